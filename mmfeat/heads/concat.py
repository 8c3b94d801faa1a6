"""Concatenation: [image; text] -> 256 -> 64 -> classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmfeat.heads.inputs import EncoderInput, FusionModule


class Concat(FusionModule):
    """Every encoder's vectors side by side, then two hidden layers with BatchNorm, ReLU and dropout."""

    hidden = (256, 64)

    def __init__(self, widths: list[int], classes: int, dropout: float) -> None:
        super().__init__()
        self.inputs = nn.ModuleList(EncoderInput(width) for width in widths)
        layers: list[nn.Module] = []
        last = sum(widths)
        for size in self.hidden:
            layers += [nn.Linear(last, size), nn.BatchNorm1d(size), nn.ReLU(), nn.Dropout(dropout)]
            last = size
        self.classifier = nn.Sequential(*layers, nn.Linear(last, classes))

    def forward(self, vectors: list[Tensor], masks: list[Tensor]) -> Tensor:
        """Lists of (N, D) vectors and (N,) masks, one an encoder -> (N, C) logits."""
        return self.classifier(torch.cat(self.prepared(vectors, masks), dim=-1))
