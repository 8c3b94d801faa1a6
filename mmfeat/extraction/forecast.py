"""The forecast of an extraction: what is missing, and from a few samples its time and its size on disk."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.extraction.encode import Batcher, batched, start_block, tokens_kept
from mmfeat.extraction.extract import (
    BLOCK,
    Extractor,
    ExtractSettings,
    Work,
    prepare_extraction,
    prepare_test,
    settle_dtypes,
)
from mmfeat.extraction.missing import BlockPlan, Item, Parts, look_over
from mmfeat.extraction.reader import Prepared, Reader
from mmfeat.extraction.requests import Decision
from mmfeat.samples.dataset import Data, name_of
from mmfeat.samples.keys import PARTS
from mmfeat.samples.rows import Overview
from mmfeat.system.notebook import usual_progress
from mmfeat.system.wording import Progress

TRIED = 64  # samples that are encoded at most
TRIED_SHARE, TRIED_ANYWAY = 4, 16  # a quarter of the missing samples is encoded, but at least 16
TRY_SECONDS = 5.0  # seconds of encoding after which no further batch is started
WARM_UP = 8  # samples that are encoded once before the clock runs
ROW_BYTES = 100  # bytes a row of key, id and checksums
SHARD_OVERHEAD = 30_000  # bytes of a shard without its rows


@dataclass(frozen=True)
class Forecast:
    """Forecast of one encoder over one view: samples a second with all outputs, and seconds for what is missing.

    `outputs` are (spec, missing rows, bytes on disk). Of `tried` samples `cut` are texts of more than `limit` tokens.
    """

    model: str
    missing: int
    rate: float
    seconds: float
    outputs: tuple[tuple[EncoderSpec, int, int], ...]
    tried: int = 0
    cut: int = 0
    limit: int = 0


@dataclass(frozen=True)
class Forecasts:
    """Forecasts of all encoders, the seconds that reading and decoding add, and the bytes that are free on the disk."""

    samples: Overview
    folder: Path
    encoders: tuple[Forecast, ...]
    reading: float
    free: int
    decision: Decision | None = None
    test: Forecasts | None = None

    @property
    def seconds(self) -> float:
        return self.reading + sum(forecast.seconds for forecast in self.encoders)

    @property
    def bytes(self) -> int:
        return sum(size for forecast in self.encoders for _, _, size in forecast.outputs)


@dataclass
class _Needs:
    """Counts of what all blocks lack, and for each set of fingerprints a few random items that lack exactly this set.

    `lacking` counts rows by cache folder, `items` and `sampled` go by the set of fingerprints, and by modality `parts`,
    the number of samples whose part is `unknown` to the cache, and the parts that were `tried`.
    """

    lacking: Counter[str] = field(default_factory=Counter)
    items: Counter[frozenset[str]] = field(default_factory=Counter)
    sampled: dict[frozenset[str], list[Item]] = field(default_factory=dict)
    parts: dict[str, Parts] = field(default_factory=dict)
    unknown: Counter[str] = field(default_factory=Counter)
    tried: dict[str, Parts] = field(default_factory=dict)
    generator: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, plan: BlockPlan) -> None:
        """Count what a plan lacks, and keep each item with the same probability (Vitter's reservoir, algorithm R)."""
        self.lacking.update(plan.lacking)
        for modality, parts in plan.counts.parts.items():
            self.parts.setdefault(modality, Parts()).add(parts)
            self.unknown[modality] += sum(item.samples for item in plan.items[modality])
        for item in (item for items in plan.items.values() for item in items):
            self.items[item.fingerprints] += 1
            kept = self.sampled.setdefault(item.fingerprints, [])
            if len(kept) < TRIED:
                kept.append(item)
            elif (index := self.generator.randrange(self.items[item.fingerprints])) < TRIED:
                kept[index] = item

    def notes(self, source: str) -> list[str]:
        """Lines about the parts of which most cannot be read, by what is stored and by those that were tried."""
        notes = []
        for modality, parts in self.parts.items():
            tried = self.tried.get(modality, Parts())
            lost = self.unknown[modality] * tried.lost // max(1, tried.count)
            parts.add(Parts(0, lost, tried.first))
            notes += parts.check(source, modality, f" (judged by {tried.count})" if lost else "")
        return notes

    def missing(self, fingerprints: frozenset[str]) -> int:
        """Number of items that lack any of these specs."""
        return sum(count for lacking, count in self.items.items() if lacking & fingerprints)

    @property
    def samples(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for lacking, count in self.items.items():
            counts[self.sampled[lacking][0].modality] += count
        return counts

    def sample(self, fingerprints: frozenset[str]) -> list[Item]:
        """Random items that lack any of these specs; each set of lacking specs has its share."""
        total = self.missing(fingerprints)
        tried = max(TRIED_ANYWAY, min(TRIED, total // TRIED_SHARE))
        kinds = [(self.sampled[lacking], count) for lacking, count in self.items.items() if lacking & fingerprints]
        return [item for items, count in kinds for item in items[: -(-tried * count // total)]]


def forecast_extraction(
    data: Data,
    encoders: Iterable[str],
    *,
    cache: str | Path = "cache",
    options: EncoderOptions | None = None,
    columns: Mapping[str, str] | None = None,
    settings: ExtractSettings | None = None,
    test: Data = None,
    progress: Progress | None = None,
) -> Forecasts:
    """Forecast `extract_features` by encoding a few samples; nothing is written."""
    data, test = name_of(data), name_of(test)
    settings, progress = settings or ExtractSettings(), progress or usual_progress()
    work = prepare_extraction(data, encoders, cache, options, columns, settings)
    work = settle_dtypes(work, settings, progress, writes=False)
    works = [work, *([prepare_test(work, test)] if test else [])]
    first, *rest = (_forecast(part, settings, progress, part is not work) for part in works)
    return replace(first, test=rest[0] if rest else None)


def _forecast(work: Work, settings: ExtractSettings, progress: Progress, is_test: bool) -> Forecasts:
    overview, needs = look_over(work.source, work.towers, is_test), _Needs()
    with Extractor(work.towers, work.store, settings, writes=False) as extractor:
        for block in work.source.blocks(BLOCK):
            needs.add(extractor.planner.plan(block, progress))
        extractor.load({name for names in needs.items for name in names}, needs.samples, progress)
        stages = [extractor.encoders(modality) for modality in PARTS]
        tried = [_stage(batchers, needs, extractor, progress) for batchers in stages if batchers]
    overview = replace(overview, notes=(*overview.notes, *needs.notes(overview.source)))
    forecasts = tuple(forecast for stage, _ in tried for forecast in stage)
    reading = sum(reading for _, reading in tried)
    return Forecasts(overview, work.store.folder, forecasts, reading, _free(work.store.folder), work.decision)


def _stage(
    batchers: Sequence[Batcher], needs: _Needs, extractor: Extractor, progress: Progress
) -> tuple[list[Forecast], float]:
    """Forecasts of the encoders of one modality, and the seconds that reading adds; a GPU works meanwhile."""
    forecasts, shared, late = [], [], 0.0
    chosen = [needs.sample(batcher.encoder.fingerprints) for batcher in batchers]
    with progress.step(f"try {batchers[0].encoder.modality}s", sum(map(len, chosen))) as advance:
        for batcher, items in zip(batchers, chosen, strict=True):
            reader = Reader([batcher.encoder], extractor.settings.workers)
            prepared = list(reader.read(items, TRIED))
            needs.tried.setdefault(batcher.encoder.modality, _tried(prepared))
            preparing = _mean([entry.preparing.get(0, 0.0) for entry in prepared]) / reader.workers
            early = preparing if batcher.encoder.early else 0.0
            shared += [
                (entry.read + entry.decode - sum(entry.preparing.values())) / reader.workers for entry in prepared
            ]
            late += (preparing - early) * needs.missing(batcher.encoder.fingerprints)
            forecasts.append(_encoder(prepared, early, batcher, needs))
            advance(len(items))
    everything = frozenset(name for batcher in batchers for name in batcher.encoder.fingerprints)
    reading = _mean(shared) * needs.missing(everything) + late
    beside = sum(forecast.seconds for forecast in forecasts) if extractor.device != "cpu" else 0.0
    return forecasts, max(0.0, reading - beside)


def _encoder(prepared: Sequence[Prepared], early: float, batcher: Batcher, needs: _Needs) -> Forecast:
    """Forecast of one encoder from prepared samples; `early` is its seconds a sample in the readers."""
    usable = [entry for entry in prepared if 0 in entry.inputs]
    start_block(usable[:WARM_UP], 0, batcher)()
    start, done = time.perf_counter(), 0
    rows, sizes = Counter[EncoderSpec](), Counter[EncoderSpec]()
    for piece in batched(usable, batcher.size or TRIED):
        for spec, block in start_block(piece, 0, batcher)():
            rows[spec] += len(block.keys)
            sizes[spec] += block.nbytes
        done += len(piece)
        if time.perf_counter() - start > TRY_SECONDS:
            break
    encoder, seconds = batcher.encoder, (time.perf_counter() - start) / max(1, done) + early
    rate = 1 / seconds if done else 0.0
    missing = needs.missing(encoder.fingerprints)
    outputs = []
    for spec in encoder.specs:
        lacking = needs.lacking[spec.folder_name]
        row = sizes[spec] // max(1, rows[spec]) + ROW_BYTES
        outputs.append((spec, lacking, lacking * row + SHARD_OVERHEAD * bool(lacking)))
    cuts = list(filter(None, (tokens_kept(entry, 0) for entry in usable[:done])))
    seconds = missing / rate if rate else 0.0
    return Forecast(
        encoder.specs[0].model, missing, rate, seconds, tuple(outputs), done, len(cuts), max(cuts, default=0)
    )


def _tried(prepared: Sequence[Prepared]) -> Parts:
    """The counts of what was read for one encoder."""
    parts = Parts(sum(entry.item.samples for entry in prepared))
    for item, errors in ((entry.item, entry.errors) for entry in prepared):
        if 0 in errors:
            parts.lose(item.sample, item.modality, errors[0], item.samples)
    return parts


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _free(folder: Path) -> int:
    """Free bytes on the disk of a folder that need not exist yet."""
    path = folder.absolute()
    return shutil.disk_usage(next(path for path in (path, *path.parents) if path.exists())).free
