"""The extractor: what some samples lack, through loaded encoders, into the cache. Every engine calls it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any

from mmfeat.cache.store import Cache
from mmfeat.cache.writer import ShardWriter
from mmfeat.encoders.registry import Tower, is_torch, load_encoders
from mmfeat.extraction.clocks import Clocks
from mmfeat.extraction.encode import BackgroundWriter, Batcher, Stage
from mmfeat.extraction.missing import Item, Missing, Planner
from mmfeat.extraction.reader import Reader
from mmfeat.samples.dataset import Sample
from mmfeat.system.hardware import resolve_device
from mmfeat.system.wording import Progress, Silent
from mmfeat.version import versions

MOST_FAILURES = 1000  # that are told one by one


@dataclass(frozen=True)
class ExtractSettings:
    """How to extract; nothing here changes a vector.

    `workers` 0 is one reader a core, `batch_size` 0 what suits the device; `compiled` has torch make kernels. What
    could not be read or encoded is remembered with its error and tried again only with `retry_failed`.
    """

    device: str = "auto"
    workers: int = 0
    batch_size: int = 0
    compiled: bool = False
    retry_failed: bool = False


@dataclass
class Tally:
    """What was found and done, by the encoder's cache folder: vectors `stored` before and `new`.

    `unreadable` are rows that hold an error, old and new; `missing` counts samples by modality and reason, of which
    `examples` has an id each; `failures` are the first (sample id, reason) of this time.
    """

    stored: Counter[str] = field(default_factory=Counter)
    new: Counter[str] = field(default_factory=Counter)
    unreadable: Counter[str] = field(default_factory=Counter)
    missing: dict[str, Counter[str]] = field(default_factory=dict)
    examples: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[tuple[str, str]] = field(default_factory=list)
    failed: int = 0
    clocks: dict[str, Clocks] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it in plain dictionaries and lists."""
        return {**vars(self), "clocks": {modality: asdict(clocks) for modality, clocks in self.clocks.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Tally:
        """What `to_json` gave and JSON carried."""
        counters: dict[str, Any] = {name: Counter(values[name]) for name in ("stored", "new", "unreadable")}
        missing = {modality: Counter(reasons) for modality, reasons in values["missing"].items()}
        failures = [(id, reason) for id, reason in values["failures"]]
        clocks = {modality: Clocks(**found) for modality, found in values["clocks"].items()}
        plain = {name: values[name] for name in ("examples", "failed")}
        return cls(**counters, **plain, missing=missing, failures=failures, clocks=clocks)

    def planned(self, plan: Missing) -> None:
        """Count what a plan found."""
        for mine, found in ((self.stored, plan.stored), (self.unreadable, plan.unreadable)):
            mine.update(found)
        self._lacked(plan.missing, plan.examples)

    def note(self, failure: tuple[str, str]) -> None:
        """Count one that could not be read or encoded."""
        self.failed += 1
        if len(self.failures) < MOST_FAILURES:
            self.failures.append(failure)

    def wrote(self, folder: str, committed: int, failed: int, found: int) -> None:
        """Count the rows of one encoder: committed, holding an error, and found to be there by then."""
        self.new[folder] += committed
        self.stored[folder] += found
        self.unreadable[folder] += failed

    def add(self, other: Tally) -> None:
        """Take over what another worker counted."""
        for mine, theirs in ((self.stored, other.stored), (self.new, other.new), (self.unreadable, other.unreadable)):
            mine.update(theirs)
        self._lacked(other.missing, other.examples)
        for modality, clocks in other.clocks.items():
            self.clocks.setdefault(modality, Clocks(0)).add(clocks)
        self.failed += other.failed
        self.failures += other.failures[: MOST_FAILURES - len(self.failures)]

    def _lacked(self, missing: Mapping[str, Counter[str]], examples: Mapping[str, Mapping[str, str]]) -> None:
        for modality, reasons in missing.items():
            self.missing.setdefault(modality, Counter()).update(reasons)
            self.examples[modality] = {**examples[modality], **self.examples.get(modality, {})}


class Extractor:
    """Plans blocks of samples and encodes what they lack; a model is loaded when something first needs it."""

    def __init__(self, towers: Sequence[Tower], store: Cache, settings: ExtractSettings, writes: bool = True) -> None:
        self.towers, self.store, self.settings = list(towers), store, settings
        self.planner = Planner([tower.spec for tower in towers], store, settings.retry_failed, writes)
        self._towers = {tower.spec.fingerprint: tower for tower in towers}
        self._encoders: list[Batcher] = []

    def __enter__(self) -> Extractor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.planner.__exit__(kind, error, trace)

    def extract(self, samples: Sequence[Sample], progress: Progress | None = None) -> Tally:
        """Plan, encode and commit one block: when this returns, its rows outlive a power loss."""
        tally, plan = Tally(), self.planner.plan(samples, progress)
        tally.planned(plan)
        self.load(plan.needed, whole=True)
        with self.writing(tally) as writer:
            self.run(plan, writer, tally, progress)
        self.planner.refresh()
        return tally

    @contextmanager
    def writing(self, tally: Tally) -> Iterator[BackgroundWriter]:
        """A writer for any number of runs; the tally counts what it committed, however it is left."""
        writer = BackgroundWriter(self._shard_writer)
        try:
            with writer:
                yield writer
        finally:
            for fingerprint, counts in writer.counts.items():
                tally.wrote(self._towers[fingerprint].spec.folder_name, *counts)

    def run(
        self, plan: Missing, writer: BackgroundWriter, tally: Tally, progress: Progress | None = None, where: str = ""
    ) -> None:
        """Encode what a plan lacks and hand it to the writer."""
        self.load(plan.needed)
        for fingerprint in plan.needed:
            writer.open(fingerprint)
        for modality, items in plan.items.items():
            for failure in self._run(modality, items, writer, tally, progress or Silent(), where):
                tally.note(failure)

    def load(self, fingerprints: set[str], whole: bool = False) -> None:
        """Load the models behind some specs unless that was done; if more is to come, `whole`, with all outputs."""
        loaded = {fingerprint for each in self._encoders for fingerprint in each.encoder.fingerprints}
        asked = {self._towers[name].request for name in fingerprints - loaded}
        wanted = [
            tower
            for name, tower in self._towers.items()
            if name not in loaded and (name in fingerprints or (whole and tower.request in asked))
        ]
        if wanted:
            fresh = load_encoders(wanted, self.device, self.settings.compiled)
            self._encoders += [Batcher(encoder, self.device, self.settings.batch_size) for encoder in fresh]

    def encoders(self, modality: str) -> list[Batcher]:
        """Those that are loaded."""
        return [each for each in self._encoders if each.encoder.modality == modality]

    @property
    def device(self) -> str:
        """Where the models compute; without one torch, which is slow to import, need not be asked."""
        if self.settings.device in ("auto", "cpu") and not any(is_torch(tower.request) for tower in self.towers):
            return "cpu"
        return resolve_device(self.settings.device)

    def _run(
        self, modality: str, items: list[Item], writer: BackgroundWriter, tally: Tally, progress: Progress, where: str
    ) -> Iterator[tuple[str, str]]:
        if not items:
            return
        batchers, settings = self.encoders(modality), self.settings
        ours = [each.encoder for each in batchers]
        clocks = tally.clocks.setdefault(modality, Clocks())
        stage = Stage(batchers, Reader(ours, settings.workers), writer, self.device, settings.batch_size, clocks)
        title = f"{modality}: {', '.join(dict.fromkeys(encoder.specs[0].model for encoder in ours))}{where}"
        with progress.step(title, len(items)) as advance:
            yield from stage.run(items, advance)

    def _shard_writer(self, fingerprint: str) -> ShardWriter:
        tower = self._towers[fingerprint]
        return self.store.writer(tower.spec, provenance(tower), self.planner.shards[fingerprint])


def provenance(tower: Tower) -> dict[str, Any]:
    """What does not change a vector but tells where it came from."""
    return {"request": tower.request, "versions": versions()}
