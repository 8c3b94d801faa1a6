"""How heads are trained: one small frozen record, saved beside the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mmfeat.errors import ConfigError

CLASS_WEIGHTS = ("none", "inverse", "sqrt")


@dataclass(frozen=True)
class HeadSettings:
    """Defaults are the published recipe for heads on frozen CLIP."""

    learning_rate: float = 3e-4
    weight_decay: float = 0.05
    dropout: float = 0.5
    batch_size: int = 16
    epochs: int = 12
    patience: int = 3
    min_delta: float = 0.001
    class_weights: str = "sqrt"
    seed: int = 42

    def __post_init__(self) -> None:
        if self.class_weights not in CLASS_WEIGHTS:
            raise ConfigError(f"--class-weights {self.class_weights}: use one of {', '.join(CLASS_WEIGHTS)}")
        if not (0 < self.learning_rate < math.inf and 0 <= self.weight_decay < math.inf):
            raise ConfigError("--learning-rate must be above 0 and --weight-decay not below it")
        if self.batch_size < 2 or self.epochs < 1:
            raise ConfigError("--batch-size must be at least 2 (batch normalisation) and --epochs at least 1")


def class_weights(labels: np.ndarray, classes: int, policy: str) -> np.ndarray:
    """(C,) loss weights with mean 1: `inverse` frequency, its `sqrt`, or `none`."""
    counts = np.maximum(np.bincount(labels, minlength=classes), 1)
    power = {"none": 0.0, "sqrt": 0.5, "inverse": 1.0}[policy]
    weights = (len(labels) / counts) ** power
    return weights / weights.mean()
