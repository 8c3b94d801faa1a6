"""Gated fusion: g = sigmoid(MLP([image; text])), a scalar; g * text + (1 - g) * image -> classifier."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfeat.heads.concat import HIDDEN
from mmfeat.heads.inputs import Batch, Fusion, Shape
from mmfeat.heads.layers import Classifier, Linear

WIDTH = 256  # of both modalities, where they differ
GATE_WIDTH = 64


class Gated(Fusion):
    """One number a sample says how far to trust its text against its image.

    Modalities of different widths are first projected to 256. A single modality is weighed against nothing, a zero.
    """

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        widths = {shape.width(modality) for modality in shape.widths}
        width = WIDTH if len(widths) > 1 else widths.pop()
        self.projections = nn.ModuleDict(
            {m: Linear(heads, shape.width(m), width) for m in shape.widths if shape.width(m) != width}
        )
        self.gate_hidden = Linear(heads, width * len(shape.widths), GATE_WIDTH)
        self.gate = Linear(heads, GATE_WIDTH, 1)
        self.classifier = Classifier(heads, width, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        alike = [self.projections[m](x) if m in self.projections else x for m, x in vectors.items()]
        gate = self.gate(F.relu(self.gate_hidden(torch.cat(alike, -1)))).sigmoid()
        image = alike[0] if len(alike) > 1 else torch.zeros_like(alike[0])
        return self.classifier(gate * alike[-1] + (1 - gate) * image, batch.keep)
