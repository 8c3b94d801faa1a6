"""Features: the vectors of a list of samples, one aligned array an encoder, with masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mmfeat.errors import CacheError


@dataclass(frozen=True)
class Block:
    """One encoder's (N, D) vectors. Rows where `mask` is False are missing and hold NaN.

    `name` is the encoder's cache folder, which no two encoders share.
    """

    name: str
    modality: str
    vectors: np.ndarray
    mask: np.ndarray

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.mask):
            raise CacheError(f"{self.name}: {len(self.vectors)} vectors but {len(self.mask)} mask entries")


@dataclass(frozen=True)
class MappedBlock:
    """One encoder's rows of N samples that stay on disk until a batch of them is asked for.

    Row i has `lengths[i]` tokens of width D; a pooled vector counts as one, a row where `mask` is False has
    none. `read` takes positions in the whole list, of which `rows` are this block's.
    """

    name: str
    modality: str
    width: int
    lengths: np.ndarray
    mask: np.ndarray
    rows: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, T, D) values, zero where a row has fewer than T tokens, and (B, T) whether there is a token."""
        lengths = self.lengths[rows]
        return self.read(self.rows[rows]), np.arange(lengths.max(initial=0)) < lengths[:, None]

    def take(self, rows: np.ndarray) -> MappedBlock:
        """The samples at `rows`."""
        return replace(self, lengths=self.lengths[rows], mask=self.mask[rows], rows=self.rows[rows])


@dataclass(frozen=True)
class Features:
    """Blocks over the same samples, aligned with `ids`; `tokens` are the blocks that stay on disk."""

    ids: tuple[str, ...]
    blocks: tuple[Block, ...]
    tokens: tuple[MappedBlock, ...] = ()

    def __post_init__(self) -> None:
        for name, length in [(b.name, len(b.vectors)) for b in self.blocks] + [(t.name, len(t)) for t in self.tokens]:
            if length != len(self.ids):
                raise CacheError(f"{name}: {length} rows for {len(self.ids)} samples")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def widths(self) -> dict[str, int]:
        """D of each block by its name."""
        return {block.name: block.vectors.shape[1] for block in self.blocks}

    def widened(self, widths: Mapping[str, int]) -> Features:
        """Blocks of which every row is missing, and so of width 0, in the width a head was trained on.

        Raises `CacheError` for any other difference.
        """
        blocks = []
        for block in self.blocks:
            width = widths[block.name]
            if block.vectors.shape[1] not in (0, width):
                raise CacheError(f"{block.name}: vectors of width {block.vectors.shape[1]}, the head takes {width}")
            empty = np.full((len(self), width), np.nan, block.vectors.dtype)
            vectors = block.vectors if block.vectors.shape[1] == width else empty
            blocks.append(Block(block.name, block.modality, vectors, block.mask))
        return replace(self, blocks=tuple(blocks))

    def take(self, rows: np.ndarray) -> Features:
        """The samples at `rows`, which may also be a mask."""
        rows = np.arange(len(self))[rows]
        blocks = tuple(Block(b.name, b.modality, b.vectors[rows], b.mask[rows]) for b in self.blocks)
        return Features(tuple(self.ids[row] for row in rows), blocks, tuple(t.take(rows) for t in self.tokens))

    def only(self, modality: str) -> Features:
        """The blocks of one modality; `both` keeps all."""
        blocks = tuple(block for block in self.blocks if modality in ("both", block.modality))
        return Features(self.ids, blocks, tuple(t for t in self.tokens if modality in ("both", t.modality)))
