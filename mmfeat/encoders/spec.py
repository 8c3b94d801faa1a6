"""The spec of an encoder: all that changes a vector, and its fingerprint.

What does not change a vector (the folder a model lies in, the device, the batch size, library versions)
is no part of it; the model's own name is, for people, so a renamed model is encoded again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, TypeAlias

import numpy as np

from mmfeat.errors import ConfigError
from mmfeat.samples.texts import CLEANING
from mmfeat.system.files import canonical_json
from mmfeat.system.hardware import DTYPES

POOLINGS = ("mean", "cls", "pooler")
DRAFT = "draft"
VISION_TRANSFORMERS = ("vit", "deit", "beit", "eva")
OUTPUT = re.compile(r"(?:([\w.-]+)=)?(?:(pooled|tokens)|prefix:([1-9]\d*))")

# What one forward pass gives for B samples: (B, D), or where rows differ in length B times (T, D). float32.
Values: TypeAlias = "np.ndarray | list[np.ndarray]"


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
    cleaning: str = "none"  # a name in texts.CLEANING
    pooling: str = "tower"  # "mean", "cls", "pooler", or "tower": the model's own
    max_length: int = 0  # tokens; 0 where there are none
    output: str = "pooled"  # (D) a sample; "tokens" or "prefix": (T, D)
    layer: int = 0  # of a prefix: its n; it is the input of the n-th layer from the end
    view: str = "none"  # or an augmentation policy and its seed, "train:1"

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical JSON, hexadecimal."""
        return hashlib.sha256(canonical_json(asdict(self)).encode()).hexdigest()

    @property
    def source(self) -> str:
        """What all views of one encoder and output share."""
        return self.fingerprint if self.view == "none" else replace(self, view="none").fingerprint

    @property
    def transform(self) -> str:
        """The preprocessing of the model's own library, canonical JSON."""
        steps = json.loads(self.preprocessing or "{}")
        return canonical_json({name: steps[name] for name in steps if name != DRAFT}) if steps else ""

    @property
    def draft(self) -> int:
        """Pixels that the short side of a JPEG keeps when it is decoded at a reduced size, 0: never reduced."""
        return int(json.loads(self.preprocessing or "{}").get(DRAFT, 0))

    def drafted(self, pixels: int) -> EncoderSpec:
        """The same with such a draft: it changes vectors a little, so it is part of the preprocessing."""
        if not pixels or self.modality != "image":
            return self
        return replace(self, preprocessing=canonical_json({**json.loads(self.preprocessing), DRAFT: pixels}))

    @property
    def name(self) -> str:
        """For people: `bert:all-MiniLM-L6-v2`, `clip.text:ViT-B-32/openai prefix:1`, `hog train:1`."""
        output = f"{self.output}:{self.layer}" if self.output == "prefix" else self.output
        view = f" {self.view}" if self.view != "none" else ""
        return self.model + (f" {output}" if output != "pooled" else "") + view

    @property
    def model(self) -> str:
        """Its name without output and view."""
        return f"{self.tower}:{self.variant}" if self.variant else self.tower

    @property
    def tower(self) -> str:
        """`clip.text`, `bert`: what a user calls one modality of a family."""
        return f"{self.family}.{self.modality}" if self.family == "clip" else self.family

    @property
    def folder_name(self) -> str:
        """The cache folder of this spec: a readable name and the first 8 digits of the fingerprint."""
        return f"{re.sub(r'[^A-Za-z0-9.]+', '-', self.name)[:80].strip('-.')}-{self.fingerprint[:8]}"

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EncoderSpec:
        """The spec in `values`; raises `ConfigError` on missing or unknown fields."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ConfigError(f"not an encoder spec: fields {sorted(set(values) ^ names)} are missing or unknown")
        return cls(**values)

    def differences(self, other: EncoderSpec) -> list[str]:
        """Names of the fields in which two specs differ."""
        mine, theirs = asdict(self), asdict(other)
        return [name for name in mine if mine[name] != theirs[name]]


@dataclass(frozen=True)
class EncoderOptions:
    """What a user may choose about all encoders of a call.

    `convolutional_dtype` is the arithmetic of convolutional models where `auto` chose another one for them.
    `outputs` are `pooled`, `tokens` and `prefix:N` (input of the N-th layer from the end), each of all encoders
    or, as `NAME=OUTPUT`, of one modality, family or tower. `views` is the number of augmented views of each image,
    beside the plain one. `draft` lets large JPEGs be decoded at a reduced size with that many pixels, 0 does not.
    """

    dtype: str = "auto"
    cleaning: str = "tweet"
    pooling: str = "mean"
    max_length: int = 128
    convolutional_dtype: str = ""
    outputs: tuple[str, ...] = ("pooled",)
    views: int = 0
    draft: int = 0

    def __post_init__(self) -> None:
        _check("dtype", self.dtype, DTYPES)
        _check("cleaning", self.cleaning, tuple(CLEANING))
        _check("pooling", self.pooling, POOLINGS)
        if self.max_length < 1:
            raise ConfigError(f"--max-length {self.max_length}: at least 1 token is needed")
        if self.views < 0:
            raise ConfigError(f"--views {self.views}: use 0 or more")
        if self.draft < 0:
            raise ConfigError(f"--draft {self.draft}: use a number of pixels, or 0 to decode in full")
        object.__setattr__(self, "outputs", tuple(self.outputs))  # JSON has lists only
        if not self.outputs or not all(map(OUTPUT.fullmatch, self.outputs)):
            given = ",".join(self.outputs)
            raise ConfigError(f"--outputs {given}: use pooled, tokens, prefix:N, or NAME=OUTPUT as in bert=tokens")

    def for_model(self, architecture: str) -> EncoderOptions:
        """The same options for this architecture: image models that are no plain ViT count as convolutional."""
        if architecture.lower().startswith(VISION_TRANSFORMERS):
            return self
        return replace(self, dtype=self.convolutional_dtype or self.dtype)

    @property
    def storage(self) -> str:
        """Half-precision arithmetic is stored in float16: HDF5 has no bfloat16."""
        return "float32" if self.dtype == "float32" else "float16"


@dataclass(frozen=True)
class Encoder:
    """A loaded tower: `specs` are the outputs of one forward pass over one view.

    `prepare` turns one text or one RGB PIL image into a model input on the CPU and may run in several threads, or
    where it is `light`, that is needs no torch, in processes of their own. `launch` starts with B such inputs
    and gives a function that waits for the values of each spec, in order. `length` tells how long an input is, where
    they differ: those of one batch are padded to the longest. With `early` all the work is in `prepare`.
    """

    specs: tuple[EncoderSpec, ...]
    prepare: Callable[[Any], Any]
    launch: Callable[[list[Any]], Callable[[], list[Values]]]
    length: Callable[[Any], int] | None = None
    light: bool = False
    early: bool = False

    def embed(self, batch: list[Any]) -> list[Values]:
        """The values of B inputs for each spec, in order."""
        return self.launch(batch)()

    @property
    def modality(self) -> str:
        return self.specs[0].modality

    @property
    def view(self) -> str:
        return self.specs[0].view

    @property
    def fingerprints(self) -> frozenset[str]:
        return frozenset(spec.fingerprint for spec in self.specs)


def _check(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"--{flag} {value}: use one of {', '.join(allowed)}")
