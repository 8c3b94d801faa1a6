"""How heads are trained: one small frozen record, saved beside the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from mmfeat.errors import ConfigError

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
