"""The registry of heads: every name that `--fusion` and `--baselines` take, and the settings that heads train with.

torch is imported only where a fusion is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmfeat.errors import ConfigError

if TYPE_CHECKING:
    from mmfeat.heads.stack import FusionType


NEEDS_TOKENS = "cross-attention"
LINEAR, ZERO_SHOT = "linear", "zero-shot"
ON_REQUEST = (
    LINEAR,
    ZERO_SHOT,
)  # heads that `all` leaves out: the names of older runs, and no encoder is loaded unasked
TWINS = {"film-concat": "film"}  # on a single modality, the first fusion equals the second
CLASS_WEIGHTS = ("none", "inverse", "sqrt", "effective")
LOSSES = ("cross-entropy", "focal")
MONITORS = ("loss", "macro-f1")
INITS = ("random", ZERO_SHOT)
# Settings that all heads of a stack share, because they shape its tensors; the others may differ from head to head.
SHARED = ("batch_size", "loss")


@dataclass(frozen=True)
class HeadSettings:
    """The settings in which heads may differ, and which a search may vary."""

    learning_rate: float = 1e-3
    attention_learning_rate: float = 1e-4  # learning rate of the attention layers of cross-attention
    weight_decay: float = 0.05
    dropout: float = 0.5
    modality_dropout: float = 0.0  # probability that a training sample loses one of its modalities
    label_smoothing: float = 0.0
    class_weights: str = "sqrt"
    loss: str = "cross-entropy"
    focal_gamma: float = 2.0
    batch_size: int = 128
    epochs: int = 12
    patience: int = 1  # validation loss falls and rises once; more patience gained only 0.0004 nats
    monitor: str = "loss"  # the score on validation rows that decides on early stopping and the learning rate
    min_delta: float = 0.001
    init: str = "random"  # first weights of a linear head: drawn, or the vectors of the class names

    def __post_init__(self) -> None:
        choices_of = {"class_weights": CLASS_WEIGHTS, "loss": LOSSES, "monitor": MONITORS, "init": INITS}
        for name, choices in choices_of.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: use one of {', '.join(choices)}")
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
SETTING_TYPES: dict[str, type] = {field.name: type(getattr(DEFAULTS, field.name)) for field in fields(HeadSettings)}


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return f"--{name.replace('_', '-')}"


def settings_of(values: dict[str, Any]) -> HeadSettings:
    """Settings with `values` in place of the defaults; JSON and searches may hold whole numbers as floats."""
    return HeadSettings(**{name: SETTING_TYPES[name](value) for name, value in values.items()})


FUSIONS = {  # the classes of `mmfeat.heads.fusions`
    "late": "Late",
    "concat": "Concat",
    "gated": "Gated",
    "film": "Film",
    "film-concat": "FilmConcat",
    NEEDS_TOKENS: "CrossAttention",
    LINEAR: "LinearFusion",
}
# `mmfeat.baselines.fit` has the functions and needs NumPy; these names are also for `mmfeat --help`, which does not.
BASELINES = ("prior", "knn", "ridge", "logistic", "svm", "forest", "boosting", ZERO_SHOT)


def load_fusion(name: str) -> FusionType:
    """The class of a fusion, for which torch is imported."""
    fusion: FusionType = getattr(import_module("mmfeat.heads.fusions"), FUSIONS[name])
    return fusion
