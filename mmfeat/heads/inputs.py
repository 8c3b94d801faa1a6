"""The way of one encoder's vectors into a fusion."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class EncoderInput(nn.Module):
    """Standardise with statistics of the training fold, LayerNorm, and a learned embedding where missing.

    (N, D) vectors and an (N,) mask -> (N, D).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))
        self.norm = nn.LayerNorm(width)
        self.missing = nn.Parameter(torch.zeros(width))

    @torch.no_grad()
    def standardise_on(self, vectors: Tensor, mask: Tensor) -> None:
        """Take mean and standard deviation from the rows that are there."""
        present = vectors[mask]
        if len(present):
            std = present.std(0, unbiased=False)
            self.mean.copy_(present.mean(0))
            self.std.copy_(torch.where(std > 1e-6, std, torch.ones_like(std)))

    def forward(self, vectors: Tensor, mask: Tensor) -> Tensor:
        normed = self.norm((vectors - self.mean) / self.std)
        return torch.where(mask.unsqueeze(-1), normed, self.missing)


class FusionModule(nn.Module):
    """What every fusion is: one input an encoder, and a forward from vectors and masks to logits."""

    inputs: nn.ModuleList

    def standardise_on(self, vectors: list[Tensor], masks: list[Tensor]) -> None:
        """Fit every input's statistics on the training fold."""
        for module, x, mask in zip(self.inputs, vectors, masks, strict=True):
            cast(EncoderInput, module).standardise_on(x, mask)

    def prepared(self, vectors: list[Tensor], masks: list[Tensor]) -> list[Tensor]:
        """Lists of (N, D) vectors and (N,) masks, one an encoder -> standardised (N, D) vectors."""
        return [module(x, mask) for module, x, mask in zip(self.inputs, vectors, masks, strict=True)]

    @property
    def widths(self) -> list[int]:
        return [len(cast(EncoderInput, module).missing) for module in self.inputs]
