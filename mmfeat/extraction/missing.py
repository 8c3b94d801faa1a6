"""The plan of an extraction, its counts and its clocks, and the parts of samples that cannot be read.

A plan says which contents lack which outputs of which encoders, each content once. Counts tell stored, new and
unreadable contents apart; clocks tell where the time goes.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from mmfeat.cache.reading import FAILED, GOOD, MISSING, KnownKeys
from mmfeat.cache.shard import Shard
from mmfeat.cache.store import Cache
from mmfeat.encoders.lexicon import notes_on_texts
from mmfeat.encoders.registry import Tower
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import DataError
from mmfeat.samples.dataset import PART, Sample, SampleSource
from mmfeat.samples.keys import BY_ID, PARTS, ContentKeys, StatIndex, single_photos
from mmfeat.samples.labels import OWN_SPLIT, rare_note
from mmfeat.samples.rows import Overview
from mmfeat.system.wording import Advance, Progress

STEPS = ("read", "decode", "encode", "write")
WORTH_NAMING = 0.15  # share of the wall time that encoders wait for another step
MAX_FAILURES = 1000  # failures that are listed one by one; the rest is only counted


@dataclass
class Clocks:
    """Seconds that each step of one modality worked; reading and decoding are sums over `workers` readers.

    Encoders are `starved` while they wait for readers, and `blocked` while they wait for the writer.
    """

    workers: int = 1
    read: float = 0.0
    decode: float = 0.0
    encode: float = 0.0
    write: float = 0.0
    starved: float = 0.0
    blocked: float = 0.0
    wall: float = 0.0

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        """Add the seconds that the context takes to a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            setattr(self, step, getattr(self, step) + time.perf_counter() - start)

    def add(self, other: Clocks) -> None:
        for name in (*STEPS, "starved", "blocked", "wall"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.workers = max(self.workers, other.workers)

    @property
    def bottleneck(self) -> str:
        """The step that the others wait for."""
        if self.blocked > max(self.starved, WORTH_NAMING * self.wall):
            return "write"
        if self.starved > WORTH_NAMING * self.wall:
            return "read" if self.read > self.decode else "decode"
        return "encode"

    @property
    def seconds(self) -> dict[str, float]:
        return {step: getattr(self, step) for step in STEPS}

    @property
    def shares(self) -> dict[str, float]:
        """Share of its available time that each step worked, from 0 to 1."""
        available = {step: self.wall * (self.workers if step in ("read", "decode") else 1) for step in STEPS}
        return {step: spent / available[step] if available[step] else 0.0 for step, spent in self.seconds.items()}

    def __str__(self) -> str:
        return " ".join(f"{step} {share:.0%}" for step, share in self.shares.items())


def place_of(sample: Sample, modality: str) -> str:
    """What a message calls the photo or text of a sample."""
    return str(sample.image) if modality == "image" and sample.image else f"sample {sample.id}"


@dataclass
class Parts:
    """Counts of the texts or photos that samples have, and of those that cannot be read or encoded.

    `first` is the place of one of the latter, and its reason.
    """

    count: int = 0
    lost: int = 0
    first: tuple[str, str] = ("", "")

    def lose(self, sample: Sample, modality: str, reason: str, samples: int = 1) -> None:
        """Count the part of one sample, or of several with this content, as lost."""
        self.lost += samples
        if not self.first[0]:
            self.first = (place_of(sample, modality), reason)

    def add(self, other: Parts) -> None:
        self.count += other.count
        self.lost += other.lost
        self.first = self.first if self.first[0] else other.first

    def notes(self, modality: str, judged: str = "") -> list[str]:
        """A line where more than half of the parts are lost, with how that is known in `judged`; else none."""
        if self.lost * 2 <= self.count:
            return []
        (where, reason), of = self.first, f"of {self.count:,} {PART[modality]}s"
        what = f"{self.lost:,} {of} cannot" if self.lost < self.count else f"none {of} can"
        return [f"{what} be read{judged}; the first is {where}: {reason}"]

    def check(self, source: str, modality: str, judged: str = "") -> list[str]:
        """The notes. Raises `DataError` where all parts are lost."""
        notes = self.notes(modality, judged)
        if not notes or self.lost < self.count:
            return notes
        others = "" if os.path.isdir(source) else ", or name other ones with --columns image=..."
        remedy = "name a file that has these ids" if modality == BY_ID else "use another encoder"
        remedy = f"put photos that open in their place{others}" if modality == "image" else remedy
        raise DataError(f"{source}: {notes[0]}; {remedy}")


@dataclass
class Counts:
    """Counts of samples, and of vectors by the cache folder of their encoder.

    `stored` vectors were in the cache before, `new` ones were committed; `unreadable` rows hold an error, old or new.
    `missing` maps modality -> reason -> number of samples, `examples` maps the same to the id of one such sample.
    `cut` counts the texts that were longer than the `limits` of their encoder, in tokens. `runtimes` says what computed
    an encoder's vectors, where that is not torch's plain pass.
    `parts` maps modality -> how many samples have a part, and how many of these parts cannot be read or encoded; a
    content that a block was the first to try does not count as lost again in the blocks after it.
    `failed` counts what could not be read or encoded this time, `failures` lists the first as (sample id, reason).
    """

    stored: Counter[str] = field(default_factory=Counter)
    new: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    cut: Counter[str] = field(default_factory=Counter)
    limits: dict[str, int] = field(default_factory=dict)
    runtimes: dict[str, str] = field(default_factory=dict)
    missing: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, dict[str, str]] = field(default_factory=dict)
    parts: dict[str, Parts] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    failed: int = 0
    clocks: dict[str, Clocks] = field(default_factory=dict)

    def to_json(self) -> str:
        import msgspec

        return msgspec.json.encode(self).decode()

    @classmethod
    def from_json(cls, text: str) -> Counts:
        import msgspec

        return msgspec.json.decode(text, type=cls, dec_hook=lambda _, counts: Counter(counts))

    def add_failures(self, items: Sequence[Item], failures: Iterable[tuple[str, str, bytes]]) -> None:
        """Count each (sample id, reason, content key) of these items that could not be read or encoded."""
        reasons: dict[bytes, str] = {}
        for id, reason, key in failures:
            reasons.setdefault(key, reason)
            self.failed += 1
            if len(self.failures) < MAX_FAILURES:
                self.failures.append((id, reason))
        for item in items if reasons else ():
            if item.key in reasons:
                self.parts[item.modality].lose(item.sample, item.modality, reasons[item.key], item.samples)

    def add_cut(self, folder: str, limit: int) -> None:
        """Count one text that an encoder read to so many tokens, where its cache folder has a new row of the text."""
        self.cut[folder] += 1
        self.limits[folder] = limit

    def add_rows(self, folder: str, committed: int, failed: int, by_others: int) -> None:
        """Count the rows of one encoder: committed, holding an error, and stored by other writers meanwhile."""
        self.new[folder] += committed
        self.stored[folder] += by_others
        self.unreadable[folder] += failed

    def add(self, other: Counts) -> None:
        for name in ("stored", "new", "unreadable", "cut", "limits", "runtimes"):
            getattr(self, name).update(getattr(other, name))
        for modality, reasons in other.missing.items():
            self.missing.setdefault(modality, Counter()).update(reasons)
            self.examples[modality] = {**other.examples[modality], **self.examples.get(modality, {})}
        for modality, clocks in other.clocks.items():
            self.clocks.setdefault(modality, Clocks(0)).add(clocks)
        for modality, parts in other.parts.items():
            self.parts.setdefault(modality, Parts()).add(parts)
        self.failed += other.failed
        self.failures += other.failures[: MAX_FAILURES - len(self.failures)]


@dataclass(frozen=True)
class Item:
    """One content to encode, the first of `samples` that have it, and the fingerprints of the specs that lack it."""

    sample: Sample
    modality: str
    key: bytes
    fingerprints: frozenset[str]
    samples: int = 1


@dataclass
class BlockPlan:
    """The plan of one block: items to encode by modality, and counts of the contents that no earlier plan met.

    `lacking` counts contents by the cache folder of the encoder that lacks them; `counts` has those that are stored or
    unreadable. An unreadable content lacks nothing unless failures are tried again.
    """

    items: dict[str, list[Item]] = field(default_factory=dict)
    lacking: Counter[str] = field(default_factory=Counter)
    counts: Counts = field(default_factory=Counts)

    @property
    def needed(self) -> set[str]:
        """Fingerprints of the specs that lack any content."""
        return {fingerprint for items in self.items.values() for item in items for fingerprint in item.fingerprints}


def look_over(source: SampleSource, towers: Sequence[Tower], is_test: bool = False) -> Overview:
    """The overview of the samples. Raises `DataError` where no sample has what an encoder takes."""
    overview = source.overview(is_test)
    for modality, absence in overview.absent.items():
        takers = [tower for tower in towers if tower.spec.part == modality]
        others = {tower.request for tower in towers if tower.spec.part != modality}
        only = [tower.spec.model for tower in takers if absence.is_named or tower.request not in others]
        if only:
            rest = "" if absence.is_named else f", or leave {only[0]} out of --encoders"
            raise DataError(f"{overview.source}: {absence.reason}{rest}")
    has_split = any(note.startswith(OWN_SPLIT) for note in overview.notes)
    few = [] if is_test or has_split else rare_note(overview.labels)
    foreign = notes_on_texts(source.texts()) if any(tower.spec.family == "lexicon" for tower in towers) else []
    return replace(overview, notes=(*overview.notes, *few, *foreign))


class Unseen:
    """Progress that is not shown; once `stopped`, `advance` raises `CancelledError`."""

    stopped = False

    @contextmanager
    def step(self, title: str, total: int | None) -> Iterator[Advance]:
        yield self._advance

    def _advance(self, steps: int, note: str = "") -> None:
        if self.stopped:
            raise CancelledError


class Planner(AbstractContextManager["Planner"]):
    """Compares the contents of blocks of samples with `store`; stored errors are tried again with `retry_failed`.

    A content that an earlier block had is not planned again. With `writes` False the planner writes no file.
    """

    def __init__(
        self, specs: Sequence[EncoderSpec], store: Cache, retry_failed: bool = False, writes: bool = True
    ) -> None:
        self._specs, self._store, self._retry_failed, self._writes = list(specs), store, retry_failed, writes
        self._known: dict[EncoderSpec, KnownKeys] = {}
        self.shards: dict[str, set[str]] = {}  # fingerprint -> names of the files accounted for
        self._open = ExitStack()
        self._index: StatIndex | None = None

    def __exit__(self, *error: object) -> None:
        self._open.close()

    def plan(self, samples: Sequence[Sample], progress: Progress | None = None) -> BlockPlan:
        """Plan one block: find the contents of the samples that the cache lacks."""
        plan = BlockPlan()
        counts = plan.counts
        everyone = samples
        for modality in PARTS:
            if specs := [spec for spec in self._specs if spec.part == modality]:
                samples = single_photos(everyone)[0] if modality == "image" else everyone
                keys = self._keys(samples, modality, progress)
                counts.missing[modality] = Counter(reason for reason in keys.reasons if reason)
                pairs = zip(reversed(keys.reasons), reversed(samples), strict=True)
                counts.examples[modality] = {reason: sample.id for reason, sample in pairs if reason}
                parts = counts.parts[modality] = Parts(sum(getattr(sample, modality) is not None for sample in samples))
                for row in np.flatnonzero(~keys.present).tolist():
                    if getattr(samples[row], modality) is not None:
                        parts.lose(samples[row], modality, keys.reasons[row])
                plan.items[modality] = self._items(plan, samples, keys, specs)
        return plan

    def plan_ahead(self, blocks: Iterator[Sequence[Sample]], progress: Progress) -> Generator[BlockPlan, None, None]:
        """Yield the plan of each block, made while the block before is encoded; only the first shows its progress."""

        def plan_next(progress: Progress) -> BlockPlan | None:
            block = next(blocks, None)
            return None if block is None else self.plan(block, progress)

        plan, rest = plan_next(progress), Unseen()
        with ThreadPoolExecutor(1) as pool:
            try:
                while plan is not None:
                    upcoming = pool.submit(plan_next, rest)
                    yield plan
                    plan = upcoming.result()
            finally:
                rest.stopped = True

    def refresh(self) -> None:
        """Read the shards that other processes wrote meanwhile, and save the hashes of photos."""
        for spec, known in self._known.items():
            seen = self.shards[spec.fingerprint]
            fresh = self._store.shards(spec, without=seen)
            known.add(fresh)
            seen |= self._accounted(fresh)
        if self._index is not None:
            self._index.save()

    def _keys(self, samples: Sequence[Sample], modality: str, progress: Progress | None) -> ContentKeys:
        if modality == "image" and self._index is None:
            self._index = self._open.enter_context(self._store.index(self._writes))
        return self._store.content_keys(samples, modality, progress, self._index)

    def _items(
        self, plan: BlockPlan, samples: Sequence[Sample], keys: ContentKeys, specs: list[EncoderSpec]
    ) -> list[Item]:
        """Items in the order of their samples; texts from long to short, so that the texts of a batch are alike."""
        present = np.flatnonzero(keys.present)
        contents, first, counts = np.unique(keys.keys[present], return_index=True, return_counts=True)
        lacking, failed = np.stack([self._compare(plan, spec, contents) for spec in specs], axis=1)
        fingerprints, modality = [spec.fingerprint for spec in specs], specs[0].part
        items = []
        rows = present[first]  # row of the first sample with each content
        if len(lost := np.flatnonzero(failed.any(axis=0))):
            column = min(lost.tolist(), key=rows.__getitem__)
            reason = self._store.error(specs[int(failed[:, column].argmax())], bytes(contents[column]))
            plan.counts.parts[modality].lose(samples[rows[column]], modality, reason, int(counts[lost].sum()))
        for column in sorted(np.flatnonzero(lacking.any(axis=0)).tolist(), key=lambda column: rows[column]):
            sample, key = samples[rows[column]], bytes(contents[column])
            missing = frozenset(name for name, lacks in zip(fingerprints, lacking[:, column], strict=True) if lacks)
            items.append(Item(sample, modality, key, missing, int(counts[column])))
        if modality == "text":
            items.sort(key=lambda item: -len(item.sample.text or ""))
        return items

    def _compare(self, plan: BlockPlan, spec: EncoderSpec, contents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) whether `spec` lacks each of N distinct contents, and (N,) whether an error is all that is stored.

        Counts the contents that no earlier plan met.
        """
        known = self._known[spec] if spec in self._known else self._look(spec)
        states, asked = known.states(contents)
        lacking = ((states == MISSING) | ((states == FAILED) & self._retry_failed)) & ~asked
        known.ask(contents)
        name = spec.folder_name
        plan.lacking[name] += int(lacking.sum())
        failed = (states == FAILED) & ~lacking
        plan.counts.unreadable[name] += int((failed & ~asked).sum())
        plan.counts.stored[name] += int(((states == GOOD) & ~asked).sum())
        return lacking, failed

    def _look(self, spec: EncoderSpec) -> KnownKeys:
        """Read the keys that the cache has of a spec."""
        shards = self._store.shards(spec)
        if self._writes:
            self._store.settle(spec)  # shards that count as stored must outlive a power loss
        self.shards[spec.fingerprint] = self._accounted(shards)
        self._known[spec] = KnownKeys(shards)
        return self._known[spec]

    def _accounted(self, shards: Sequence[Shard]) -> set[str]:
        """Names of the shards that a writer need not read.

        A content that is tried again may fail again: its writer must see the stored errors, or it stores them twice.
        """
        return {shard.path.name for shard in shards if not (self._retry_failed and (shard.errors != b"").any())}
