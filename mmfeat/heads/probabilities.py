"""Probabilities as finite logits."""

from __future__ import annotations

import numpy as np

ABSENT = 30.0  # how far down the logit of a class is that the training rows do not have


def from_probabilities(probabilities: np.ndarray, multilabel: bool) -> np.ndarray:
    """(n, C) float64 log-probabilities, or log-odds where multi-label, none beyond ABSENT."""
    shares = np.asarray(probabilities, dtype=np.float64)
    with np.errstate(divide="ignore"):
        logs = np.log(shares) - (np.log1p(-shares) if multilabel else 0)
    return np.clip(logs, -ABSENT, ABSENT)


def log_loss(logits: np.ndarray, wanted: np.ndarray, multilabel: bool) -> float:
    """Mean log-loss of (n, C) logits; `wanted` (n, C) bool."""
    if multilabel:
        return float(np.logaddexp(0, np.where(wanted, -logits, logits)).sum(axis=1).mean())
    return float((np.logaddexp.reduce(logits, axis=1) - logits[wanted]).mean())


def decided(logits: np.ndarray, multilabel: bool) -> np.ndarray:
    """(n, C) bool: the highest logit of a row, or those above 0 where multi-label."""
    if multilabel:
        return logits > 0
    return logits.argmax(axis=1)[:, None] == np.arange(logits.shape[1])
