"""Explanations: why a sample is a hit or a miss in the cache, and which fields of the spec differ."""

from __future__ import annotations

import contextlib
import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.hdf5 import printable
from mmfeat.cache.shard import Shard, read_ids
from mmfeat.cache.store import Cache
from mmfeat.cache.survey import CachedEncoder, survey
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import DataError
from mmfeat.samples.dataset import Sample, SampleSet
from mmfeat.samples.keys import single_photos

SHOWN_VALUE = 60
# Field of a spec or key of its preprocessing -> the flag that sets it, where one does.
FLAGS = {
    **dict.fromkeys(("variant", "weights"), "--encoders"),
    **dict.fromkeys(("arithmetic", "storage"), "--dtype"),
    **dict.fromkeys(("output", "layer"), "--outputs"),
    **dict.fromkeys(("input_size", "size", "crop", "crop_size", "resize"), "--image-size"),
    **{name: f"--{name.replace('_', '-')}" for name in ("cleaning", "max_length", "layers", "prompt", "truncate_dim")},
    "view": "--views",
    **{name: f"--{name}" for name in ("draft", "exif", "background")},
    "remote_code": "--trust-remote-code",
}


@dataclass(frozen=True)
class Explanation:
    """The outcome for one encoder and the reasons, a line each; hit, failed, miss, or masked (nothing to encode)."""

    encoder: str
    outcome: str
    reasons: tuple[str, ...]


def explain_sample(root: str | Path, samples: SampleSet, id: str, specs: Sequence[EncoderSpec]) -> list[Explanation]:
    """Tell what the next extraction of `specs` would do with one sample, and why."""
    known = {sample.id: sample for sample in samples}
    if id not in known:
        close = difflib.get_close_matches(id, known, n=3)
        remedy = f"did you mean {', '.join(close)}" if close else "check the id"
        raise DataError(f"{samples.source}: no sample {id!r}; {remedy}")
    store = Cache(root, samples.name)
    entries = survey(root, store.folder.name) if store.folder.is_dir() else []
    return [
        _explain(store, sample, spec, entries)
        for spec in specs
        for sample in (single_photos([known[id]])[0] if spec.part == "image" else [known[id]])
    ]


def _explain(store: Cache, sample: Sample, spec: EncoderSpec, entries: list[CachedEncoder]) -> Explanation:
    key, reason = sample.key(spec.part)
    if key is None:
        return Explanation(spec.name, "masked", (f"{reason}: nothing to encode",))
    index = store.row_index(spec)
    row = int(index.find(np.array([key]))[0])
    if row >= 0:
        shard, number = index.locate(row)
        where = f"row {number} of {shard.path}"
        if index.failed[row]:
            error = printable(shard.errors[number])
            return Explanation(spec.name, "failed", (f"{error} ({where})",))
        first = printable(read_ids(shard.path)[number])
        return Explanation(spec.name, "hit", (f"{where}, first computed for {first}",))
    reasons = [*_changed_content(index.shards, sample.id, key, spec), *_nearest(key, spec, entries)]
    if not index.shards:
        reasons.insert(0, f"no shard of this encoder in {store.spec_folder(spec)}")
    stored = f"this {spec.part} is not among the {len(index.unique()[0]):,} that are stored"
    return Explanation(spec.name, "miss", tuple(reasons or [stored]))


def why_failed(store: Cache, sample: Sample, specs: Sequence[EncoderSpec]) -> str:
    """The reason why a sample has no value for one of `specs`, all of one modality; "" if the sample has values."""
    for spec in specs:
        key, reason = sample.key(spec.part)
        if key is None:
            return reason
        if error := store.error(spec, key):
            return error
    return ""


def _changed_content(shards: Sequence[Shard], id: str, key: bytes, spec: EncoderSpec) -> Iterator[str]:
    """Lines about other contents that are stored under the sample's id."""
    for shard in shards:
        for row in np.flatnonzero(read_ids(shard.path) == id.encode()):
            earlier = printable(shard.keys[row])
            change = f"stored was {earlier[:12]}..., now it is {key.decode()[:12]}... (SHA-256)"
            yield f"its {spec.part} changed (or another data set of this name has the id): {change}"


def _nearest(key: bytes, spec: EncoderSpec, entries: list[CachedEncoder]) -> Iterator[str]:
    """Each difference to the stored spec of the same tower that has the fewest differences; the newest of equals."""
    others = [entry for entry in entries if entry.spec and entry.spec.tower == spec.tower and entry.spec != spec]
    if not others:
        return
    nearest = min(others, key=lambda e: (len(e.spec.differences(spec)), -e.changed))  # type: ignore[union-attr]
    assert nearest.spec is not None
    has = "has" if any((shard.keys == key).any() for shard in nearest.shards) else "lacks"
    yield f"nearest is {nearest.folder.name}, which {has} this {spec.part}; it differs in"
    there, here = _values(nearest.spec), _values(spec)
    for name in [name for name in {**there, **here} if there.get(name, "") != here.get(name, "")]:
        stored, asked = str(there.get(name, "")), str(here.get(name, ""))
        same = next((n for n, (a, b) in enumerate(zip(stored, asked, strict=False)) if a != b), 0)
        flag = _flag(name, spec)
        by = f" ({flag})" if flag else ""
        yield f"  {name}: there {_shown(stored, same)}, asked for {_shown(asked, same)}{by}"


def _values(spec: EncoderSpec) -> dict[str, Any]:
    """The fields of a spec by name, with the keys of its preprocessing in place of the whole."""
    values = asdict(spec)
    with contextlib.suppress(ValueError):  # a spec in a cache that anybody wrote
        steps = json.loads(spec.preprocessing or "{}")
        if isinstance(steps, dict):
            del values["preprocessing"]
            values = {**{name: value for name, value in steps.items() if name not in values}, **values}
    return values


def _flag(name: str, spec: EncoderSpec) -> str:
    """The flag that sets a field of a spec, "" where the checkpoint alone does."""
    if name == "pooling":
        return "--image-pooling" if spec.modality == "image" else "--pooling" if spec.family == "bert" else ""
    if name == "max_length" and spec.family not in ("bert", "st"):
        return ""
    return FLAGS.get(name, "")


def _shown(value: str, same: int) -> str:
    """The value; of a long value, the part around its first difference, which comes after `same` letters."""
    if len(value) <= SHOWN_VALUE:
        return value or "nothing"
    start = max(0, same - SHOWN_VALUE // 3)
    part = value[start : start + SHOWN_VALUE]
    return f"{'...' if start else ''}{part}{'...' if start + SHOWN_VALUE < len(value) else ''}"
