"""Kernel logistic regression: a sample is described and classified by how alike it is to some training samples.

The kernel of two samples is exp(sum over encoders of (cosine - 1)), of vectors that are scaled to length 1, centred by
the mean of the training rows, and scaled to length 1 again. It is known to some random training rows, the landmarks, by
the method of Nyström (Williams and Seeger, 2001): logistic regression learns from the leading components of their
kernel matrix. Its weights are kept as one weight a landmark, so that a prediction is two products and an exponential.
Few columns say something each: those of a narrow encoder are standardised and follow the components of wider ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from mmfeat.baselines.basis import Matrix, Scaler, eigenpairs, products, scaler_of
from mmfeat.baselines.linear import LinearHead

LANDMARKS = 1600
COMPONENTS = 400
STRENGTHS = (0.03, 0.1, 0.3, 1.0, 1.7, 3.0, 5.5, 10.0, 30.0)  # C of logistic regression, strong to weak
NARROW = 32  # columns of the narrowest encoder whose vectors are compared as a whole
SHORTEST = 1e-6  # a vector that is shorter counts as missing
LEAST = 1e-6  # share of the largest eigenvalue below which a component is rounding errors


@dataclass(frozen=True)
class Kernel:
    """A matrix of the kernels of all samples of `matrix` with L landmarks; times `components`, where there are some.

    `widths` are those of the encoders side by side, and `beside` the numbers of those whose m columns follow the
    kernels in place of being compared. `scaler` standardises these and the columns of a table, others stay as they are.
    `centre` (D,) is the mean of the scaled vectors, and `landmarks` (L, D - m) float16 are prepared vectors.
    """

    matrix: Any  # a Matrix, but None in a head, which is given one with the rows
    widths: tuple[int, ...]
    scaler: Scaler
    centre: np.ndarray
    landmarks: np.ndarray
    components: np.ndarray | None = None
    beside: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        own = len(self.landmarks) if self.components is None else self.components.shape[1]
        return own + int((~self.compared).sum())

    @cached_property
    def compared(self) -> np.ndarray:
        """(D,) bool: whether a column is one of the encoders that are compared."""
        return np.repeat([number not in self.beside for number in range(len(self.widths))], self.widths)

    def __len__(self) -> int:
        return len(self.matrix)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """(n,) row numbers -> (n, L + m) float32 kernels and columns, or (n, r + m) components and columns."""
        vectors = self.matrix.rows(rows)
        kernels = self.kernels(self.prepared(vectors))
        kernels = kernels if self.components is None else products(kernels, self.components.T)
        return np.concatenate([kernels, self.scaler.scaled(vectors)[:, ~self.compared]], axis=1)

    def prepared(self, vectors: np.ndarray) -> np.ndarray:
        """(n, D) raw vectors -> (n, D - m) float32, of length 1 for each encoder, 0 where its vector is missing."""
        present = ~np.isnan(vectors)
        unit = _by_encoder(_unit, self.scaler.scaled(vectors), self.widths)
        return _by_encoder(_unit, np.where(present, unit - self.centre, 0), self.widths)[:, self.compared]

    def kernels(self, prepared: np.ndarray) -> np.ndarray:
        """(n, D - m) prepared vectors -> (n, L) kernels."""
        return np.exp(products(prepared, self.landmarks.astype(np.float32)) - (len(self.widths) - len(self.beside)))


@dataclass(frozen=True)
class KernelHead:
    """A fitted kernel logistic regression: `linear` reads the kernels with the landmarks of `kernel`, which has no
    matrix of its own."""

    kernel: Kernel
    linear: LinearHead

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64 log-probabilities, or log-odds where multi-label."""
        return self.linear.logits(replace(self.kernel, matrix=matrix), rows)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Plain values for JSON, and arrays; `restore` takes both."""
        config, tensors = self.linear.state()
        kernel = {"kernel_mean": self.kernel.scaler.mean, "kernel_std": self.kernel.scaler.std}
        kernel |= {"centre": self.kernel.centre, "landmarks": self.kernel.landmarks}
        narrow = {"beside": list(self.kernel.beside)} if self.kernel.beside else {}
        return {**config, "widths": list(self.kernel.widths), **narrow}, {**tensors, **kernel}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> KernelHead:
        """The head whose `state` returned `config` and `tensors`."""
        scaler = Scaler(tensors["kernel_mean"], tensors["kernel_std"])
        widths, beside = tuple(config["widths"]), tuple(config.get("beside", ()))
        kernel = Kernel(None, widths, scaler, tensors["centre"], tensors["landmarks"], beside=beside)
        return cls(kernel, LinearHead.restore(config, tensors))


def make_kernel(
    matrix: Matrix, widths: Sequence[int], has_table: bool, rows: np.ndarray, landmarks: np.ndarray
) -> Kernel:
    """Make the kernel of training `rows`, of which `landmarks` are some; the last of the `widths` is that of a table if
    `has_table`.

    An encoder of less than NARROW columns stands beside the wider ones, with a mean square length of 1 as the kernel
    has. Where all are narrow, they are compared.
    """
    vectors = matrix.rows(np.sort(rows))
    narrow = [number for number, width in enumerate(widths) if width < NARROW]
    beside = narrow if len(narrow) < len(widths) else []
    factors = [np.sqrt(width) if number in beside else 1 for number, width in enumerate(widths)]
    scaled = [number in narrow or (has_table and number == len(widths) - 1) for number in range(len(widths))]
    chosen = np.flatnonzero(np.repeat(scaled, widths))
    columns = scaler_of([vectors[:, chosen]], len(chosen))
    scaler = Scaler(np.zeros(matrix.width, np.float32), np.repeat(factors, widths).astype(np.float32))
    scaler.mean[chosen], scaler.std[chosen] = columns.mean, columns.std * scaler.std[chosen]
    unit = _by_encoder(_unit, scaler.scaled(vectors), widths)
    present = ~np.isnan(vectors)
    centre = unit.sum(0, dtype=np.float64, where=present) / np.maximum(present.sum(0), 1)
    empty = np.empty((0, matrix.width), np.float16)
    kernel = Kernel(matrix, tuple(widths), scaler, centre.astype(np.float32), empty, beside=tuple(beside))
    known = kernel.prepared(matrix.rows(landmarks)).astype(np.float16)
    kernel = replace(kernel, landmarks=known)
    values, vectors = eigenpairs(kernel.kernels(known.astype(np.float32)), COMPONENTS)
    kept = np.flatnonzero(values > LEAST * values.max(initial=LEAST))[::-1]
    return replace(kernel, components=(vectors[:, kept] / np.sqrt(values[kept])).astype(np.float32))


def kernel_head(kernel: Kernel, linear: LinearHead, strength: float) -> KernelHead:
    """The head of a linear model of the kernel's components."""
    assert kernel.components is not None, "a kernel to train on has components"
    plain = replace(kernel, matrix=None, components=None)
    size, rank = plain.width, kernel.components.shape[1]
    unscaled = Scaler(np.zeros(size, np.float32), np.ones(size, np.float32))
    intercepts = linear.intercepts - linear.scaler.mean.astype(np.float64) @ linear.coefficients
    weights = np.concatenate([kernel.components @ linear.coefficients[:rank], linear.coefficients[rank:]])
    head = replace(linear, strength=strength, scaler=unscaled, coefficients=weights, intercepts=intercepts)
    return KernelHead(plain, head)


def _by_encoder(function: Any, vectors: np.ndarray, widths: Sequence[int]) -> np.ndarray:
    ends = np.cumsum(widths)[:-1]
    return np.concatenate([function(part) for part in np.split(vectors, ends, axis=1)], axis=1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > SHORTEST, vectors / np.maximum(length, SHORTEST), 0).astype(np.float32)
