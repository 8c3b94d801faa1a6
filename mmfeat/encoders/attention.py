"""Multi-head attention of torch in one projection and one fused kernel, for towers that only encode."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class FusedAttention(nn.Module):
    """What `nn.MultiheadAttention` computes of one sequence with itself: (B, T, D) -> (B, T, D).

    torch's own module turns every sequence over and back again, which for short texts costs as much as attention.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention

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
        own = self.attention
        odd_mask = key_padding_mask is not None or (attn_mask is not None and attn_mask.ndim != 2)
        if not (query is key is value) or odd_mask or need_weights or query.ndim != 3:
            given = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            return own(query, key, value, **given, **rest)
        heads = nn.functional.linear(query, own.in_proj_weight, own.in_proj_bias).unflatten(
            -1, (3, own.num_heads, own.head_dim)
        )
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=_additive(attn_mask, heads))
        return own.out_proj(attended.transpose(1, 2).flatten(2)), None


def fuse_attention(module: nn.Module) -> None:
    """Put `FusedAttention` around each multi-head attention inside `module` that it can stand for."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.MultiheadAttention) and not isinstance(parent, FusedAttention) and _is_plain(child):
                setattr(parent, name, FusedAttention(child))


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    same_width = attention.in_proj_weight is not None
    return same_width and attention.batch_first and attention.bias_k is None and not attention.add_zero_attn


def _additive(mask: Tensor | None, heads: Tensor) -> Tensor | None:
    """A (T, T) mask as the kernel takes it: `nn.MultiheadAttention` hides where it is True, the kernel shows."""
    if mask is None or mask.dtype == torch.bool:
        return None if mask is None else torch.logical_not(mask)
    return mask.to(heads.dtype)
