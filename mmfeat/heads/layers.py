"""Layers of K stacked heads: every tensor has a leading axis of heads, and every head its own parameters.

A stack of one is an ordinary head, so there is one definition of each architecture. A generator for each head draws its
first weights, which do not depend on the other heads of the stack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfeat.samples.table_columns import TABLE
from mmfeat.system.hardware import has_onednn

BATCH_NORM_MOMENTUM = 0.1
EPSILON = 1e-5
ONEDNN = has_onednn()
Tokens: TypeAlias = "list[tuple[Tensor, Tensor]]"  # (K, B, T, D) values and a (K, B, T) mask of each source


class Stacked(nn.Module):
    """A layer whose parameters and buffers all have a leading axis of heads."""

    @torch.no_grad()
    def reset(self, head: int, generator: torch.Generator) -> None:
        """Draw the first weights of one head."""


class Linear(Stacked):
    """K times `nn.Linear`, with the same first weights: (K, ..., inputs) -> (K, ..., outputs).

    A `centred` layer is followed by batch normalisation, which subtracts the bias again. The gradient of the bias would
    consist of rounding errors, which AdamW scales up to whole steps; so the bias gets no gradient.

    A `rounded` layer rounds factors and product to bfloat16 in training; parameters and predictions stay float32.
    """

    rounded = False

    def __init__(self, heads: int, inputs: int, outputs: int, centred: bool = False) -> None:
        super().__init__()
        self.centred = centred
        self.weight = nn.Parameter(torch.zeros(heads, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(heads, 1, outputs))

    @torch.no_grad()
    def reset(self, head: int, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(max(self.weight.shape[1], 1))  # 0 inputs where a modality is missing everywhere
        for parameter in (self.weight, self.bias):
            parameter[head].uniform_(-bound, bound, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, -2) if x.dim() > 3 else x
        bias = self.bias.detach() if self.centred else self.bias
        return product(bias, rows, self.weight, self.rounded and self.training).view(*x.shape[:-1], -1)


def product(bias: Tensor, x: Tensor, weight: Tensor, rounded: bool = False) -> Tensor:
    """(K, 1, W) + (K, B, D) @ (K, D, W), with `rounded` factors and product in bfloat16.

    Predictions on a CPU are computed by oneDNN, head after head: on AMD's processors with AVX-512 in half the time.
    """
    if rounded:
        return torch.bmm(x.bfloat16(), weight.bfloat16()) + bias
    if not (ONEDNN and torch.is_inference_mode_enabled() and x.is_cpu and x.dtype == torch.float32 and x.numel()):
        return torch.baddbmm(bias, x, weight)
    by_head = zip(x, weight.transpose(1, 2), bias[:, 0], strict=True)
    return torch.stack([torch.ops.mkldnn._linear_pointwise(*factors, "none", [], "") for factors in by_head])


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
    """The classifier behind a fusion: fused -> hidden sizes -> classes, with BatchNorm, ReLU and dropout in between."""

    def __init__(self, heads: int, width: int, classes: int, hidden: tuple[int, ...], normalised: bool = True) -> None:
        super().__init__()
        widths = (width, *hidden)
        self.hidden = hidden
        self.linears = nn.ModuleList(Linear(heads, *pair, normalised) for pair in zip(widths, hidden, strict=False))
        self.norms = nn.ModuleList(BatchNorm(heads, size) if normalised else nn.Identity() for size in hidden)
        self.output = Linear(heads, widths[-1], classes)

    def forward(self, x: Tensor, keep: Tensor | None) -> Tensor:
        """(K, B, D) and (K, B, sum of hidden) dropout factors, 0 or 1 / keep rate (None: no dropout) -> (K, B, C)."""
        kept = keep.split(self.hidden, -1) if keep is not None else [None] * len(self.hidden)
        for linear, norm, factor in zip(self.linears, self.norms, kept, strict=True):
            x = F.relu(norm(linear(x)))
            x = x if factor is None else x * factor
        return self.output(x)


@dataclass(frozen=True)
class Shape:
    """The input widths of a fusion: of the encoders of each modality, [image; text; table], and of their tokens."""

    widths: dict[str, tuple[int, ...]]
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def width(self, modality: str) -> int:
        """The width of all encoders of the modality side by side."""
        return sum(self.widths[modality])

    @property
    def total(self) -> int:
        return sum(map(self.width, self.widths))


@dataclass(frozen=True)
class Batch:
    """B samples for each of K heads.

    `vectors[modality]` holds (K, B, D) vectors for each encoder, `masks` a (K, B) mask of present vectors, None where
    all are present. `tokens` holds (K, B, T, D) values and a (K, B, T) mask for each source. `keep` (K, B, units) are
    dropout factors. `normed` vectors are standardised and layer-normed already, `compact` tokens are layer-normed.
    """

    vectors: dict[str, list[Tensor]]
    masks: dict[str, list[Tensor | None]]
    tokens: dict[str, Tokens] = field(default_factory=dict)
    keep: Tensor | None = None
    normed: bool = False
    compact: bool = False


class EncoderInput(Stacked):
    """The input of one encoder: (K, B, D) vectors and (K, B) masks -> (K, B, D).

    Vectors are standardised with statistics of the training fold and layer-normed; a learned embedding replaces missing
    vectors. The norm has no parameters, because a linear layer follows; so no gradient has to pass through the norm.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(heads, 1, width))
        self.register_buffer("std", torch.ones(heads, 1, width))
        self.missing = nn.Parameter(torch.zeros(heads, 1, width))

    def normed(self, vectors: Tensor) -> Tensor:
        """(K, B, D) standardised and layer-normed vectors."""
        return norm(vectors, self.mean, self.std)

    def forward(self, vectors: Tensor, mask: Tensor | None, is_normed: bool = False) -> Tensor:
        with torch.no_grad():
            normed = vectors if is_normed else self.normed(vectors)
        return normed if mask is None else torch.where(mask.unsqueeze(-1), normed, self.missing)


class UnitInput(EncoderInput):
    """The input of one encoder whose vectors are scaled to the length 1, then standardised: a linear layer behind it is
    a linear function of the directions of the vectors."""

    def normed(self, vectors: Tensor) -> Tensor:
        return (F.normalize(vectors, dim=-1) - self.mean) / self.std


class TableInput(EncoderInput):
    """The input of the columns of a table: standardised, not layer-normed, as one column says nothing of another."""

    def normed(self, vectors: Tensor) -> Tensor:
        return norm_table(vectors, self.mean, self.std)


def norm_table(vectors: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(..., D) vectors standardised, 0 where a number is missing or the deviation is infinite."""
    return ((vectors - mean) / std).nan_to_num(0.0)


def norm(vectors: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(..., D) vectors standardised and layer-normed, without parameters."""
    return F.layer_norm((vectors - mean) / std, vectors.shape[-1:])


class Fusion(Stacked):
    """K heads of one architecture. A subclass defines `fuse`, from one vector of each modality to logits."""

    units = 0  # number of dropout factors for a sample
    is_stacked = True  # all tensors have a leading axis of heads
    unit = False  # vectors are scaled to the length 1 before they are standardised, and not layer-normed

    def __init__(self, heads: int, shape: Shape) -> None:
        super().__init__()
        kind = UnitInput if self.unit else EncoderInput
        self.inputs = nn.ModuleDict(
            {
                modality: nn.ModuleList((TableInput if modality == TABLE else kind)(heads, width) for width in widths)
                for modality, widths in shape.widths.items()
            }
        )

    def forward(self, batch: Batch) -> Tensor:
        """(K, B, C) logits of a batch."""
        vectors = {}
        for modality in self.inputs:
            inputs = self._inputs(modality, batch.vectors, batch.masks)
            parts = [module(x, mask, batch.normed) for module, x, mask in inputs]
            vectors[modality] = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
        return self.fuse(vectors, batch)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        """(K, B, width) vectors of each modality -> (K, B, C) logits."""
        raise NotImplementedError

    def attention_parameters(self) -> set[str]:
        """Names of the parameters that learn at `attention_learning_rate`."""
        return set()

    @torch.no_grad()
    def standardise(self, head: int, statistics: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
        """Set the mean (D,) and the standard deviation (D,) of each encoder for one head."""
        for modality in self.inputs:
            for module, (mean, std) in self._inputs(modality, statistics):
                module.mean[head], module.std[head] = mean, std

    def _inputs(self, modality: str, *values: Mapping[str, list[Any]]) -> Iterator[tuple[Any, ...]]:
        """The input module of each encoder of the modality, with the encoder's element of each of the `values`."""
        modules = cast(nn.ModuleList, self.inputs[modality])
        return zip(modules, *(by_modality[modality] for by_modality in values), strict=True)

    def round_products(self) -> None:
        """Have training compute the products of all linear layers in bfloat16."""
        for module in self.modules():
            if isinstance(module, Linear):
                module.rounded = True

    def reset_head(self, head: int, generator: torch.Generator) -> None:
        """Draw all first weights of one head, in the order of the modules."""
        for module in self.modules():
            if isinstance(module, Stacked):
                module.reset(head, generator)

    def start_from(self, head: int, classes: Mapping[int, Tensor]) -> None:
        """Replace the first weights of one head by the (C, D) vectors of classes, which are given by the first column
        of their encoder; only a linear head can."""

    @torch.no_grad()
    def keep_heads(self, heads: Tensor) -> None:
        """Continue with these heads of the stack."""
        for tensor in (*self.parameters(), *self.buffers()):
            tensor.data = tensor.data[heads]
