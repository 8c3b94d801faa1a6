"""Photos: each file is read once for its content key, its perceptual hash and its oddities."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING
from unicodedata import normalize

import numpy as np

from mmfeat.extraction.missing import Parts
from mmfeat.extraction.reader import prefetch
from mmfeat.samples.contents import KEY_LENGTH, content_key
from mmfeat.samples.dataset import Sample, SampleSet
from mmfeat.samples.folders import photo_suffixes
from mmfeat.samples.keys import DRAFT_SIDE, SIDE, ContentKeys, hash_photo
from mmfeat.samples.photo_cells import Photos
from mmfeat.samples.photos import Decoding, decode_image, orientation, read_photo
from mmfeat.system.remote import is_remote
from mmfeat.system.wording import Progress

if TYPE_CHECKING:
    from PIL import Image


MISSING, UNREADABLE, TRUNCATED, BROKEN = "missing", "unreadable", "truncated", "broken"
TINY, EXTREME, HUGE, FLAT, COLOURS = "tiny", "extreme shape", "huge", "flat", "colours"
ANIMATED, TURNED, MISNAMED = "animated", "turned", "misnamed"

SMALLEST_SIDE = 32  # pixels; encoders enlarge a smaller photo at least seven times
MOST_ASPECT = 4.0  # encoders cut a square out of the middle, which is a quarter of a photo of this aspect
FAINTEST_SPREAD = 3.0  # standard deviation of the grey levels of a small version, of 255
MOST_PIXELS = 50_000_000
PLAIN_MODES = ("RGB", "L")
FORMATS = {".jpg": ("JPEG", "MPO"), ".jpeg": ("JPEG", "MPO"), ".png": ("PNG",), ".webp": ("WEBP",), ".gif": ("GIF",)}
LOST = (UNREADABLE, TRUNCATED, BROKEN)
AHEAD = 64  # photos read in advance

Oddity = tuple[str, str]  # (kind, detail)


@dataclass(frozen=True)
class PhotoFacts:
    """Facts about the photo of one sample; `key` is None where the file could not be read."""

    key: bytes | None
    hash: int | None
    size: tuple[int, int] | None
    findings: tuple[Oddity, ...]


@dataclass(frozen=True)
class PhotosFacts:
    """Facts about the photos of N samples; `hashes` are (perceptual hashes (N,) uint64, known (N,) bool)."""

    keys: ContentKeys
    hashes: tuple[np.ndarray, np.ndarray]
    sizes: list[tuple[int, int]]
    findings: list[tuple[Oddity, ...]]
    absent: bool  # True where no sample names a photo
    lost: list[str]  # a line where more than half of the photos cannot be read


def inspect_photos(samples: Sequence[Sample], workers: int, progress: Progress) -> PhotosFacts:
    """Read every photo, `workers` at once and at most `AHEAD` in memory.

    Where no sample names a photo, no photo counts as missing.
    """
    photos: list[PhotoFacts] = []
    parts = Parts(sum(sample.image is not None for sample in samples))
    with warnings.catch_warnings(), progress.step("inspect photos", len(samples)) as advance:
        warnings.filterwarnings("ignore", module=r"PIL\.")  # the findings report odd files
        for sample, photo in zip(samples, prefetch(inspect_photo, samples, workers, AHEAD), strict=True):
            photos.append(photo)
            if reason := next((why for what, why in photo.findings if sample.image and what in LOST), ""):
                parts.lose(sample, "image", reason)
            advance(1)
    keys = np.array([photo.key or b"" for photo in photos], f"S{KEY_LENGTH}")
    known = np.array([photo.hash is not None for photo in photos], bool)
    absent = all(sample.image is None for sample in samples)
    return PhotosFacts(
        ContentKeys(keys, keys != b"", ()),
        (np.array([photo.hash or 0 for photo in photos], np.uint64), known),
        [photo.size for photo in photos if photo.size],
        [() if absent else photo.findings for photo in photos],
        absent,
        parts.notes("image"),
    )


def inspect_photo(sample: Sample) -> PhotoFacts:
    if sample.image is None:
        return PhotoFacts(None, None, None, ((MISSING, sample.image_error),))
    try:
        data = sample.image.read_bytes()
    except OSError as error:
        return PhotoFacts(None, None, None, ((UNREADABLE, error.strerror or str(error)),))
    suffix = PurePosixPath(sample.image.name.partition("?")[0]).suffix.lower()
    size, findings = _header(data, suffix)
    photo_hash = hash_photo(data)
    if photo_hash is None:
        findings = (*_undecoded(data), *findings)
    key = sample.key("image")[0] if isinstance(sample.image, Photos) else content_key(data)
    return PhotoFacts(key, photo_hash, size, findings)


def _undecoded(data: bytes) -> tuple[Oddity, ...]:
    """The oddity of a photo without a hash: the photo cannot be decoded or shows one plain area."""
    image, reason = decode_image(data, Decoding(DRAFT_SIDE))
    if image is not None:
        spread = float(np.asarray(image.convert("L").resize((SIDE, SIDE))).std())
        return ((FLAT, "hardly anything can be seen"),) if spread < FAINTEST_SPREAD else ()
    return ((TRUNCATED if "truncated" in reason else BROKEN, reason),)


def _header(data: bytes, suffix: str) -> tuple[tuple[int, int] | None, tuple[Oddity, ...]]:
    """Size and oddities of a photo that its header tells, without decoding."""
    try:
        return read_photo(data, lambda image: (image.size, tuple(_oddities(image, suffix))))
    except MemoryError:
        raise  # the machine is at fault, not the photo
    except Exception:  # a broken file may raise any error; `_undecoded` names the fault
        return None, ()


def _oddities(image: Image.Image, suffix: str) -> list[Oddity]:
    width, height = image.size
    short, long = sorted(image.size)
    kind = str(image.format)
    frames = getattr(image, "n_frames", 1) if kind != "MPO" else 1
    turn = orientation(image)
    checks = [
        (short < SMALLEST_SIDE, TINY, f"{width} x {height} pixels"),
        (long > MOST_ASPECT * short, EXTREME, f"{width} x {height} pixels"),
        (width * height > MOST_PIXELS, HUGE, f"{width} x {height} pixels"),
        (image.mode not in PLAIN_MODES, COLOURS, f"{image.mode}, not RGB"),
        (frames > 1, ANIMATED, f"{frames} frames, the first counts"),
        (turn != 1, TURNED, f"EXIF orientation {turn}; encoders see it upright, unless --exif stored"),
        (kind not in FORMATS.get(suffix, (kind,)), MISNAMED, f"{kind} in a file named {suffix}"),
    ]
    return [(what, detail) for is_odd, what, detail in checks if is_odd]


def stray_files(samples: SampleSet) -> list[str]:
    """Sorted names of files in `data/` that no sample uses: ids on no list, second photos of an id, other kinds."""
    folder = Path(samples.source) / "data"
    if is_remote(samples.source) or not (Path(samples.source).is_dir() and folder.is_dir()):
        return []
    ids = {normalize("NFC", sample.id) for sample in samples}
    photos = {sample.image.name for sample in samples if sample.image}
    names = sorted(entry.name for entry in os.scandir(folder))
    return [name for name in names if not _is_used(Path(name), ids, photos)]


def _is_used(path: Path, ids: set[str], photos: set[str]) -> bool:
    suffix = path.suffix.lower()
    return (
        path.name in photos if suffix in photo_suffixes() else suffix == ".txt" and normalize("NFC", path.stem) in ids
    )
