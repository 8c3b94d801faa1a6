"""Fused attention equals the module that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmfeat.encoders.faster import FusedAttention, fuse_attention


@pytest.fixture
def attention() -> nn.MultiheadAttention:
    torch.manual_seed(0)
    return nn.MultiheadAttention(32, 4, batch_first=True).eval().requires_grad_(False)


def masks() -> dict[str, torch.Tensor | None]:
    causal = torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)
    return {"none": None, "boolean": causal, "additive": torch.zeros(7, 7).masked_fill(causal, float("-inf"))}


@pytest.mark.parametrize("name", masks())
def test_it_equals_torch(attention: nn.MultiheadAttention, name: str) -> None:
    x, mask = torch.randn(3, 7, 32), masks()[name]
    wanted, _ = attention(x, x, x, need_weights=False, attn_mask=mask)
    found, weights = FusedAttention(attention)(x, x, x, need_weights=False, attn_mask=mask)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    assert weights is None


def test_what_it_cannot_do_goes_to_torch(attention: nn.MultiheadAttention) -> None:
    x, y, padding = torch.randn(3, 7, 32), torch.randn(3, 7, 32), torch.zeros(3, 7, dtype=torch.bool)
    padding[:, 5:] = True
    fused = FusedAttention(attention)
    for arguments, options in (
        ((x, y, y), {"need_weights": False}),
        ((x, x, x), {"need_weights": True}),
        ((x, x, x), {"need_weights": False, "key_padding_mask": padding}),
        ((x, x, x), {"need_weights": False, "attn_mask": torch.zeros(12, 7, 7)}),
    ):
        for ours, theirs in zip(fused(*arguments, **options), attention(*arguments, **options), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_only_plain_modules_are_replaced_and_only_once(attention: nn.MultiheadAttention) -> None:
    odd = nn.MultiheadAttention(32, 4, batch_first=True, kdim=16, vdim=16)
    late = nn.MultiheadAttention(32, 4, batch_first=False)
    model = nn.ModuleDict({"plain": attention, "odd": odd, "late": late})
    for _ in range(2):
        fuse_attention(model)
    assert isinstance(model["plain"], FusedAttention)
    assert model["plain"].attention is attention
    assert (model["odd"], model["late"]) == (odd, late)
