"""The k nearest training samples by cosine similarity of standardised vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmfeat.baselines.basis import Basis, Matrix, Scaler, from_probabilities
from mmfeat.samples.labels import Targets

NEIGHBOURS = (5, 10, 20, 40, 80)
TEMPERATURE = 0.07  # votes weigh exp(similarity / TEMPERATURE) (Wu et al. 2018)
STEPS = 1e5  # similarities are rounded to 1 / STEPS, so that duplicates tie whatever their last digits
QUERIES = 512  # vectors that are compared at a time
Found = tuple[np.ndarray, np.ndarray]  # (n, K) similarities, falling, and numbers of the neighbours


@dataclass(frozen=True)
class NeighbourHead:
    """`vectors` (n, D) float16 of length 1 and what each says of every class: `votes` (n, C, 2) for and against it.

    `prior` (C,) counts as one more vote. `by_similarity`: nearer neighbours count more.
    """

    scaler: Scaler
    vectors: np.ndarray
    votes: np.ndarray
    prior: np.ndarray
    multilabel: bool
    neighbours: int = NEIGHBOURS[0]
    by_similarity: bool = False

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64 log-probabilities, or log-odds where multi-label."""
        return self.voted(self.found(matrix, rows))

    def found(self, matrix: Matrix, rows: np.ndarray) -> Found:
        """The nearest training samples of those at `rows`, as many as vote."""
        both = self.scaler.apply(matrix, rows, lambda scaled: np.stack(self._nearest(scaled), axis=-1))
        return both[..., 0], both[..., 1].astype(np.int64)

    def _nearest(self, scaled: np.ndarray) -> Found:
        most = min(self.neighbours, len(self.vectors))
        training = self.vectors.astype(np.float32)
        similarities, numbers = [], []
        for start in range(0, max(len(scaled), 1), QUERIES):
            products = _unit(scaled[start : start + QUERIES]) @ training.T
            some = _largest(products, most)
            similarities.append(np.take_along_axis(products, some, axis=1))
            numbers.append(some)
        return np.concatenate(similarities).astype(np.float64), np.concatenate(numbers)

    def voted(self, found: Found) -> np.ndarray:
        """(m, C) logits from at least as many neighbours as vote; nobody votes on a sample that is like none, of which
        nothing is seen."""
        values, numbers = (each[:, : self.neighbours] for each in found)
        most = values.max(axis=1, keepdims=True)
        counts = np.exp((values - most) / TEMPERATURE) if self.by_similarity else np.ones_like(values)
        counts = np.where(most == 0, 0.0, counts)
        votes = np.einsum("mk,mkcs->mcs", counts, self.votes[numbers].astype(np.float64))
        return from_probabilities((votes[..., 0] + self.prior) / (votes.sum(axis=-1) + 1), self.multilabel)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What JSON can hold, and arrays."""
        config = {
            "multilabel": self.multilabel,
            "neighbours": self.neighbours,
            "by_similarity": self.by_similarity,
        }
        tensors = {"vectors": self.vectors, "votes": self.votes, "prior": self.prior}
        return config, {**tensors, "mean": self.scaler.mean, "std": self.scaler.std}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> NeighbourHead:
        """The head whose `state` this is."""
        arrays = tensors["vectors"], tensors["votes"], tensors["prior"]
        return cls(Scaler(tensors["mean"], tensors["std"]), *arrays, **config)


def neighbour_head(
    basis: Basis, rows: np.ndarray, targets: Targets, class_weights: np.ndarray, prior: np.ndarray
) -> NeighbourHead:
    """Keeps the vectors at `rows`, whose targets are `targets`. A vote weighs what the class of the voter does."""
    weights = np.asarray(class_weights, dtype=np.float64)
    if targets.multilabel:
        votes = np.stack([targets.matrix * weights, ~targets.matrix], axis=-1)
    else:
        voters = weights[targets.numbers][:, None]
        votes = np.stack([targets.matrix * voters, ~targets.matrix * voters], axis=-1)
    vectors = basis.scaler.apply(basis.matrix, rows, lambda scaled: _unit(scaled).astype(np.float16))
    return NeighbourHead(basis.scaler, vectors, votes.astype(np.float32), prior, targets.multilabel)


def neighbour_heads(head: NeighbourHead) -> Iterator[tuple[dict[str, float], NeighbourHead]]:
    """The head with each number of neighbours, counted alike and by similarity."""
    for count in NEIGHBOURS:
        for by_similarity in (False, True):
            setting = {"k": float(count), "by_similarity": float(by_similarity)}
            yield setting, replace(head, neighbours=count, by_similarity=by_similarity)


def _largest(products: np.ndarray, most: int) -> np.ndarray:
    """(n, most) columns of the largest of each row, falling; of those that `STEPS` cannot part the first."""
    far = -np.round(products * STEPS)
    some = np.argpartition(far, most - 1, axis=1)[:, :most]
    furthest = np.take_along_axis(far, some, axis=1).max(axis=1, keepdims=True)
    for row in np.flatnonzero((far <= furthest).sum(axis=1) > most):
        some[row] = np.argsort(far[row], kind="stable")[:most]
    order = np.lexsort((some, np.take_along_axis(far, some, axis=1)), axis=1)
    return np.take_along_axis(some, order, axis=1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
