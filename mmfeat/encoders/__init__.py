"""Encoders: frozen towers that turn one modality into vectors.

An encoder is asked for as `family[:variant]`. Describing one (its specs) is cheap and happens on
every run; loading one happens only when vectors are missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfeat.encoders import bert, clip, hashing, hog, timm_models, torchvision_models
from mmfeat.encoders.spec import OUTPUT, Encoder, EncoderOptions, EncoderSpec, Values
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.views import view_name

__all__ = [
    "FAMILIES",
    "Encoder",
    "EncoderOptions",
    "EncoderSpec",
    "Tower",
    "Values",
    "absolute_request",
    "describe_encoders",
    "load_encoders",
    "load_reference",
]


class Family(NamedTuple):
    """What each family offers.

    `describe(family, variant, options)` gives the pooled spec of each tower; `load(variant, specs, device)`
    an encoder a tower for all outputs in `specs`; `reference(variant, spec)` the library's own plain float32
    call for one text or picture, (D) or (T, D). `has_layers` says whether there are tokens and prefixes.
    """

    describe: Callable[[str, str, EncoderOptions], list[EncoderSpec]]
    load: Callable[[str, list[EncoderSpec], str], list[Encoder]]
    reference: Callable[[str, EncoderSpec], Callable[[Any], np.ndarray]]
    has_layers: bool = True


_TORCHVISION = Family(torchvision_models.describe, torchvision_models.load, torchvision_models.reference)

FAMILIES: dict[str, Family] = {
    "clip": Family(clip.describe, clip.load, clip.reference),
    "bert": Family(bert.describe, bert.load, bert.reference),
    "resnet50": _TORCHVISION,  # any other torchvision model is found by its name
    "timm": Family(timm_models.describe, timm_models.load, timm_models.reference),
    "hashing": Family(hashing.describe, hashing.load, hashing.reference, has_layers=False),
    "hog": Family(hog.describe, hog.load, hog.reference, has_layers=False),
}


@dataclass(frozen=True)
class Tower:
    """A spec and the request it came from, which says where its weights lie."""

    request: str
    spec: EncoderSpec


def describe_encoders(requests: list[str], options: EncoderOptions) -> list[Tower]:
    """All towers of `family[:variant]` requests, in order; a tower asked for twice is given once.

    Each output and each view of a tower has a spec of its own.
    """
    if options.dtype == "auto":
        raise ConfigError("dtype auto is no arithmetic yet; pass the options through mmfeat.requests.resolve_options")
    if not requests:
        raise EncoderError(f"no encoders; name some of {', '.join(FAMILIES)} with --encoders A,B")
    towers: dict[str, Tower] = {}
    bases: list[EncoderSpec] = []
    idle: list[str] = []
    for request in requests:
        family, variant = _split(request)
        described = _family(request).describe(family, variant, options)
        specs = [spec for base in described for spec in _outputs(base, options, _family(request).has_layers)]
        for spec in specs:
            towers.setdefault(spec.fingerprint, Tower(absolute_request(request), spec))
        bases += described
        idle += [] if specs else [request]
    _check_output_names(options, bases)
    if idle:
        asked = ",".join(options.outputs)
        raise ConfigError(f"--outputs {asked}: asks nothing of {', '.join(idle)}; add an output of it, or leave it out")
    return list(towers.values())


def _outputs(base: EncoderSpec, options: EncoderOptions, has_layers: bool) -> list[EncoderSpec]:
    """The specs of all outputs of one tower, of the plain view first."""
    specs = []
    for asked in options.outputs:
        name, plain, layer = _parts(asked)
        if name and name not in _names(base):
            continue
        output = plain or "prefix"
        if output != "pooled" and not has_layers:
            wanted = asked.rpartition("=")[2]
            raise EncoderError(f"--outputs {asked}: {base.name} has no {output}; name the encoder, as in clip={wanted}")
        pooling = base.pooling if output == "pooled" else "none"
        specs.append(replace(base, output=output, layer=int(layer or 0), pooling=pooling))
    views = [view_name(number) for number in range(1, options.views + 1)] if base.modality == "image" else []
    return specs + [replace(spec, view=view) for view in views for spec in specs]


def _check_output_names(options: EncoderOptions, bases: list[EncoderSpec]) -> None:
    """`NAME=OUTPUT` names something that was asked for."""
    known = sorted({name for base in bases for name in _names(base)})
    for asked in options.outputs:
        if _parts(asked)[0] not in ("", *known):
            raise ConfigError(
                f"--outputs {asked}: no such modality, family or tower here; there are {', '.join(known)}"
            )


def _names(spec: EncoderSpec) -> set[str]:
    return {spec.modality, spec.family, spec.tower}


def _parts(output: str) -> tuple[str, str, str]:
    """(name, "pooled" or "tokens", N of a prefix), each may be empty."""
    found = OUTPUT.fullmatch(output)
    assert found is not None  # the options were checked
    name, plain, layer = found.groups(default="")
    return name, plain, layer


def absolute_request(request: str) -> str:
    """The request with a local path made absolute, so that it means the same from any folder."""
    family, variant = _split(request)
    model, slash, file = variant.partition("/") if family == "clip" else ("", "", "")  # MODEL/FILE is CLIP's alone
    for prefix, path in (("", variant), (model + slash, file)):
        if path and Path(path).expanduser().exists():
            return f"{family}:{prefix}{os.path.abspath(Path(path).expanduser())}"
    return request


def load_encoders(towers: list[Tower], device: str) -> list[Encoder]:
    """Load each model once, however many towers, outputs and views are asked for; one encoder a tower and view."""
    encoders: list[Encoder] = []
    for request in dict.fromkeys(tower.request for tower in towers):
        specs = [tower.spec for tower in towers if tower.request == request]
        plain = list(dict.fromkeys(replace(spec, view="none") for spec in specs))
        for loaded in _family(request).load(_split(request)[1], plain, device):
            _check_outputs(loaded)
            for view in dict.fromkeys(spec.view for spec in specs):
                if seen := [spec for spec in specs if spec.view == view and replace(spec, view="none") in loaded.specs]:
                    encoders.append(_seen(loaded, seen))
    return encoders


def load_reference(tower: Tower) -> Callable[[Any], np.ndarray]:
    """The reference library's own plain float32 call for one text or RGB picture: (D) or (T, D)."""
    return _family(tower.request).reference(_split(tower.request)[1], tower.spec)


def _check_outputs(loaded: Encoder) -> None:
    """A model whose layers are not what they look like shows it on one blank sample, before any work."""
    if all(spec.output == "pooled" for spec in loaded.specs):
        return
    from PIL import Image

    blank = "" if loaded.modality == "text" else Image.new("RGB", (64, 64))
    try:
        outputs = loaded.embed([loaded.prepare(blank)])
    except EncoderError as error:
        raise EncoderError(f"{loaded.specs[0].name}: {error}") from error
    for spec, values in zip(loaded.specs, outputs, strict=True):
        if spec.output != "pooled" and [rows.ndim for rows in values] != [2]:
            raise EncoderError(f"{spec.name}: samples are not apart there; use another layer or pooled")


def _seen(loaded: Encoder, specs: list[EncoderSpec]) -> Encoder:
    """The encoder with only the outputs in `specs`, which are of one view."""
    chosen = [loaded.specs.index(replace(spec, view="none")) for spec in specs]

    def embed(batch: list[Any]) -> list[Values]:
        values = loaded.embed(batch)
        return [values[number] for number in chosen]

    return Encoder(tuple(specs), loaded.prepare, embed)


def _split(request: str) -> tuple[str, str]:
    family, _, variant = request.partition(":")
    return family, variant


def _family(request: str) -> Family:
    family, _ = _split(request)
    if family in FAMILIES:
        return FAMILIES[family]
    if torchvision_models.is_model(family):
        return _TORCHVISION
    raise EncoderError(
        f"{request}: no encoder family {family!r}; use {', '.join(f'{name}[:variant]' for name in FAMILIES)}, "
        "or the name of a torchvision model"
    )
