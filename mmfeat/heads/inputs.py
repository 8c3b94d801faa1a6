"""The way of cached vectors into a fusion."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfeat.heads.layers import Stacked


@dataclass(frozen=True)
class Shape:
    """What a fusion is built for: widths of the encoders of each modality, [image; text], and of their tokens."""

    widths: dict[str, tuple[int, ...]]
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def width(self, modality: str) -> int:
        """Of all encoders of the modality side by side."""
        return sum(self.widths[modality])

    @property
    def total(self) -> int:
        return sum(map(self.width, self.widths))


@dataclass(frozen=True)
class Batch:
    """B samples for each of K heads. `vectors[modality]` holds one (K, B, D) an encoder, `masks` (K, B) whether it is
    there (None: all are); `tokens` one pair of (K, B, T, D) values and (K, B, T) masks a source; `keep` (K, B, units)
    factors of dropout. `normed`: the vectors are standardised and layer-normed already."""

    vectors: dict[str, list[Tensor]]
    masks: dict[str, list[Tensor | None]]
    tokens: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    keep: Tensor | None = None
    normed: bool = False


class EncoderInput(Stacked):
    """Standardised with statistics of the training fold, layer-normed, a learned embedding where missing.

    (K, B, D) vectors and (K, B) masks -> (K, B, D). The norm has no parameters: a linear layer follows, and without
    them no gradient needs to come back to here.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(heads, 1, width))
        self.register_buffer("std", torch.ones(heads, 1, width))
        self.missing = nn.Parameter(torch.zeros(heads, 1, width))

    def forward(self, vectors: Tensor, mask: Tensor | None, is_normed: bool = False) -> Tensor:
        with torch.no_grad():
            normed = vectors if is_normed else norm(vectors, self.mean, self.std)
        return normed if mask is None else torch.where(mask.unsqueeze(-1), normed, self.missing)


def norm(vectors: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(..., D) vectors standardised and layer-normed, without parameters."""
    return F.layer_norm((vectors - mean) / std, vectors.shape[-1:])


class Fusion(Stacked):
    """K heads of one architecture. A subclass says what it builds from one vector a modality, and how it fuses them."""

    units = 0  # dropout factors a sample
    is_stacked = True  # all its tensors have the heads in front

    def __init__(self, heads: int, shape: Shape) -> None:
        super().__init__()
        self.inputs = nn.ModuleDict(
            {
                modality: nn.ModuleList(EncoderInput(heads, width) for width in widths)
                for modality, widths in shape.widths.items()
            }
        )

    def forward(self, batch: Batch) -> Tensor:
        """-> (K, B, C) logits."""
        vectors = {
            modality: torch.cat(
                [
                    module(x, mask, batch.normed)
                    for module, x, mask in self._inputs(modality, batch.vectors, batch.masks)
                ],
                dim=-1,
            )
            for modality in self.inputs
        }
        return self.fuse(vectors, batch)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        """(K, B, width of the modality) each -> (K, B, C) logits."""
        raise NotImplementedError

    def attention_parameters(self) -> set[str]:
        """Names of the parameters that learn at `attention_learning_rate`."""
        return set()

    @torch.no_grad()
    def standardise(self, head: int, statistics: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
        """Give one head mean and standard deviation of each encoder, (D,) each."""
        for modality in self.inputs:
            for module, (mean, std) in self._inputs(modality, statistics):
                module.mean[head], module.std[head] = mean, std

    def _inputs(self, modality: str, *values: Mapping[str, list[Any]]) -> Iterator[tuple[Any, ...]]:
        """Each encoder's input module with what `values` have for it."""
        modules = cast(nn.ModuleList, self.inputs[modality])
        return zip(modules, *(each[modality] for each in values), strict=True)

    def reset_head(self, head: int, generator: torch.Generator) -> None:
        """Draw all first weights of one head, in the order of the modules."""
        for module in self.modules():
            if isinstance(module, Stacked):
                module.reset(head, generator)

    def tensors(self, head: int) -> dict[str, Tensor]:
        """Parameters and buffers of one head, without the axis of heads, copied."""
        return {name: value[head].detach().clone() for name, value in self.state_dict().items()}

    @torch.no_grad()
    def keep_heads(self, heads: Tensor) -> None:
        """Go on with these heads."""
        for parameter in self.parameters():
            parameter.data = parameter.data[heads]
        for module in self.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer[heads] if buffer is not None else None
