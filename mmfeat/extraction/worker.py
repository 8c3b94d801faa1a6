"""The extractor: what some samples lack, through loaded encoders, into the cache. Every engine calls it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from mmfeat.cache.store import Cache
from mmfeat.cache.writer import ShardWriter
from mmfeat.encoders.registry import Tower, is_torch, load_encoders
from mmfeat.extraction.counts import Clocks, Counts
from mmfeat.extraction.encode import BackgroundWriter, Batcher, Stage
from mmfeat.extraction.missing import Item, Missing, Planner
from mmfeat.extraction.reader import Reader
from mmfeat.samples.dataset import Sample
from mmfeat.system.hardware import resolve_device
from mmfeat.system.wording import Progress, Silent
from mmfeat.version import versions


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

    def extract(self, samples: Sequence[Sample], progress: Progress | None = None) -> Counts:
        """Plan, encode and commit one of several blocks: when this returns, its rows outlive a power loss."""
        counts = self.encode([self.planner.plan(samples, progress)], progress)
        self.planner.refresh()
        return counts

    def encode(self, plans: Iterable[Missing], progress: Progress | None = None, total: int = 0) -> Counts:
        """Encode what plans lack, one after the other, and commit it; `total` is the number of plans, 0 if unknown.

        What was encoded is committed also where an error ends the work.
        """
        counts, writer = Counts(), BackgroundWriter(self._shard_writer)
        with writer:
            for number, plan in enumerate(plans, 1):
                counts.add(plan.counts)
                self.load(plan.needed, whole=total != 1)
                for fingerprint in plan.needed:
                    writer.open(fingerprint)
                where = f" (block {number} of {total})" if total > 1 else ""
                for modality, items in plan.items.items():
                    if items:
                        clocks = counts.clocks.setdefault(modality, Clocks())
                        for failure in self._run(modality, items, writer, clocks, progress or Silent(), where):
                            counts.add_failure(failure)
        for fingerprint, rows in writer.counts.items():
            counts.add_rows(self._towers[fingerprint].spec.folder_name, *rows)
        return counts

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
        self, modality: str, items: list[Item], writer: BackgroundWriter, clocks: Clocks, progress: Progress, where: str
    ) -> Iterator[tuple[str, str]]:
        """Encode the items of one modality; yields (sample id, reason) of failures."""
        batchers, settings = self.encoders(modality), self.settings
        encoders = [batcher.encoder for batcher in batchers]
        stage = Stage(batchers, Reader(encoders, settings.workers), writer, self.device, settings.batch_size, clocks)
        title = f"{modality}: {', '.join(dict.fromkeys(encoder.specs[0].model for encoder in encoders))}{where}"
        with progress.step(title, len(items)) as advance:
            yield from stage.run(items, advance)

    def _shard_writer(self, fingerprint: str) -> ShardWriter:
        tower = self._towers[fingerprint]
        return self.store.writer(tower.spec, provenance(tower), self.planner.shards[fingerprint])


def provenance(tower: Tower) -> dict[str, Any]:
    """What does not change a vector but tells where it came from."""
    return {"request": tower.request, "versions": versions()}
