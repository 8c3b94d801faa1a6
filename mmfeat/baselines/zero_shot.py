"""Zero-shot: classes scored by their names, by the cosine of a sample's vectors to the vectors of the names.

As in CLIP (Radford et al., 2021) and in open_clip's `build_zero_shot_classifier`; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfeat.baselines.basis import Matrix, Scaler, from_probabilities

SCALE = 100.0  # open_clip's factor of the cosines; a decision's temperature replaces it where there are labels
SHORTEST = 1e-12  # length of a vector that counts as missing


@dataclass(frozen=True)
class ZeroShot:
    """SCALE times the cosine of a vector and a class, the mean over the encoders whose vector is present.

    `classes` maps the first column of an encoder to the (C, D) vectors of the classes, of length 1; other columns do
    not count. Where a sample may have several classes, a logit is the log-odds of a class against all others.
    """

    classes: Mapping[int, np.ndarray]
    multilabel: bool

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64 logits of the samples at `rows`; equal for all classes where a sample has no vector."""
        plain = Scaler(np.zeros(matrix.width, np.float32), np.ones(matrix.width, np.float32))
        return plain.apply(matrix, rows, self._scored)

    def _scored(self, vectors: np.ndarray) -> np.ndarray:
        """(n, D) vectors, 0 where one is missing -> (n, C) logits."""
        cosines, present = 0.0, np.zeros((len(vectors), 1))
        for start, classes in self.classes.items():
            part = vectors[:, start : start + classes.shape[1]].astype(np.float64)
            length = np.linalg.norm(part, axis=1, keepdims=True)
            cosines = cosines + part / np.maximum(length, SHORTEST) @ classes.T.astype(np.float64)
            present += length > SHORTEST
        logits = SCALE * cosines / np.maximum(present, 1)
        if not self.multilabel:
            return logits
        shares = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
        return from_probabilities(shares, multilabel=True)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Plain values for JSON, and arrays; `restore` takes both."""
        return {"multilabel": self.multilabel}, {str(start): vectors for start, vectors in self.classes.items()}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> ZeroShot:
        """The model whose `state` returned `config` and `tensors`."""
        return cls({int(start): tensors[start] for start in sorted(tensors, key=int)}, config["multilabel"])
