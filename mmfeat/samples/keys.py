"""Content keys of many samples at once, and the stat index that remembers the keys of unchanged photos.

`RecordFile` is the format of the stat index and of the photo hashes: sorted records in one file, with a digest.
"""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

import numpy as np

from mmfeat.errors import WriteError
from mmfeat.samples.dataset import KEY_LENGTH, Photo, Sample, content_key
from mmfeat.system.files import write_atomic
from mmfeat.system.hardware import cpu_count
from mmfeat.system.wording import Progress, Silent

DIGEST_BYTES = 16
SAVE_SECONDS = 30.0
SAVE_SHARE = 0.05  # largest share of the time for saving, which writes the whole file however little is new

ENTRY = np.dtype([("path", "<u8"), ("stat", "<u8"), ("key", f"S{KEY_LENGTH}")])
RACY_SECONDS = 2.0  # step of the coarsest clock of a file system (FAT)
MOST_ENTRIES = 1 << 22  # 200 MB; files beyond this number are hashed again each time
STEP = 1024  # samples that are hashed between two reports of progress

AnyRecordFile = TypeVar("AnyRecordFile", bound="RecordFile")


class RecordFile:
    """Entries of one structured `dtype` in one file, sorted by their first field, with one entry for each value of it.

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
        """(entry of each key (N,), whether the key has an entry (N,)); entries added since `save` are not seen."""
        if not len(self._entries):
            return np.zeros(len(keys), self._dtype), np.zeros(len(keys), bool)
        rows = np.minimum(np.searchsorted(self._entries[self._key], keys), len(self._entries) - 1)
        entries = self._entries[rows]
        return entries, entries[self._key] == keys

    def append(self, *fields: object) -> None:
        """Remember one entry, which replaces an older one with the same key."""
        self._new.append(fields)

    def save_when_due(self) -> None:
        """Save at most every `SAVE_SECONDS`, and more rarely if saving takes long."""
        if time.monotonic() - self._saved >= self._pause:
            self.save()

    def save(self) -> None:
        """Merge the new entries with the file; if the file cannot be written, the entries stay usable in memory."""
        start = time.monotonic()
        if self._new:
            self._entries = self._merged(self._entries, self._read(), np.array(self._new, self._dtype))
            self._new = []
            if self._writes and self._path.parent.is_dir():  # reading a data set makes no cache folder
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
        """One entry for each key, sorted: the last entry of the key in the last table that has the key."""
        entries = np.concatenate(tables)[::-1]
        _, first = np.unique(entries[self._key], return_index=True)
        return entries[first]


def _digest(entries: np.ndarray) -> bytes:
    import xxhash

    return xxhash.xxh3_128_digest(entries.tobytes())


@dataclass(frozen=True)
class ContentKeys:
    """Content keys (N,) S32; a sample whose `present` (N,) is False has no content, for the reason in `reasons`."""

    keys: np.ndarray
    present: np.ndarray
    reasons: tuple[str, ...]


def content_keys(
    samples: Sequence[Sample], modality: str, progress: Progress | None = None, index: StatIndex | None = None
) -> ContentKeys:
    """Hash one modality of all samples; images are read from disk unless `index` knows the unchanged file."""
    keys = np.zeros(len(samples), f"S{KEY_LENGTH}")
    reasons = [""] * len(samples)
    task = (progress or Silent()).step(f"hash {modality}s", len(samples))
    with task as advance, ThreadPoolExecutor(cpu_count()) as pool:
        for start in range(0, len(samples), STEP):
            part = samples[start : start + STEP]
            for row, (key, reason) in enumerate(_keys(part, modality, index, pool), start):
                keys[row], reasons[row] = key or b"", reason
            advance(len(part))
    return ContentKeys(keys, keys != b"", tuple(reasons))


def _keys(
    samples: Sequence[Sample], modality: str, index: StatIndex | None, pool: Executor
) -> Iterable[tuple[bytes | None, str]]:
    if modality == "text":
        return [sample.key(modality) for sample in samples]
    if index is None:
        return pool.map(lambda sample: sample.key(modality), samples)
    keys = index.keys([sample.image for sample in samples], pool)
    return [entry if sample.image else (None, sample.image_error) for entry, sample in zip(keys, samples, strict=True)]


class Stamp(NamedTuple):
    """Hash of a file's path, and hash of path, size, times and inode number together."""

    path: int
    stat: int


class StatIndex(RecordFile):
    """Content keys of files by their stamps, so that an unchanged file is not read again.

    Entries are keyed by the hash of the path alone, so that a changed file replaces its former entry. Other threads
    may hash files for the one that uses the index.
    """

    def __init__(self, file: Path, writes: bool = True) -> None:
        super().__init__(file, ENTRY, writes=writes)

    def keys(self, paths: Sequence[Photo | None], pool: Executor) -> list[tuple[bytes | None, str]]:
        """(content key, "") or (None, the reason for no key) of each file; a path that is None gives (None, "")."""
        known = self._known([_stamp(path) if isinstance(path, Path) else None for path in paths])
        unknown = [row for row, key in enumerate(known) if not key and paths[row] is not None]
        keys: list[tuple[bytes | None, str]] = [(key or None, "") for key in known]
        for row, (key, reason, stamp) in zip(unknown, pool.map(_hash, (paths[row] for row in unknown)), strict=True):
            keys[row] = key, reason
            if key and stamp and len(self) < MOST_ENTRIES:
                self.append(*stamp, key)
        self.save_when_due()
        return keys

    def _known(self, stamps: Sequence[Stamp | None]) -> list[bytes]:
        """The content key of each stamp, empty for a stamp that is None or not in the index."""
        wanted = np.array([stamp or Stamp(0, 0) for stamp in stamps], np.uint64).reshape(-1, 2)
        entries, present = self.lookup(wanted[:, 0])
        return np.where(present & (entries["stat"] == wanted[:, 1]), entries["key"], b"").tolist()


def _hash(path: Photo) -> tuple[bytes | None, str, Stamp | None]:
    """(content key, reason without one, stamp) of a photo.

    The stamp is None for a photo that lies in no local file, and for a file that changed during the reading or so
    shortly before that another change might leave the file's times as they are.
    """
    start = time.time()
    try:
        if not isinstance(path, Path):
            return content_key(path.read_bytes()), "", None
        with path.open("rb") as handle:
            before = os.fstat(handle.fileno())
            key = content_key(handle.read())
            after = os.fstat(handle.fileno())
    except OSError as error:
        return None, f"unreadable: {error.strerror}", None
    settled = max(before.st_mtime, before.st_ctime) < start - RACY_SECONDS
    stamp = _stamp_of(path, before)
    return key, "", stamp if settled and stamp == _stamp_of(path, after) else None


def _stamp(path: Path) -> Stamp | None:
    try:
        return _stamp_of(path, os.stat(path))
    except OSError:
        return None


def _stamp_of(path: Path, status: os.stat_result) -> Stamp:
    import xxhash

    name = os.fsencode(path)
    if not os.path.isabs(name):  # an absolute path must work even where the working folder is gone
        name = os.path.join(os.getcwdb(), name)
    # The change time cannot be set back, so another file with the old date under the same name is noticed.
    facts = struct.pack("<4q", status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (2**63 - 1))
    return Stamp(xxhash.xxh3_64_intdigest(name), xxhash.xxh3_64_intdigest(name + facts))
