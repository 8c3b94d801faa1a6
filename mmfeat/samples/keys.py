"""Content keys of many samples at once."""

from __future__ import annotations

import contextlib
import os
import struct
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmfeat.errors import WriteError
from mmfeat.samples.dataset import KEY_LENGTH, Photo, Sample, content_key
from mmfeat.system.files import write_atomic
from mmfeat.system.hardware import cpu_count
from mmfeat.system.progress import Progress, Silent

if TYPE_CHECKING:
    pass


STEP = 1024


@dataclass(frozen=True)
class ContentKeys:
    """(N,) S32 keys; where `present` is False there is no content, for the reason given."""

    keys: np.ndarray
    present: np.ndarray
    reasons: tuple[str, ...]


def content_keys(
    samples: Sequence[Sample], modality: str, progress: Progress | None = None, index: StatIndex | None = None
) -> ContentKeys:
    """Hash one modality of all samples; images are read from disk unless `index` knows the unchanged file."""
    keys = np.zeros(len(samples), f"S{KEY_LENGTH}")
    reasons = [""] * len(samples)
    task = (progress or Silent()).task(f"hash {modality}s", len(samples))
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
    found = index.keys([sample.image for sample in samples], pool)
    return [entry if sample.image else (None, sample.image_error) for entry, sample in zip(found, samples, strict=True)]


# Two hashes, of the path and of path, size, times and inode, so that a changed file takes the place of its old self.
ENTRY = np.dtype([("path", "<u8"), ("stat", "<u8"), ("key", f"S{KEY_LENGTH}")])
DIGEST_BYTES = 16
RACY_SECONDS = 2.0  # the coarsest clock of a file system (FAT)
SAVE_SECONDS = 30.0
SAVE_SHARE = 0.05  # of the time: saving writes the whole file, however little is new
MOST_ENTRIES = 1 << 22  # 200 MB; files beyond them are hashed again each time


class Stamp(NamedTuple):
    """What a file looked like, hashed."""

    path: int
    stat: int


class StatIndex:
    """Entries in one file, sorted by path; used by one thread, which may hash files in others."""

    def __init__(self, file: Path, writes: bool = True) -> None:
        self._file, self._writes = file, writes
        self._entries = _read(file)
        self._new: list[tuple[int, int, bytes]] = []
        self._saved = time.monotonic()
        self._pause = SAVE_SECONDS

    def keys(self, paths: Sequence[Photo | None], pool: Executor) -> list[tuple[bytes | None, str]]:
        """(content key, "") or (None, why not) of each file; a path that is None gives (None, "")."""
        stamps = [_stamp(path) if isinstance(path, Path) else None for path in paths]
        known = self._find([stamp or Stamp(0, 0) for stamp in stamps])
        unknown = [row for row, key in enumerate(known) if not key and paths[row] is not None]
        found: list[tuple[bytes | None, str]] = [(key or None, "") for key in known]
        for row, (key, reason, stamp) in zip(unknown, pool.map(_hash, (paths[row] for row in unknown)), strict=True):
            found[row] = key, reason
            if key and stamp and len(self._entries) + len(self._new) < MOST_ENTRIES:
                self._new.append((*stamp, key))
        if time.monotonic() - self._saved >= self._pause:
            self.save()
        return found

    def save(self) -> None:
        """Write what is new beside what others wrote meanwhile; a cache that cannot be written stays usable."""
        start = time.monotonic()
        if self._writes and self._new and self._file.parent.is_dir():  # reading makes no cache
            self._entries = _merged(_read(self._file), np.array(self._new, ENTRY))
            self._new = []
            with contextlib.suppress(WriteError):
                write_atomic(self._file, [_digest(self._entries), self._entries.tobytes()])
        self._saved = time.monotonic()
        self._pause = max(SAVE_SECONDS, (self._saved - start) / SAVE_SHARE)

    def __len__(self) -> int:
        return len(self._entries)

    def __enter__(self) -> StatIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()

    def _find(self, stamps: Iterable[Stamp]) -> list[bytes]:
        wanted = np.array(list(stamps), np.uint64).reshape(-1, 2)
        if not len(self._entries):
            return [b""] * len(wanted)
        at = np.minimum(np.searchsorted(self._entries["path"], wanted[:, 0]), len(self._entries) - 1)
        found = self._entries[at]
        same = (found["path"] == wanted[:, 0]) & (found["stat"] == wanted[:, 1])
        return np.where(same, found["key"], b"").tolist()


def _hash(path: Photo) -> tuple[bytes | None, str, Stamp | None]:
    """Key and stamp; no stamp for a file that changed so lately that another change might not show, or is elsewhere."""
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


def _stamp_of(path: Path, found: os.stat_result) -> Stamp:
    import xxhash

    place = os.fsencode(path)
    if not os.path.isabs(place):  # where one works may be gone, which is no matter to others
        place = os.path.join(os.getcwdb(), place)
    # The change time cannot be set back, so a file that is put in place with its old date is seen.
    seen = struct.pack("<4q", found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino & (2**63 - 1))
    return Stamp(xxhash.xxh3_64_intdigest(place), xxhash.xxh3_64_intdigest(place + seen))


def _read(file: Path) -> np.ndarray:
    try:
        if not file.is_file():  # reading a pipe would wait for ever
            return np.empty(0, ENTRY)
        data = file.read_bytes()
        entries = np.frombuffer(data, ENTRY, offset=DIGEST_BYTES)
    except (OSError, ValueError):
        return np.empty(0, ENTRY)
    return entries if data[:DIGEST_BYTES] == _digest(entries) else np.empty(0, ENTRY)


def _merged(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """One entry a path, the newest, sorted."""
    entries = np.concatenate([new[::-1], old])
    _, first = np.unique(entries["path"], return_index=True)
    return entries[first]


def _digest(entries: np.ndarray) -> bytes:
    import xxhash

    return xxhash.xxh3_128_digest(entries.tobytes())
