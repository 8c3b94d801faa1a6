"""The embedder: samples -> features in memory, by encoders that stay loaded; no cache is read or written.

Reader, batches and the rules for unreadable contents are those of an extraction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mmfeat.cache.features import Block, Features, MappedBlock, joined, joined_mapped
from mmfeat.cache.shard import Rows
from mmfeat.encoders.registry import Tower, load_encoders, loading
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.extraction.encode import Batcher, Stage
from mmfeat.extraction.missing import Clocks, Item
from mmfeat.extraction.reader import Reader
from mmfeat.samples.dataset import Sample
from mmfeat.samples.keys import PARTS, ContentKeys, content_keys, single_photos
from mmfeat.system.notebook import usual_progress
from mmfeat.system.wording import Progress

CHANGED = "changed while it was read"
EncodedValues = tuple[np.ndarray, str]  # (D) or (T, D) values, and the error, "" if there is none


@dataclass(frozen=True)
class Embedded:
    """Features of N samples; `reasons` maps modality -> (N,) reasons why a sample lacks it, "" where it does not."""

    features: Features
    reasons: Mapping[str, tuple[str, ...]]


class Embedder:
    """Encodes samples by `towers`. A model is loaded when a sample first needs it, and stays loaded.

    One thread may use an embedder at a time.
    """

    def __init__(self, towers: Sequence[Tower], device: str, workers: int = 0) -> None:
        self.towers, self.device, self.workers = list(towers), device, workers
        self._batchers: dict[str, list[Batcher]] = {}

    def embed(self, samples: Sequence[Sample], progress: Progress | None = None) -> Embedded:
        """Encode each content once. Samples may lack a modality, or have an unreadable one."""
        asked = [name for name in PARTS if self._specs(name)]
        keys = {name: content_keys(samples, name) for name in asked}
        progress = progress or usual_progress()
        self._load([name for name in asked if keys[name].present.any()], progress)
        sink = _RowsInMemory()
        for modality in asked:
            single = keys[modality].single or keys[modality]
            photos = single_photos(samples)[0] if keys[modality].is_several else samples
            if items := self._items(photos, single, modality):
                self._run(modality, items, sink, progress)
        blocks = [_block(tower.spec, keys[tower.spec.part], sink.rows) for tower in self.towers]
        features = Features(
            tuple(sample.id for sample in samples),
            tuple(block for block in blocks if isinstance(block, Block)),
            tuple(block for block in blocks if isinstance(block, MappedBlock)),
        )
        return Embedded(features, {name: _reasons(keys[name], self._specs(name), sink.rows) for name in asked})

    def _specs(self, modality: str) -> list[EncoderSpec]:
        return [tower.spec for tower in self.towers if tower.spec.part == modality]

    def _load(self, modalities: Sequence[str], progress: Progress) -> None:
        """Load the encoders of several modalities in one call, because they may be towers of one model."""
        fresh = [name for name in modalities if name not in self._batchers]
        wanted = [tower for tower in self.towers if tower.spec.part in fresh]
        if wanted:
            with progress.step(loading(wanted), None):
                loaded = load_encoders(wanted, self.device)
            for name in fresh:
                self._batchers[name] = [Batcher(encoder, self.device) for encoder in loaded if encoder.modality == name]

    def _items(self, samples: Sequence[Sample], keys: ContentKeys, modality: str) -> list[Item]:
        """Items of each content once, in the order of an extraction."""
        fingerprints = frozenset(spec.fingerprint for spec in self._specs(modality))
        first: dict[bytes, Item] = {}
        for sample, key in zip(samples, keys.keys.tolist(), strict=True):
            if key:
                first.setdefault(key, Item(sample, modality, key, fingerprints))
        if modality == "text":
            return sorted(first.values(), key=lambda item: -len(item.sample.text or ""))
        return list(first.values())

    def _run(self, modality: str, items: list[Item], sink: _RowsInMemory, progress: Progress) -> None:
        batchers = self._batchers[modality]
        reader = Reader([batcher.encoder for batcher in batchers], self.workers)
        with progress.step(f"encode {modality}s", len(items)) as advance:
            for _ in Stage(batchers, reader, sink, self.device).run(items, advance):
                pass  # the rows hold the errors as well


class _RowsInMemory:
    """Sink that keeps rows by fingerprint and content key."""

    def __init__(self) -> None:
        self.rows: defaultdict[str, dict[bytes, EncodedValues]] = defaultdict(dict)

    def add(self, fingerprint: str, rows: Rows, clocks: Clocks) -> None:
        self.rows[fingerprint].update(zip(rows.keys, zip(rows.values, rows.errors, strict=True), strict=True))


def _block(
    spec: EncoderSpec, keys: ContentKeys, rows: Mapping[str, Mapping[bytes, EncodedValues]]
) -> Block | MappedBlock:
    """The block that a cache would load: NaN or no tokens where a row lacks values, width 0 where all rows do."""
    encoded, wanted = rows.get(spec.fingerprint, {}), (keys.single or keys).keys.tolist()
    values = [encoded[key][0] if key in encoded and not encoded[key][1] else None for key in wanted]
    mask = np.array([value is not None for value in values], bool)
    width = next((value.shape[-1] for value in values if value is not None), 0)
    if spec.output == "pooled":
        vectors = np.full((len(values), width), np.nan, spec.storage)
        for row in np.flatnonzero(mask):
            vectors[row] = values[row]
        return joined(Block(spec.folder_name, spec.modality, vectors, mask, spec.source, spec.view), keys.owners)
    empty = np.empty((0, width), spec.storage)
    tokens = [empty if value is None else value for value in values]
    block = MappedBlock(
        name=spec.folder_name,
        modality=spec.modality,
        width=width,
        lengths=np.array([len(sequence) for sequence in tokens], np.int64),
        mask=mask,
        rows=np.arange(len(tokens)),
        read=partial(_padded, tokens),
        source=spec.source,
        view=spec.view,
        output=spec.output,
    )
    return joined_mapped(block, keys.owners)


def _padded(tokens: Sequence[np.ndarray], positions: np.ndarray) -> np.ndarray:
    """(B, T, D) tokens of B samples, padded with zeros."""
    chosen = [tokens[position] for position in positions]
    out = np.zeros((len(chosen), max(map(len, chosen), default=0), tokens[0].shape[1]), tokens[0].dtype)
    for row, values in enumerate(chosen):
        out[row, : len(values)] = values
    return out


def _reasons(
    keys: ContentKeys, specs: Sequence[EncoderSpec], rows: Mapping[str, Mapping[bytes, EncodedValues]]
) -> tuple[str, ...]:
    """(N,) the first reason why an encoder has no row of a sample, "" where all have one."""

    def reason(key: bytes, why: str) -> str:
        if not key:
            return why
        errors = (rows.get(spec.fingerprint, {}).get(key, (None, CHANGED))[1] for spec in specs)
        return next(filter(None, errors), "")

    single = keys.single or keys
    reasons = [reason(key, why) for key, why in zip(single.keys.tolist(), single.reasons, strict=True)]
    if keys.owners is None:
        return tuple(reasons)
    of_sample: dict[int, str] = {}  # of several photos one without a reason is enough
    for owner, why in zip(keys.owners.tolist(), reasons, strict=True):
        of_sample[owner] = why and of_sample.get(owner, why)
    return tuple(of_sample.values())
