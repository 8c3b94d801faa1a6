"""The spec of an encoder: everything that changes a vector, and its fingerprint.

The folder of a model, the device, the batch size and library versions do not change a vector and are no part of the
spec. The name of the model is, for people to read, so a renamed model is encoded again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np

from mmfeat.errors import ConfigError
from mmfeat.samples.contents import CLEANING
from mmfeat.samples.photos import NONE, STORED, UPRIGHT, WHITE, Decoding
from mmfeat.system.files import canonical_json
from mmfeat.system.hardware import DTYPES

POOLINGS = ("mean", "cls", "max", "last", "pooler", "auto")
CLEANINGS = ("auto", *CLEANING)
IMAGE_POOLINGS = ("model", "cls", "mean", "cls+mean")
OF_MODEL = "model"  # the value of an option that leaves a matter to the model
NAMED = (
    *("dtype", "convolutional_dtype", "cleaning", "pooling", "max_length", "prompt", "truncate_dim"),
    *("image_size", "image_pooling", "layers"),
)
# Options of texts that only some families heed.
HEEDING = {"pooling": ("bert",), "max_length": ("bert", "st"), "prompt": ("st",), "truncate_dim": ("st",)}
# Options and fields of a spec that the first version lacked. While they hold these defaults, names stay as before.
LATER: dict[str, Any] = {"prompt": "", "truncate_dim": 0, "layers": 1, "remote_code": 0}
LATER |= {"image_size": OF_MODEL, "image_pooling": OF_MODEL}
# What earlier versions did, without these options. As keys of a preprocessing they are left out with these values.
BEFORE = {"exif": STORED, "background": NONE}
LATER |= BEFORE
AUTO = "auto"  # the value of an option that the data set or the machine decides
NUMBERS = (  # option -> its least value, and what it takes
    ("max_length", 0, "a number of tokens, or 0 for all"),
    ("truncate_dim", 0, "a number of dimensions, or 0 for all"),
    ("layers", 1, "a number of layers; 1 is the last one"),
)
DECIDED = "auto:"  # before the cleaning of options that was `auto`, which keeps the case of texts for a cased model
DRAFT = "draft"
SHOWN = {"exif": UPRIGHT, "background": WHITE}  # the values of auto: photos as people see them
BACKGROUND = re.compile("#[0-9a-f]{6}")
RAW = ("lexicon", "vectors")  # families that take a text as it was written, whatever the cleaning
TWO_TOWERS = ("clip", "hf", "vectors")  # families whose towers are named by their modality
VISION_TRANSFORMERS = ("vit", "deit", "beit", "eva")
SIZE = re.compile(r"([1-9]\d*)(?:x([1-9]\d*))?")
OUTPUT = re.compile(r"(?:([\w.-]+)=)?(?:(pooled|tokens)|prefix:([1-9]\d*))")

# Keys of `EncoderSpec.preprocessing` under which the families keep the size of a picture, (channels,) height and width.
SIZE_KEYS = ("input_size", "crop", "crop_size", "size")

# Float32 values of B samples from one forward pass: (B, D), or B arrays (T, D), which may differ in T.
Values: TypeAlias = "np.ndarray | list[np.ndarray]"


def parse_output(text: str) -> tuple[str, str, int]:
    """(name, output, layer) of an entry of `EncoderOptions.outputs`; raises `ValueError` for anything else.

    `name` is a modality, family or tower, or "" for all encoders; `layer` is N of `prefix:N`, else 0.
    """
    if (match := OUTPUT.fullmatch(text)) is None:
        raise ValueError(text)
    name, plain, layer = match.groups(default="")
    return name, plain or "prefix", int(layer or 0)


@dataclass(frozen=True)
class EncoderSpec:
    """One tower, completely described. Vectors of equal specs are comparable."""

    family: str  # "bert"
    modality: str  # "text" or "image"
    variant: str  # hub name, model/weights, or the last part of a local path
    weights: str  # "sha256:...", "revision:..." or "builtin:N"
    arithmetic: str  # dtype of the forward pass
    storage: str  # dtype on disk
    preprocessing: str = ""  # canonical JSON of what turns a file into numbers
    cleaning: str = "none"  # a name in `CLEANING`
    pooling: str = "tower"  # one of `POOLINGS` or `IMAGE_POOLINGS`; "tower": the model's own
    max_length: int = 0  # tokens; 0 where there are none
    output: str = "pooled"  # "pooled": (D) a sample; "tokens" or "prefix": (T, D)
    layer: int = 0  # N of prefix:N, the input of the N-th layer from the end
    view: str = "none"  # "none", or an augmentation policy and its seed, "train:1"
    layers: int = 1  # the vector is pooled from the mean of the last so many hidden states
    remote_code: int = 0  # 1 where the checkpoint's own code makes the vector

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON of `stated`, hexadecimal."""
        return hashlib.sha256(canonical_json(self.stated).encode()).hexdigest()

    @property
    def stated(self) -> dict[str, Any]:
        """Plain values that `from_json` reads, without later fields that hold their default, as before they came."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}

    @property
    def source(self) -> str:
        """The fingerprint of the plain view, which all views of one encoder and output share."""
        return self.fingerprint if self.view == "none" else replace(self, view="none").fingerprint

    @property
    def transform(self) -> str:
        """Canonical JSON of the preprocessing without the decoding: that of the model's own library."""
        steps = json.loads(self.preprocessing or "{}")
        return canonical_json({name: steps[name] for name in steps if name not in (DRAFT, *BEFORE)}) if steps else ""

    @property
    def decoding(self) -> Decoding:
        """How the bytes of a photo become the picture that is prepared for the model."""
        steps = {DRAFT: 0, **BEFORE, **json.loads(self.preprocessing or "{}")}
        return Decoding(int(steps[DRAFT]), *(steps[name] for name in BEFORE))

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the pictures that the model sees; None for texts and built-in encoders."""
        steps = json.loads(self.preprocessing or "{}")
        keys = [key for key in SIZE_KEYS if key in steps and (key != "crop_size" or steps.get("do_center_crop"))]
        size = steps[keys[0]] if keys else None
        if isinstance(size, dict):  # the form of transformers, where a short side alone is no size
            size = [size.get("height"), size.get("width")]
        sides = [size] * 2 if isinstance(size, int) else (size or [None])[-2:]
        return None if None in sides else (sides[0], sides[-1])

    def of(self, output: str, layer: int = 0) -> EncoderSpec:
        """The spec of another output of the same pass; states are not pooled and come from one layer."""
        if output == "pooled":
            return replace(self, output=output, layer=layer)
        return replace(self, output=output, layer=layer, pooling="none", layers=1)

    def computed_in(self, dtype: str) -> EncoderSpec:
        """The spec of the same torch model in another arithmetic."""
        return replace(self, arithmetic=dtype, storage=stored_in(dtype))

    def decoded(self, decoding: Decoding) -> EncoderSpec:
        """The spec of an encoder of photos with another decoding; that of an encoder of texts as it is."""
        if self.part != "image":
            return self
        asked = {name: value for name, value in asdict(decoding).items() if value not in (0, BEFORE.get(name))}
        steps = {**json.loads(self.transform or "{}"), **asked}
        same = steps == json.loads(self.preprocessing or "{}")
        return self if same else replace(self, preprocessing=canonical_json(steps))

    @property
    def name(self) -> str:
        """Name for people: `bert:all-MiniLM-L6-v2`, `clip.text:ViT-B-32/openai prefix:1`, `hog train:1`."""
        output = f"{self.output}:{self.layer}" if self.output == "prefix" else self.output
        view = f" {self.view}" if self.view != "none" else ""
        return self.model + (f" {output}" if output != "pooled" else "") + view

    @property
    def model(self) -> str:
        """The name without output and view."""
        return f"{self.tower}:{self.variant}" if self.variant else self.tower

    @property
    def tower(self) -> str:
        """Name of one modality of a family: `clip.text`, `bert`."""
        return f"{self.family}.{self.modality}" if self.family in TWO_TOWERS else self.family

    @property
    def part(self) -> str:
        """The part of a sample that is read: the modality, or the id that finds a vector of the user's own."""
        return "id" if self.family == "vectors" else self.modality

    @property
    def names(self) -> set[str]:
        """The names by which an option may address this tower."""
        return {self.modality, self.family, self.tower}

    @property
    def folder_name(self) -> str:
        """The cache folder of this spec: a readable name and the first 8 digits of the fingerprint."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.name)[:80].strip('-.')}-{self.fingerprint[:8]}"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EncoderSpec:
        """The spec in `values`; raises `ConfigError` on missing or unknown fields. Later fields may be missing."""
        names = {field.name for field in fields(cls)}
        if wrong := (set(values) ^ names) - (set(LATER) - set(values)):
            raise ConfigError(f"not an encoder spec: fields {sorted(wrong)} are missing or unknown")
        return cls(**values)

    def differences(self, other: EncoderSpec) -> list[str]:
        """Names of the fields in which two specs differ."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if mine[name] != theirs[name]]


def named_values(option: Any) -> dict[str, str]:
    """Encoder name -> value of `64,st=256`: {"": "64", "st": "256"}, where "" stands for all encoders not named."""
    pairs = [entry.rpartition("=") for entry in _entries(str(option))]
    return {name.strip(): value.strip() for name, _, value in pairs}


def written(values: Mapping[str, Any]) -> str:
    """The text that `named_values` reads as `values`."""
    return ",".join(f"{name}={value}" if name else str(value) for name, value in values.items())


def _entries(option: str) -> list[str]:
    """The parts of a comma-separated option; a path with commas is kept whole, as no value has a slash."""
    entries: list[str] = []
    for piece in option.split(","):
        if entries and "/" in entries[-1] and "=" not in entries[-1]:
            entries[-1] += f",{piece}"
        else:
            entries.append(piece)
    return entries


@dataclass(frozen=True)
class EncoderOptions:
    """Options of all encoders of a call.

    An option in `NAMED` has one value for all encoders, or a value for each in a text: `NAME=VALUE,...`, where NAME is
    a whole request (`clip:` for one without a variant), a family or tower, or a modality; they count in this order, and
    a value without a name is for all others. `max_length`
    0 is the encoder's default: 128 tokens for bert, the checkpoint's own length for st. `prompt` is the name of a
    checkpoint's prompt, "" its default and "none" none; `truncate_dim` keeps the first dimensions of a vector
    (Matryoshka), 0 all. `image_size` is a number of pixels, HEIGHTxWIDTH, or "model": the model's own; `image_pooling`
    is one of `IMAGE_POOLINGS`. With `layers` N a vector is pooled from the mean of the last N hidden states.

    `cleaning` auto depends on the texts: `tweet` for tweets, or `tweet-cased` where the model tells capitals apart, and
    `none` for other texts; `mmfeat.extraction.requests.resolve_options` decides.

    `convolutional_dtype` is the arithmetic of convolutional models where `auto` chose another one for them.
    `outputs` are `pooled`, `tokens` and `prefix:N` (input of the N-th layer from the end) of all encoders, or as
    `NAME=OUTPUT`. `views` is the number of augmented views of each image beside the plain one. With `draft` large JPEGs
    are decoded at a reduced size, whose short side keeps that many pixels. `exif` is auto, upright or stored, and
    `background` auto, white, none or `#rrggbb`, as `Decoding` explains; auto is what the data set was extracted with
    before, else upright and white.
    """

    dtype: str = "auto"
    cleaning: str = "auto"
    pooling: str = "mean"
    max_length: int | str = 0
    convolutional_dtype: str = ""
    outputs: tuple[str, ...] = ("pooled",)
    views: int = 0
    draft: int = 0
    prompt: str = ""
    truncate_dim: int | str = 0
    image_size: str = OF_MODEL
    image_pooling: str = OF_MODEL
    layers: int | str = 1
    exif: str = AUTO
    background: str = AUTO

    def __post_init__(self) -> None:
        choices = {"dtype": DTYPES, "cleaning": CLEANINGS, "pooling": POOLINGS, "image_pooling": IMAGE_POOLINGS}
        for name, allowed in choices.items():
            for value in self._values(name):
                _check(name.replace("_", "-"), value.removeprefix(DECIDED) if name == "cleaning" else value, allowed)
        for value in self._values("image_size"):
            if value != OF_MODEL and not SIZE.fullmatch(value):
                raise ConfigError(
                    f"--image-size {value}: write pixels, as in 336 or 224x448 (height x width), or model"
                )
        for name, least, usage in NUMBERS:
            for value in self._values(name):
                if not value.isdecimal() or int(value) < least:
                    raise ConfigError(f"--{name.replace('_', '-')} {value}: use {usage}")
            if str(getattr(self, name)).isdecimal():
                object.__setattr__(self, name, int(getattr(self, name)))  # a flag gives text
        _check("exif", self.exif, (AUTO, UPRIGHT, STORED))
        if self.background not in (AUTO, WHITE, NONE) and not BACKGROUND.fullmatch(self.background):
            raise ConfigError(f"--background {self.background}: use auto, white, none or a colour as in #00ff7f")
        if self.views < 0:
            raise ConfigError(f"--views {self.views}: use 0 or more")
        if self.draft < 0:
            raise ConfigError(f"--draft {self.draft}: use a number of pixels, or 0 to decode in full")
        object.__setattr__(self, "outputs", tuple(self.outputs))  # a request from JSON has a list
        if not self.outputs or not all(map(OUTPUT.fullmatch, self.outputs)):
            given = ",".join(self.outputs)
            raise ConfigError(f"--outputs {given}: use pooled, tokens, prefix:N, or NAME=OUTPUT as in bert=tokens")

    def _values(self, name: str) -> list[str]:
        option = str(getattr(self, name))
        values = named_values(option)
        if len(values) != len(_entries(option)):
            raise ConfigError(f"--{name.replace('_', '-')} {option}: write one value, or NAME=VALUE,... as in bert=cls")
        return list(values.values())

    def named(self, names: Mapping[str, Collection[str]]) -> EncoderOptions:
        """The options of one encoder, each with one value; `names` gives those that address it, by option."""
        chosen: dict[str, Any] = {}
        for option in NAMED:
            values = named_values(getattr(self, option))
            default = type(self).__dataclass_fields__[option].default
            known = (name for name in values if name in names[option])
            named = min(known, key=lambda name: (":" not in name, name in ("text", "image")), default="")
            value = values.get(named, str(default))
            chosen[option] = int(value) if isinstance(default, int) else value
        return replace(self, **chosen)

    @property
    def decoding(self) -> Decoding:
        asked = {name: getattr(self, name) for name in SHOWN}
        return Decoding(self.draft, *(SHOWN[name] if value == AUTO else value for name, value in asked.items()))

    def decided(self, before: EncoderOptions | None) -> EncoderOptions:
        """The options with what photos were decoded by `before`, or are by default, in place of `auto`."""
        known = SHOWN if before is None else {name: getattr(before, name) for name in SHOWN}
        auto: dict[str, Any] = {name: value for name, value in known.items() if getattr(self, name) == AUTO}
        return replace(self, **auto)

    @property
    def identity(self) -> dict[str, Any]:
        """The options in the name of a run: as in runs of versions that had fewer options."""
        values = asdict(self)
        kept = {name: value for name, value in values.items() if name not in LATER or value != LATER[name]}
        return {**kept, "cleaning": self.cleaning.replace(DECIDED, ""), "max_length": self.max_length or 128}

    def cleaned(self, cleaning: str) -> EncoderOptions:
        """The options with `cleaning` in place of `auto`."""
        pairs = {"": "auto", **named_values(self.cleaning)}
        chosen = {name: cleaning if value == "auto" else value for name, value in pairs.items()}
        return replace(self, cleaning=written(chosen))

    def for_model(self, architecture: str) -> EncoderOptions:
        """The options for an image architecture: all but plain ViTs count as convolutional."""
        if architecture.lower().startswith(VISION_TRANSFORMERS):
            return self
        return replace(self, dtype=self.convolutional_dtype or self.dtype)

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) that is asked of one encoder; None for the model's own."""
        if (match := SIZE.fullmatch(self.image_size)) is None:
            return None
        height, width = match.groups()
        return int(height), int(width or height)

    @property
    def tower_pooling(self) -> str:
        return "tower" if self.image_pooling == OF_MODEL else self.image_pooling

    @property
    def of_model(self) -> dict[str, Any]:
        """The fields of a spec that the options of one torch model give alike for all families."""
        return {"layers": int(self.layers), "arithmetic": self.dtype, "storage": stored_in(self.dtype)}


@dataclass(frozen=True)
class Encoder:
    """A loaded tower: `specs` are the outputs of one forward pass over one view.

    `prepare` turns one text or one RGB PIL image into a model input on the CPU, in any thread; a `light` one needs no
    torch and may run in other processes. `launch` starts encoding B inputs and returns a function that waits for the
    values of each spec, in order. `length` gives the length of an input where lengths differ, because the inputs of a
    batch are padded to the longest. With `early` all work is in `prepare`. `note` says by what the values are computed,
    where that is not torch's plain pass.
    """

    specs: tuple[EncoderSpec, ...]
    prepare: Callable[[Any], Any]
    launch: Callable[[list[Any]], Callable[[], list[Values]]]
    length: Callable[[Any], int] | None = None
    light: bool = False
    early: bool = False
    note: Callable[[], str] = lambda: ""

    def embed(self, batch: list[Any]) -> list[Values]:
        """The values of B inputs, for each spec in order."""
        return self.launch(batch)()

    @property
    def modality(self) -> str:
        return self.specs[0].part

    @property
    def view(self) -> str:
        return self.specs[0].view

    @property
    def fingerprints(self) -> frozenset[str]:
        return frozenset(spec.fingerprint for spec in self.specs)


def stored_in(dtype: str) -> str:
    """The dtype on disk: float16 for half-precision arithmetic, because HDF5 has no bfloat16."""
    return "float32" if dtype == "float32" else "float16"


def _check(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"--{flag} {value}: use one of {', '.join(allowed)}")
