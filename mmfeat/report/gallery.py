"""The gallery: the samples out of fold and those to predict, with texts, photos and predictions, in a limited size; and
their map, where samples with alike vectors lie close together."""

from __future__ import annotations

import base64
import gzip
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.cache.features import MappedBlock
from mmfeat.cache.store import Cache
from mmfeat.errors import MmfeatError
from mmfeat.extraction.requests import test_of
from mmfeat.report.facts import doubted_rows, twins_of
from mmfeat.report.modalities import WHO, attribute
from mmfeat.report.section import LARGE_SIDE, PHOTO_SIDE, SINGLE, Subject, shortened, thumbnail, title_of
from mmfeat.samples.dataset import Sample
from mmfeat.samples.labels import names_of
from mmfeat.system.files import canonical_json
from mmfeat.system.wording import Progress

if TYPE_CHECKING:
    from mmfeat.prediction.output_file import Predictions


ROW_SHARE = 0.7  # share of the bytes for rows; photos get the rest
TEXT_LENGTHS = (600, 280, 140, 60, 0)  # characters of each text; the first length that fits is used
LARGE = 96  # photos at the top of the gallery that are larger
FIRST = 240  # samples of a kind (wrong, to predict, right) whose photos come before the rest of any kind
BATCH = 64
POINTS = 3000  # largest map
WIDTH = 50  # dimensions that UMAP is given
SCALE = 1000  # a place is an integer up to this
SEED = 42


@dataclass(frozen=True)
class Gallery:
    """`rows` and `photos` are gzipped JSON in base64; `photos` maps the index of a row to a WebP in base64.

    A row is [id, text, label, prediction, confidence, share of the seeds, right, who, doubted label, has a photo,
    number of its near duplicates, 0 without]; right is null of a sample to predict, which has no label.
    """

    rows: str
    photos: str
    samples: int
    listed: int  # samples in the page, those to predict among them
    errors: int
    waiting: int  # samples to predict
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
    classes, multilabel = predictions.targets.classes, predictions.targets.multilabel
    confidence = _confidence(predictions.probabilities, votes, multilabel)
    agreement = (predictions.chosen == votes).all(2).mean(0)
    doubted, twins = set(doubted_rows(subject).tolist()), twins_of(predictions)
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
            int(twins[row]),
        ]
        for row in order
    ]
    ids, known = [predictions.ids[row] for row in order], len(order)
    waiting, predicted = _predict_waiting(subject)
    if predicted is not None:
        sure = _confidence(predicted.probabilities, predicted.chosen, multilabel).tolist()
        cells = [names_of(chosen, classes) for chosen in predicted.chosen]
        facts += [["", cell, round(p, 3), 1, None, "", 0, 0] for cell, p in zip(cells, sure, strict=True)]
        ids, samples = ids + list(predicted.ids), [*samples, *waiting]
    packed, cut, listed = _fit_rows(ids, samples, facts, int(room * ROW_SHARE))
    places, how = place_samples(subject, samples[: min(listed, known)])
    points = pack(places) if places else ""
    if len(packed) + len(points) > room:
        places, points = [], ""
    ranked = _by_kind([fact[4] for fact in facts[:listed]])
    images, shown = _fit_photos(samples, ranked, photos, room - len(packed) - len(points), progress)
    other = attribution.title if attribution and attribution.title != title_of(subject.entry) else ""
    counts = (known, listed, int((~right).sum()), len(waiting))
    return Gallery(packed, images, *counts, shown, cut, other, points, len(places), how)


def _predict_waiting(subject: Subject) -> tuple[Sequence[Sample], Predictions | None]:
    """(the samples that wait for a label, predictions of them by the entry): the test data of the extraction, else the
    unlabelled samples of the run's data. None where their vectors are not cached or the final heads are gone."""
    from mmfeat.prediction.final_heads import EntryPredictor, predict_features, read_for, table_of

    run, entry = subject.run, subject.entry
    try:
        if test := test_of(run.config.cache, run.config.data):
            waiting = read_for(test, None, run.config)
        elif subject.samples is not None:
            waiting = replace(subject.samples, samples=subject.samples.unlabelled)
        else:
            return (), None
        predictor, samples = EntryPredictor(run, entry), waiting.samples
        features = Cache(run.config.cache, waiting.name).load(samples, [tower.spec for tower in predictor.towers])
        return samples, predict_features(predictor, features.with_table(table_of(run, entry), samples), samples)
    except (MmfeatError, OSError):
        return (), None


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
            [id, shortened(sample, length), *fact[:-1], int(sample is not None and sample.image is not None), fact[-1]]
            for id, sample, fact in zip(ids, samples, facts, strict=True)
        ]
        packed = pack(rows)
        if len(packed) <= room:
            return packed, length, len(rows)
    while rows and len(packed) > room:
        rows = rows[: int(len(rows) * min(0.95, room / len(packed)))]
        packed = pack(rows)
    return packed, length, len(rows)


def pack(value: Any) -> str:
    """Encode a value as gzipped JSON in base64, which the script of the page unpacks."""
    return base64.b64encode(gzip.compress(canonical_json(value).encode(), mtime=0)).decode()


def _by_kind(right: Sequence[int | None]) -> list[int]:
    """The rows in the order in which they get photos: `FIRST` of the wrong ones, of those to predict and of the right
    ones, and then the rest."""
    seen, ranked = Counter[int | None](), []
    for row, kind in enumerate(right):
        seen[kind] += 1
        ranked.append((seen[kind] > FIRST, (0, None, 1).index(kind), row))
    return [row for *_, row in sorted(ranked)]


def _fit_photos(
    samples: Sequence[Sample | None], ranked: Sequence[int], most: int, room: int, progress: Progress
) -> tuple[str, int]:
    """(packed photos, number of photos): at most `most` that fit into `room`; "" for an unreadable photo."""
    pairs = ((row, samples[row]) for row in ranked)
    wanted = [(row, sample) for row, sample in pairs if sample and sample.image is not None][:most]
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
    rest = ((row, sample, LARGE_SIDE if rank < LARGE else PHOTO_SIDE) for rank, (row, sample) in enumerate(wanted))
    with ThreadPoolExecutor() as pool:
        while batch := list(islice(rest, BATCH)):
            rows, samples, sides = zip(*batch, strict=True)
            yield from zip(rows, pool.map(thumbnail, samples, sides), strict=True)


def place_samples(subject: Subject, samples: Sequence[Sample | None]) -> tuple[list[tuple[int, int, int]], str]:
    """([row, x, y] of at most `POINTS` of the samples, evenly chosen, and how they were placed).

    There are none without vectors that differ. The vectors are those of the entry's encoders, each of length 1. They
    are placed by UMAP where umap-learn is installed, else along their two principal components.
    """
    present = [row for row, sample in enumerate(samples) if sample is not None]
    rows = [present[at] for at in np.linspace(0, len(present) - 1, min(POINTS, len(present))).round().astype(int)]
    vectors = _vectors(subject, [sample for row in rows if (sample := samples[row])])
    if vectors is None or min(vectors.shape) < 3 or not np.ptp(vectors, axis=0).any():
        return [], ""
    from scipy.sparse.linalg import svds

    centred = vectors - vectors.mean(0)
    has_umap = find_spec("umap") is not None
    size, start = min(centred.shape), np.random.default_rng(SEED)
    left, values, _ = svds(centred, min(WIDTH if has_umap else 2, size - 1), v0=start.normal(size=size))
    left, values = left[:, ::-1], values[::-1]  # the largest first
    places, how = left[:, :2] * values[:2], "principal components"
    if share := float(np.square(centred).sum()):
        how += f", {100 * float(np.square(values[:2]).sum()) / share:.0f} % of the variance"
    if has_umap and len(rows) > WIDTH:
        from umap import UMAP

        places, how = UMAP(random_state=SEED, n_jobs=1).fit_transform(left * values), "UMAP"
    low, high = np.percentile(places, [0.5, 99.5], axis=0)  # few samples far away would squeeze all others
    scaled = np.clip((places - low) / np.where(high > low, high - low, 1), 0, 1) * SCALE
    return [(row, *place) for row, place in zip(rows, scaled.round().astype(int).tolist(), strict=True)], how


def _vectors(subject: Subject, samples: Sequence[Sample]) -> np.ndarray | None:
    """(N, D) vectors of all encoders side by side, each of length 1, or its mean where a sample lacks one; None where
    the cache is gone."""
    config, seen = subject.run.config, subject.entry.modalities
    specs = [tower.spec for tower in config.encoders if (tower.spec.output, tower.spec.view) == ("pooled", "none")]
    specs = [spec for spec in specs if seen not in SINGLE or spec.modality == seen]
    try:
        store = Cache(config.cache, config.dataset)
        blocks = [store.map(samples, spec, allow_missing=True) for spec in specs]
        parts = [_units(block) for block in blocks if block.mask.any()]
    except (MmfeatError, OSError):
        return None
    return np.concatenate(parts, axis=1) if parts else None


def _units(block: MappedBlock) -> np.ndarray:
    vectors = np.zeros((len(block), block.width), np.float32)
    rows = np.flatnonzero(block.mask)
    values = block.batch(rows)[0][:, 0].astype(np.float32)
    values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    vectors[rows], vectors[~block.mask] = values, values.mean(0)
    return vectors
