"""Encoders: frozen towers that turn one modality into vectors.

An encoder is asked for as `family[:variant]`. Describing one (its specs) is cheap and happens on
every run; loading one happens only when vectors are missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mmfeat.encoders import bert, clip, hashing, hog, timm_models, torchvision_models
from mmfeat.encoders.spec import Encoder, EncoderOptions, EncoderSpec
from mmfeat.errors import ConfigError, EncoderError

__all__ = [
    "FAMILIES",
    "Encoder",
    "EncoderOptions",
    "EncoderSpec",
    "Tower",
    "absolute_request",
    "describe_encoders",
    "load_encoders",
]


class Family(NamedTuple):
    """`describe(family, variant, options)` gives the specs, `load(variant, specs, device)` the encoders."""

    describe: Callable[[str, str, EncoderOptions], list[EncoderSpec]]
    load: Callable[[str, list[EncoderSpec], str], list[Encoder]]


_TORCHVISION = Family(torchvision_models.describe, torchvision_models.load)

FAMILIES: dict[str, Family] = {
    "clip": Family(clip.describe, clip.load),
    "bert": Family(bert.describe, bert.load),
    "resnet50": _TORCHVISION,  # any other torchvision model is found by its name
    "timm": Family(timm_models.describe, timm_models.load),
    "hashing": Family(hashing.describe, hashing.load),
    "hog": Family(hog.describe, hog.load),
}


@dataclass(frozen=True)
class Tower:
    """A spec and the request it came from, which says where its weights lie."""

    request: str
    spec: EncoderSpec


def describe_encoders(requests: list[str], options: EncoderOptions) -> list[Tower]:
    """All towers of `family[:variant]` requests, in order; a tower asked for twice is given once."""
    if options.dtype == "auto":
        raise ConfigError("dtype auto is no arithmetic yet; pass the options through mmfeat.requests.resolve_options")
    towers: dict[str, Tower] = {}
    for request in requests:
        family, variant = _split(request)
        for spec in _family(request).describe(family, variant, options):
            towers.setdefault(spec.fingerprint, Tower(absolute_request(request), spec))
    if not towers:
        raise EncoderError(f"no encoders; name some of {', '.join(FAMILIES)} with --encoders A,B")
    return list(towers.values())


def absolute_request(request: str) -> str:
    """The request with a local path made absolute, so that it means the same from any folder."""
    family, variant = _split(request)
    model, slash, file = variant.partition("/") if family == "clip" else ("", "", "")  # MODEL/FILE is CLIP's alone
    for prefix, path in (("", variant), (model + slash, file)):
        if path and Path(path).expanduser().exists():
            return f"{family}:{prefix}{os.path.abspath(Path(path).expanduser())}"
    return request


def load_encoders(towers: list[Tower], device: str) -> list[Encoder]:
    """Load each model once, however many of its towers are asked for."""
    encoders: list[Encoder] = []
    for request in dict.fromkeys(tower.request for tower in towers):
        specs = [tower.spec for tower in towers if tower.request == request]
        encoders += _family(request).load(_split(request)[1], specs, device)
    return encoders


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
