"""FiLM on both: [image; text] -> (gamma, beta) for both modalities, the modulated vectors -> classifier."""

from __future__ import annotations

import torch
from torch import Tensor

from mmfeat.heads.concat import HIDDEN
from mmfeat.heads.film import Modulation
from mmfeat.heads.inputs import Batch, Fusion, Shape
from mmfeat.heads.layers import Classifier


class FilmConcat(Fusion):
    """Both modalities together say which features of either count."""

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        self.modulation = Modulation(heads, shape.total, shape.total)
        self.classifier = Classifier(heads, shape.total, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        joined = torch.cat(list(vectors.values()), -1)
        return self.classifier(self.modulation(joined, joined), batch.keep)
