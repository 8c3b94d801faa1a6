"""Perceptual hashes: 63 bits of a photo that stay the same when it is saved again, smaller or more compressed.

The bits are signs of the lowest frequencies of a 32 x 32 grey version, less their median (pHash: Zauner, 2010).
Each photo is hashed once: a file beside the cache keeps the hashes by content. Deleting it costs only time.
"""

from __future__ import annotations

import contextlib
import functools
import io
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.errors import WriteError
from mmfeat.samples.dataset import KEY_LENGTH, Sample, content_key
from mmfeat.samples.images import MAX_ASPECT
from mmfeat.system.files import write_atomic
from mmfeat.system.hardware import cpu_count
from mmfeat.system.progress import Progress, Silent

if TYPE_CHECKING:
    from PIL import Image

    from mmfeat.samples.keys import ContentKeys


SIDE = 32
FREQUENCIES = 8
DRAFT_SIDE = 4 * SIDE  # with less, what a JPEG decoder leaves out shows in the bits
# Half of the waves have an amplitude below a quarter of a grey level: the signs of a flat picture or a plain
# gradient are those of rounding errors, and would be equal for many.
FAINTEST = SIDE * SIDE / 4 / 4

ENTRY = np.dtype([("key", f"S{KEY_LENGTH}"), ("hash", "<u8"), ("known", "u1")])
HEADER = b"mmfeat image hashes 1\n"  # another way of hashing gets another number
DIGEST_BYTES = 16
STEP = 1024
SAVE_SECONDS = 30.0
UNREAD = -1

_ORIENTATION = 0x0112
_TURNS = {  # what an orientation says was done to the picture, undone on (row, column)
    2: lambda grey: grey[:, ::-1],
    3: lambda grey: grey[::-1, ::-1],
    4: lambda grey: grey[::-1],
    5: lambda grey: grey.T,
    6: lambda grey: grey.T[:, ::-1],
    7: lambda grey: grey[::-1, ::-1].T,
    8: lambda grey: grey.T[::-1],
}


class ImageHashes:
    """Hashes in one file, sorted by content key; a file that is damaged or foreign counts as empty."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._entries = _read(file)
        self._new: list[tuple[bytes, int, bool]] = []
        self._saved = time.monotonic()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of content keys (N,) S32: hashes (N,) uint64, whether there is one, and whether that was remembered.

        What was added since the last `save` is not found.
        """
        if not len(self._entries):
            return np.zeros(len(keys), np.uint64), np.zeros(len(keys), bool), np.zeros(len(keys), bool)
        at = np.minimum(np.searchsorted(self._entries["key"], keys), len(self._entries) - 1)
        entries = self._entries[at]
        remembered = entries["key"] == keys
        known = remembered & (entries["known"] > 0)
        return np.where(known, entries["hash"], np.uint64(0)), known, remembered

    def add(self, key: bytes, found: int | None) -> None:
        """Remember the hash of a content, or that it has none; written now and then, and by `save`."""
        self._new.append((key, found or 0, found is not None))
        if time.monotonic() - self._saved >= SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what is new beside what others wrote meanwhile; where that cannot be, the hashes stay usable."""
        if self._new:
            new = np.array(self._new, ENTRY)
            self._entries = _merged(_merged(_read(self._file), self._entries), new)
            self._new = []
            if self._file.parent.is_dir():  # reading makes no cache
                with contextlib.suppress(WriteError):
                    write_atomic(self._file, [HEADER, _digest(self._entries), self._entries.tobytes()])
        self._saved = time.monotonic()

    def __enter__(self) -> ImageHashes:
        return self

    def __exit__(self, *_: object) -> None:
        self.save()


def image_hashes(
    samples: Sequence[Sample], keys: ContentKeys, store_path: Path, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) uint64 hashes of the samples' photos, and (N,) whether there is one; 0 where there is none.

    `keys` are the content keys of the same photos; only contents that the file `store_path` lacks are read.
    """
    with ImageHashes(store_path) as store:
        distinct, first = np.unique(keys.keys, return_index=True)
        unknown = first[~store.find(distinct)[2] & keys.present[first]]
        task = (progress or Silent()).task("compare images", len(unknown))
        with task as advance, ThreadPoolExecutor(cpu_count()) as pool:
            for start in range(0, len(unknown), STEP):
                rows = unknown[start : start + STEP]
                wanted = keys.keys[rows].tolist()
                for key, found in zip(wanted, pool.map(_hash_of, (samples[row] for row in rows), wanted), strict=True):
                    if found != UNREAD:
                        store.add(key, found)
                advance(len(rows))
        store.save()
        return store.find(keys.keys)[:2]


def perceptual_hash(path: Path) -> int | None:
    """63 bits of the photo, the right way up; None for what cannot be read as one, and for flat pictures."""
    try:
        return hash_photo(path.read_bytes())
    except OSError:
        return None


def _hash_of(sample: Sample, key: bytes) -> int | None:
    """The hash of a sample's photo, or `UNREAD` if it no longer is what its key was made of."""
    try:
        data = sample.image.read_bytes() if sample.image else b""
    except OSError:
        return UNREAD
    return hash_photo(data) if content_key(data) == key else UNREAD


def hash_photo(data: bytes) -> int | None:
    """`perceptual_hash` of a file's bytes."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            grey = _grey(image)
    except MemoryError:
        raise  # the machine's trouble, not the picture's
    except Exception:  # decoders raise whatever a broken file makes them raise
        return None
    if grey is None:
        return None
    waves = (_cosines() @ grey @ _cosines().T).ravel()[1:]  # without the mean
    if np.median(np.abs(waves)) < FAINTEST:
        return None
    return int.from_bytes(np.packbits(waves > np.median(waves)).tobytes(), "big")


def _grey(image: Image.Image) -> np.ndarray | None:
    """(SIDE, SIDE) float64 luminance, 0 to 255, or None for a picture too thin to be a photo."""
    from PIL import Image

    if max(image.size) > MAX_ASPECT * min(image.size):
        return None
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    image.draft("L", (DRAFT_SIDE, DRAFT_SIDE))  # a JPEG is decoded small, and only its luminance
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    grey = np.asarray(small, dtype=np.float64)
    return turn(grey) if turn else grey


@functools.cache
def _cosines() -> np.ndarray:
    """(FREQUENCIES, SIDE) the lowest rows of the discrete cosine transform."""
    return np.cos(np.pi * (2 * np.arange(SIDE) + 1) * np.arange(FREQUENCIES)[:, None] / (2 * SIDE))


def _read(file: Path) -> np.ndarray:
    try:
        if not file.is_file():  # reading a pipe would wait for ever
            return np.empty(0, ENTRY)
        data = file.read_bytes()
        entries = np.frombuffer(data, ENTRY, offset=len(HEADER) + DIGEST_BYTES)
    except (OSError, ValueError):
        return np.empty(0, ENTRY)
    whole = data.startswith(HEADER) and data[len(HEADER) : len(HEADER) + DIGEST_BYTES] == _digest(entries)
    return entries if whole else np.empty(0, ENTRY)


def _merged(old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """One entry a key, the newest, sorted."""
    entries = np.concatenate([new[::-1], old])
    _, first = np.unique(entries["key"], return_index=True)
    return entries[first]


def _digest(entries: np.ndarray) -> bytes:
    import xxhash

    return xxhash.xxh3_128_digest(entries.tobytes())
