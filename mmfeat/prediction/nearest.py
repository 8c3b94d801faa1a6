"""Neighbours: the samples of a data set whose cached vectors are nearest to a sample, a text or a photo.

The search is exact: every vector is compared, some at a time. NumPy takes 6 ms of a core for one query among 100,000
vectors of 512, and so does FAISS; usearch takes twice that, and an index has to be built first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfeat.cache.features import MappedBlock
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower
from mmfeat.errors import ConfigError, DataError
from mmfeat.extraction.arithmetic import resolve_encoders
from mmfeat.extraction.embed import Embedder
from mmfeat.extraction.requests import latest_request
from mmfeat.prediction.inputs import pair_of
from mmfeat.samples.dataset import Data, Sample, SampleSource, read_samples
from mmfeat.sweep.class_names import two_towers
from mmfeat.system.hardware import resolve_device
from mmfeat.system.wording import Progress, counted

STEP = 1024  # vectors that are compared at once


@dataclass(frozen=True)
class Neighbours:
    """The nearest `samples` by the vectors of `encoder`, nearest first, with the cosines to the query."""

    query: Sample
    encoder: str
    samples: tuple[Sample, ...]
    similarities: tuple[float, ...]
    notes: tuple[str, ...] = ()


def neighbours(
    id: str | None = None,
    *,
    text: str | None = None,
    image: str | None = None,
    data: Data = None,
    encoder: str | None = None,
    count: int = 10,
    cache: str | Path = "cache",
    columns: Mapping[str, str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Neighbours:
    """The `count` samples nearest to the sample `id`, to a text or to a photo, by an encoder of the latest extraction.

    A text is compared with photos, and a photo with texts, where a model has towers for both in one space; `encoder`
    names another one, as `bert` or `clip.text`. Samples with the very content of the query are left out.
    Raises `ConfigError` for an encoder that cannot compare it, `DataError` for an unknown id.
    """
    if (id is not None) + (text is not None) + (image is not None) != 1:
        raise ConfigError("neighbours of what? give one of ID, --text and --image")
    request = latest_request(cache, data)
    request = request.changed(None, request.columns | dict(columns or {}), {})
    source = SampleSource(request.data, request.columns)
    described = resolve_encoders(request.encoders, request.options, source, cache, device).towers
    towers = [tower for tower in described if (tower.spec.output, tower.spec.view) == ("pooled", "none")]
    samples = read_samples(request.data, request.columns)
    store = Cache(cache, samples.name)
    if id is not None:
        query = next((sample for sample in samples if sample.id == id), None) or Sample("")
        if not query.id:
            raise DataError(f"{id}: no such sample in {samples.source}; its ids are like {samples.samples[0].id}")
        pairs = [(tower, tower) for tower in towers if query.key(tower.spec.modality)[0]]
    else:
        (query,) = pair_of(text, image)
        pairs = _pairs(towers, "image" if text is None else "text")
    searched, maker = _named(pairs, encoder)
    spec, store = searched.spec, Cache(cache, samples.name)
    keys = store.content_keys(samples.samples, spec.modality, progress)
    block = store.map(samples.samples, spec, keys)
    own = np.flatnonzero(keys.keys == (query.key(spec.modality)[0] or b"none"))
    if id is None:
        vector = _encoded(query, maker, device, progress)
    elif not block.mask[own].all():
        raise DataError(f"{id}: {spec.name} has no vector of it; mmfeat cache explain {id} says why")
    else:
        vector = block.batch(own[:1])[0][0, 0]
    scores = similarities(block, vector)
    scores[own] = np.nan
    nearest = np.argsort(-scores, kind="stable")[: min(count, int(np.isfinite(scores).sum()))]
    left = len(own) - (id is not None)
    notes = (f"{counted(left, 'sample')} with the very same {spec.modality} left out",) if left else ()
    found = tuple(samples.samples[row] for row in nearest)
    return Neighbours(query, spec.name, found, tuple(scores[nearest].tolist()), notes)


def _encoded(query: Sample, tower: Tower, device: str, progress: Progress | None) -> np.ndarray:
    """The vector (D,) of a query. Raises `DataError` for one that cannot be read."""
    embedded = Embedder([tower], resolve_device(device)).embed([query], progress)
    if not embedded.features.blocks[0].mask[0]:
        raise DataError(f"{query.image or query.text}: {embedded.reasons[tower.spec.modality][0]}; give another")
    return embedded.features.blocks[0].vectors[0]


def similarities(block: MappedBlock, vector: np.ndarray) -> np.ndarray:
    """(N,) cosines in double precision of a vector (D,) and those of a block, NaN where there is none."""
    unit = vector.astype(np.float64) / (np.linalg.norm(vector.astype(np.float64)) or 1.0)
    cosines, present = np.full(len(block), np.nan), np.flatnonzero(block.mask)
    for start in range(0, len(present), STEP):
        rows = present[start : start + STEP]
        vectors = block.batch(rows)[0][:, 0].astype(np.float64)
        cosines[rows] = vectors @ unit / np.maximum(np.linalg.norm(vectors, axis=1), np.finfo(float).tiny)
    return cosines


def _pairs(towers: Sequence[Tower], modality: str) -> list[tuple[Tower, Tower]]:
    """(a tower whose vectors can be searched, the tower that makes a vector of a query), towers of photos first."""
    joint, pairs = two_towers(towers), []
    for tower in towers:
        model = joint.get(tower.spec.folder_name)
        if tower.spec.modality == modality:
            pairs.append((tower, tower))
        elif model is not None:
            partners = [t for t in towers if t.spec.modality == modality and joint.get(t.spec.folder_name) == model]
            pairs.append((tower, model if modality == "text" else partners[0]))
    return sorted(pairs, key=lambda pair: pair[0].spec.modality != "image")


def _named(pairs: Sequence[tuple[Tower, Tower]], encoder: str | None) -> tuple[Tower, Tower]:
    """The first pair whose searched tower the user names. Raises `ConfigError` where there is none."""
    for pair in pairs:
        spec = pair[0].spec
        if encoder in (None, pair[0].request, spec.name, spec.tower, spec.family, spec.folder_name):
            return pair
    usable = ", ".join(dict.fromkeys(tower.spec.tower for tower, _ in pairs)) or "none"
    what = f"--encoder {encoder}" if encoder else "no encoder for this"
    raise ConfigError(f"{what}: the latest extraction has {usable}; name one of them, or extract with another first")
