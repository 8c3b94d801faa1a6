"""The tokens of heads: as they are cached, as pooled vectors, or compact, in a basis of 64 columns."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfeat.cache.features import MappedBlock
from mmfeat.heads.layers import Tokens
from mmfeat.samples.table_columns import TABLE

COMPACT = 64  # columns of compact tokens; 128 take a third more time for the same scores
KEPT = 2**28  # most numbers of compact tokens in memory, 1 GB; those of more samples are computed batch by batch
CHUNK = 256  # samples of one read


class CompactTokens:
    """The layer-normed tokens of one encoder in an orthonormal basis (D, 64), in half precision.

    Projecting tokens as they are cached takes nearly all of the time of attention. Of the projection's weight, a sweep
    trains only the part (64, 128) in this basis. The basis is drawn at random for the width alone, so that it keeps
    distances (Johnson and Lindenstrauss, 1984), sees no sample, and serves all heads. Tokens of up to 64 columns keep
    these.
    """

    def __init__(self, block: MappedBlock, device: str) -> None:
        self.block, self.device = block, device
        self.width = min(block.width, COMPACT)
        self.basis = _basis(block.width, self.width)
        self.lengths = torch.from_numpy(block.lengths).to(device)
        self.starts = self.lengths.cumsum(0) - self.lengths
        total = int(block.lengths.sum())
        self.values = self._all(total).to(device) if total * self.width <= KEPT else None

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(K, B) rows -> (K, B, T, W) tokens, T the most of one row, and a (K, B, T) mask."""
        if self.values is None:
            values, present = self._read(rows.cpu().numpy().ravel())
            return values.to(self.device).unflatten(0, rows.shape), present.to(self.device).unflatten(0, rows.shape)
        lengths = self.lengths[rows]
        position = torch.arange(int(lengths.max()), device=self.device)
        present = position < lengths.unsqueeze(-1)
        indices = torch.where(present, self.starts[rows].unsqueeze(-1) + position, 0)
        return self.values.index_select(0, indices.flatten()).view(*indices.shape, self.width), present

    def expanded(self, weight: Tensor) -> Tensor:
        """The (D, 128) weight of a projection whose weight in the basis is (W, 128)."""
        return self.basis @ weight

    def _all(self, total: int) -> Tensor:
        out = torch.zeros((max(total, 1), self.width), dtype=torch.float32)
        start = 0
        for first in range(0, len(self.block), CHUNK):
            values, present = self._read(np.arange(first, min(first + CHUNK, len(self.block))))
            tokens = values[present]
            out[start : start + len(tokens)] = tokens
            start += len(tokens)
        return out

    def _read(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        values, present = self.block.batch(rows)
        normed = F.layer_norm(torch.from_numpy(values).float(), (self.block.width,))
        return normed @ self.basis, torch.from_numpy(present)


def _basis(width: int, columns: int) -> Tensor:
    if width == columns:
        return torch.eye(width)
    drawn = np.random.default_rng(width).standard_normal((width, columns))
    return torch.from_numpy(np.linalg.qr(drawn)[0]).float()


def read_tokens(block: MappedBlock, rows: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """(K, B) rows -> (K, B, T, D) float32 tokens as they are cached, T the most of one row, and a (K, B, T) mask."""
    values, present = (torch.from_numpy(x).to(device) for x in block.batch(rows.cpu().numpy().ravel()))
    return values.float().unflatten(0, rows.shape), present.unflatten(0, rows.shape)


def pooled_tokens(vectors: dict[str, list[Tensor]], masks: dict[str, list[Tensor | None]]) -> dict[str, Tokens]:
    """(K, B, D) vectors and (K, B) masks -> (K, B, 1, D) and (K, B, 1): each pooled vector as one token."""
    return {
        name: [
            (x.nan_to_num().unsqueeze(2), (x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m).unsqueeze(2))
            for x, m in zip(sources, masks[name], strict=True)
        ]
        for name, sources in vectors.items()
        if name != TABLE
    }
