"""The plan of an extraction: which content lacks which output of which encoder, each content once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmfeat.cache import Cache, ContentKeys
from mmfeat.encoders import EncoderSpec
from mmfeat.progress import Progress
from mmfeat.samples import MODALITIES, Sample, SampleSet


@dataclass(frozen=True)
class Item:
    """One piece of content to encode, and the fingerprints of the specs that lack it."""

    sample: Sample
    modality: str
    key: bytes
    fingerprints: frozenset[str]


@dataclass
class Plan:
    """What is there and what is not; `stored` and `unreadable` count contents by the encoder's cache folder."""

    items: dict[str, list[Item]] = field(default_factory=dict)  # by modality
    stored: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, int] = field(default_factory=dict)  # remembered with an error, and not tried again
    missing: dict[str, Counter[str]] = field(default_factory=dict)  # modality -> reason -> samples
    shards: dict[str, set[str]] = field(default_factory=dict)  # fingerprint -> names of the files accounted for

    @property
    def needed(self) -> set[str]:
        """Fingerprints of the specs that lack anything."""
        return {fingerprint for items in self.items.values() for item in items for fingerprint in item.fingerprints}


def make_plan(
    samples: SampleSet, specs: Sequence[EncoderSpec], store: Cache, progress: Progress, retry_failed: bool = False
) -> Plan:
    """Compare the contents of `samples` with what `store` has; errors count as stored unless `retry_failed`."""
    plan = Plan()
    for modality in MODALITIES:
        if ours := [spec for spec in specs if spec.modality == modality]:
            keys = store.content_keys(samples.samples, modality, progress)
            plan.missing[modality] = Counter(reason for reason in keys.reasons if reason)
            plan.items[modality] = _items(plan, samples, keys, ours, store, retry_failed)
    return plan


def _items(
    plan: Plan, samples: SampleSet, keys: ContentKeys, specs: list[EncoderSpec], store: Cache, retry_failed: bool
) -> list[Item]:
    """In the order of the samples; texts by length, so that a batch holds equal ones."""
    present = np.flatnonzero(keys.present)
    contents, first = np.unique(keys.keys[present], return_index=True)
    lacking = np.stack([_lacking(plan, spec, store, contents, retry_failed) for spec in specs])
    fingerprints = [spec.fingerprint for spec in specs]
    items = []
    places = present[first]
    for column in sorted(np.flatnonzero(lacking.any(axis=0)).tolist(), key=lambda column: places[column]):
        sample, key = samples.samples[places[column]], bytes(contents[column])
        missing = frozenset(name for name, lacks in zip(fingerprints, lacking[:, column], strict=True) if lacks)
        items.append(Item(sample, specs[0].modality, key, missing))
    return sorted(items, key=lambda item: len(item.sample.text or "")) if specs[0].modality == "text" else items


def _lacking(plan: Plan, spec: EncoderSpec, store: Cache, contents: np.ndarray, retry_failed: bool) -> np.ndarray:
    """(N,) whether `spec` lacks each content; counts what it has."""
    table = store.table(spec)
    store.settle(spec)  # what counts as stored has to stay
    rows = table.find(contents)
    failed = rows >= 0
    failed[failed] = table.failed[rows[failed]]
    lacking = (rows < 0) | (failed & retry_failed)
    # What is tried again may fail again: the writer has to see which errors are there to not store them twice.
    seen = [shard for shard in table.shards if not (retry_failed and (shard.errors != b"").any())]
    plan.shards[spec.fingerprint] = {shard.path.name for shard in seen}
    plan.unreadable[spec.folder_name] = int((failed & ~lacking).sum())
    plan.stored[spec.folder_name] = len(contents) - int((failed | lacking).sum())
    return lacking
