"""Reading shards: whole matrices, random batches and zero-copy scans, and indices of rows by content key.

Copies are made with positioned reads, not through a mapping: reads cost no page tables, and a disk that fails gives an
error where a mapping would give a signal. Every MiB is compared with its checksum when any byte of it is first used.
`RowIndex` finds the rows of content keys; `KnownKeys` remembers in 16 bytes a key what is stored and was asked for.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise

import numpy as np

from mmfeat.cache.hdf5 import NOT_OURS
from mmfeat.cache.shard import MIB, Shard
from mmfeat.errors import CacheError
from mmfeat.samples.contents import KEY_LENGTH
from mmfeat.system.files import open_for_reading, read_at
from mmfeat.system.hardware import cpu_count

STEP = 4 * MIB
MISSING, FAILED, GOOD = 0, 1, 2


def corrupt_pieces(shard: Shard) -> list[int]:
    """Indices of the MiB pieces that do not match their checksum; all pieces are read again."""
    import xxhash

    with _opened(shard) as handle:
        for piece, wanted in enumerate(shard.checksums.tolist()):
            shard.checked[piece] = xxhash.xxh3_64_intdigest(_read_piece(shard, handle, piece).data) == wanted
    return np.flatnonzero(~shard.checked).tolist()


def read_vectors(shard: Shard, rows: np.ndarray, out: np.ndarray, out_rows: np.ndarray) -> None:
    """Copy `values[rows]` to `out[out_rows]`, in file order and with all cores."""
    order = np.argsort(rows, kind="stable")
    rows, out_rows = rows[order], out_rows[order]
    step = max(1, STEP // shard.row_bytes)
    edges = np.searchsorted(rows, np.arange(0, shard.values.shape[0] + step, step))
    parts = [slice(start, stop) for start, stop in pairwise(edges.tolist()) if start < stop]
    with _opened(shard) as handle, ThreadPoolExecutor(cpu_count()) as pool:
        # Listing the results raises an error of a thread here.
        list(pool.map(lambda part: _read_part(shard, handle, rows[part], out, out_rows[part]), parts))


def read_tokens(shard: Shard, rows: Sequence[int], out: Sequence[np.ndarray]) -> None:
    """Fill `out[i]`, contiguous and (T, D), with the tokens of `rows[i]`."""
    with _opened(shard) as handle:
        for row, target in zip(rows, out, strict=True):
            start, stop = (int(shard.bounds[row + step]) * shard.row_bytes for step in (0, 1))
            if start < stop:
                for piece in _unchecked(shard, start, stop):
                    _compare(shard, _read_piece(shard, handle, piece), piece)
                _fill(shard, handle, start, target.reshape(-1).view(np.uint8).data)


def scan(shard: Shard) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield (rows of `values`, the values at these rows), a few MiB at a time, mapped and not copied.

    Copy values that are to be kept: a kept part keeps the whole shard mapped.
    """
    if not shard.values.nbytes:
        return
    step, rows = max(1, STEP // shard.row_bytes), shard.values.shape[0]
    values, mapping = _mapped(shard)
    raw = values.reshape(-1).view(np.uint8)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        _check_size(shard, mapping.size())  # touching bytes beyond the end of the file would be a signal
        for piece in _unchecked(shard, part.start * shard.row_bytes, part.stop * shard.row_bytes):
            _compare(shard, raw[piece * MIB : (piece + 1) * MIB], piece)
        yield part, values[part]


def _read_part(shard: Shard, handle: int, rows: np.ndarray, out: np.ndarray, out_rows: np.ndarray) -> None:
    """Do a part of `read_vectors` whose rows are sorted and lie near each other."""
    first, last = int(rows[0]), int(rows[-1])
    low, high = first * shard.row_bytes, (last + 1) * shard.row_bytes
    start, stop = low // MIB * MIB, min(-(-high // MIB) * MIB, shard.values.nbytes)
    in_order = last - first + 1 == len(rows) == out_rows[-1] - out_rows[0] + 1
    in_order = in_order and bool((np.diff(rows) == 1).all() and (np.diff(out_rows) == 1).all())
    direct = in_order and (start, stop) == (low, high) and out.flags.c_contiguous
    raw = np.empty(0 if direct else stop - start, np.uint8)
    if direct:
        raw = out[out_rows[0] : out_rows[0] + len(rows)].reshape(-1).view(np.uint8)
    _fill(shard, handle, start, raw.data)
    _compare(shard, raw, start // MIB)
    if not direct:
        values = raw[low - start : high - start].view(shard.values.dtype).reshape(-1, shard.width)
        out[out_rows[0] if len(rows) == 1 else out_rows] = values[rows - first]


def _unchecked(shard: Shard, start: int, stop: int) -> list[int]:
    """The pieces with the bytes from `start` to `stop` that were not compared with their checksums yet."""
    return [piece for piece in range(start // MIB, -(-stop // MIB)) if not shard.checked[piece]]


def _read_piece(shard: Shard, handle: int, piece: int) -> np.ndarray:
    raw = np.empty(min(MIB, shard.values.nbytes - piece * MIB), np.uint8)
    _fill(shard, handle, piece * MIB, raw.data)
    return raw


def _compare(shard: Shard, raw: np.ndarray, first: int) -> None:
    """Compare whole pieces, from index `first` on, with their checksums."""
    import xxhash

    for number, at in enumerate(range(0, len(raw), MIB), first):
        if xxhash.xxh3_64_intdigest(raw[at : at + MIB].data) != int(shard.checksums[number]):
            raise CacheError(f"{shard.path}: values do not match their checksum (MiB {number}); {NOT_OURS}")
        shard.checked[number] = True


def _fill(shard: Shard, handle: int, start: int, target: memoryview) -> None:
    """Read as many bytes as `target` takes, from byte `start` of the values on."""
    at = shard.values.offset + start
    while target:
        count = read_at(handle, target, at)
        if count == 0:
            raise _shorter(shard)
        target, at = target[count:], at + count


def _mapped(shard: Shard) -> tuple[np.ndarray, mmap.mmap]:
    with _opened(shard) as handle:
        _check_size(shard, os.fstat(handle).st_size)
        mapping = mmap.mmap(handle, shard.values.offset + shard.values.nbytes, access=mmap.ACCESS_READ)
    values = np.frombuffer(mapping, shard.values.dtype, int(np.prod(shard.values.shape)), shard.values.offset)
    return values.reshape(shard.values.shape), mapping


def _check_size(shard: Shard, size: int) -> None:
    if size < shard.values.offset + shard.values.nbytes:
        raise _shorter(shard)


def _shorter(shard: Shard) -> CacheError:
    return CacheError(f"{shard.path}: it became shorter while it was read; {NOT_OURS}")


@contextmanager
def _opened(shard: Shard) -> Iterator[int]:
    handle = -1
    try:
        handle = open_for_reading(shard.path)
        yield handle
    except FileNotFoundError:
        raise CacheError(f"{shard.path}: the shard is gone; run mmfeat extract again") from None
    except OSError as error:
        remedy = "check the disk, then mmfeat cache verify"
        raise CacheError(f"{shard.path}: cannot be read ({error.strerror}); {remedy}") from error
    finally:
        if handle >= 0:
            os.close(handle)


class KnownKeys:
    """Content keys that are stored or were asked for, so that a content counts once however often it comes."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._keys = np.empty(0, "S16")
        self._states = np.empty(0, np.uint8)
        self._asked = np.empty(0, bool)
        self.add(shards)

    def add(self, shards: Iterable[Shard]) -> None:
        """Add the keys of some shards."""
        if parts := [_packed_with_states(shard) for shard in shards]:
            self._merge(*map(np.concatenate, zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self._keys)

    def states(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) MISSING, FAILED or GOOD for the S32 keys (N,), and (N,) whether a key was asked for before."""
        packed = _packed(keys)
        if not len(self._keys):
            return np.zeros(len(keys), np.uint8), np.zeros(len(keys), bool)
        at = np.minimum(np.searchsorted(self._keys, packed), len(self._keys) - 1)
        known = self._keys[at] == packed
        return np.where(known, self._states[at], MISSING).astype(np.uint8), known & self._asked[at]

    def ask(self, keys: np.ndarray) -> None:
        """Note distinct keys as asked for; missing keys are about to be encoded and count as good."""
        packed = _packed(keys)
        states, _ = self.states(keys)
        self._merge(packed[states == MISSING], np.full(int((states == MISSING).sum()), GOOD, np.uint8))
        self._asked[np.searchsorted(self._keys, packed)] = True

    def _merge(self, packed: np.ndarray, states: np.ndarray) -> None:
        """Add keys with their states; of equal keys the best state counts."""
        if not len(packed):
            return
        order = np.lexsort((-states.astype(np.int8), packed))
        packed, states = packed[order], states[order]
        first = np.concatenate([[True], packed[1:] != packed[:-1]])
        packed, states = packed[first], states[first]
        at = np.searchsorted(self._keys, packed)
        inside = np.minimum(at, max(len(self._keys) - 1, 0))
        known = self._keys[inside] == packed if len(self._keys) else np.zeros(len(packed), bool)
        self._states[inside[known]] = np.maximum(self._states[inside[known]], states[known])
        self._keys = np.insert(self._keys, at[~known], packed[~known])
        self._states = np.insert(self._states, at[~known], states[~known])
        self._asked = np.insert(self._asked, at[~known], False)


def _packed_with_states(shard: Shard) -> tuple[np.ndarray, np.ndarray]:
    """(N,) S16 keys and (N,) states of the rows of a shard."""
    try:
        return _packed(shard.keys), np.where(shard.errors == b"", GOOD, FAILED).astype(np.uint8)
    except ValueError:
        raise CacheError(f"{shard.path}: its keys are no content keys; {NOT_OURS}") from None


def _packed(keys: np.ndarray) -> np.ndarray:
    """(N,) S16 of (N,) S32: two hexadecimal digits in a byte."""
    return np.frombuffer(bytes.fromhex(np.ascontiguousarray(keys, "S32").tobytes().decode()), "S16")


class RowIndex:
    """Content key -> row, for rows that are numbered over all shards in order, and the values at rows.

    Of rows with equal keys, `find` gives the first one with a value, and one with an error only if there is no other.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self.shards = tuple(shards)
        self.width = max((shard.width for shard in shards), default=0)
        self.dtype = self.shards[0].values.dtype if shards else np.dtype(np.float32)
        self.keys = np.concatenate([shard.keys for shard in shards] or [np.empty(0, f"S{KEY_LENGTH}")])
        self.failed = np.concatenate([shard.errors != b"" for shard in shards] or [np.empty(0, bool)])
        self.lengths = np.concatenate([np.diff(shard.bounds) for shard in shards] or [np.empty(0, np.int64)])
        self._starts = np.cumsum([0, *(len(shard.keys) for shard in shards)])

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """(N,) rows of the wanted keys (N,), -1 for a key that is not stored."""
        if not len(self.keys):
            return np.full(len(wanted), -1)
        if np.array_equal(self.keys[: len(wanted)], wanted) and not self.failed[: len(wanted)].any():
            return np.arange(len(wanted))  # most photos are stored in this order; sorting a million keys takes a second
        at = np.minimum(np.searchsorted(self._sorted, wanted), len(self._sorted) - 1)
        return np.where(self._sorted[at] == wanted, self._order[at], -1)

    def locate(self, row: int) -> tuple[Shard, int]:
        """The shard of a row, and the row's number in that shard."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return self.shards[number], row - int(self._starts[number])

    @functools.cached_property
    def _order(self) -> np.ndarray:
        return np.lexsort((self.failed, self.keys))

    @functools.cached_property
    def _sorted(self) -> np.ndarray:
        return self.keys[self._order]

    def unique(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) distinct keys, and (N,) whether a key has only rows with errors."""
        first = np.ones(len(self._sorted), bool)
        first[1:] = self._sorted[1:] != self._sorted[:-1]
        return self._sorted[first], self.failed[self._order][first]

    def vectors(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy the pooled vectors at `rows` (N,) to `out` (N, D); for a row of -1, `out` stays as it is."""
        for shard, positions, local in self._by_shard(rows):
            read_vectors(shard, local, out, positions)

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """(B, T, D) values of `rows`, zero beyond the length of a row, and for a row of -1."""
        present, lengths = rows >= 0, np.zeros(len(rows), np.int64)
        lengths[present] = self.lengths[rows[present]]
        out = np.zeros((len(rows), lengths.max(initial=0), self.width), self.dtype)
        for shard, positions, local in self._by_shard(rows):
            read_tokens(shard, local.tolist(), [out[position, : lengths[position]] for position in positions])
        return out

    def _by_shard(self, rows: np.ndarray) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Yield (shard, positions in `rows`, row numbers within the shard); rows of -1 are left out."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers[rows >= 0]):
            positions = np.flatnonzero((numbers == number) & (rows >= 0))
            yield self.shards[number], positions, rows[positions] - self._starts[number]
