"""The registry of heads: every name that `--fusion` and `--baselines` take, and the settings that heads train with.

torch loads only with a fusion.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from mmfeat.errors import ConfigError

if TYPE_CHECKING:
    from mmfeat.heads.stack import FusionType


CLASS_WEIGHTS = ("none", "inverse", "sqrt", "effective")
LOSSES = ("cross-entropy", "focal")
MONITORS = ("loss", "macro-f1")
# Settings that all heads of a stack share, because they shape its tensors; the others may differ from head to head.
SHARED = ("batch_size", "loss")


@dataclass(frozen=True)
class HeadSettings:
    """What a head of the sweep may differ in. Search varies any of these."""

    learning_rate: float = 1e-3
    attention_learning_rate: float = 1e-4  # of cross-attention's own layers
    weight_decay: float = 0.05
    dropout: float = 0.5
    modality_dropout: float = 0.0  # probability that a training sample loses one of its modalities
    label_smoothing: float = 0.0
    class_weights: str = "sqrt"
    loss: str = "cross-entropy"
    focal_gamma: float = 2.0
    batch_size: int = 128
    epochs: int = 12
    patience: int = 1  # validation loss falls and rises once: waiting longer was seen to bring 0.0004 nats
    monitor: str = "loss"  # on the validation rows: what early stopping and the learning rate go by
    min_delta: float = 0.001

    def __post_init__(self) -> None:
        for name, value in (("class_weights", CLASS_WEIGHTS), ("loss", LOSSES), ("monitor", MONITORS)):
            if getattr(self, name) not in value:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: use one of {', '.join(value)}")
        for name in ("learning_rate", "attention_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: a number above 0")
        for name in ("weight_decay", "focal_gamma", "min_delta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: a number not below 0")
        for name in ("dropout", "modality_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: a share from 0 to below 1")
        for name, least in (("batch_size", 2), ("epochs", 1), ("patience", 1)):  # batch normalisation needs two
            if getattr(self, name) < least:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: at least {least}")


DEFAULTS = HeadSettings()
KINDS: dict[str, type] = {field.name: type(getattr(DEFAULTS, field.name)) for field in fields(HeadSettings)}


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return f"--{name.replace('_', '-')}"


def settings_of(values: dict[str, Any]) -> HeadSettings:
    """Settings with `values` in place of the defaults; from JSON or a search, whole numbers may come as floats."""
    return HeadSettings(**{name: KINDS[name](value) for name, value in values.items()})


__all__ = ["BASELINES", "FUSIONS", "HEADS", "NEEDS_TOKENS", "TWINS", "HeadSettings", "load_fusion"]

NEEDS_TOKENS = "cross-attention"
TWINS = {"film-concat": "film"}  # on one modality the first is the second


def _late() -> FusionType:
    from mmfeat.heads.fusions import Late

    return Late


def _concat() -> FusionType:
    from mmfeat.heads.fusions import Concat

    return Concat


def _gated() -> FusionType:
    from mmfeat.heads.fusions import Gated

    return Gated


def _film() -> FusionType:
    from mmfeat.heads.fusions import Film

    return Film


def _film_concat() -> FusionType:
    from mmfeat.heads.fusions import FilmConcat

    return FilmConcat


def _cross_attention() -> FusionType:
    from mmfeat.heads.fusions import CrossAttention

    return CrossAttention


FUSIONS: dict[str, Callable[[], FusionType]] = {
    "late": _late,
    "concat": _concat,
    "gated": _gated,
    "film": _film,
    "film-concat": _film_concat,
    NEEDS_TOKENS: _cross_attention,
}
# Their functions are in mmfeat/baselines, which needs NumPy: these names are for `mmfeat --help` too.
BASELINES = ("prior", "knn", "ridge", "logistic", "svm", "forest", "boosting")
HEADS: tuple[str, ...] = (*FUSIONS, *BASELINES)


def load_fusion(name: str) -> FusionType:
    """The class of a fusion; torch is imported only now."""
    return FUSIONS[name]()
