"""Early fusion: the text becomes a fourth channel of the picture, and a small convolutional net sees all four.

text vector -> Linear -> 224 x 224, beside the 3 x 224 x 224 picture -> four convolutions -> mean -> classes. It needs
pixels, so it is trained here and not on cached vectors.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from mmfeat.finetune.readers import SIDE
from mmfeat.heads.inputs import Batch, Fusion, Shape

EARLY = "early"
CHANNELS = (16, 32, 64, 128)


class EarlyFusion(Fusion):
    """One head (K = 1), whose image is the pixels; its convolutions have no axis of heads."""

    units = CHANNELS[-1]
    is_stacked = False

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        assert heads == 1  # it is never stacked
        self.channel = nn.Linear(shape.width("text"), SIDE * SIDE)
        steps = [4, *CHANNELS]
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(given, wanted, 3, 2, 1, bias=False), nn.BatchNorm2d(wanted), nn.ReLU())
                for given, wanted in itertools.pairwise(steps)
            )
        )
        self.output = nn.Linear(CHANNELS[-1], classes)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        image, text = vectors["image"][0], vectors["text"][0]
        picture = torch.cat([image.view(-1, 3, SIDE, SIDE), self.channel(text).view(-1, 1, SIDE, SIDE)], 1)
        seen = self.convolutions(picture).mean((2, 3))
        return self.output(seen if batch.keep is None else seen * batch.keep[0])[None]

    def reset_head(self, head: int, generator: torch.Generator) -> None:
        """First weights as torch draws them, from a generator of their own."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for parameter in module.parameters():
                    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.data.copy_(drawn)
