"""Perceptual hashes: 63 bits of a photo that stay the same when the photo is saved again, smaller or more compressed.

The bits are signs of the lowest frequencies of a 32 x 32 grey version, less their median (pHash: Zauner, 2010).
Each photo is hashed once: a file beside the cache keeps the hashes by content. Deleting the file costs only time.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.samples.dataset import KEY_LENGTH, Sample, content_key
from mmfeat.samples.images import MAX_ASPECT
from mmfeat.samples.keys import RecordFile
from mmfeat.system.hardware import cpu_count
from mmfeat.system.wording import Progress, Silent

if TYPE_CHECKING:
    from PIL import Image

    from mmfeat.samples.keys import ContentKeys


SIDE = 32
FREQUENCIES = 8
DRAFT_SIDE = 4 * SIDE  # a smaller draft lacks details that show in the bits
# Least median coefficient. Below that, half of the waves have an amplitude under a quarter of a grey level, as in a
# flat picture or a plain gradient: the signs are rounding errors, and would be equal for many pictures.
FAINTEST = SIDE * SIDE / 4 / 4

ENTRY = np.dtype([("key", f"S{KEY_LENGTH}"), ("hash", "<u8"), ("known", "u1")])
HEADER = b"mmfeat image hashes 1\n"  # another way of hashing gets another number
STEP = 1024  # photos that are hashed between two reports of progress
UNREAD = -1  # a photo that changed or can no longer be read has this in place of a hash

_ORIENTATION = 0x0112
_TURNS = {  # EXIF orientation -> the turn of a (row, column) array that undoes it
    2: lambda grey: grey[:, ::-1],
    3: lambda grey: grey[::-1, ::-1],
    4: lambda grey: grey[::-1],
    5: lambda grey: grey.T,
    6: lambda grey: grey.T[:, ::-1],
    7: lambda grey: grey[::-1, ::-1].T,
    8: lambda grey: grey.T[::-1],
}


class ImageHashes(RecordFile):
    """Perceptual hashes by content key; a photo that has no hash is remembered as such."""

    def __init__(self, file: Path) -> None:
        super().__init__(file, ENTRY, HEADER)

    def find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Look up content keys (N,): (hashes (N,) uint64, whether each has a hash (N,), whether each is known (N,)).

        Hashes that were added since the last `save` are not known.
        """
        entries, remembered = self.lookup(keys)
        known = remembered & (entries["known"] > 0)
        return np.where(known, entries["hash"], np.uint64(0)), known, remembered

    def add(self, key: bytes, value: int | None) -> None:
        """Remember the hash of a content, None for a content without hash; saved now and then, and by `save`."""
        self.append(key, value or 0, value is not None)
        self.save_when_due()


def image_hashes(
    samples: Sequence[Sample], keys: ContentKeys, store_path: Path, progress: Progress | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(N,) uint64 hashes of the samples' photos, 0 for no hash, and (N,) whether a sample has a hash.

    `keys` are the content keys of the same photos; only contents that the file `store_path` lacks are read.
    """
    with ImageHashes(store_path) as store:
        distinct, first = np.unique(keys.keys, return_index=True)
        unknown = first[~store.find(distinct)[2] & keys.present[first]]
        task = (progress or Silent()).step("compare images", len(unknown))
        with task as advance, ThreadPoolExecutor(cpu_count()) as pool:
            for start in range(0, len(unknown), STEP):
                rows = unknown[start : start + STEP]
                contents = keys.keys[rows].tolist()
                values = pool.map(_hash_of, (samples[row] for row in rows), contents)
                for key, value in zip(contents, values, strict=True):
                    if value != UNREAD:
                        store.add(key, value)
                advance(len(rows))
        store.save()
        return store.find(keys.keys)[:2]


def perceptual_hash(path: Path) -> int | None:
    """63 bits of the photo, the right way up; None for a file that is no photo, and for a flat picture."""
    try:
        return hash_photo(path.read_bytes())
    except OSError:
        return None


def _hash_of(sample: Sample, key: bytes) -> int | None:
    """The hash of a sample's photo, or `UNREAD` if the photo no longer has this content key."""
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
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    image.draft("L", (DRAFT_SIDE, DRAFT_SIDE))  # a JPEG is decoded small, and only its luminance
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    grey = np.asarray(small, dtype=np.float64)
    return turn(grey) if turn else grey


@functools.cache
def _cosines() -> np.ndarray:
    """(FREQUENCIES, SIDE) the lowest rows of the discrete cosine transform."""
    return np.cos(np.pi * (2 * np.arange(SIDE) + 1) * np.arange(FREQUENCIES)[:, None] / (2 * SIDE))
