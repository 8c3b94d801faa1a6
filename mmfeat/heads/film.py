"""FiLM (Perez et al., AAAI 2018): text -> (gamma, beta); gamma * image + beta beside text -> classifier."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfeat.heads.concat import HIDDEN
from mmfeat.heads.inputs import Batch, Fusion, Shape
from mmfeat.heads.layers import Classifier, Linear, Stacked

GENERATOR_WIDTH = 64


class Modulation(Stacked):
    """condition -> 64 -> (gamma, beta); gamma = 1 + tanh(...) stays between 0 and 2. -> gamma * x + beta."""

    def __init__(self, heads: int, condition: int, width: int) -> None:
        super().__init__()
        self.hidden = Linear(heads, condition, GENERATOR_WIDTH)
        self.output = Linear(heads, GENERATOR_WIDTH, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.output(F.relu(self.hidden(condition))).chunk(2, dim=-1)
        return (1 + torch.tanh(gamma)) * x + beta


class Film(Fusion):
    """The text says which features of the image count. A single modality modulates itself."""

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        modulated, condition = next(iter(shape.widths)), list(shape.widths)[-1]
        self.modulation = Modulation(heads, shape.width(condition), shape.width(modulated))
        self.classifier = Classifier(heads, shape.total, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        image, *text = vectors.values()
        modulated = self.modulation(image, text[0] if text else image)
        return self.classifier(torch.cat([modulated, *text], -1), batch.keep)
