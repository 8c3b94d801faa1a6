"""Resampling: scores of choices on other samples from the same population.

Scores come from `Hits`, which resampling sums from `Cells` of equal samples. Near duplicates are drawn together: a
group of them tells as much as one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.samples.labels import Targets

if TYPE_CHECKING:
    from scipy.sparse import csr_array

DRAWS = 2000
MAX_CELLS = 20_000  # most cells for the bootstrap; with more cells the jackknife is as good and cheaper
FEW = 10  # samples a cell below which samples are drawn one by one: a multinomial number takes as long as ten samples
CHUNK = 4_000_000  # numbers held in memory at a time
LEAST = 1e-15  # smaller sums are 0
TINY = np.finfo(np.float64).tiny
EXACT_FLOAT32 = 2**24  # integers up to here are exact in float32, whose products take half the time


@dataclass(frozen=True)
class Hits:
    """Counts from which scores of one or many sets of predictions follow.

    `hits`, `labelled` and `predicted` (..., C) count samples by class, `right` (...) samples with every class right;
    `samples` (...) is the number of all samples. `apart` (...) sums the squares of the numbers of classes by which
    choices are off where classes are ordered, and is else None.
    """

    hits: np.ndarray
    labelled: np.ndarray
    predicted: np.ndarray
    right: np.ndarray
    samples: np.ndarray
    apart: np.ndarray | None = None

    @property
    def headline(self) -> np.ndarray:
        """(...) the score by which heads are compared: macro-F1, for ordered classes kappa."""
        return self.macro_f1 if self.apart is None else self.kappa

    @property
    def kappa(self) -> np.ndarray:
        """(...) quadratic weighted kappa of ordered classes (Cohen, 1968)."""
        numbers = np.arange(self.hits.shape[-1])
        squares = (self.labelled + self.predicted) @ numbers**2
        return quadratic_kappa(
            self.apart, squares, (self.labelled @ numbers) * (self.predicted @ numbers), self.samples
        )

    @property
    def f1(self) -> np.ndarray:
        """(..., C) F1; 0 for a class that is neither labelled nor predicted."""
        return 2 * self.hits / np.maximum(self.labelled + self.predicted, 1)

    @property
    def precision(self) -> np.ndarray:
        """(..., C) share of hits among the samples predicted as a class; 0 for a class that is never predicted."""
        return self.hits / np.maximum(self.predicted, 1)

    @property
    def recall(self) -> np.ndarray:
        """(..., C) share of right ones among the samples labelled with a class; 0 for a class without labels."""
        return self.hits / np.maximum(self.labelled, 1)

    @property
    def macro_f1(self) -> np.ndarray:
        """(...) unweighted mean of the classes' F1."""
        return self.f1.mean(-1)

    @property
    def micro_f1(self) -> np.ndarray:
        """(...) F1 of all classes' counts together."""
        return 2 * self.hits.sum(-1) / np.maximum((self.labelled + self.predicted).sum(-1), 1)

    @property
    def weighted_f1(self) -> np.ndarray:
        """(...) mean of the classes' F1, weighted by how many samples have the class."""
        return (self.f1 * self.labelled).sum(-1) / np.maximum(self.labelled.sum(-1), 1)

    @property
    def accuracy(self) -> np.ndarray:
        """(...) share of samples with every class right."""
        return self.right / np.maximum(self.samples, 1)


@dataclass(frozen=True)
class Errors:
    """Sums from which scores of one or many sets of predicted numbers follow: of the `squared` and `absolute` errors
    (...), of the true numbers (`total`) and their `squares`, and how many `samples` there are."""

    squared: np.ndarray
    absolute: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    samples: np.ndarray

    @property
    def r2(self) -> np.ndarray:
        """(...) share of the variance that is predicted; 0 where nothing varies."""
        spread = self.squares - self.total**2 / np.maximum(self.samples, 1)
        return np.where(spread > 0, 1 - self.squared / np.maximum(spread, TINY), 0.0)

    @property
    def mae(self) -> np.ndarray:
        """(...) mean absolute error."""
        return self.absolute / np.maximum(self.samples, 1)

    @property
    def rmse(self) -> np.ndarray:
        """(...) square root of the mean squared error."""
        return np.sqrt(self.squared / np.maximum(self.samples, 1))

    @property
    def headline(self) -> np.ndarray:
        """(...) the score by which heads are compared."""
        return self.r2


@dataclass(frozen=True)
class Units:
    """K distinct samples, and how many of each are drawn together: `numbers` (K,) counts those that are drawn alone,
    and `groups` (G, K), a sparse matrix, those in each group that is drawn whole."""

    numbers: np.ndarray
    groups: csr_array

    @property
    def units(self) -> np.ndarray:
        """(K + G,) how many draws can give a sample of each cell, and each group."""
        return np.concatenate([self.numbers, np.ones(self.groups.shape[0], self.numbers.dtype)])

    def weights(self, drawn: np.ndarray) -> np.ndarray:
        """(D, K) samples of each cell, of how often each unit was drawn (D, K + G)."""
        alone, whole = np.split(drawn, [len(self.numbers)], axis=1)
        return alone + (self.groups.T @ whole.T).T if whole.size else alone

    def contributions(self, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield for up to `step` units each how many there are of them, and the rows of `table` that one adds up."""
        for start in range(0, len(self.numbers), step):
            rows = slice(start, start + step)
            yield self.numbers[rows], self.table(rows)
        for start in range(0, self.groups.shape[0], step):
            part = self.groups[start : start + step]
            held = np.unique(part.indices)
            yield np.ones(part.shape[0]), part[:, held] @ self.table(held)

    def table(self, rows: slice | np.ndarray = slice(None), dtype: type = np.float64) -> np.ndarray:
        """(K, ...) what one sample adds to the sums that `counts` takes; the last column counts samples."""
        raise NotImplementedError

    def counts(self, sums: np.ndarray) -> Any:
        """The scores that follow from (D, ...) sums over the columns of `table`, each (D, S, ...)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Numbers(Units):
    """True numbers `values` (N,), less their mean, and `predicted` (S, N) ones, less the same."""

    values: np.ndarray
    predicted: np.ndarray

    def table(self, rows: slice | np.ndarray = slice(None), dtype: type = np.float64) -> np.ndarray:
        """(N, 2S + 3) squared and absolute errors, the number and its square, and 1."""
        values = self.values[rows, None]
        errors = self.predicted[:, rows].T - values
        return np.hstack([errors**2, np.abs(errors), values, values**2, np.ones_like(values)]).astype(dtype)

    def counts(self, sums: np.ndarray) -> Errors:
        """The (D, 2S + 3) sums over the columns of `table`."""
        seeds = len(self.predicted)
        return Errors(*np.split(sums, [seeds, 2 * seeds, 2 * seeds + 1, 2 * seeds + 2], axis=1))


@dataclass(frozen=True)
class Cells(Units):
    """Cells of equal samples: `labels` (K, C) bool and `chosen` (S, K, C) bool are those of one sample of each cell.
    Classes may be `ordered`."""

    labels: np.ndarray
    chosen: np.ndarray
    ordered: bool = False

    def table(self, rows: slice | np.ndarray = slice(None), dtype: type = np.float64) -> np.ndarray:
        """(K, 2SC + C + S + 1) what one sample of these cells adds to hits, predicted, labelled, right and samples;
        before the last, of ordered classes, S columns more for `apart`."""
        chosen, labels = self.chosen[:, rows].transpose(1, 0, 2), self.labels[rows, None]
        one = np.ones((len(labels), 1), bool)
        parts = [chosen & labels, chosen, labels, (chosen == labels).all(-1)]
        parts += [apart(labels, chosen)] * self.ordered + [one]
        return np.concatenate([part.reshape(len(labels), -1) for part in parts], axis=1).astype(dtype)

    def counts(self, sums: np.ndarray) -> Hits:
        """(D, 2SC + C + S + 1) sums over the columns of `table` as counts of shape (D, S, C)."""
        seeds, _, classes = self.chosen.shape
        width = seeds * classes
        ends = np.cumsum([width, width, classes, seeds, seeds * self.ordered])
        hits, predicted, labelled, right, off, samples = np.split(sums, ends, axis=1)
        shape = (-1, seeds, classes)
        labelled = np.broadcast_to(labelled[:, None], (len(sums), seeds, classes))
        predicted = predicted.reshape(shape)
        return Hits(hits.reshape(shape), labelled, predicted, right, samples, off if self.ordered else None)


Scorer = Callable[[Any], np.ndarray]  # `Hits` of shape (D, S, C), or `Errors` (D, S) -> (D, Q) scores


def quadratic_kappa(apart: Any, squares: Any, product: Any, samples: Any) -> Any:
    """Quadratic weighted kappa of the numbers of classes of labels and choices: from the sums of the squares of their
    differences (`apart`) and of all `squares`, and the `product` of their sums. 0 where no difference is by chance."""
    chance = squares - 2 * product / np.maximum(samples, 1)
    return np.where(chance > LEAST, 1 - apart / np.maximum(chance, LEAST), 0.0)


def apart(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(...) squares of the numbers of classes between labels and choices (..., C), both bool, of ordered classes."""
    return (chosen.argmax(-1) - labels.argmax(-1)) ** 2


def count(labels: np.ndarray, chosen: np.ndarray, ordered: bool = False) -> Hits:
    """Counts of decisions (..., N, C) about samples with labels (N, C), both bool."""
    samples = len(labels)
    # A product with ones adds up long columns of few classes ten times as fast as sum() does.
    ones = np.ones(samples, np.float32 if samples < EXACT_FLOAT32 else np.float64)
    sums = [ones @ part.astype(ones.dtype) for part in (labels & chosen, labels, chosen)]
    hits, labelled, predicted = (part.astype(np.float64) for part in sums)
    right = np.count_nonzero((labels == chosen).all(-1), axis=-1)
    labelled, off = np.broadcast_to(labelled, hits.shape), apart(labels, chosen).sum(-1) if ordered else None
    return Hits(hits, labelled, predicted, np.asarray(right), np.asarray(samples), off)


def find_cells(targets: Targets, chosen: np.ndarray, groups: np.ndarray | None = None) -> Units:
    """Count N samples that have equal labels and equal predictions (S, N, C); each predicted number is one of its own.

    Samples with the same number in `groups` (N,) are near duplicates, which are drawn together.
    """
    from scipy.sparse import coo_array

    code = np.arange(len(targets)) if targets.numeric else _equal(targets.matrix, chosen)
    size = int(code.max(initial=-1)) + 1
    joined, of = joined_groups(groups, len(code))
    inside = coo_array((np.ones(len(joined)), (of, code[joined])), shape=(int(of.max(initial=-1)) + 1, size)).tocsr()
    numbers = np.bincount(code, minlength=size) - np.bincount(code[joined], minlength=size)
    if targets.numeric:
        middle = targets.matrix.mean()
        return Numbers(numbers, inside, targets.matrix[:, 0] - middle, chosen[..., 0] - middle)
    first = np.empty(size, dtype=np.int64)
    first[code] = np.arange(len(code))  # any sample of a cell can represent it
    return Cells(numbers, inside, targets.matrix[first], chosen[:, first], targets.ordered)


def _equal(labels: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(N,) numbers of cells of samples with equal labels (N, C) and choices (S, N, C)."""
    rows = np.concatenate([labels[None], chosen]).transpose(1, 0, 2).reshape(len(labels), -1)
    packed = np.packbits(rows, axis=1)
    words = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 8))).view(np.uint64)
    code = np.zeros(len(labels), dtype=np.int64)
    for word in words.T:
        values, inverse = np.unique(word, return_inverse=True)
        code = np.unique(code * len(values) + inverse, return_inverse=True)[1] if words.shape[1] > 1 else inverse
    return code


def joined_groups(groups: np.ndarray | None, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of samples that share their group with others, and the number of the group of each, counted from 0."""
    if groups is None:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    _, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(sizes[number] > 1)
    return rows, np.unique(number[rows], return_inverse=True)[1]


def draw_scores(cells: Units, scores: Scorer, seed: int, draws: int = DRAWS) -> tuple[np.ndarray, np.ndarray]:
    """(Q,) scores of the samples, and (draws, Q) scores of resampled samples, groups of near duplicates whole.

    Up to `MAX_CELLS` cells and groups, these are drawn as in the bootstrap. With more, which would take minutes, scores
    are close to normal: they are drawn from a normal distribution with the jackknife's covariance (Efron, 1982).
    """
    value = scores(cells.counts(_totals(cells)[None]))[0]
    random = np.random.default_rng(seed)
    if len(cells.units) <= MAX_CELLS:
        return value, np.concatenate(list(_bootstrap(cells, scores, random, draws)))
    values, vectors = np.linalg.eigh(_jackknife(cells, scores, value))
    noise = random.standard_normal((draws, len(value))) * np.sqrt(np.maximum(values, 0))
    return value, value + noise @ vectors.T


def _totals(cells: Units) -> np.ndarray:
    return cells.weights(cells.units[None].astype(np.float64))[0] @ cells.table()


def _bootstrap(cells: Units, scores: Scorer, random: np.random.Generator, draws: int) -> Iterator[np.ndarray]:
    units = cells.units
    count = int(units.sum())
    table = cells.table(dtype=np.float32 if _totals(cells)[-1] < EXACT_FLOAT32 else np.float64)
    one_by_one = 0 < count < FEW * len(units)
    step = max(1, CHUNK // max(*table.shape, count if one_by_one else 0))
    unit_of = np.repeat(np.arange(len(units)), units)
    for size in (min(step, draws - start) for start in range(0, draws, step)):
        if one_by_one:
            numbers = unit_of[random.integers(0, count, (size, count))] + len(units) * np.arange(size)[:, None]
            drawn = np.bincount(numbers.ravel(), minlength=size * len(units)).reshape(size, -1)
        else:
            drawn = random.multinomial(count, units / max(count, 1), size=size)
        yield scores(cells.counts((cells.weights(drawn).astype(table.dtype) @ table).astype(np.float64)))


def _jackknife(cells: Units, scores: Scorer, value: np.ndarray) -> np.ndarray:
    """(Q, Q) covariance of the scores, from leaving out each unit in turn; samples of one cell give equal scores."""
    totals, count = _totals(cells), int(cells.units.sum())
    mean, square = np.zeros(len(value)), np.zeros((len(value), len(value)))
    for times, contribution in cells.contributions(max(1, CHUNK // len(totals))):
        shift = scores(cells.counts(totals - contribution)) - value
        mean += times @ shift / count
        square += (shift * times[:, None]).T @ shift
    return (count - 1) / count * (square - count * np.outer(mean, mean))
