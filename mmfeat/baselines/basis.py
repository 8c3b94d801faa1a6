"""The basis of all baselines: standardised training rows and the eigenvectors of their weighted covariance.

Rows are read from a `Matrix` in chunks, so that vectors may lie on disk; a matrix that fits into MEMORY is read once
and held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import numpy as np

from mmfeat.samples.labels import Targets
from mmfeat.system.hardware import has_onednn

ABSENT = 30.0  # distance below the other logits for a class without training rows
MEMORY = 1 << 30  # bytes of float32 rows to hold; a larger matrix is read again at every pass
CHUNK = 1 << 26  # bytes of float32 rows that are read at a time
CONSTANT = 1e-6  # a column whose deviation is at most this share of its mean is constant
LARGE = 2**22  # multiplications of a product from which on another library is worth while
NULL = 1e-10  # eigenvalues below this share of the largest are rounding errors


def from_probabilities(probabilities: np.ndarray, multilabel: bool) -> np.ndarray:
    """(n, C) float64 log-probabilities, or log-odds where multi-label, cut to [-ABSENT, ABSENT]; predicted numbers
    (n, 1) as they are."""
    shares = np.asarray(probabilities, dtype=np.float64)
    if is_number(shares.shape[-1], multilabel):
        return shares
    with np.errstate(divide="ignore"):
        logs = np.log(shares) - (np.log1p(-shares) if multilabel else 0)
    return np.clip(logs, -ABSENT, ABSENT)


def is_number(columns: int, multilabel: bool) -> bool:
    """Whether the one column of a model is a number, since there is no choice among one class."""
    return columns == 1 and not multilabel


def log_loss(logits: np.ndarray, wanted: np.ndarray, multilabel: bool) -> float:
    """Mean log-loss of (n, C) logits; `wanted` (n, C) bool. The mean squared error of numbers."""
    if wanted.dtype != bool:
        return float(((logits - wanted) ** 2).mean())
    if multilabel:
        return float(np.logaddexp(0, np.where(wanted, -logits, logits)).sum(axis=1).mean())
    return float((np.logaddexp.reduce(logits, axis=1) - logits[wanted]).mean())


class Matrix(Protocol):
    """The (N, D) vectors of all samples, encoders side by side, in memory or on disk."""

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
        """(n, D) raw vectors -> (n, D) float32 standardised vectors; missing values become the mean, which is 0."""
        scaled = np.subtract(vectors, self.mean, dtype=np.float32)
        scaled /= self.std
        if len(missing := np.flatnonzero(np.isnan(scaled.sum(axis=1)))):
            filled = scaled[missing]
            filled[np.isnan(filled)] = 0
            scaled[missing] = filled
        return scaled

    def apply(self, matrix: Matrix, rows: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Apply `function` to the standardised vectors at `rows`, in chunks; rows are read in ascending order."""
        order = np.argsort(rows, kind="stable")
        pieces = [function(self.scaled(matrix.rows(rows[order[part]]))) for part in _parts(len(rows), matrix.width)]
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return np.concatenate(pieces)[inverse]


@dataclass(frozen=True)
class Basis:
    """n training rows, standardised and less their weighted mean, and the eigenvectors of their covariance.

    Eigenvalues `values` (r,) are in falling order, eigenvectors `vectors` are (D, r) with r <= min(n - 1, D): the null
    space is cut, because no penalised linear model has weight there. `weights` (n,) are sample weights. `held` (n, r)
    are the coordinates of the rows in the basis of the eigenvectors, None where the rows do not fit into memory.
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
        """Yield all training rows in order: their coordinates (n, r) if held, else centred rows (n, D) from disk."""
        if self.held is not None:
            yield slice(0, len(self.rows)), self.held
            return
        for part in _parts(len(self.rows), self.matrix.width):
            yield part, self.scaler.scaled(self.matrix.rows(self.rows[part])) - self.centre

    def directions(self, coordinates: np.ndarray) -> np.ndarray:
        """(r, K) coordinates -> the matrix by which a chunk is multiplied to get its (n, K) scores."""
        small = coordinates.astype(np.float32)
        return small if self.held is not None else self.vectors @ small

    def coordinates(self, directions: np.ndarray) -> np.ndarray:
        """Gradients by `directions` -> (r, K) float64 gradients by coordinates: the transpose of `directions`."""
        return (directions if self.held is not None else self.vectors.T @ directions).astype(np.float64)


def make_basis(
    matrix: Matrix,
    targets: Targets,
    rows: np.ndarray,
    class_weights: np.ndarray,
    memory: int = MEMORY,
    standardised: bool = True,
) -> Basis:
    """Make the basis of the training `rows`. In a multi-class problem, the weight of a sample is that of its class.

    Rows that are not `standardised` are only centred.
    The smaller of X'X and XX' is decomposed, so the time grows with min(n, D) cubed.
    """
    rows = np.sort(rows)
    weights = sample_weights(targets.take(rows), class_weights)
    with one_blas_thread():
        scaler, centre, held = _standardised(matrix, rows, weights, memory, standardised)
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
    """(n,) weights of the samples, each that of the sample's class; 1 where a sample may have several classes."""
    if targets.multilabel or targets.numeric:
        return np.ones(len(targets))
    return np.asarray(class_weights, dtype=np.float64)[targets.numbers]


_single_lock = Lock()
_single: dict[str, Any] = {"users": 0, "limits": None}


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Run BLAS and OpenMP on one thread inside the context.

    BLAS has one setting for the whole process, so the first context to be entered sets the limit and the last one to
    be left restores it, also where the contexts run in different threads; OpenMP has a setting for each thread.
    """
    import scipy.linalg  # noqa: F401  SciPy has its own BLAS; a library that is loaded later would not be limited
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


def products(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(n, D) and (m, D) float32 -> (n, m) `left @ right.T`; large ones by oneDNN, which takes half the time of BLAS on
    AMD's processors with AVX-512, and wherever one of n and m is small."""
    if len(left) * right.size < LARGE:
        return left @ right.T
    import torch

    if not has_onednn():
        return left @ right.T
    right = right if right.flags.forc else np.ascontiguousarray(right)  # a transpose is multiplied as it lies
    factors = torch.from_numpy(np.ascontiguousarray(left)), torch.from_numpy(right)
    return torch.ops.mkldnn._linear_pointwise(*factors, None, "none", [], "").numpy()


def eigenpairs(matrix: np.ndarray, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The `most` largest eigenvalues of a symmetric matrix (n, n), in rising order, and their eigenvectors (n, most).

    By torch, which lets other threads work meanwhile; SciPy does not.
    """
    import torch

    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    first = 0 if most is None else max(0, len(matrix) - most)
    return values[first:].numpy(), vectors[:, first:].numpy()


def _parts(count: int, width: int) -> list[slice]:
    """Slices of at most CHUNK bytes over `count` rows; at least one, so that no rows can be concatenated too."""
    size = max(1, CHUNK // (4 * max(width, 1)))
    return [slice(start, min(start + size, count)) for start in range(0, max(count, 1), size)]


def _standardised(
    matrix: Matrix, rows: np.ndarray, weights: np.ndarray, memory: int, by_deviation: bool
) -> tuple[Scaler, np.ndarray, np.ndarray | None]:
    """Scaler, weighted mean of the standardised rows, and the rows less their mean, if they fit into `memory`."""
    parts = _parts(len(rows), matrix.width)
    if 4 * len(rows) * matrix.width <= memory:
        held = np.empty((len(rows), matrix.width), dtype=np.float32)
        for part in parts:
            held[part] = matrix.rows(rows[part])
        scaler = scaler_of((held[part] for part in parts), matrix.width, by_deviation)
        for part in parts:
            held[part] = scaler.scaled(held[part])
        centre = (weights.astype(np.float32) @ held / weights.sum()).astype(np.float32)
        held -= centre
        return scaler, centre, held
    scaler = scaler_of((matrix.rows(rows[part]) for part in parts), matrix.width, by_deviation)
    total = sum(weights[part] @ scaler.scaled(matrix.rows(rows[part])) for part in parts)
    return scaler, (total / weights.sum()).astype(np.float32), None


def _rotated(held: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Compute `held @ vectors` in the memory of `held`, which its (n, r) rows fill from the start."""
    rank, memory = vectors.shape[1], held.reshape(-1)
    for part in _parts(*held.shape):
        memory[part.start * rank : part.stop * rank] = products(held[part], vectors.T).reshape(-1)
    return memory[: len(held) * rank].reshape(len(held), rank)


def scaler_of(chunks: Any, width: int, by_deviation: bool = True) -> Scaler:
    """Mean of the present values and, if wanted, deviation, merged over chunks (Chan, Golub and LeVeque 1983)."""
    count, mean, squares = np.zeros(width), np.zeros(width), np.zeros(width)
    for chunk in chunks:
        present = ~np.isnan(chunk)
        counts = present.sum(0)
        values = np.where(present, chunk, 0)
        chunk_mean = values.sum(0, dtype=np.float64) / np.maximum(counts, 1)
        values = np.where(present, values - chunk_mean.astype(np.float32), 0)
        chunk_squares = np.square(values, out=values).sum(0, dtype=np.float64)
        total = np.maximum(count + counts, 1)
        squares += chunk_squares + (chunk_mean - mean) ** 2 * count * counts / total
        mean += (chunk_mean - mean) * counts / total
        count += counts
    std = np.sqrt(squares / np.maximum(count, 1))
    std[(std <= CONSTANT * np.maximum(np.abs(mean), CONSTANT)) | (not by_deviation)] = 1
    return Scaler(mean.astype(np.float32), std.astype(np.float32))


def _by_columns(chunks: Any, weights: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors from X'X (D, D), in float32; a linear model corrects their rounding errors."""
    gram = np.zeros((width, width))
    for part, chunk in chunks:
        root = chunk * np.sqrt(weights[part, None]).astype(np.float32)
        gram += root.T @ root
    covariance = (gram / weights.sum()).astype(np.float32)
    values, vectors = eigenpairs(covariance)
    kept = np.flatnonzero(values > NULL * max(values.max(initial=0), CONSTANT))[::-1]
    return values[kept].astype(np.float64), np.ascontiguousarray(vectors[:, kept])


def _by_samples(held: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors from XX' (n, n), in float64: division by small eigenvalues enlarges rounding."""
    root = held * np.sqrt(weights[:, None] / weights.sum())
    values, vectors = eigenpairs(root @ root.T)
    kept = np.flatnonzero(values > NULL * max(values.max(initial=0), CONSTANT))[::-1]
    directions = root.T @ (vectors[:, kept] / np.sqrt(values[kept]))
    return values[kept], np.ascontiguousarray(directions, dtype=np.float32)
