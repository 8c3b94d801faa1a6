"""Concatenation: [image; text] -> 256 -> 64 -> classes."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfeat.heads.inputs import Batch, Fusion, Shape
from mmfeat.heads.layers import Classifier

HIDDEN = (256, 64)  # of the classifier behind every fusion but the late one


class Concat(Fusion):
    """The vectors of all modalities side by side, then the classifier."""

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        self.classifier = Classifier(heads, shape.total, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.classifier(torch.cat(list(vectors.values()), -1), batch.keep)
