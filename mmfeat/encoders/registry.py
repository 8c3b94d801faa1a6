"""The registry of encoders: from requests `family[:variant]` to specs and loaded encoders.

Describing an encoder (its specs) is cheap and happens on every run; loading happens only when vectors are missing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmfeat.encoders import (
    bert,
    clip,
    hashing,
    hog,
    lexicon,
    sentence,
    timm_models,
    torchvision_models,
    transformers_models,
    vectors,
)
from mmfeat.encoders.delta import apply_delta, read_delta
from mmfeat.encoders.names import canonical
from mmfeat.encoders.spec import (
    DECIDED,
    HEEDING,
    NAMED,
    RAW,
    Encoder,
    EncoderOptions,
    EncoderSpec,
    Values,
    named_values,
    parse_output,
    written,
)
from mmfeat.encoders.tokenizer import is_cased
from mmfeat.encoders.torch_tower import Runtime, TorchTower
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.samples.contents import view_name
from mmfeat.system import plugins
from mmfeat.system.trust import keep_private
from mmfeat.system.wording import shown


@dataclass(frozen=True)
class Tower:
    """A spec and the request that it came from, which says where the weights are."""

    request: str
    spec: EncoderSpec


@dataclass(frozen=True)
class Family:
    """The functions of one kind of encoders.

    `modalities` are those of its towers. `describe(family, variant, options)` gives the pooled spec of each tower.
    `reference(variant, spec)` gives the library's own plain float32 call for one text or picture: (D) or (T, D); None
    where no other library computes the vectors.
    `open_towers(variant, specs)` gives the torch models behind the towers; families without torch have `load`, with the
    same arguments, instead, and only pooled vectors. `is_cased(variant)` says whether capitals reach the model,
    and `read_cuts(variant, spec)` gives `Tokens.cut` of a text, for families whose models cut texts.
    """

    modalities: tuple[str, ...]
    describe: Callable[[str, str, EncoderOptions], list[EncoderSpec]]
    reference: Callable[[str, EncoderSpec], Callable[[Any], np.ndarray]] | None = None
    open_towers: Callable[[str, list[EncoderSpec]], list[TorchTower]] | None = None
    load: Callable[[str, list[EncoderSpec]], Encoder] | None = None
    is_cased: Callable[[str], bool] = is_cased
    read_cuts: Callable[[str, EncoderSpec], Callable[[str], int]] | None = None


def _describe_tuned(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of a fine-tuned tower, after a check that its parent is the one that was fine-tuned."""
    file, delta = read_delta(variant)
    described = _family(delta.request).describe(*_split(delta.request), delta.options(options))
    parent = next(spec for spec in described if spec.modality == delta.spec.modality)
    if parent.modality == "text":
        parent = replace(parent, preprocessing=delta.spec.preprocessing)
    if (parent.weights, parent.transform) != (delta.spec.weights, delta.spec.transform):
        raise EncoderError(
            f"finetuned:{variant}: {delta.request} is not the encoder that was fine-tuned; restore its weights, or "
            "run mmfeat finetune again"
        )
    return [delta.tuned(parent, file)]


def _open_tuned(variant: str, specs: list[EncoderSpec]) -> list[TorchTower]:
    file, delta = read_delta(variant)
    before = [replace(spec, variant=delta.spec.variant, weights=delta.spec.weights) for spec in specs]
    (tower,) = open_towers(Tower(delta.request, before[0]), before)
    apply_delta(file, tower.module)
    return [replace(tower, specs=tuple(specs))]


_TEXT, _IMAGE, _BOTH = ("text",), ("image",), ("image", "text")
_TORCHVISION = Family(_IMAGE, torchvision_models.describe, torchvision_models.reference, torchvision_models.open_towers)

FAMILIES: dict[str, Family] = {
    "st": Family(_TEXT, sentence.describe, sentence.reference, sentence.open_towers, read_cuts=sentence.read_cuts),
    "bert": Family(_TEXT, bert.describe, bert.reference, bert.open_towers, read_cuts=bert.read_cuts),
    "hf": Family(
        _BOTH,
        transformers_models.describe,
        transformers_models.reference,
        transformers_models.open_towers,
        read_cuts=transformers_models.read_cuts,
    ),
    "clip": Family(
        _BOTH, clip.describe, clip.reference, clip.open_towers, is_cased=clip.is_cased, read_cuts=clip.read_cuts
    ),
    "timm": Family(_IMAGE, timm_models.describe, timm_models.reference, timm_models.open_towers),
    "resnet50": _TORCHVISION,  # `_family` gives it for the name of any model of torchvision
    "hashing": Family(_TEXT, hashing.describe, load=hashing.load, is_cased=lambda variant: False),
    "hog": Family(_IMAGE, hog.describe, load=hog.load),
    "lexicon": Family(_TEXT, lexicon.describe, load=lexicon.load),
    "vectors": Family(_TEXT, vectors.describe, load=vectors.load),
    "vectors.image": Family(_IMAGE, vectors.describe, load=vectors.load),
    "finetuned": Family(
        _BOTH, _describe_tuned, lambda variant, spec: _open_tuned(variant, [spec])[0].reference(), _open_tuned
    ),
}


def describe_encoders(requests: list[str], options: EncoderOptions) -> list[Tower]:
    """The towers of `family[:variant]` requests, in order and each once; each output and view has its own spec."""
    if "auto" in named_values(options.dtype).values():
        raise ConfigError(
            "dtype auto is no arithmetic yet; pass the options through mmfeat.extraction.requests.resolve_options"
        )
    if not requests:
        raise EncoderError(f"no encoders; name some of {', '.join(FAMILIES)} with --encoders A,B")
    keep_private()
    towers: dict[str, Tower] = {}
    names: set[str] = set()
    known: dict[str, set[str]] = {option: set() for option in NAMED}
    idle: list[str] = []
    for request in map(absolute_request, requests):
        family = _family(request)
        own_names = _names(request, family)
        own = options.named(own_names)
        described = [_cleaned(spec, request) for spec in family.describe(*_split(request), own)]
        bases = [spec.decoded(options.decoding) for spec in described]
        specs = [spec for base in bases for spec in _outputs(base, options, family.open_towers is not None)]
        for spec in specs:
            towers.setdefault(spec.fingerprint, Tower(request, spec))
        names.update(*(base.names for base in bases))
        for option in NAMED:
            known[option] |= own_names[option]
        idle += [] if specs else [request]
    for asked in options.outputs:
        if parse_output(asked)[0] not in ("", *names):
            there = ", ".join(sorted(names))
            raise ConfigError(f"--outputs {asked}: no such modality, family or tower here; there are {there}")
    for option in NAMED:
        if unknown := set(named_values(getattr(options, option))) - {"", *known[option]}:
            flag, there = f"--{option.replace('_', '-')}", ", ".join(sorted(names & known[option]))
            there = there or f"none (it is about {' and '.join(HEEDING.get(option, ('other encoders',)))})"
            raise ConfigError(
                f"{flag} {min(unknown)}=...: no encoder of that name takes this option; there are {there}"
            )
    if idle:
        asked = ",".join(options.outputs)
        raise ConfigError(f"--outputs {asked}: asks nothing of {', '.join(idle)}; add an output of it, or leave it out")
    return list(towers.values())


def _names(request: str, family: Family) -> dict[str, set[str]]:
    """Option -> the names by which it addresses this encoder: a model with two towers has one arithmetic."""
    name = _split(request)[0]
    only = set(family.modalities) if len(family.modalities) == 1 else set()
    texts, images = (
        {modality, name, f"{name}.{modality}"} if modality in family.modalities else set()
        for modality in ("text", "image")
    )
    whole = {whole_request(request)}
    texts, images = (names and names | whole for names in (texts, images))
    arithmetic = {name} | only | whole
    chosen = {"dtype": arithmetic, "convolutional_dtype": arithmetic, "image_size": images, "image_pooling": images}
    chosen |= {option: texts if name in families else set() for option, families in HEEDING.items()}
    chosen["layers"] = images or chosen["max_length"]  # the same families
    chosen |= {"cleaning": set()} if name in RAW else {}
    return {option: chosen.get(option, texts) for option in NAMED}


def _cleaned(spec: EncoderSpec, request: str) -> EncoderSpec:
    """The spec with a cleaning by name: what `auto` stands for keeps the case of a text whose capitals the model sees.

    Raises `ConfigError` while that is open.
    """
    if spec.cleaning == "auto":
        raise ConfigError(
            "cleaning auto depends on the texts: name tweet or none, or pass the options and the decision through "
            "mmfeat.extraction.requests.resolve_options"
        )
    if spec.cleaning != f"{DECIDED}tweet":
        return replace(spec, cleaning=spec.cleaning.removeprefix(DECIDED))
    return replace(spec, cleaning=cleaning_of_tweets(request, spec))


def cleaning_of_tweets(request: str, spec: EncoderSpec) -> str:
    """What the cleaning `auto` stands for where the texts are tweets."""
    cased = _family(request).is_cased(_split(request)[1] or spec.variant)
    return "tweet-cased" if cased else "tweet"


def _outputs(base: EncoderSpec, options: EncoderOptions, has_layers: bool) -> list[EncoderSpec]:
    """The specs of the outputs of one tower: of the plain view, then of each augmented view."""
    specs = []
    for asked in options.outputs:
        name, output, layer = parse_output(asked)
        if name and name not in base.names:
            continue
        if output != "pooled" and not has_layers:
            remedy = "leave this out" if name else f"name the encoder, as in clip={asked}"
            only = ", only pooled vectors" if name else ""
            raise EncoderError(f"--outputs {asked}: {base.name} has no {output}{only}; {remedy}")
        specs.append(base.of(output, layer))
    views = [view_name(number) for number in range(1, options.views + 1)] if base.part == "image" else []
    return specs + [replace(spec, view=view) for view in views for spec in specs]


def is_torch(request: str) -> bool:
    """Whether an encoder is a torch model, which a GPU, half precision and a compiler could speed up."""
    return _family(request).open_towers is not None


def absolute_request(request: str) -> str:
    """The request as `family[:variant]` with a local path made absolute, so that it means the same from any folder."""
    family, variant = _split(request)
    if is_family(family) and (not variant or family == "hashing"):  # a variant of hashing is a version, no path
        return request.removesuffix(":")
    return canonical(request, is_family)


def absolute_names(options: EncoderOptions) -> EncoderOptions:
    """The options with each whole request in `NAME=VALUE` as `absolute_request` gives it."""
    changed: dict[str, Any] = {}
    for option in NAMED:
        values = named_values(getattr(options, option))
        if any(":" in name for name in values):
            changed[option] = written({whole_request(name) if ":" in name else name: values[name] for name in values})
    return replace(options, **changed)


def whole_request(request: str) -> str:
    """The name by which an option addresses one request alone; a family alone would name others with variants, too."""
    request = absolute_request(request)
    return request if ":" in request else f"{request}:"


def kept_for(requests: Sequence[str], options: EncoderOptions) -> EncoderOptions:
    """The options without the `NAME=VALUE` pairs of encoders that are not among the requests."""
    requests = [absolute_request(request) for request in requests]
    families = {_split(request)[0]: _family(request) for request in requests}
    here = {"", *map(whole_request, requests), *(name for family in families.values() for name in family.modalities)}
    kept: dict[str, Any] = {}
    for option in NAMED:
        values = named_values(getattr(options, option))
        pairs = {name: value for name, value in values.items() if name in here or name.partition(".")[0] in families}
        if pairs != values:
            kept[option] = written(pairs) or getattr(EncoderOptions(), option)
    return replace(options, **kept)


def load_encoders(towers: list[Tower], device: str, runtime: Runtime | None = None) -> list[Encoder]:
    """Load each model once for all its towers, outputs and views; returns one encoder a tower and view.

    Pooled vectors of torch models are computed by `runtime`, by default torch's plain pass.
    """
    encoders: list[Encoder] = []
    for request in dict.fromkeys(tower.request for tower in towers):
        specs = [tower.spec for tower in towers if tower.request == request]
        plain = list(dict.fromkeys(replace(spec, view="none") for spec in specs))
        for loaded in _load(request, plain, device, runtime):
            _check_outputs(loaded)
            for view in dict.fromkeys(spec.view for spec in specs):
                if seen := [spec for spec in specs if spec.view == view and replace(spec, view="none") in loaded.specs]:
                    encoders.append(_seen(loaded, seen))
    return encoders


def loading(towers: Iterable[Tower]) -> str:
    """The title of a step that loads the models of these towers."""
    return f"loading {', '.join(dict.fromkeys(shown(tower.request) for tower in towers))}"


def _load(request: str, specs: list[EncoderSpec], device: str, runtime: Runtime | None) -> list[Encoder]:
    if (load := _family(request).load) is not None:
        return [load(_split(request)[1], specs)]
    return [tower.encoder(device, runtime) for tower in open_towers(Tower(request, specs[0]), specs)]


def open_towers(tower: Tower, specs: list[EncoderSpec] | None = None) -> list[TorchTower]:
    """The torch model behind a tower, in float32 on the CPU. Raises `EncoderError` where there is none."""
    opened = _family(tower.request).open_towers
    if opened is None:
        raise EncoderError(
            f"{tower.request}: no layers that could be trained; name st, bert, hf, clip, timm or resnet50"
        )
    return opened(_split(tower.request)[1], specs or [tower.spec])


def count_cut(tower: Tower, texts: Iterable[str]) -> tuple[int, int]:
    """The number of texts that are longer than a text tower reads, and the tokens that it reads of them; else 0, 0."""
    read_cuts = _family(tower.request).read_cuts
    if read_cuts is None:
        return 0, 0
    cut = read_cuts(_split(tower.request)[1], tower.spec)
    kept = [tokens for tokens in map(cut, texts) if tokens]
    return len(kept), max(kept, default=0)


def load_reference(tower: Tower) -> Callable[[Any], np.ndarray]:
    """The reference library's own plain float32 call for one text or RGB picture: (D) or (T, D).

    An encoder that no other library computes is its own reference.
    """
    if (reference := _family(tower.request).reference) is not None:
        return reference(_split(tower.request)[1], tower.spec)
    (encoder,) = load_encoders([tower], "cpu")
    return lambda content: np.asarray(encoder.embed([encoder.prepare(content)])[0][0])


def _check_outputs(loaded: Encoder) -> None:
    """Encode one blank sample before any work, which shows a model whose layers do not give (B, T, D)."""
    if all(spec.output == "pooled" for spec in loaded.specs):
        return
    from PIL import Image

    blank = "a b c d" if loaded.modality == "text" else Image.new("RGB", (64, 64))
    try:
        outputs = loaded.embed([loaded.prepare(blank)])
    except EncoderError as error:
        raise EncoderError(f"{loaded.specs[0].name}: {error}") from error
    for spec, values in zip(loaded.specs, outputs, strict=True):
        if spec.output != "pooled" and [rows.ndim for rows in values] != [2]:
            raise EncoderError(f"{spec.name}: samples are not apart there; use another layer or pooled")


def _seen(loaded: Encoder, specs: list[EncoderSpec]) -> Encoder:
    """The encoder with only the outputs in `specs`, which are of one view."""
    indices = [loaded.specs.index(replace(spec, view="none")) for spec in specs]

    def launch(batch: list[Any]) -> Callable[[], list[Values]]:
        wait = loaded.launch(batch)

        def chosen() -> list[Values]:
            values = wait()
            return [values[index] for index in indices]

        return chosen

    return replace(loaded, specs=tuple(specs), launch=launch)


def _split(request: str) -> tuple[str, str]:
    """(family, variant) of a request."""
    family, _, variant = request.partition(":")
    return family, variant


def is_family(name: str) -> bool:
    """Whether a name is that of a family, of a model of torchvision, or of a plug-in."""
    if name in FAMILIES or (name.isidentifier() and name in torchvision_models.names()):
        return True
    return name in plugins.plugins(plugins.ENCODERS)


def _family(request: str) -> Family:
    """The family of a request. Raises `EncoderError` with the nearest name for an unknown one."""
    name, _ = _split(request)
    if name in FAMILIES or name in torchvision_models.names():
        return FAMILIES.get(name, _TORCHVISION)
    if is_family(name):
        if not isinstance(family := plugins.load_plugin(plugins.ENCODERS, name), Family):
            raise plugins.wrong_kind(plugins.ENCODERS, name, "mmfeat.encoders.Family")
        return family
    known = [*FAMILIES, *plugins.plugins(plugins.ENCODERS)]
    close = difflib.get_close_matches(name.lower(), [*known, *torchvision_models.names()], n=1)
    meant = f"did you mean {close[0]}? There are" if close else "use"
    raise EncoderError(
        f"{request}: no encoder family {name!r}; {meant} {', '.join(known)}, each with an optional :variant, "
        "and the models of torchvision by name"
    )
