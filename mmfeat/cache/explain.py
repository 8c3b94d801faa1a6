"""Why a sample is a hit or a miss: what the cache has of it, and which field of the spec differs."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mmfeat.cache.shard import Shard, read_ids
from mmfeat.cache.store import Cache
from mmfeat.cache.survey import Entry, survey
from mmfeat.encoders import EncoderSpec
from mmfeat.errors import DataError
from mmfeat.samples import Sample, SampleSet

SHOWN_VALUE = 60


@dataclass(frozen=True)
class Explanation:
    """`outcome` is hit, failed, miss or masked (there is nothing to encode); `reasons` are one line each."""

    encoder: str
    outcome: str
    reasons: tuple[str, ...]


def explain_sample(root: str | Path, samples: SampleSet, id: str, specs: Sequence[EncoderSpec]) -> list[Explanation]:
    """What the next extraction of `specs` would do with one sample, and why."""
    known = {sample.id: sample for sample in samples}
    if id not in known:
        close = difflib.get_close_matches(id, known, n=3)
        raise DataError(
            f"{samples.source}: no sample {id!r}; {'did you mean ' + ', '.join(close) if close else 'check the id'}"
        )
    store = Cache(root, samples.name)
    entries = survey(root, store.folder.name) if store.folder.is_dir() else []
    return [_explain(store, known[id], spec, entries) for spec in specs]


def _explain(store: Cache, sample: Sample, spec: EncoderSpec, entries: list[Entry]) -> Explanation:
    key, reason = sample.key(spec.modality)
    if key is None:
        return Explanation(spec.name, "masked", (f"{reason}: nothing to encode",))
    table = store.table(spec)
    row = int(table.find(np.array([key]))[0])
    if row >= 0:
        shard, number = table.place(row)
        where = f"row {number} of {shard.path}"
        if table.failed[row]:
            error = shard.errors[number].decode()
            return Explanation(spec.name, "failed", (f"{error} ({where})", "mmfeat extract --retry-failed tries again"))
        return Explanation(spec.name, "hit", (f"{where}, first computed for {read_ids(shard.path)[number].decode()}",))
    reasons = [*_changed_content(table.shards, sample.id, key, spec), *_nearest(key, spec, entries)]
    if not table.shards:
        reasons.insert(0, f"no shard of this encoder in {store.spec_folder(spec)}")
    return Explanation(spec.name, "miss", tuple(reasons or [f"this {spec.modality} is not among {len(table.keys):,}"]))


def _changed_content(shards: Sequence[Shard], id: str, key: bytes, spec: EncoderSpec) -> Iterator[str]:
    """Whether the sample was stored with another content."""
    for shard in shards:
        for row in np.flatnonzero(read_ids(shard.path) == id.encode()):
            was = shard.keys[row].decode()
            yield f"its {spec.modality} changed: stored was {was[:12]}..., now it is {key.decode()[:12]}... (SHA-256)"


def _nearest(key: bytes, spec: EncoderSpec, entries: list[Entry]) -> Iterator[str]:
    """The present spec that differs in the fewest fields, field by field."""
    others = [e for e in entries if e.spec and e.spec.modality == spec.modality and e.spec != spec]
    if not others:
        return
    # A sample that is there tells more than one that is not; the newest comes first among equals.
    nearest = min(others, key=lambda e: (len(e.spec.differences(spec)), -e.changed))  # type: ignore[union-attr]
    assert nearest.spec is not None
    there = any((shard.keys == key).any() for shard in nearest.shards)
    has = "has" if there else "lacks"
    yield f"nearest is {nearest.folder.name}, which {has} this {spec.modality}; it differs in"
    for name in nearest.spec.differences(spec):
        yield f"  {name}: there {_shown(nearest.spec, name)}, asked for {_shown(spec, name)}"


def _shown(spec: EncoderSpec, name: str) -> str:
    value = str(asdict(spec)[name])
    return value if len(value) <= SHOWN_VALUE else f"{value[:SHOWN_VALUE]}..."
