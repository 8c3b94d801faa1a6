"""Features: the vectors of a list of samples, one aligned array an encoder, with masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

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
class Features:
    """Blocks over the same samples, aligned with `ids`."""

    ids: tuple[str, ...]
    blocks: tuple[Block, ...]

    def __post_init__(self) -> None:
        for block in self.blocks:
            if len(block.vectors) != len(self.ids):
                raise CacheError(f"{block.name}: {len(block.vectors)} vectors for {len(self.ids)} samples")

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
        return Features(self.ids, tuple(blocks))

    def take(self, rows: np.ndarray) -> Features:
        """The samples at `rows`."""
        blocks = tuple(Block(b.name, b.modality, b.vectors[rows], b.mask[rows]) for b in self.blocks)
        return Features(tuple(self.ids[row] for row in rows), blocks)

    def only(self, modality: str) -> Features:
        """The blocks of one modality; `both` keeps all."""
        blocks = tuple(block for block in self.blocks if modality in ("both", block.modality))
        return Features(self.ids, blocks)
