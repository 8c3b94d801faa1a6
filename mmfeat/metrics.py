"""Metrics with intervals, and paired tests. All of them are functions of confusion counts.

The bootstrap draws whole samples with replacement. For scores that depend on counts alone this is a
multinomial draw over the cells of the table, which is exact and fast (Efron and Tibshirani, 1993).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """A value with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) counts, labels in rows, predictions in columns."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def f1_by_class(table: np.ndarray) -> np.ndarray:
    """(..., C) F1 of (..., C, C) confusions; 0 for a class that is neither there nor predicted."""
    hits = np.diagonal(table, axis1=-2, axis2=-1)
    total = table.sum(-1) + table.sum(-2)
    return 2 * hits / np.maximum(total, 1)


def macro_f1(table: np.ndarray) -> np.ndarray:
    """(...) unweighted mean of the classes' F1."""
    return f1_by_class(table).mean(-1)


def accuracy(table: np.ndarray) -> np.ndarray:
    """(...) share of correct predictions."""
    return np.trace(table, axis1=-2, axis2=-1) / np.maximum(table.sum((-2, -1)), 1)


def evaluate(labels: np.ndarray, predictions: np.ndarray, classes: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Macro-F1 and accuracy with intervals, the report by class, and the confusion matrix, for JSON."""
    table = confusion(labels, predictions, len(classes))
    draws = _resample(table.ravel(), seed).reshape(-1, len(classes), len(classes))
    return {
        "macro_f1": vars(_score(macro_f1(table), macro_f1(draws))),
        "accuracy": vars(_score(accuracy(table), accuracy(draws))),
        "classes": {
            name: _class_report(table, row, _score(value, column))
            for row, (name, value, column) in enumerate(
                zip(classes, f1_by_class(table), f1_by_class(draws).T, strict=True)
            )
        },
        "confusion": table.tolist(),
        "samples": int(table.sum()),
    }


def paired_difference(labels: np.ndarray, one: np.ndarray, other: np.ndarray, classes: int, seed: int) -> Score:
    """Macro-F1 of `one` less that of `other` on the same samples, by a paired bootstrap.

    The difference is within noise, a tie, if the interval holds 0.
    """
    cells = np.bincount((labels * classes + one) * classes + other, minlength=classes**3)
    value, draws = (
        macro_f1(cube.sum(-1)) - macro_f1(cube.sum(-2))
        for cube in (counts.reshape(-1, classes, classes, classes) for counts in (cells, _resample(cells, seed)))
    )
    return _score(value[0], draws)


def _class_report(table: np.ndarray, row: int, f1: Score) -> dict[str, Any]:
    hits = table[row, row]
    return {
        "precision": float(hits / max(table[:, row].sum(), 1)),
        "recall": float(hits / max(table[row].sum(), 1)),
        "f1": vars(f1),
        "support": int(table[row].sum()),
    }


def _resample(cells: np.ndarray, seed: int) -> np.ndarray:
    total = int(cells.sum())
    return np.random.default_rng(seed).multinomial(total, cells / max(total, 1), size=DRAWS)


def _score(value: Any, draws: np.ndarray) -> Score:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Score(float(value), float(low), float(high))
