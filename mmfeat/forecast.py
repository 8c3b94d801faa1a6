"""The forecast of an extraction: what is missing, and from a few samples how long it takes and how large it gets."""

from __future__ import annotations

import random
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmfeat.batching import Batcher
from mmfeat.encoders import EncoderOptions, EncoderSpec
from mmfeat.extract import BLOCK, prepare_extraction
from mmfeat.extractor import Extractor, ExtractSettings
from mmfeat.pipeline import start_block
from mmfeat.plan import Item, Plan
from mmfeat.progress import Progress, Silent
from mmfeat.reader import Prepared, Reader
from mmfeat.samples import MODALITIES, Overview

TRIED = 64  # samples that are encoded to find out
WARM_UP = 8  # of them that are encoded once before the clock runs
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
    """What all blocks lack, and a few random items of each modality."""

    lacking: Counter[str] = field(default_factory=Counter)  # by cache folder
    items: Counter[frozenset[str]] = field(default_factory=Counter)  # by the fingerprints that lack them
    tried: dict[str, list[Item]] = field(default_factory=dict)
    seen: Counter[str] = field(default_factory=Counter)
    dice: random.Random = field(default_factory=lambda: random.Random(0))

    def add(self, plan: Plan) -> None:
        self.lacking.update(plan.lacking)
        for modality, items in plan.items.items():
            self.items.update(item.fingerprints for item in items)
            for item in items:
                self._keep(modality, item)

    def _keep(self, modality: str, item: Item) -> None:
        """Each item with the same probability (Vitter's reservoir, algorithm R)."""
        kept = self.tried.setdefault(modality, [])
        self.seen[modality] += 1
        if len(kept) < TRIED:
            kept.append(item)
        elif (place := self.dice.randrange(self.seen[modality])) < TRIED:
            kept[place] = item

    def missing(self, fingerprints: frozenset[str]) -> int:
        """How many items lack any of these."""
        return sum(count for lacking, count in self.items.items() if lacking & fingerprints)


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
    work = prepare_extraction(data, encoders, cache, options, columns, settings.device)
    overview, needs = work.source.overview(), _Needs()
    with Extractor(work.towers, work.store, settings) as extractor:
        for block in work.source.blocks(BLOCK):
            needs.add(extractor.planner.plan(block, progress))
        extractor.load({name for names in needs.items for name in names})
        found = [_modality(modality, needs, extractor, progress) for modality in MODALITIES if needs.seen[modality]]
    forecasts = tuple(forecast for each, _ in found for forecast in each)
    reading = sum(seconds for _, seconds in found)
    if forecasts and extractor.device != "cpu":
        reading = max(0.0, reading - sum(forecast.seconds for forecast in forecasts))  # it runs beside the device
    return Forecasts(overview, work.store.folder, forecasts, reading, _free(Path(cache)))


def _modality(modality: str, needs: _Needs, extractor: Extractor, progress: Progress) -> tuple[list[Forecast], float]:
    """The forecasts of one modality's encoders, and the seconds for reading all its items."""
    batchers = extractor.encoders(modality)
    reader = Reader([each.encoder for each in batchers], extractor.settings.workers)
    items = needs.tried[modality]
    prepared = list(reader.read(items, TRIED))
    each = sum(entry.read + entry.decode for entry in prepared) / len(prepared) / reader.workers
    forecasts = []
    with progress.task(f"try {modality}s", len(batchers)) as advance:
        for number, batcher in enumerate(batchers):
            forecasts.append(_encoder(prepared, number, batcher, needs))
            advance(1)
    return forecasts, each * needs.seen[modality]


def _encoder(prepared: Sequence[Prepared], number: int, batcher: Batcher, needs: _Needs) -> Forecast:
    usable = [entry for entry in prepared if number in entry.inputs]
    start_block(usable[:WARM_UP], number, batcher)()
    start = time.perf_counter()
    blocks = start_block(usable, number, batcher)()
    seconds = time.perf_counter() - start
    rows, sizes = Counter[EncoderSpec](), Counter[EncoderSpec]()
    for spec, found in blocks:
        rows[spec] += len(found.keys)
        sizes[spec] += found.nbytes
    encoder = batcher.encoder
    rate = len(usable) / seconds if usable else 0.0
    missing = needs.missing(encoder.fingerprints)
    outputs = []
    for spec in encoder.specs:
        lacking = needs.lacking[spec.folder_name]
        row = sizes[spec] // max(1, rows[spec]) + ROW_BYTES
        outputs.append((spec, lacking, lacking * row + SHARD_BYTES * bool(lacking)))
    return Forecast(encoder.specs[0].model, missing, rate, missing / rate if rate else 0.0, tuple(outputs))


def _free(folder: Path) -> int:
    """Bytes left on the disk that a folder lies on, or will lie on."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
