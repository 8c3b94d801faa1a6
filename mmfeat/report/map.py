"""The map: samples as points of a plane, near each other where their vectors are alike."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np

from mmfeat.cache.features import MappedBlock
from mmfeat.cache.store import Cache
from mmfeat.errors import MmfeatError
from mmfeat.report.subject import SINGLE, Subject
from mmfeat.samples.dataset import Sample

POINTS = 3000  # largest map
WIDTH = 50  # dimensions that UMAP is given
SCALE = 1000  # a place is an integer up to this
SEED = 42


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
