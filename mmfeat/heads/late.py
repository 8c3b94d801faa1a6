"""Late fusion: each modality -> 512; [image; text] -> 512, ReLU, dropout -> classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfeat.heads.inputs import Batch, Fusion, Shape
from mmfeat.heads.layers import Classifier, Linear

WIDTH = 512


class Late(Fusion):
    """A linear projection of each modality, joined only afterwards."""

    units = WIDTH

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        self.projections = nn.ModuleDict({m: Linear(heads, shape.width(m), WIDTH) for m in shape.widths})
        self.classifier = Classifier(heads, WIDTH * len(shape.widths), classes, (WIDTH,), normalised=False)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        projected = [self.projections[modality](x) for modality, x in vectors.items()]
        return self.classifier(torch.cat(projected, -1), batch.keep)
