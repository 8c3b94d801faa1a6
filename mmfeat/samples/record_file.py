"""Record files: small sorted tables beside the cache that save work and may be deleted, such as the stat index."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np

from mmfeat.errors import WriteError
from mmfeat.system.files import write_atomic

DIGEST_BYTES = 16
SAVE_SECONDS = 30.0
SAVE_SHARE = 0.05  # largest share of the time spent on saving, which writes the whole file however little is new

AnyRecordFile = TypeVar("AnyRecordFile", bound="RecordFile")


class RecordFile:
    """Entries of one structured `dtype` in one file, one for each value of its first field, sorted by that field.

    The file holds `header`, the XXH3-128 digest of the entries, and the entries. A file that is damaged or foreign
    counts as empty. Each save keeps what other processes wrote meanwhile. One thread may use an object at a time.
    """

    def __init__(self, path: Path, dtype: np.dtype, header: bytes = b"", writes: bool = True) -> None:
        self._path, self._dtype, self._header, self._writes = path, dtype, header, writes
        self._key = str((dtype.names or ())[0])
        self._entries = self._read()
        self._new: list[tuple[object, ...]] = []
        self._saved, self._pause = time.monotonic(), SAVE_SECONDS

    def __len__(self) -> int:
        return len(self._entries) + len(self._new)

    def __enter__(self: AnyRecordFile) -> AnyRecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.save()

    def lookup(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The entry (N,) of each key (N,), and whether it is one (N,); entries added since `save` are not seen."""
        if not len(self._entries):
            return np.zeros(len(keys), self._dtype), np.zeros(len(keys), bool)
        rows = np.minimum(np.searchsorted(self._entries[self._key], keys), len(self._entries) - 1)
        entries = self._entries[rows]
        return entries, entries[self._key] == keys

    def append(self, *fields: object) -> None:
        """Remember one entry, which replaces an older one with the same key."""
        self._new.append(fields)

    def save_when_due(self) -> None:
        """Save at most every `SAVE_SECONDS`, and more rarely where saving takes long."""
        if time.monotonic() - self._saved >= self._pause:
            self.save()

    def save(self) -> None:
        """Merge the new entries with the file's; where the file cannot be written, they stay usable in memory."""
        start = time.monotonic()
        if self._new:
            self._entries = self._merged(self._entries, self._read(), np.array(self._new, self._dtype))
            self._new = []
            if self._writes and self._path.parent.is_dir():  # reading makes no cache
                with contextlib.suppress(WriteError):
                    write_atomic(self._path, [self._header, _digest(self._entries), self._entries.tobytes()])
        self._saved = time.monotonic()
        self._pause = max(SAVE_SECONDS, (self._saved - start) / SAVE_SHARE)

    def _read(self) -> np.ndarray:
        start, empty = len(self._header) + DIGEST_BYTES, np.empty(0, self._dtype)
        try:
            if not self._path.is_file():  # reading a pipe would wait for ever
                return empty
            data = self._path.read_bytes()
            entries = np.frombuffer(data, self._dtype, offset=start)
        except (OSError, ValueError):
            return empty
        return entries if data[:start] == self._header + _digest(entries) else empty

    def _merged(self, *tables: np.ndarray) -> np.ndarray:
        """One entry for each key, sorted: the last one in the last table that has it."""
        entries = np.concatenate(tables)[::-1]
        _, first = np.unique(entries[self._key], return_index=True)
        return entries[first]


def _digest(entries: np.ndarray) -> bytes:
    import xxhash

    return xxhash.xxh3_128_digest(entries.tobytes())
