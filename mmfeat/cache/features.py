"""Features: the vectors of a list of samples, one aligned array for each encoder, with masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from mmfeat.errors import CacheError
from mmfeat.samples.dataset import Sample
from mmfeat.samples.table_columns import TABLE, TableColumn, table_vectors


@dataclass(frozen=True)
class Block:
    """One encoder's (N, D) vectors. Rows where `mask` is False are missing and hold NaN.

    `name` is the encoder's cache folder, which no two specs share; `source` is the same for all views of an encoder.
    """

    name: str
    modality: str
    vectors: np.ndarray
    mask: np.ndarray
    source: str = ""
    view: str = "none"

    def __post_init__(self) -> None:
        if len(self.vectors) != len(self.mask):
            raise CacheError(f"{self.name}: {len(self.vectors)} vectors but {len(self.mask)} mask entries")

    @property
    def width(self) -> int:
        return self.vectors.shape[1]

    def empty(self, width: int) -> Block:
        """A block of as many rows in this width, all missing."""
        return replace(self, vectors=np.full((len(self.mask), width), np.nan, self.vectors.dtype))


@dataclass(frozen=True)
class MappedBlock:
    """One encoder's rows of N samples that stay on disk until a batch of rows is read: tokens, prefixes, and
    vectors that are too many for the memory.

    Row i has `lengths[i]` tokens of width D; a pooled vector counts as one token, a row where `mask` is False has
    none. `read` takes positions in a longer list of samples; `rows` are the positions of this block's samples.
    """

    name: str
    modality: str
    width: int
    lengths: np.ndarray
    mask: np.ndarray
    rows: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]
    source: str = ""
    view: str = "none"
    output: str = "tokens"

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, T, D) values, zero where a row has fewer than T tokens, and (B, T) whether there is a token."""
        lengths = self.lengths[rows]
        return self.read(self.rows[rows]), np.arange(lengths.max(initial=0)) < lengths[:, None]

    def empty(self, width: int) -> MappedBlock:
        """The same block in another width; every row is missing."""
        return replace(self, width=width, read=partial(_read_zeros, self.read, width))

    def take(self, rows: np.ndarray) -> MappedBlock:
        """The block of the samples at `rows`."""
        return replace(self, lengths=self.lengths[rows], mask=self.mask[rows], rows=self.rows[rows])


@dataclass(frozen=True)
class Features:
    """Blocks over the same samples, aligned with `ids`; `mapped` are the blocks that stay on disk.

    `classes` maps the name of a block to the (C, D) vectors of the class names by the same model, of length 1.
    """

    ids: tuple[str, ...] = field(repr=False)
    blocks: tuple[Block, ...]
    mapped: tuple[MappedBlock, ...] = ()
    classes: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for block in self._all:
            if len(block.mask) != len(self.ids):
                raise CacheError(f"{block.name}: {len(block.mask)} rows for {len(self.ids)} samples")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def _all(self) -> tuple[Block | MappedBlock, ...]:
        return (*self.blocks, *self.mapped)

    @property
    def masks(self) -> dict[str, np.ndarray]:
        """Name of a block -> (N,) bool: whether each sample has a vector."""
        return {block.name: block.mask for block in self._all}

    @property
    def widths(self) -> dict[str, int]:
        """Name of a block -> D."""
        return {block.name: block.width for block in self._all}

    def widened(self, widths: Mapping[str, int]) -> Features:
        """Give blocks of width 0, of which every row is missing, the width that a head was trained on.

        Raises `CacheError` for any other difference.
        """
        for block in self._all:
            if block.width not in (0, widths[block.name]):
                raise CacheError(f"{block.name}: vectors of width {block.width}, the head takes {widths[block.name]}")
        blocks = tuple(block if block.width else block.empty(widths[block.name]) for block in self.blocks)
        mapped = tuple(block if block.width else block.empty(widths[block.name]) for block in self.mapped)
        return replace(self, blocks=blocks, mapped=mapped)

    def with_table(self, columns: Sequence[TableColumn], samples: Sequence[Sample]) -> Features:
        """The features with one more block, of the columns of numbers and categories; as they are without columns."""
        if not columns:
            return self
        block = Block(TABLE, TABLE, *table_vectors(columns, samples), source=TABLE)
        return replace(self, blocks=(*self.blocks, block))

    def take(self, rows: np.ndarray) -> Features:
        """The features of the samples at `rows`, which may also be a mask."""
        rows = np.arange(len(self))[rows]
        blocks = tuple(replace(b, vectors=b.vectors[rows], mask=b.mask[rows]) for b in self.blocks)
        mapped = tuple(block.take(rows) for block in self.mapped)
        return replace(self, ids=tuple(self.ids[row] for row in rows), blocks=blocks, mapped=mapped)

    def named(self, names: Sequence[str]) -> Features:
        """The blocks of these names, in the order of `names`, and that of a table; unknown names are passed over."""
        blocks, mapped = {b.name: b for b in self.blocks}, {t.name: t for t in self.mapped}
        return replace(
            self,
            blocks=tuple(blocks[name] for name in (*names, TABLE) if name in blocks),
            mapped=tuple(mapped[name] for name in names if name in mapped),
        )


def joined(block: Block, owners: np.ndarray | None) -> Block:
    """The means of the vectors of each owner, ascending (M,), that has any; None leaves a block as it is."""
    if owners is None:
        return block
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    counts = np.add.reduceat(block.mask.astype(np.int64), starts)
    sums = np.add.reduceat(np.where(block.mask[:, None], block.vectors, 0).astype(np.float32), starts)
    vectors = sums / np.where(counts, counts, np.nan)[:, None]
    return replace(block, vectors=vectors.astype(block.vectors.dtype), mask=counts > 0)


def joined_mapped(block: MappedBlock, owners: np.ndarray | None) -> MappedBlock:
    """`joined` for rows on disk; the tokens of one owner stand side by side."""
    if owners is None:
        return block
    starts = np.flatnonzero(np.diff(owners, prepend=-1))
    ends = np.append(starts[1:], len(owners))
    mask = np.logical_or.reduceat(block.mask, starts)
    lengths = mask.astype(np.int64) if block.output == "pooled" else np.add.reduceat(block.lengths, starts)
    read = partial(_read_joined, block, starts, ends)
    return replace(block, lengths=lengths, mask=mask, rows=np.arange(len(starts)), read=read)


def _read_joined(block: MappedBlock, starts: np.ndarray, ends: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(B, T, D) values of the owners at `positions`, zero where there are fewer than T tokens."""
    rows = [np.arange(starts[position], ends[position]) for position in positions]
    values, there = block.batch(np.concatenate(rows)) if rows else block.batch(np.empty(0, np.int64))
    parts = np.split(np.arange(len(values)), np.cumsum([len(part) for part in rows])[:-1]) if rows else []
    tokens = [values[part][there[part]] for part in parts]
    if block.output == "pooled":
        tokens = [part.mean(0, dtype=np.float32, keepdims=True) if len(part) else part for part in tokens]
    out = np.zeros((len(tokens), max(map(len, tokens), default=0), values.shape[-1]), values.dtype)
    for number, part in enumerate(tokens):
        out[number, : len(part)] = part
    return out


def _read_zeros(read: Callable[[np.ndarray], np.ndarray], width: int, positions: np.ndarray) -> np.ndarray:
    """(B, T, width) zeros in place of values that are read as (B, T, 0)."""
    empty = read(positions)
    return np.zeros((*empty.shape[:-1], width), empty.dtype)
