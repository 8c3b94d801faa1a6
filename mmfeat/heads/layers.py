"""Layers of K heads at once: every tensor has a leading axis of heads, every head its own parameters.

A stack of one is an ordinary head, so there is one definition of each architecture. A head's first weights come from
its own generator: they do not depend on its neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH_NORM_MOMENTUM = 0.1
EPSILON = 1e-5


class Stacked(nn.Module):
    """A layer whose parameters and buffers all have the heads in front."""

    @torch.no_grad()
    def reset(self, head: int, generator: torch.Generator) -> None:
        """Draw the first weights of one head."""


class Linear(Stacked):
    """K times `nn.Linear`, and its first weights. (K, ..., inputs) -> (K, ..., outputs).

    `centred`: batch normalisation follows, which takes the bias away again. The gradient of the bias would be nothing
    but rounding, which AdamW blows up to whole steps, so it gets none.
    """

    def __init__(self, heads: int, inputs: int, outputs: int, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred
        self.weight = nn.Parameter(torch.zeros(heads, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(heads, 1, outputs))

    @torch.no_grad()
    def reset(self, head: int, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(max(self.weight.shape[1], 1))  # nothing comes in where a modality is missing everywhere
        for parameter in (self.weight, self.bias):
            parameter[head].uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, -2) if x.dim() > 3 else x
        bias = self.bias.detach() if self.centred else self.bias
        return torch.baddbmm(bias, rows, self.weight).view(*x.shape[:-1], self.weight.shape[-1])


class BatchNorm(Stacked):
    """K times `nn.BatchNorm1d`: (K, B, D) -> (K, B, D), statistics of each head's own batch."""

    mean: Tensor
    var: Tensor

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, 1, width))
        self.bias = nn.Parameter(torch.zeros(heads, 1, width))
        self.register_buffer("mean", torch.zeros(heads, 1, width))
        self.register_buffer("var", torch.ones(heads, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.mean) * (self.weight * torch.rsqrt(self.var + EPSILON)) + self.bias
        mean = x.mean(1, keepdim=True)
        centred = x - mean
        var = centred.square().mean(1, keepdim=True)
        with torch.no_grad():
            self.mean.lerp_(mean, BATCH_NORM_MOMENTUM)
            self.var.lerp_(var * (x.shape[1] / max(x.shape[1] - 1, 1)), BATCH_NORM_MOMENTUM)
        return centred * (self.weight * torch.rsqrt(var + EPSILON)) + self.bias


class LayerNorm(Stacked):
    """K times `nn.LayerNorm` over the last axis."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(heads, width))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        shape = (len(x), *[1] * (x.dim() - 2), -1)
        return F.layer_norm(x, x.shape[-1:]) * self.weight.view(shape) + self.bias.view(shape)


class Scalar(Stacked):
    """One learned number a head, (K, 1, 1)."""

    def __init__(self, heads: int, start: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full((heads, 1, 1), start))


class Classifier(Stacked):
    """fused -> hidden sizes -> classes, with BatchNorm, ReLU and dropout after each hidden layer."""

    def __init__(self, heads: int, width: int, classes: int, hidden: tuple[int, ...], normalised: bool = True) -> None:
        super().__init__()
        widths = (width, *hidden)
        self.hidden = hidden
        self.linears = nn.ModuleList(Linear(heads, *pair, normalised) for pair in zip(widths, hidden, strict=False))
        self.norms = nn.ModuleList(BatchNorm(heads, size) if normalised else nn.Identity() for size in hidden)
        self.output = Linear(heads, widths[-1], classes)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """(K, B, D), and (K, B, sum of hidden) factors of dropout (0 or 1 / keep rate) or None -> (K, B, C)."""
        kept = keep.split(self.hidden, -1) if keep is not None else [None] * len(self.hidden)
        for linear, norm, factor in zip(self.linears, self.norms, kept, strict=True):
            x = F.relu(norm(linear(x)))
            x = x if factor is None else x * factor
        return self.output(x)
