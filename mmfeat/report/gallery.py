"""The gallery: the samples out of fold with text, photo, label and prediction, errors first, in a limited size."""

from __future__ import annotations

import base64
import gzip
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from mmfeat.report.audited import doubted_rows
from mmfeat.report.map import place_samples
from mmfeat.report.modalities import WHO, attribute
from mmfeat.report.section import title_of
from mmfeat.report.subject import Subject
from mmfeat.samples.dataset import Sample
from mmfeat.samples.labels import names_of
from mmfeat.samples.photos import Decoding, decode_image
from mmfeat.system.files import canonical_json
from mmfeat.system.wording import Progress

ROW_SHARE = 0.7  # share of the bytes for rows; photos get the rest
TEXT_LENGTHS = (600, 280, 140, 60, 0)  # characters of each text; the first length that fits is used
PHOTO_SIDE = 160  # pixels
PHOTO_QUALITY = 55
BATCH = 64


@dataclass(frozen=True)
class Gallery:
    """`rows` and `photos` are gzipped JSON in base64; `photos` maps the index of a row to a WebP in base64.

    A row is [id, text, label, prediction, confidence, share of the seeds, right, who, doubted label, has a photo].
    """

    rows: str
    photos: str
    samples: int
    listed: int  # samples in the page
    errors: int
    shown: int  # photos in the page
    cut: int  # characters after which texts are cut; 0 where the page has no texts
    attributed: str  # the head of the attribution, where another head than the entry's; else ""
    points: str = ""  # packed as rows: [row, x, y] of the samples on the map; "" without a map
    placed: int = 0  # samples on the map
    how: str = ""  # how they were placed


def make_gallery(subject: Subject, photos: int, room: int, progress: Progress) -> Gallery:
    """Make a gallery of at most `room` bytes and `photos` photos: errors first, the most confident ones at the top."""
    predictions = subject.predictions()
    attribution = attribute(subject)
    votes, right = predictions.voted, predictions.right
    classes = predictions.targets.classes
    confidence = _confidence(predictions.probabilities, votes, predictions.targets.multilabel)
    agreement = (predictions.chosen == votes).all(2).mean(0)
    doubted = set(doubted_rows(subject).tolist())
    who = [WHO[index] for index in attribution.who] if attribution else [""] * len(right)
    order = np.lexsort((-confidence, right)).tolist()
    samples = [subject.by_id.get(predictions.ids[row]) for row in order]
    facts = [
        [
            names_of(predictions.targets.matrix[row], classes),
            names_of(votes[row], classes),
            round(float(confidence[row]), 3),
            round(float(agreement[row]), 2),
            int(right[row]),
            who[row],
            int(row in doubted),
        ]
        for row in order
    ]
    ids = [predictions.ids[row] for row in order]
    packed, cut, listed = _fit_rows(ids, samples, facts, int(room * ROW_SHARE))
    places, how = place_samples(subject, samples[:listed])
    points = pack(places) if places else ""
    if len(packed) + len(points) > room:
        places, points = [], ""
    images, shown = _fit_photos(samples[:listed], photos, room - len(packed) - len(points), progress)
    other = attribution.title if attribution and attribution.title != title_of(subject.entry) else ""
    return Gallery(packed, images, len(ids), listed, int((~right).sum()), shown, cut, other, points, len(places), how)


def _confidence(probabilities: np.ndarray, votes: np.ndarray, multilabel: bool) -> np.ndarray:
    """(N,) the probability of the predicted class, in multi-label data the probability of the least certain class."""
    if not multilabel:
        return probabilities[votes]
    return np.where(votes, probabilities, 1 - probabilities).min(1)


def _fit_rows(
    ids: Sequence[str], samples: Sequence[Sample | None], facts: Sequence[list[Any]], room: int
) -> tuple[str, int, int]:
    """(packed rows, length of a text, number of rows): the longest texts that fit, or else only the first rows."""
    for length in TEXT_LENGTHS:
        rows = [
            [id, _text(sample, length), *fact, int(sample is not None and sample.image is not None)]
            for id, sample, fact in zip(ids, samples, facts, strict=True)
        ]
        packed = pack(rows)
        if len(packed) <= room:
            return packed, length, len(rows)
    while rows and len(packed) > room:
        rows = rows[: int(len(rows) * min(0.95, room / len(packed)))]
        packed = pack(rows)
    return packed, length, len(rows)


def _text(sample: Sample | None, length: int) -> str:
    text = (sample.text or "") if sample else ""
    return text if len(text) <= length else f"{text[:length]}…" if length else ""


def pack(value: Any) -> str:
    """Encode a value as gzipped JSON in base64, which the script of the page unpacks."""
    return base64.b64encode(gzip.compress(canonical_json(value).encode(), mtime=0)).decode()


def _fit_photos(samples: Sequence[Sample | None], most: int, room: int, progress: Progress) -> tuple[str, int]:
    """(packed photos, number of photos): at most `most` that fit into `room`; "" for an unreadable photo."""
    wanted = [(row, sample) for row, sample in enumerate(samples) if sample and sample.image is not None][:most]
    photos: dict[str, str] = {}
    if wanted:
        used = 0
        with progress.step("photos of the report", len(wanted)) as advance:
            for row, data in _thumbnails(wanted):
                advance(1)
                used += len(data) * 3 // 2  # base64 within base64 is 16/9 of the data, of which gzip saves some
                if used > room:
                    break
                photos[str(row)] = base64.b64encode(data).decode()
    return pack(photos), sum(map(bool, photos.values()))


def _thumbnails(wanted: Sequence[tuple[int, Sample]]) -> Iterator[tuple[int, bytes]]:
    rest = iter(wanted)
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(rest, BATCH)):
            rows, samples = zip(*batch, strict=True)
            yield from zip(rows, pool.map(thumbnail, samples), strict=True)


def thumbnail(sample: Sample) -> bytes:
    """A small WebP of the photo without metadata; empty for an unreadable photo."""
    assert sample.image is not None
    try:
        image, _ = decode_image(sample.image.read_bytes(), Decoding(PHOTO_SIDE))
    except OSError:
        return b""
    if image is None:
        return b""
    image.thumbnail((PHOTO_SIDE, PHOTO_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=PHOTO_QUALITY, method=4)
    return buffer.getvalue()
