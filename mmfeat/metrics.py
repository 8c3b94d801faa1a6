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


@dataclass(frozen=True)
class Counts:
    """What F1 and accuracy need of one or many confusions, each (..., C): hits, labels and predictions by class."""

    hits: np.ndarray
    labelled: np.ndarray
    predicted: np.ndarray

    @property
    def f1(self) -> np.ndarray:
        """(..., C) F1; 0 for a class that is neither there nor predicted."""
        return 2 * self.hits / np.maximum(self.labelled + self.predicted, 1)

    @property
    def macro_f1(self) -> np.ndarray:
        """(...) unweighted mean of the classes' F1."""
        return self.f1.mean(-1)

    @property
    def accuracy(self) -> np.ndarray:
        """(...) share of correct predictions."""
        return self.hits.sum(-1) / np.maximum(self.labelled.sum(-1), 1)


def macro_f1(labels: np.ndarray, predictions: np.ndarray, classes: int) -> float:
    """Macro-F1 of class numbers."""
    table = confusion(labels, predictions, classes)
    return float(Counts(np.diagonal(table), table.sum(1), table.sum(0)).macro_f1)


def confusion(labels: np.ndarray, predictions: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) counts, labels in rows, predictions in columns."""
    return np.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def evaluate(labels: np.ndarray, predictions: np.ndarray, classes: tuple[str, ...], seed: int) -> dict[str, Any]:
    """Macro-F1 and accuracy with intervals, the report by class, and the confusion matrix, for JSON."""
    table = confusion(labels, predictions, len(classes))
    counts, draws = (each[0] for each in _bootstrap(labels, [predictions], len(classes), seed))
    by_class = zip(classes, counts.f1, draws.f1.T, strict=True)
    return {
        "macro_f1": vars(_score(counts.macro_f1, draws.macro_f1)),
        "accuracy": vars(_score(counts.accuracy, draws.accuracy)),
        "classes": {
            name: _class_report(counts, row, _score(value, column))
            for row, (name, value, column) in enumerate(by_class)
        },
        "confusion": table.tolist(),
        "samples": len(labels),
    }


def paired_difference(labels: np.ndarray, one: np.ndarray, other: np.ndarray, classes: int, seed: int) -> Score:
    """Macro-F1 of `one` less that of `other` on the same samples, by a paired bootstrap.

    The difference is within noise, a tie, if the interval holds 0.
    """
    (first, second), (first_draws, second_draws) = _bootstrap(labels, [one, other], classes, seed)
    return _score(first.macro_f1 - second.macro_f1, first_draws.macro_f1 - second_draws.macro_f1)


def _class_report(counts: Counts, row: int, f1: Score) -> dict[str, Any]:
    hits = counts.hits[row]
    return {
        "precision": float(hits / max(counts.predicted[row], 1)),
        "recall": float(hits / max(counts.labelled[row], 1)),
        "f1": vars(f1),
        "support": int(counts.labelled[row]),
    }


def _bootstrap(
    labels: np.ndarray, predictions: list[np.ndarray], classes: int, seed: int
) -> tuple[list[Counts], list[Counts]]:
    """For each of several predictions of the same samples, the counts and DRAWS resampled ones.

    Only the cells that occur are drawn, at most one a sample.
    """
    cells, numbers = np.unique(np.stack([labels, *predictions]), axis=1, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(labels), numbers / max(len(labels), 1), size=DRAWS)
    eye = np.eye(classes, dtype=np.int64)

    def counts(weights: np.ndarray, predicted: np.ndarray) -> Counts:
        hits = weights * (cells[0] == predicted)
        return Counts(hits @ eye[cells[0]], weights @ eye[cells[0]], weights @ eye[predicted])

    return [counts(numbers, row) for row in cells[1:]], [counts(draws, row) for row in cells[1:]]


def _score(value: Any, draws: np.ndarray) -> Score:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Score(float(value), float(low), float(high))
