"""The k nearest training samples by cosine similarity of standardised vectors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmfeat.baselines.basis import Basis, Matrix, Scaler, from_probabilities, products
from mmfeat.samples.labels import Targets

NEIGHBOURS = (5, 10, 20, 40, 80)
TEMPERATURE = 0.07  # votes weigh exp(similarity / TEMPERATURE) (Wu et al. 2018)
STEPS = 1e5  # similarities are rounded to multiples of 1 / STEPS, so that duplicates tie in spite of rounding errors
QUERIES = 512  # vectors that are compared at a time
VOTES = 2**22  # most votes that are counted at a time
Nearest = tuple[np.ndarray, np.ndarray]  # (n, K) falling similarities and (n, K) indices of the nearest neighbours


@dataclass(frozen=True)
class NeighbourHead:
    """Training `vectors` (n, D), float16 of length 1, and their `votes` (n, C, 2) for and against each class. Votes for
    numbers are the number and what it lacks of 1, so that the shares of votes are their means.

    `prior` (C,) counts as one more vote. With `by_similarity`, nearer neighbours have larger votes.
    """

    scaler: Scaler
    vectors: np.ndarray
    votes: np.ndarray
    prior: np.ndarray
    multilabel: bool
    neighbours: int = NEIGHBOURS[0]
    by_similarity: bool = False

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64 log-probabilities, or log-odds where multi-label; computed in pieces, as votes take memory."""
        size = QUERIES * max(1, VOTES // (QUERIES * self.neighbours * self.votes[0].size))
        pieces = (rows[start : start + size] for start in range(0, max(len(rows), 1), size))
        return np.concatenate([self.vote(self.nearest(matrix, piece)) for piece in pieces])

    def nearest(self, matrix: Matrix, rows: np.ndarray) -> Nearest:
        """The `neighbours` nearest training samples of each sample at `rows`."""
        both = self.scaler.apply(matrix, rows, lambda scaled: np.stack(self._search(scaled), axis=-1))
        return both[..., 0], both[..., 1].astype(np.int64)

    def _search(self, scaled: np.ndarray) -> Nearest:
        most = min(self.neighbours, len(self.vectors))
        training = self.vectors.astype(np.float32)
        similarities, indices = [], []
        for start in range(0, max(len(scaled), 1), QUERIES):
            cosines = products(_unit(scaled[start : start + QUERIES]), training)
            largest = _largest(cosines, most)
            similarities.append(np.take_along_axis(cosines, largest, axis=1))
            indices.append(largest)
        return np.concatenate(similarities).astype(np.float64), np.concatenate(indices)

    def vote(self, nearest: Nearest) -> np.ndarray:
        """(m, C) logits from at least `neighbours` nearest samples.

        A sample without any vector has the similarity 0 to all others: it gets no votes, only the prior.
        """
        values, indices = (array[:, : self.neighbours] for array in nearest)
        most = values.max(axis=1, keepdims=True)
        counts = np.exp((values - most) / TEMPERATURE) if self.by_similarity else np.ones_like(values)
        counts = np.where(most == 0, 0.0, counts)
        votes = np.einsum("mk,mkcs->mcs", counts, self.votes.astype(np.float64)[indices])
        return from_probabilities((votes[..., 0] + self.prior) / (votes.sum(axis=-1) + 1), self.multilabel)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Plain values for JSON, and arrays; `restore` takes both."""
        config = {name: getattr(self, name) for name in ("multilabel", "neighbours", "by_similarity")}
        tensors = {"vectors": self.vectors, "votes": self.votes, "prior": self.prior}
        return config, {**tensors, "mean": self.scaler.mean, "std": self.scaler.std}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> NeighbourHead:
        """The head whose `state` returned `config` and `tensors`."""
        arrays = tensors["vectors"], tensors["votes"], tensors["prior"]
        return cls(Scaler(tensors["mean"], tensors["std"]), *arrays, **config)


def neighbour_head(
    basis: Basis, rows: np.ndarray, targets: Targets, class_weights: np.ndarray, prior: np.ndarray
) -> NeighbourHead:
    """A head that keeps the vectors at `rows`, with their `targets`. A vote weighs as much as the voter's class."""
    weights = np.asarray(class_weights, dtype=np.float64)
    if targets.numeric:
        votes = np.stack([targets.matrix, 1 - targets.matrix], axis=-1)
    elif targets.multilabel:
        votes = np.stack([targets.matrix * weights, ~targets.matrix], axis=-1)
    else:
        voters = weights[targets.numbers][:, None]
        votes = np.stack([targets.matrix * voters, ~targets.matrix * voters], axis=-1)
    vectors = basis.scaler.apply(basis.matrix, rows, lambda scaled: _unit(scaled).astype(np.float16))
    votes = votes.astype(np.float64 if targets.numeric else np.float32)
    return NeighbourHead(basis.scaler, vectors, votes, prior, targets.multilabel)


def neighbour_heads(head: NeighbourHead) -> Iterator[tuple[dict[str, float], NeighbourHead]]:
    """Yield the head with each number of neighbours, with equal votes and with votes by similarity."""
    for count in NEIGHBOURS:
        for by_similarity in (False, True):
            setting = {"k": float(count), "by_similarity": float(by_similarity)}
            yield setting, replace(head, neighbours=count, by_similarity=by_similarity)


def _largest(cosines: np.ndarray, most: int) -> np.ndarray:
    """(n, most) columns of the largest cosines of each row, falling; ties after rounding go to the first column."""
    far = -np.round(cosines * STEPS)
    columns = np.argpartition(far, most - 1, axis=1)[:, :most]
    furthest = np.take_along_axis(far, columns, axis=1).max(axis=1, keepdims=True)
    for row in np.flatnonzero((far <= furthest).sum(axis=1) > most):
        columns[row] = np.argsort(far[row], kind="stable")[:most]
    order = np.lexsort((columns, np.take_along_axis(far, columns, axis=1)), axis=1)
    return np.take_along_axis(columns, order, axis=1)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
