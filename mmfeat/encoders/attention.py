"""Multi-head attention of torch in one projection and one fused kernel, for towers that only encode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FusedAttention(nn.Module):
    """Self-attention as `nn.MultiheadAttention` computes it: (B, T, D) -> (B, T, D).

    torch's own module transposes every sequence twice, which for short texts costs as much as attention.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention
        self.project = self._projected

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        module = self.attention
        odd_mask = key_padding_mask is not None or (attn_mask is not None and attn_mask.ndim != 2)
        if not (query is key is value) or odd_mask or need_weights or query.ndim != 3:
            given = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            return module(query, key, value, **given, **rest)
        heads = self.project(query).unflatten(-1, (3, module.num_heads, module.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=_additive(attn_mask, heads))
        return module.out_proj(attended.transpose(1, 2).flatten(2)), None

    def _projected(self, query: Tensor) -> Tensor:
        """(B, T, 3 D) queries, keys and values of (B, T, D), by the product that `project` is until it is replaced."""
        return nn.functional.linear(query, self.attention.in_proj_weight, self.attention.in_proj_bias)


def fuse_attention(module: nn.Module) -> None:
    """Replace each multi-head attention inside `module` by `FusedAttention` where both compute the same."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.MultiheadAttention) and not isinstance(parent, FusedAttention) and _is_plain(child):
                setattr(parent, name, FusedAttention(child))


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    same_width = attention.in_proj_weight is not None
    return same_width and attention.batch_first and attention.bias_k is None and not attention.add_zero_attn


def _additive(mask: Tensor | None, heads: Tensor) -> Tensor | None:
    """A (T, T) mask for the kernel, where True shows a token; in a mask of `nn.MultiheadAttention` True hides it."""
    if mask is None or mask.dtype == torch.bool:
        return None if mask is None else torch.logical_not(mask)
    return mask.to(heads.dtype)
