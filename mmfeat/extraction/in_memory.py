"""The embedder: samples -> features in memory, by encoders that stay loaded; no cache is read or written.

Everything else is as in an extraction: the same reader, the same batches, the same rules for what cannot be read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from mmfeat.cache.features import Block, Features, MappedBlock
from mmfeat.cache.shard import Rows
from mmfeat.encoders.registry import Tower, load_encoders
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.extraction.counts import Clocks
from mmfeat.extraction.encode import Batcher, Stage
from mmfeat.extraction.missing import Item
from mmfeat.extraction.reader import Reader
from mmfeat.samples.dataset import MODALITIES, Sample
from mmfeat.samples.keys import ContentKeys, content_keys
from mmfeat.system.wording import Progress, Silent

CHANGED = "changed while it was read"
Found = tuple[np.ndarray, str]  # (D) or (T, D) values, and "" or why there are none


@dataclass(frozen=True)
class Embedded:
    """Features of N samples; `reasons` tell by modality why each of them lacks it, "" where it does not."""

    features: Features
    reasons: Mapping[str, tuple[str, ...]]


class Embedder:
    """Encodes what the `towers` want of samples. A model is loaded when the first sample needs it, and kept.

    Used by one thread at a time.
    """

    def __init__(self, towers: Sequence[Tower], device: str, workers: int = 0) -> None:
        self.towers, self.device, self.workers = list(towers), device, workers
        self._batchers: dict[str, list[Batcher]] = {}

    def embed(self, samples: Sequence[Sample], progress: Progress | None = None) -> Embedded:
        """Encode each content once. Samples may lack a modality, or have one that cannot be read."""
        asked = [name for name in MODALITIES if self._specs(name)]
        keys = {name: content_keys(samples, name) for name in asked}
        self._load([name for name in asked if keys[name].present.any()])
        found = _Collected()
        for modality in asked:
            if items := self._items(samples, keys[modality], modality):
                self._run(modality, items, found, progress or Silent())
        blocks = [_block(tower.spec, keys[tower.spec.modality], found.rows) for tower in self.towers]
        features = Features(
            tuple(sample.id for sample in samples),
            tuple(block for block in blocks if isinstance(block, Block)),
            tuple(block for block in blocks if isinstance(block, MappedBlock)),
        )
        return Embedded(features, {name: _reasons(keys[name], self._specs(name), found.rows) for name in asked})

    def _specs(self, modality: str) -> list[EncoderSpec]:
        return [tower.spec for tower in self.towers if tower.spec.modality == modality]

    def _load(self, modalities: Sequence[str]) -> None:
        """Those of several modalities together: they may be towers of one model."""
        fresh = [name for name in modalities if name not in self._batchers]
        wanted = [tower for tower in self.towers if tower.spec.modality in fresh]
        loaded = load_encoders(wanted, self.device) if wanted else []
        for name in fresh:
            own = [encoder for encoder in loaded if encoder.modality == name]
            self._batchers[name] = [Batcher(encoder, self.device) for encoder in own]

    def _items(self, samples: Sequence[Sample], keys: ContentKeys, modality: str) -> list[Item]:
        """Each content once, in the order of an extraction."""
        fingerprints = frozenset(spec.fingerprint for spec in self._specs(modality))
        first: dict[bytes, Item] = {}
        for sample, key in zip(samples, keys.keys.tolist(), strict=True):
            if key:
                first.setdefault(key, Item(sample, modality, key, fingerprints))
        if modality == "text":
            return sorted(first.values(), key=lambda item: -len(item.sample.text or ""))
        return list(first.values())

    def _run(self, modality: str, items: list[Item], found: _Collected, progress: Progress) -> None:
        batchers = self._batchers[modality]
        reader = Reader([each.encoder for each in batchers], self.workers)
        with progress.step(f"encode {modality}s", len(items)) as advance:
            for _ in Stage(batchers, reader, found, self.device).run(items, advance):
                pass  # what failed is in the rows as well


class _Collected:
    """Keeps rows by fingerprint and content key, in the place of a writer."""

    def __init__(self) -> None:
        self.rows: defaultdict[str, dict[bytes, Found]] = defaultdict(dict)

    def add(self, fingerprint: str, rows: Rows, clocks: Clocks) -> None:
        self.rows[fingerprint].update(zip(rows.keys, zip(rows.values, rows.errors, strict=True), strict=True))


def _block(spec: EncoderSpec, keys: ContentKeys, rows: Mapping[str, Mapping[bytes, Found]]) -> Block | MappedBlock:
    """What the cache would load: NaN or no tokens where nothing could be read, width 0 where no row is there."""
    found = rows.get(spec.fingerprint, {})
    values = [found[key][0] if key in found and not found[key][1] else None for key in keys.keys.tolist()]
    mask = np.array([value is not None for value in values], bool)
    width = next((value.shape[-1] for value in values if value is not None), 0)
    if spec.output == "pooled":
        vectors = np.full((len(values), width), np.nan, spec.storage)
        for row in np.flatnonzero(mask):
            vectors[row] = values[row]
        return Block(spec.folder_name, spec.modality, vectors, mask, spec.source, spec.view)
    empty = np.empty((0, width), spec.storage)
    tokens = [empty if value is None else value for value in values]
    return MappedBlock(
        name=spec.folder_name,
        modality=spec.modality,
        width=width,
        lengths=np.array([len(each) for each in tokens], np.int64),
        mask=mask,
        rows=np.arange(len(tokens)),
        read=partial(_padded, tokens),
        source=spec.source,
        view=spec.view,
        output=spec.output,
    )


def _padded(tokens: Sequence[np.ndarray], positions: np.ndarray) -> np.ndarray:
    """(B, T, D) of B samples, zero behind the end of each."""
    chosen = [tokens[position] for position in positions]
    out = np.zeros((len(chosen), max(map(len, chosen), default=0), tokens[0].shape[1]), tokens[0].dtype)
    for row, values in enumerate(chosen):
        out[row, : len(values)] = values
    return out


def _reasons(
    keys: ContentKeys, specs: Sequence[EncoderSpec], rows: Mapping[str, Mapping[bytes, Found]]
) -> tuple[str, ...]:
    """Of each sample why one of the encoders has nothing of it; "" where all have."""

    def reason(key: bytes, why: str) -> str:
        if not key:
            return why
        errors = (rows.get(spec.fingerprint, {}).get(key, (None, CHANGED))[1] for spec in specs)
        return next(filter(None, errors), "")

    return tuple(reason(key, why) for key, why in zip(keys.keys.tolist(), keys.reasons, strict=True))
