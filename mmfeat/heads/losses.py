"""Losses against imbalance, for many heads at once: each head has its own weights, smoothing and gamma."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfeat.heads.settings import HeadSettings
from mmfeat.samples.labels import Targets

BETA = 0.999  # beta in the effective number of n samples, (1 - beta^n) / (1 - beta)


def class_weights(targets: Targets, policy: str) -> np.ndarray:
    """(C,) loss weights with mean 1.

    `inverse` frequency, its square root (`sqrt`), the `effective` number of samples (Cui et al., CVPR 2019) or `none`.
    For multi-label targets a weight multiplies the loss of samples that have the class, against those that lack it.
    """
    present = targets.matrix.sum(0)
    counts = np.maximum(present, 1)
    if policy == "effective":
        weights = (1 - BETA) / (1 - BETA**counts)
    else:
        base = np.maximum(len(targets) - present, 1) if targets.multilabel else len(targets)
        weights = (base / counts) ** {"none": 0.0, "sqrt": 0.5, "inverse": 1.0}[policy]
    return weights if targets.multilabel and policy != "effective" else weights / weights.mean()


class StackedLoss:
    """(K, B, C) logits and (K, B, C) targets -> (K,) losses, each the weighted mean of its own batch.

    Equals torch's `cross_entropy(weight=..., label_smoothing=...)` of each head; `focal` multiplies by (1 - p)^gamma
    (Lin et al., ICCV 2017); multi-label targets take the binary form.
    """

    def __init__(self, settings: Sequence[HeadSettings], weights: Sequence[np.ndarray], multilabel: bool, device: str):
        self.weights = torch.tensor(np.stack(weights), dtype=torch.float32, device=device)[:, None]
        self.smoothing = _column([each.label_smoothing for each in settings], device)
        self.gamma = _column([each.focal_gamma for each in settings], device)
        self.focal = settings[0].loss == "focal"
        self.multilabel = multilabel

    def keep(self, heads: Tensor) -> None:
        """Continue with these heads of the stack."""
        self.weights, self.smoothing, self.gamma = (x[heads] for x in (self.weights, self.smoothing, self.gamma))

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        return self._binary(logits, targets) if self.multilabel else self._softmax(logits, targets)

    def _softmax(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, -1)
        if self.focal:
            log_p = log_p * (1 - log_p.exp()).clamp_min(1e-8) ** self.gamma
        smooth = targets * (1 - self.smoothing) + self.smoothing / logits.shape[-1]
        return -(log_p * smooth * self.weights).sum((1, 2)) / (targets * self.weights).sum((1, 2))

    def _binary(self, logits: Tensor, targets: Tensor) -> Tensor:
        smooth = targets * (1 - self.smoothing) + self.smoothing / 2
        there, absent = F.logsigmoid(logits), F.logsigmoid(-logits)
        if self.focal:
            p = logits.sigmoid()
            there = there * (1 - p).clamp_min(1e-8) ** self.gamma
            absent = absent * p.clamp_min(1e-8) ** self.gamma
        return -(smooth * there * self.weights + (1 - smooth) * absent).mean((1, 2))


def validation_loss(logits: np.ndarray, matrix: np.ndarray, weights: np.ndarray, multilabel: bool) -> float:
    """Weighted cross-entropy of (n, C) logits and (n, C) bool labels, in nats; 0 without rows."""
    if not len(matrix):
        return 0.0
    if multilabel:
        there, absent = np.logaddexp(0, -logits) * weights, np.logaddexp(0, logits)
        return float(np.where(matrix, there, absent).mean())
    with np.errstate(invalid="ignore"):  # a head that diverged has a loss of NaN
        nats = np.logaddexp.reduce(logits, axis=-1) - (logits * matrix).sum(-1)
    row_weights = (matrix * weights).sum(-1)
    return float((nats * row_weights).sum() / row_weights.sum())


def _column(values: Sequence[float], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]
