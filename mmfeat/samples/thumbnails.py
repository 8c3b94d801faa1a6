"""Thumbnails: a second look at photos whose perceptual hashes are alike, which those of products on plain ground are.

A thumbnail is the photo in 8 x 8 cells of colour. Thumbnails are remembered beside the hashes, by content key; deleting
their file costs only time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmfeat.samples.contents import KEY_LENGTH
from mmfeat.samples.dataset import Sample
from mmfeat.samples.keys import DRAFT_SIDE, RecordFile, look_at_photos
from mmfeat.samples.photos import Decoding, decode_image
from mmfeat.system.wording import Progress

CELLS = 8
COLOURS = CELLS * CELLS * 3  # numbers of a thumbnail

# Two thumbnails show one photo if no cell differs by more levels, of 255, than this in any colour, and the mean square
# of their differences is less than this share of that of the contrasts. 99.6 % of photos (of tweets and products) that
# were saved again, smaller or more compressed, stay within both, though only a third of those of 60 x 80 pixels that
# were halved; of 2,530 pairs of products that only the hashes took for equal, 18 do.
MOST_LEVELS = 16
MOST_UNLIKE = 0.01
COMPARED = 1 << 16  # pairs that are compared at once

_ENTRY = np.dtype([("key", f"S{KEY_LENGTH}"), ("cells", f"V{COLOURS}"), ("known", "u1")])
_HEADER = b"mmfeat thumbnails 1\n"  # another way of making them gets another number


class SecondLook:
    """Thumbnails of the photos of some samples, whose content keys (N,) are `keys`.

    They are remembered in the file `path`, without one only as long as the object lives; only photos that are asked
    for, and that the file lacks, are read.
    """

    def __init__(
        self, samples: Sequence[Sample], keys: np.ndarray, path: Path | None = None, progress: Progress | None = None
    ) -> None:
        self._samples, self._keys, self._progress = samples, keys, progress
        self._file = RecordFile(path or Path(), _ENTRY, _HEADER, writes=path is not None)

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(Thumbnails (R, `COLOURS`) uint8 of these rows, whether a photo has one (R,)); no content stands twice."""
        wanted = self._keys[rows]
        unknown = rows[~self._file.lookup(wanted)[1]]
        step = "look at images again"
        look_at_photos(self._file, self._samples, unknown, self._keys, thumbnail, step, self._progress)
        entries, present = self._file.lookup(wanted)
        cells = np.frombuffer(entries["cells"].tobytes(), np.uint8).reshape(len(rows), COLOURS)
        return cells, present & (entries["known"] > 0)


def thumbnail(data: bytes) -> bytes:
    """The mean colours of the cells of a photo, row by row; empty for bytes that are no photo."""
    from PIL import Image

    image, _ = decode_image(data, Decoding(DRAFT_SIDE))
    return image.resize((CELLS, CELLS), Image.Resampling.BOX).tobytes() if image else b""


def show_one_photo(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """(P,) whether the two thumbnails, of (N, `COLOURS`) uint8, of each pair (P, 2) of rows are of one photo."""
    alike = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), COMPARED):
        one, other = (thumbnails[rows].astype(np.float32) for rows in pairs[start : start + COMPARED].T)
        near = np.abs(one - other).max(axis=1, initial=0) <= MOST_LEVELS
        one, other = _contrast(one), _contrast(other)
        contrast = (np.square(one).sum(axis=1) + np.square(other).sum(axis=1)) / 2
        alike[start : start + COMPARED] = near & (np.square(one - other).sum(axis=1) <= MOST_UNLIKE * contrast)
    return alike


def _contrast(thumbnails: np.ndarray) -> np.ndarray:
    """Thumbnails (N, `COLOURS`) less the mean of each colour."""
    cells = thumbnails.reshape(len(thumbnails), -1, 3)
    return (cells - cells.mean(axis=1, keepdims=True)).reshape(len(thumbnails), -1)
