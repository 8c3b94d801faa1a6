"""Cross-attention: text tokens look at image patches; what they find joins both pooled vectors through a gate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfeat.heads.concat import HIDDEN
from mmfeat.heads.inputs import Batch, Fusion, Shape
from mmfeat.heads.layers import Classifier, LayerNorm, Linear, Scalar, Stacked

WIDTH = 128
ATTENTION_HEADS = 8
CLOSED = -4.0  # the gate's logit at the start: sigmoid(-4) = 0.018


class TokenInput(Stacked):
    """Tokens of all sources of a modality, layer-normed, each source projected to 128, one after the other."""

    def __init__(self, heads: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(Linear(heads, width, WIDTH) for width in widths)

    def forward(self, sources: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """[(K, B, T, D) and (K, B, T)] -> (K, B, sum of T, 128) and (K, B, sum of T)."""
        values = [
            projection(F.layer_norm(x, x.shape[-1:]))
            for projection, (x, _) in zip(self.projections, sources, strict=True)
        ]
        return torch.cat(values, 2), torch.cat([mask for _, mask in sources], 2)


class Attention(Stacked):
    """Multi-head attention of 8 heads (Vaswani et al., 2017) with one more, learned key for "nothing to see here",
    which also serves samples without any token; then the mean over the queries that are there, normed."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.query, self.output = Linear(heads, WIDTH, WIDTH), Linear(heads, WIDTH, WIDTH)
        self.key_value = Linear(heads, WIDTH, 2 * WIDTH)
        self.nothing = nn.Parameter(torch.zeros(heads, 1, 1, WIDTH))
        self.norm = LayerNorm(heads, WIDTH)

    def forward(self, queries: Tensor, present: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """(K, B, T, 128), (K, B, T), (K, B, P, 128), (K, B, P) -> (K, B, 128)."""
        heads, batch = mask.shape[:2]
        keys = torch.cat([self.nothing.expand(-1, batch, -1, -1), keys], 2)
        mask = F.pad(mask, (1, 0), value=True).flatten(0, 1)[:, None, None]
        key, value = self.key_value(keys).chunk(2, -1)
        found = F.scaled_dot_product_attention(_split(self.query(queries)), _split(key), _split(value), attn_mask=mask)
        found = self.output(found.transpose(1, 2).reshape(heads, batch, -1, WIDTH)) * present.unsqueeze(-1)
        return self.norm(found.sum(2) / present.sum(2, keepdim=True).clamp_min(1))


class CrossAttention(Fusion):
    """Needs tokens of both modalities; with one modality its tokens attend to themselves."""

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        self.tokens = nn.ModuleDict({m: TokenInput(heads, widths) for m, widths in shape.tokens.items()})
        self.attention = Attention(heads)
        self.gate = Scalar(heads, CLOSED)
        self.classifier = Classifier(heads, shape.total + WIDTH, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        sequences = {modality: module(batch.tokens[modality]) for modality, module in self.tokens.items()}
        image, *text = sequences.values()
        attended = self.attention(*(text[0] if text else image), *image) * self.gate.value.sigmoid()
        return self.classifier(torch.cat([*vectors.values(), attended], -1), batch.keep)

    def attention_parameters(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.split(".")[0] in ("tokens", "attention", "gate")}


def _split(x: Tensor) -> Tensor:
    """(K, B, T, 128) -> (K * B, 8, T, 16)."""
    return x.flatten(0, 1).unflatten(-1, (ATTENTION_HEADS, -1)).transpose(1, 2)
