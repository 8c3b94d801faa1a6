"""Hashes of many contents at once: content keys, and perceptual hashes of photos, with the files that remember them.

Content keys of unchanged photos are remembered in the stat index. A perceptual hash is 63 bits that stay the same when
a photo is saved again, smaller or more compressed: signs of the lowest frequencies of a 32 x 32 grey version, less
their median (pHash: Zauner, 2010). Both files are a `RecordFile` beside the cache; deleting one costs only time.
"""

from __future__ import annotations

import contextlib
import functools
import os
import struct
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from mmfeat.errors import WriteError
from mmfeat.samples.contents import KEY_LENGTH, content_key, joined_key
from mmfeat.samples.dataset import MODALITIES, Sample
from mmfeat.samples.photo_cells import Photo, Photos
from mmfeat.samples.photos import MAX_ASPECT, orientation, read_photo, upright
from mmfeat.system.files import write_atomic
from mmfeat.system.hardware import cpu_count
from mmfeat.system.notebook import usual_progress
from mmfeat.system.remote import RemoteFile, is_remote, split_url
from mmfeat.system.wording import Progress

if TYPE_CHECKING:
    from PIL import Image

BY_ID = "id"  # the part of a sample by which vectors of the user's own are found
PARTS = (*MODALITIES, BY_ID)  # what encoders read of a sample
DIGEST_BYTES = 16
SAVE_SECONDS = 30.0
SAVE_SHARE = 0.05  # largest share of the time for saving, which writes the whole file however little is new

ENTRY = np.dtype([("path", "<u8"), ("stat", "<u8"), ("key", f"S{KEY_LENGTH}")])
RACY_SECONDS = 2.0  # step of the coarsest clock of a file system (FAT)
MOST_ENTRIES = 1 << 22  # 200 MB; files beyond this number are hashed again each time
WEB_THREADS = 32
STEP = 1024  # samples that are hashed between two reports of progress

SIDE = 32
FREQUENCIES = 8
DRAFT_SIDE = 4 * SIDE  # a smaller draft lacks details that show in the bits
# Least median coefficient. Below that, half of the waves have an amplitude under a quarter of a grey level, as in a
# flat picture or a plain gradient: the signs are rounding errors, and would be equal for many pictures.
FAINTEST = SIDE * SIDE / 4 / 4

HASH_ENTRY = np.dtype([("key", f"S{KEY_LENGTH}"), ("hash", "<u8"), ("known", "u1")])
HASH_HEADER = b"mmfeat image hashes 1\n"  # another way of hashing gets another number

AnyRecordFile = TypeVar("AnyRecordFile", bound="RecordFile")
Stamp = tuple[int, int]  # hash of a file's path, and hash of path, size, times and inode number together


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

    def __exit__(self, *error: object) -> None:
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
    """Content keys (N,) S32; a sample whose `present` (N,) is False has no content, for the reason in `reasons`.

    Where samples have several photos, `single` are the keys of all M photos, and `owners` (M,) the samples they are of,
    ascending.
    """

    keys: np.ndarray
    present: np.ndarray
    reasons: tuple[str, ...]
    single: ContentKeys | None = None
    owners: np.ndarray | None = None

    @property
    def is_several(self) -> bool:
        return self.single is not None


def single_photos(samples: Sequence[Sample]) -> tuple[Sequence[Sample], np.ndarray]:
    """(M samples with at most one photo each, (M,) the sample that each is of): one for each photo of a sample."""
    counts = [len(sample.image.photos) if isinstance(sample.image, Photos) else 1 for sample in samples]
    owners = np.repeat(np.arange(len(samples)), counts)
    if len(owners) == len(samples):
        return samples, owners
    single: list[Sample] = []
    for sample in samples:
        several = sample.image.photos if isinstance(sample.image, Photos) else ()
        single += [replace(sample, image=photo) for photo in several] or [sample]
    return single, owners


def content_keys(
    samples: Sequence[Sample], modality: str, progress: Progress | None = None, index: StatIndex | None = None
) -> ContentKeys:
    """Hash one modality of all samples; images are read from disk unless `index` knows the unchanged file."""
    single, owners = single_photos(samples) if modality == "image" else (samples, np.empty(0))
    if single is not samples:
        return _joined(content_keys(single, modality, progress, index), owners, len(samples))
    keys = np.zeros(len(samples), f"S{KEY_LENGTH}")
    reasons = [""] * len(samples)
    task = (progress or usual_progress()).step(f"hash {modality}s", len(samples))
    with task as advance, ThreadPoolExecutor(_threads(samples)) as pool:
        for start in range(0, len(samples), STEP):
            part = samples[start : start + STEP]
            for row, (key, reason) in enumerate(_keys(part, modality, index, pool), start):
                keys[row], reasons[row] = key or b"", reason
            advance(len(part))
    return ContentKeys(keys, keys != b"", tuple(reasons))


def _threads(samples: Sequence[Sample]) -> int:
    """The threads that read photos: servers answer many requests at a time, and a silent one holds up one thread."""
    remote = next((sample.image.url for sample in samples if isinstance(sample.image, RemoteFile)), "")
    return WEB_THREADS if remote and not split_url(remote) else cpu_count()


def _joined(single: ContentKeys, owners: np.ndarray, count: int) -> ContentKeys:
    """The keys of so many samples from those of their photos."""
    pairs = [(key or None, reason) for key, reason in zip(single.keys.tolist(), single.reasons, strict=True)]
    ends = np.searchsorted(owners, np.arange(count), side="right")
    joined = [joined_key(pairs[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    keys = np.array([key or b"" for key, _ in joined], single.keys.dtype)
    return ContentKeys(keys, keys != b"", tuple(reason for _, reason in joined), single, owners)


def _keys(
    samples: Sequence[Sample], modality: str, index: StatIndex | None, pool: Executor
) -> Iterable[tuple[bytes | None, str]]:
    if modality != "image":
        return [sample.key(modality) for sample in samples]
    if index is None:
        return pool.map(lambda sample: sample.key(modality), samples)
    keys = index.keys([sample.image for sample in samples], pool)
    return [entry if sample.image else (None, sample.image_error) for entry, sample in zip(keys, samples, strict=True)]


class StatIndex(RecordFile):
    """Content keys of files by their stamps, so that an unchanged file is not read again.

    Entries are keyed by the hash of the path alone, so that a changed file replaces its former entry. Other threads
    may hash files for the one that uses the index.
    """

    def __init__(self, file: Path, writes: bool = True) -> None:
        super().__init__(file, ENTRY, writes=writes)

    def keys(self, paths: Sequence[Photo | None], pool: Executor) -> list[tuple[bytes | None, str]]:
        """(content key, "") or (None, the reason for no key) of each file; a path that is None gives (None, "")."""
        known = self._known([_stamp(path) for path in paths])
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
        wanted = np.array([stamp or (0, 0) for stamp in stamps], np.uint64).reshape(-1, 2)
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
            stamped = _stamp(path)  # of the archive that the photo lies in
            key = content_key(path.read_bytes())
            old = stamped and os.stat(_archive(path)).st_mtime < start - RACY_SECONDS
            return key, "", stamped if old and stamped == _stamp(path) else None
        with path.open("rb") as handle:
            before = os.fstat(handle.fileno())
            key = content_key(handle.read())
            after = os.fstat(handle.fileno())
    except OSError as error:
        return None, f"unreadable: {error.strerror}", None
    settled = max(before.st_mtime, before.st_ctime) < start - RACY_SECONDS
    stamp = _stamp_of(path, before)
    return key, "", stamp if settled and stamp == _stamp_of(path, after) else None


def _archive(photo: Photo | None) -> str:
    """The local archive that a photo lies in, "" for another photo."""
    member = split_url(photo.url) if isinstance(photo, RemoteFile) else None
    return member[0] if member else ""


def _stamp(photo: Photo | None) -> Stamp | None:
    """The stamp of a photo in a local file or archive, None for another photo and where the file is gone."""
    file = photo if isinstance(photo, Path) else _archive(photo)
    try:
        return _stamp_of(str(photo), os.stat(file)) if file else None
    except OSError:
        return None


def _stamp_of(path: str | Path, status: os.stat_result) -> Stamp:
    import xxhash

    name = os.fsencode(path)
    # An absolute path must work even where the working folder is gone.
    if not is_remote(str(path)) and not os.path.isabs(name):
        name = os.path.join(os.getcwdb(), name)
    # The change time cannot be set back, so another file with the old date under the same name is noticed.
    facts = struct.pack("<4q", status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & (2**63 - 1))
    return xxhash.xxh3_64_intdigest(name), xxhash.xxh3_64_intdigest(name + facts)


def image_hashes(
    samples: Sequence[Sample], keys: ContentKeys, path: Path, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) uint64 hashes of the samples' photos, 0 for no hash, and (N,) whether a sample has a hash.

    `keys` are the content keys of the same photos; only contents that the file `path` lacks are read.
    """
    hashes = RecordFile(path, HASH_ENTRY, HASH_HEADER)
    distinct, first = np.unique(keys.keys, return_index=True)
    unknown = first[~hashes.lookup(distinct)[1] & keys.present[first]]
    look_at_photos(hashes, samples, unknown, keys.keys, hash_photo, "compare images", progress)
    entries, remembered = hashes.lookup(keys.keys)
    known = remembered & (entries["known"] > 0)
    return np.where(known, entries["hash"], np.uint64(0)), known


def look_at_photos(
    file: RecordFile,
    samples: Sequence[Sample],
    rows: np.ndarray,
    keys: np.ndarray,
    make: Callable[[bytes], object],
    step: str,
    progress: Progress | None = None,
) -> None:
    """Remember in a file, by content key, what `make` makes of the photos at `rows`, None or b"" where that is nothing.

    Photos that cannot be read, or no longer have their content key in `keys` (N,), are left out.
    """

    def made(row: int) -> tuple[bytes, object] | None:
        try:
            image = samples[row].image
            data = image.read_bytes() if image else b""
        except OSError:
            return None
        return (keys[row], make(data)) if content_key(data) == keys[row] else None

    rows = np.sort(rows)  # photos of a table or an archive are read fastest as they lie
    with file, (progress or usual_progress()).step(step, len(rows)) as advance, ThreadPoolExecutor(cpu_count()) as pool:
        for start in range(0, len(rows), STEP):
            part = rows[start : start + STEP].tolist()
            for key, value in filter(None, pool.map(made, part)):
                file.append(key, 0 if value is None else value, value not in (None, b""))
                file.save_when_due()
            advance(len(part))


def hash_photo(data: bytes) -> int | None:
    """63 bits of a photo, the right way up; None for bytes that are no photo, and for a flat picture."""
    try:
        grey = read_photo(data, _grey)
    except MemoryError:
        raise  # no fault of the picture
    except Exception:  # decoders raise whatever a broken file makes them raise
        return None
    if grey is None:
        return None
    waves = (_cosines() @ grey @ _cosines().T).ravel()[1:]  # the first coefficient is the mean
    if np.median(np.abs(waves)) < FAINTEST:
        return None
    return int.from_bytes(np.packbits(waves > np.median(waves)).tobytes(), "big")


def _grey(image: Image.Image) -> np.ndarray | None:
    """(SIDE, SIDE) float64 luminance, 0 to 255, or None for a picture too thin to be a photo."""
    from PIL import Image

    if max(image.size) > MAX_ASPECT * min(image.size):
        return None
    image.draft("L", (DRAFT_SIDE, DRAFT_SIDE))  # a JPEG is decoded small, and only its luminance
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(upright(small, orientation(image)), dtype=np.float64)


@functools.cache
def _cosines() -> np.ndarray:
    """(FREQUENCIES, SIDE) the lowest rows of the discrete cosine transform."""
    return np.cos(np.pi * (2 * np.arange(SIDE) + 1) * np.arange(FREQUENCIES)[:, None] / (2 * SIDE))
