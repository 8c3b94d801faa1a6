"""The forecast of an extraction: what is missing, and from a few samples how long it takes and how large it gets."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.extraction.encode import Batcher, batched, start_block
from mmfeat.extraction.extract import BLOCK, Extractor, ExtractSettings, prepare_extraction
from mmfeat.extraction.missing import Item, Missing
from mmfeat.extraction.reader import Prepared, Reader
from mmfeat.samples.dataset import MODALITIES, Overview
from mmfeat.system.wording import Progress, Silent

TRIED = 64  # samples at most that are encoded to find out
TRIED_SHARE, TRIED_ANYWAY = 4, 16  # no more than one in 4 of what is missing, but 16
TRY_SECONDS = 5.0  # of encoding after which no further batch is begun
WARM_UP = 8  # samples that are encoded once before the clock runs
ROW_BYTES = 100  # of key, id and checksums beside a row's values
SHARD_BYTES = 30_000  # of what surrounds the rows of a shard, and of what aligns them


@dataclass(frozen=True)
class Forecast:
    """One encoder over one view: `rate` in samples a second with all its outputs, `seconds` for what is missing.

    `outputs` are (spec, missing, bytes on disk).
    """

    model: str
    missing: int
    rate: float
    seconds: float
    outputs: tuple[tuple[EncoderSpec, int, int], ...]


@dataclass(frozen=True)
class Forecasts:
    """Those of all encoders; `reading` is how many seconds reading and decoding add, `free` bytes the disk has left."""

    samples: Overview
    folder: Path
    encoders: tuple[Forecast, ...]
    reading: float
    free: int

    @property
    def seconds(self) -> float:
        return self.reading + sum(forecast.seconds for forecast in self.encoders)

    @property
    def bytes(self) -> int:
        return sum(size for forecast in self.encoders for _, _, size in forecast.outputs)


@dataclass
class _Needs:
    """What all blocks lack, and for each set of fingerprints a few random items that lack just these."""

    lacking: Counter[str] = field(default_factory=Counter)  # by cache folder
    items: Counter[frozenset[str]] = field(default_factory=Counter)
    tried: dict[frozenset[str], list[Item]] = field(default_factory=dict)
    dice: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, plan: Missing) -> None:
        self.lacking.update(plan.lacking)
        for item in (item for items in plan.items.values() for item in items):
            self._keep(item)

    def _keep(self, item: Item) -> None:
        """Each item with the same probability (Vitter's reservoir, algorithm R)."""
        self.items[item.fingerprints] += 1
        kept = self.tried.setdefault(item.fingerprints, [])
        if len(kept) < TRIED:
            kept.append(item)
        elif (place := self.dice.randrange(self.items[item.fingerprints])) < TRIED:
            kept[place] = item

    def missing(self, fingerprints: frozenset[str]) -> int:
        """How many items lack any of these."""
        return sum(count for lacking, count in self.items.items() if lacking & fingerprints)

    def some(self, fingerprints: frozenset[str]) -> list[Item]:
        """About as many as are tried of those that lack any of these, of each kind its share."""
        total = self.missing(fingerprints)
        tried = max(TRIED_ANYWAY, min(TRIED, total // TRIED_SHARE))
        kinds = [(self.tried[lacking], count) for lacking, count in self.items.items() if lacking & fingerprints]
        return [item for items, count in kinds for item in items[: -(-tried * count // total)]]


def forecast_extraction(
    data: str | Path,
    encoders: Iterable[str],
    *,
    cache: str | Path = "cache",
    options: EncoderOptions | None = None,
    columns: Mapping[str, str] | None = None,
    settings: ExtractSettings | None = None,
    progress: Progress | None = None,
) -> Forecasts:
    """What `extract_features` would do, from encoding a few samples; nothing is written."""
    settings, progress = settings or ExtractSettings(), progress or Silent()
    work = prepare_extraction(data, encoders, cache, options, columns, settings)
    overview, needs = work.source.overview(), _Needs()
    with Extractor(work.towers, work.store, settings, writes=False) as extractor:
        for block in work.source.blocks(BLOCK):
            needs.add(extractor.planner.plan(block, progress))
        extractor.load({name for names in needs.items for name in names})
        stages = [extractor.encoders(modality) for modality in MODALITIES]
        found = [_stage(batchers, needs, extractor, progress) for batchers in stages if batchers]
    forecasts = tuple(forecast for each, _ in found for forecast in each)
    return Forecasts(overview, work.store.folder, forecasts, sum(reading for _, reading in found), _free(Path(cache)))


def _stage(
    batchers: Sequence[Batcher], needs: _Needs, extractor: Extractor, progress: Progress
) -> tuple[list[Forecast], float]:
    """The forecasts of one modality's encoders, and the seconds that reading adds: a GPU works meanwhile."""
    forecasts, shared, own = [], [], 0.0
    chosen = [needs.some(batcher.encoder.fingerprints) for batcher in batchers]
    with progress.step(f"try {batchers[0].encoder.modality}s", sum(map(len, chosen))) as advance:
        for batcher, items in zip(batchers, chosen, strict=True):
            reader = Reader([batcher.encoder], extractor.settings.workers)
            prepared = list(reader.read(items, TRIED))
            preparing = _mean([entry.own.get(0, 0.0) for entry in prepared]) / reader.workers
            early = preparing if batcher.encoder.early else 0.0
            shared += [(entry.read + entry.decode - sum(entry.own.values())) / reader.workers for entry in prepared]
            own += (preparing - early) * needs.missing(batcher.encoder.fingerprints)
            forecasts.append(_encoder(prepared, early, batcher, needs))
            advance(len(items))
    everything = frozenset(name for each in batchers for name in each.encoder.fingerprints)
    reading = _mean(shared) * needs.missing(everything) + own
    beside = sum(forecast.seconds for forecast in forecasts) if extractor.device != "cpu" else 0.0
    return forecasts, max(0.0, reading - beside)


def _encoder(prepared: Sequence[Prepared], early: float, batcher: Batcher, needs: _Needs) -> Forecast:
    """`early` are the seconds a sample of an encoder's own work that is done in reading."""
    usable = [entry for entry in prepared if 0 in entry.inputs]
    start_block(usable[:WARM_UP], 0, batcher)()
    start, done = time.perf_counter(), 0
    rows, sizes = Counter[EncoderSpec](), Counter[EncoderSpec]()
    for piece in batched(usable, batcher.size or TRIED):
        for spec, found in start_block(piece, 0, batcher)():
            rows[spec] += len(found.keys)
            sizes[spec] += found.nbytes
        done += len(piece)
        if time.perf_counter() - start > TRY_SECONDS:
            break
    encoder, each = batcher.encoder, (time.perf_counter() - start) / max(1, done) + early
    rate = 1 / each if done else 0.0
    missing = needs.missing(encoder.fingerprints)
    outputs = []
    for spec in encoder.specs:
        lacking = needs.lacking[spec.folder_name]
        row = sizes[spec] // max(1, rows[spec]) + ROW_BYTES
        outputs.append((spec, lacking, lacking * row + SHARD_BYTES * bool(lacking)))
    return Forecast(encoder.specs[0].model, missing, rate, missing / rate if rate else 0.0, tuple(outputs))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _free(folder: Path) -> int:
    """Bytes left on the disk that a folder lies on, or will lie on."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
