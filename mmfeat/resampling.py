"""Confusion counts, the scores that follow from them, and how those scores vary with the sample.

The bootstrap draws whole samples with replacement. For scores that depend on counts alone this is a
multinomial draw over the cells of the table, which is exact and fast (Efron and Tibshirani, 1993).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

DRAWS = 2000
MAX_CELLS = 20_000  # distinct samples up to which drawing them is cheap; beyond it the jackknife is as good
CHUNK = 4_000_000  # numbers held at a time
EXACT_FLOAT32 = 2**24  # integers up to here are exact in float32, whose products take half the time


@dataclass(frozen=True)
class Counts:
    """What scores need of one or many confusions.

    `hits`, `labelled` and `predicted` are (..., C) counts by class, `right` (...) samples with every class
    right, `samples` how many there are.
    """

    hits: np.ndarray
    labelled: np.ndarray
    predicted: np.ndarray
    right: np.ndarray
    samples: int

    @property
    def f1(self) -> np.ndarray:
        """(..., C) F1; 0 for a class that is neither there nor predicted."""
        return 2 * self.hits / np.maximum(self.labelled + self.predicted, 1)

    @property
    def precision(self) -> np.ndarray:
        """(..., C) share of the samples given a class that have it; 0 for a class that is never predicted."""
        return self.hits / np.maximum(self.predicted, 1)

    @property
    def recall(self) -> np.ndarray:
        """(..., C) share of the samples of a class that are found; 0 for a class that is not there."""
        return self.hits / np.maximum(self.labelled, 1)

    @property
    def macro_f1(self) -> np.ndarray:
        """(...) unweighted mean of the classes' F1."""
        return self.f1.mean(-1)

    @property
    def weighted_f1(self) -> np.ndarray:
        """(...) mean of the classes' F1, weighted by how many samples have the class."""
        return (self.f1 * self.labelled).sum(-1) / np.maximum(self.labelled.sum(-1), 1)

    @property
    def accuracy(self) -> np.ndarray:
        """(...) share of samples with every class right."""
        return self.right / max(self.samples, 1)


@dataclass(frozen=True)
class Cells:
    """The distinct samples: `numbers` (K,) of each, their labels (K, C) and S predictions of them (S, K, C), bool."""

    numbers: np.ndarray
    labels: np.ndarray
    chosen: np.ndarray

    @property
    def samples(self) -> int:
        return int(self.numbers.sum())

    def table(self, dtype: type) -> np.ndarray:
        """(K, 2SC + C + S) what one sample of each cell adds to hits, predicted, labelled and right."""
        rows = self.chosen.transpose(1, 0, 2)
        labels = self.labels[:, None]
        parts = [rows & labels, rows, labels, (rows == labels).all(-1)]
        return np.concatenate([part.reshape(len(labels), -1) for part in parts], axis=1).astype(dtype)

    def counts(self, sums: np.ndarray, samples: int) -> Counts:
        """(D, 2SC + C + S) sums over the columns of `table` as counts of shape (D, S, C)."""
        seeds, _, classes = self.chosen.shape
        each = seeds * classes
        hits, predicted, labelled, right = np.split(sums, [each, 2 * each, 2 * each + classes], axis=1)
        shape = (-1, seeds, classes)
        labelled = np.broadcast_to(labelled[:, None], (len(sums), seeds, classes))
        return Counts(hits.reshape(shape), labelled, predicted.reshape(shape), right, samples)


Scores = Callable[[Counts], np.ndarray]  # counts of shape (D, S, C) -> (D, Q) scores


def count(labels: np.ndarray, chosen: np.ndarray) -> Counts:
    """Counts of decisions (..., N, C) about samples with labels (N, C), both bool."""
    samples = len(labels)
    # a product with ones adds up long columns of few classes ten times as fast as sum() does
    ones = np.ones(samples, np.float32 if samples < EXACT_FLOAT32 else np.float64)
    sums = [ones @ part.astype(ones.dtype) for part in (labels & chosen, labels, chosen)]
    hits, labelled, predicted = (part.astype(np.float64) for part in sums)
    right = np.count_nonzero((labels == chosen).all(-1), axis=-1)
    return Counts(hits, np.broadcast_to(labelled, hits.shape), predicted, np.asarray(right), samples)


def find_cells(labels: np.ndarray, chosen: np.ndarray) -> Cells:
    """Group N samples that have equal labels (N, C) and equal predictions (S, N, C)."""
    rows = np.concatenate([labels[None], chosen]).transpose(1, 0, 2).reshape(len(labels), -1)
    packed = np.packbits(rows, axis=1)
    words = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)
    code = np.zeros(len(labels), dtype=np.int64)
    for word in words.T:
        values, inverse = np.unique(word, return_inverse=True)
        code = np.unique(code * len(values) + inverse, return_inverse=True)[1] if words.shape[1] > 1 else inverse
    numbers = np.bincount(code)
    first = np.empty(len(numbers), dtype=np.int64)
    first[code] = np.arange(len(code))  # any sample stands for its cell
    return Cells(numbers, labels[first], chosen[:, first])


def draw_scores(cells: Cells, scores: Scores, seed: int, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """(Q,) scores of the samples as they are, and (draws, Q) of resampled ones.

    Up to `MAX_CELLS` cells this is the bootstrap. More of them would take minutes, and there the scores are
    close to normal: they are drawn from a normal distribution with the jackknife's covariance (Efron, 1982).
    """
    value = scores(cells.counts(_totals(cells)[None], cells.samples))[0]
    random = np.random.default_rng(seed)
    if len(cells.numbers) <= MAX_CELLS:
        return value, np.concatenate(list(_bootstrap(cells, scores, random, draws)))
    values, vectors = np.linalg.eigh(_jackknife(cells, scores, value))
    noise = random.standard_normal((draws, len(value))) * np.sqrt(np.maximum(values, 0))
    return value, value + noise @ vectors.T


def _totals(cells: Cells) -> np.ndarray:
    return cells.numbers.astype(np.float64) @ cells.table(np.float64)


def _bootstrap(cells: Cells, scores: Scores, random: np.random.Generator, draws: int) -> Iterator[np.ndarray]:
    samples = cells.samples
    table = cells.table(np.float32 if samples < EXACT_FLOAT32 else np.float64)
    step = max(1, CHUNK // max(table.shape))
    for start in range(0, draws, step):
        drawn = random.multinomial(samples, cells.numbers / max(samples, 1), size=min(step, draws - start))
        yield scores(cells.counts((drawn.astype(table.dtype) @ table).astype(np.float64), samples))


def _jackknife(cells: Cells, scores: Scores, value: np.ndarray) -> np.ndarray:
    """(Q, Q) covariance of the scores, from leaving out each sample in turn; those of one cell are alike."""
    samples, totals = cells.samples, _totals(cells)
    mean, square = np.zeros(len(value)), np.zeros((len(value), len(value)))
    step = max(1, CHUNK // len(totals))
    for start in range(0, len(cells.numbers), step):
        rows = slice(start, start + step)
        part = Cells(cells.numbers[rows], cells.labels[rows], cells.chosen[:, rows])
        shift = scores(cells.counts(totals - part.table(np.float64), samples - 1)) - value
        mean += part.numbers @ shift / samples
        square += (shift * part.numbers[:, None]).T @ shift
    return (samples - 1) / samples * (square - samples * np.outer(mean, mean))
