"""All shards of one encoder as one table: which row holds which key."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from mmfeat.cache.reading import read_tokens, read_vectors
from mmfeat.cache.shard import Shard
from mmfeat.samples import KEY_LENGTH


class Table:
    """Rows are numbered over all shards in order; of rows with equal keys a good one comes before an error."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self.width = max((shard.width for shard in shards), default=0)
        self.keys = np.concatenate([shard.keys for shard in shards] or [np.empty(0, f"S{KEY_LENGTH}")])
        self.failed = np.concatenate([shard.errors != b"" for shard in shards] or [np.empty(0, bool)])
        self.lengths = np.concatenate([np.diff(shard.bounds) for shard in shards] or [np.empty(0, np.int64)])
        self._starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """Row of each wanted key, -1 where there is none."""
        if not len(self.keys):
            return np.full(len(wanted), -1)
        if np.array_equal(self.keys[: len(wanted)], wanted) and not self.failed[: len(wanted)].any():
            return np.arange(len(wanted))  # as photos mostly lie; a million keys take a second to sort
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], -1)

    def place(self, row: int) -> tuple[Shard, int]:
        """The shard of a row, and its number there."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.shards[number], row - int(self._starts[number])

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.lexsort((self.failed, self.keys))

    @functools.cached_property
    def _sorted(self) -> np.ndarray:
        return self.keys[self._order]

    def unique(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) keys that are stored, and for each whether all that is stored is an error."""
        first = np.ones(len(self._sorted), bool)
        first[1:] = self._sorted[1:] != self._sorted[:-1]
        return self._sorted[first], self.failed[self._order][first]

    def vectors(self, rows: np.ndarray, out: np.ndarray, places: np.ndarray) -> None:
        """`out[places]` = the pooled vectors at `rows`."""
        for shard, here, local in self._by_shard(rows):
            read_vectors(shard, local, out, places[here])

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """(B, T, D) of `rows`, zero beyond the length of each and where a row is -1."""
        here, lengths = rows >= 0, np.zeros(len(rows), np.int64)
        lengths[here] = self.lengths[rows[here]]
        dtype = self.shards[0].values.dtype if self.shards else np.float32
        out = np.zeros((len(rows), lengths.max(initial=0), self.width), dtype)
        for shard, places, local in self._by_shard(rows):
            read_tokens(shard, local.tolist(), [out[place, : lengths[place]] for place in places])
        return out

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """(shard, positions in `rows`, row numbers within the shard)."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers[rows >= 0]):
            here = np.flatnonzero((numbers == number) & (rows >= 0))
            yield self.shards[number], here, rows[here] - self._starts[number]
