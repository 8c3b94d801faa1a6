"""What all baselines share: standardised training rows and the eigenvectors of their weighted covariance.

Rows come from a `Matrix` in chunks, so that they may lie on disk; what fits into MEMORY is read once and held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np

from mmfeat.samples.labels import Targets

ABSENT = 30.0  # distance below the other logits for a class without training rows


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


MEMORY = 1 << 30  # bytes of float32 rows to hold; a larger matrix is read again at every pass
CHUNK = 1 << 26  # bytes of float32 rows that are read at a time
CONSTANT = 1e-6  # a column that varies less than this, relative to its size, is constant
NULL = 1e-10  # eigenvalues below this share of the largest are rounding


class Matrix(Protocol):
    """(N, D) vectors of all samples, encoders side by side, wherever they lie."""

    @property
    def width(self) -> int: ...
    def __len__(self) -> int: ...
    def rows(self, rows: np.ndarray) -> np.ndarray:
        """(n,) row numbers -> (n, D) float32, NaN where an encoder's vector is missing."""
        ...


@dataclass(frozen=True)
class Scaler:
    """Mean and standard deviation of each column over the training rows that have it, each (D,) float32."""

    mean: np.ndarray
    std: np.ndarray

    def scaled(self, vectors: np.ndarray) -> np.ndarray:
        """(n, D) raw vectors -> (n, D) float32 standardised ones; what is missing is the mean, which is 0."""
        scaled = np.subtract(vectors, self.mean, dtype=np.float32)
        scaled /= self.std
        if len(missing := np.flatnonzero(np.isnan(scaled.sum(axis=1)))):
            some = scaled[missing]
            some[np.isnan(some)] = 0
            scaled[missing] = some
        return scaled

    def apply(self, matrix: Matrix, rows: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """`function` of the standardised vectors at `rows`, chunk by chunk in the order they lie in."""
        order = np.argsort(rows, kind="stable")
        pieces = [function(self.scaled(matrix.rows(rows[order[part]]))) for part in _parts(len(rows), matrix.width)]
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return np.concatenate(pieces)[inverse]


@dataclass(frozen=True)
class Basis:
    """n training rows, standardised and less their weighted mean, and the eigenvectors of their covariance.

    `values` (r,) falls, `vectors` is (D, r) with r <= min(n - 1, D): the null space is cut, in which no penalised
    linear model has weight. `weights` (n,) are those of the samples. `held` (n, r) are the rows in the basis of
    the eigenvectors, None where they would not fit into memory.
    """

    matrix: Matrix
    rows: np.ndarray
    weights: np.ndarray
    scaler: Scaler
    centre: np.ndarray
    values: np.ndarray
    vectors: np.ndarray
    held: np.ndarray | None

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """All training rows in order: eigenvector coordinates (n, r) if held, else centred (n, D) from disk."""
        if self.held is not None:
            yield slice(0, len(self.rows)), self.held
            return
        for part in _parts(len(self.rows), self.matrix.width):
            yield part, self.scaler.scaled(self.matrix.rows(self.rows[part])) - self.centre

    def directions(self, coordinates: np.ndarray) -> np.ndarray:
        """(r, K) coordinates -> what a chunk is multiplied by to get its (n, K) scores."""
        small = coordinates.astype(np.float32)
        return small if self.held is not None else self.vectors @ small

    def coordinates(self, directions: np.ndarray) -> np.ndarray:
        """The transpose of `directions`, float64: gradients go this way."""
        return (directions if self.held is not None else self.vectors.T @ directions).astype(np.float64)


def make_basis(
    matrix: Matrix, targets: Targets, rows: np.ndarray, class_weights: np.ndarray, memory: int = MEMORY
) -> Basis:
    """The basis of the training `rows`. A sample of a multi-class problem weighs what its class does.

    The eigenvectors are those of the smaller of X'X and XX', so time grows with min(n, D) cubed.
    """
    rows = np.sort(rows)
    weights = sample_weights(targets.take(rows), class_weights)
    with one_blas_thread():
        scaler, centre, held = _standardised(matrix, rows, weights, memory)
        empty = Basis(matrix, rows, weights, scaler, centre, np.empty(0), np.empty((0, 0)), None)
        parts = _parts(len(rows), matrix.width)
        chunks = ((part, held[part]) for part in parts) if held is not None else empty.chunks()
        if held is not None and len(rows) < matrix.width:
            values, vectors = _by_samples(held, weights)
        else:
            values, vectors = _by_columns(chunks, weights, matrix.width)
        rotated = None if held is None else _rotated(held, vectors)
    return Basis(matrix, rows, weights, scaler, centre, values, vectors, rotated)


def sample_weights(targets: Targets, class_weights: np.ndarray) -> np.ndarray:
    """(n,) the weight of each sample's class; 1 where a sample may have many."""
    if targets.multilabel:
        return np.ones(len(targets))
    return np.asarray(class_weights, dtype=np.float64)[targets.numbers]


_single_lock = Lock()
_single: dict[str, Any] = {"users": 0, "limits": None}


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """One BLAS and OpenMP thread inside.

    BLAS has one setting for the whole process, so the first to enter sets it and the last to leave restores it,
    also if they run in different threads; OpenMP has one for each thread.
    """
    import scipy.linalg  # noqa: F401  has a BLAS of its own; one that is loaded later would not be limited
    from threadpoolctl import threadpool_limits

    with _single_lock:
        if not _single["users"]:
            _single["limits"] = threadpool_limits(1, user_api="blas")
        _single["users"] += 1
    try:
        with threadpool_limits(1, user_api="openmp"):
            yield
    finally:
        with _single_lock:
            _single["users"] -= 1
            if not _single["users"]:
                _single["limits"].restore_original_limits()


def _parts(count: int, width: int) -> list[slice]:
    """At least one, so that there is something to concatenate also for no rows."""
    size = max(1, CHUNK // (4 * max(width, 1)))
    return [slice(start, min(start + size, count)) for start in range(0, max(count, 1), size)]


def _standardised(
    matrix: Matrix, rows: np.ndarray, weights: np.ndarray, memory: int
) -> tuple[Scaler, np.ndarray, np.ndarray | None]:
    """Scaler, weighted mean of the standardised rows, and these rows less that mean if they fit into `memory`."""
    parts = _parts(len(rows), matrix.width)
    if 4 * len(rows) * matrix.width <= memory:
        held = np.empty((len(rows), matrix.width), dtype=np.float32)
        for part in parts:
            held[part] = matrix.rows(rows[part])
        scaler = _scaler((held[part] for part in parts), matrix.width)
        for part in parts:
            held[part] = scaler.scaled(held[part])
        centre = (weights.astype(np.float32) @ held / weights.sum()).astype(np.float32)
        held -= centre
        return scaler, centre, held
    scaler = _scaler((matrix.rows(rows[part]) for part in parts), matrix.width)
    total = sum(weights[part] @ scaler.scaled(matrix.rows(rows[part])) for part in parts)
    return scaler, (total / weights.sum()).astype(np.float32), None


def _rotated(held: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """`held @ vectors` in the place of `held`."""
    for part in _parts(*held.shape):
        held[part, : vectors.shape[1]] = held[part] @ vectors
    return held[:, : vectors.shape[1]]


def _scaler(chunks: Any, width: int) -> Scaler:
    """Statistics of the values that are there, merged over chunks (Chan, Golub and LeVeque 1983)."""
    count, mean, squares = np.zeros(width), np.zeros(width), np.zeros(width)
    for chunk in chunks:
        present = ~np.isnan(chunk)
        here = present.sum(0)
        values = np.where(present, chunk, 0)
        chunk_mean = values.sum(0, dtype=np.float64) / np.maximum(here, 1)
        values = np.where(present, values - chunk_mean.astype(np.float32), 0)
        chunk_squares = np.square(values, out=values).sum(0, dtype=np.float64)
        total = np.maximum(count + here, 1)
        squares += chunk_squares + (chunk_mean - mean) ** 2 * count * here / total
        mean += (chunk_mean - mean) * here / total
        count = count + here
    std = np.sqrt(squares / np.maximum(count, 1))
    std[std <= CONSTANT * np.maximum(np.abs(mean), CONSTANT)] = 1
    return Scaler(mean.astype(np.float32), std.astype(np.float32))


def _by_columns(chunks: Any, weights: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """From X'X (D, D): products in float32, their sum over chunks and the eigenvectors in float64."""
    from scipy.linalg import eigh

    gram = np.zeros((width, width))
    for part, chunk in chunks:
        root = chunk * np.sqrt(weights[part, None]).astype(np.float32)
        gram += root.T @ root
    values, vectors = eigh(gram / weights.sum(), driver="evd", overwrite_a=True, check_finite=False)
    kept = np.flatnonzero(values > NULL * max(values.max(initial=0), CONSTANT))[::-1]
    return values[kept], np.ascontiguousarray(vectors[:, kept], dtype=np.float32)


def _by_samples(held: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """From XX' (n, n), all in float64: dividing by small eigenvalues would show the rounding of float32."""
    from scipy.linalg import eigh

    root = held * np.sqrt(weights[:, None] / weights.sum())
    values, vectors = eigh(root @ root.T, driver="evd", overwrite_a=True, check_finite=False)
    kept = np.flatnonzero(values > NULL * max(values.max(initial=0), CONSTANT))[::-1]
    directions = root.T @ (vectors[:, kept] / np.sqrt(values[kept]))
    return values[kept], np.ascontiguousarray(directions, dtype=np.float32)
