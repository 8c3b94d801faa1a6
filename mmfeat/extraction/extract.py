"""Extraction: samples x encoders -> cache, only what is missing; the result has counts, and the vectors as a frame.

`extract_features` reads the samples block by block, or leaves the blocks to `on_ray`; an `Extractor` plans each block
and encodes what the cache lacks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.cache.features import Features
from mmfeat.cache.store import EXPORTED, Cache, ShardWriter
from mmfeat.encoders.names import listed
from mmfeat.encoders.registry import Tower, absolute_names, absolute_request, is_torch, load_encoders, loading
from mmfeat.encoders.spec import RAW, EncoderOptions
from mmfeat.encoders.torch_tower import LIBRARIES, Runtime
from mmfeat.extraction.arithmetic import Evidence, FirstSamples, Resolved, resolve_encoders, settle
from mmfeat.extraction.encode import BackgroundWriter, Batcher, Stage
from mmfeat.extraction.missing import BlockPlan, Clocks, Counts, Item, Planner, look_over
from mmfeat.extraction.reader import Reader
from mmfeat.extraction.requests import (
    Decision,
    Request,
    begin_request,
    check_applies,
    check_runtime,
    decide_cleaning,
    open_test,
    remember_request,
    shared_ids,
    test_of,
)
from mmfeat.samples.dataset import Data, Sample, SampleSet, SampleSource, name_of, read_samples
from mmfeat.samples.rows import Overview
from mmfeat.system.hardware import check_engine, fast_half, resolve_device
from mmfeat.system.notebook import Cells, Frame, Shown, usual_progress
from mmfeat.system.remote import absolute
from mmfeat.system.wording import Progress, counted, duration, shown
from mmfeat.version import versions

if TYPE_CHECKING:
    import pyarrow

DEFAULT_ENCODERS = ("clip", "bert", "resnet50")
BLOCK = 65_536  # samples that are in memory at once; the next block is planned while one is encoded


@dataclass(frozen=True)
class ExtractSettings:
    """How to extract; no setting changes a vector.

    `workers` is the number of readers, 0 for one a core; `batch_size` 0 suits the device; `runtime` is what computes
    pooled torch models: torch, compile, onnxruntime, openvino, or auto, the fastest one that agrees. A failure is
    stored with its error and tried again only with `retry_failed`.
    """

    device: str = "auto"
    workers: int = 0
    batch_size: int = 0
    runtime: str = "auto"
    retry_failed: bool = False


@dataclass(kw_only=True, repr=False)
class Extraction(Frame, Shown, Counts):
    """Result of an extraction: samples, encoders, cache folder of the data set, counts, and the decision on the
    cleaning where a text encoder follows it, and by request the evidence on which `auto` settled the dtype. `test` is
    the extraction of the test data, if named; `lost` notes what is mostly unreadable.
    """

    samples: Overview
    towers: Sequence[Tower]
    folder: Path
    settings: ExtractSettings
    engine: str
    seconds: float
    decision: Decision | None = None
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    test: Extraction | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # of the samples
    lost: tuple[str, ...] = ()

    @property
    def nothing_to_do(self) -> bool:
        """Whether the cache lacked nothing."""
        return not any(self.new.values()) and not self.failed

    def load(self) -> tuple[SampleSet, Features]:
        """The samples, read again, and their vectors, as `Cache.load` has them."""
        samples = read_samples(self.samples.source, self.columns)
        store = Cache(self.folder.parent, self.folder.name)
        return samples, store.load(samples.samples, [tower.spec for tower in self.towers])

    def to_arrow(self) -> pyarrow.Table:
        """id, text, image, label, and the pooled vectors of each encoder in a column, NaN where a sample has none."""
        import pyarrow

        samples, features = self.load()
        cells = [
            (sample.id, sample.text, None if sample.image is None else str(sample.image), sample.label)
            for sample in samples
        ]
        columns = {
            name: pyarrow.array(column, pyarrow.string())
            for name, column in zip(("id", "text", "image", "label"), zip(*cells, strict=True), strict=True)
        }
        names = {tower.spec.folder_name: tower.spec.name for tower in self.towers if tower.spec.view == "none"}
        for block in features.blocks:
            flat = pyarrow.array(block.vectors.astype(np.float32).ravel())
            columns[names.get(block.name, block.name)] = pyarrow.FixedSizeListArray.from_arrays(flat, block.width)
        return pyarrow.table(columns)

    def facts(self) -> list[str]:
        new = f"{sum(self.new.values()):,} new vectors in {duration(self.seconds)}"
        return [self.samples.name, counted(len(self.samples), "sample"), new, str(self.folder)]

    def cells(self) -> Cells:
        specs = [tower.spec for tower in self.towers]
        counts = (self.new, self.stored, self.unreadable)
        rows = [(spec.name, spec.output, *(count[spec.folder_name] for count in counts)) for spec in specs]
        return [("encoder", "output", "new", "stored", "unreadable"), *rows]


def extract_features(
    data: Data,
    encoders: str | Iterable[str] = DEFAULT_ENCODERS,
    *,
    cache: str | Path = "cache",
    options: EncoderOptions | None = None,
    columns: Mapping[str, str] | None = None,
    settings: ExtractSettings | None = None,
    test: Data = None,
    engine: str = "local",
    ray_address: str | None = None,
    progress: Progress | None = None,
    tell: Callable[[Overview], None] | None = None,
) -> Extraction:
    """Encode what the cache lacks of `data`; after an interruption the same call encodes the rest.

    `tell` is called with the overview of `data`, and then with that of `test`, before anything is encoded.

    `test`, read by the same names of columns, is encoded in the same way and remembered for the submission; "" forgets
    the test data that an earlier extraction of `data` remembered.

    `options.dtype` "auto" becomes half precision where the hardware has it and the first samples bear it, and the
    cleaning "auto" that which suits the texts. `data` may be larger than memory. With the engine "ray" blocks of
    samples go to the workers of a Ray cluster, which write to a `cache` that all of them see.
    """
    data, test = name_of(data), name_of(test)
    start = time.monotonic()
    check_engine(engine, ray_address)
    settings, progress = settings or ExtractSettings(), progress or usual_progress()
    # The other devices need torch, which is slow to import.
    if engine == "local" and settings.device not in ("auto", "cpu"):
        resolve_device(settings.device)
    with progress.step(f"reading {shown(str(data))}", None):
        work = prepare_extraction(data, encoders, cache, options, columns, settings, test)
        works = [work, *([prepare_test(work, test)] if test else [])]
        overviews = [look_over(part.source, part.towers, part is not work) for part in works]
    if test and (note := shared_ids(*(part.source for part in works))):
        overviews[1] = replace(overviews[1], notes=(*overviews[1].notes, note))
    if tell:
        for overview in overviews:
            tell(overview)
    work = settle_dtypes(work, settings, progress)
    begin_request(cache, work.request)
    results: list[Extraction] = []
    for part, overview in zip(works, overviews, strict=True):
        part = replace(part, towers=work.towers)
        part.store.create()
        if engine == "ray":
            from mmfeat.extraction.on_ray import extract_on_ray

            counts = extract_on_ray(part, settings, ray_address, progress, len(overview))
        else:
            counts = _extract(part.source.blocks(BLOCK), len(overview), part.towers, part.store, settings, progress)
        lost = [note for name, parts in counts.parts.items() for note in parts.check(overview.source, name)]
        overview = replace(overview, notes=(*overview.notes, *lost))
        result = _result(counts, start, overview, part.towers, part.store, settings, engine)
        results.append(replace(result, columns=part.source.columns, lost=tuple(lost)))
        start = time.monotonic()
    remember_request(cache, work.request)
    return replace(results[0], decision=work.decision, evidence=work.evidence, test=results[1] if test else None)


def extract_samples(
    samples: SampleSet,
    towers: Sequence[Tower],
    *,
    cache: str | Path,
    settings: ExtractSettings | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """`extract_features` for samples and towers that are already read and described."""
    start, settings, store = time.monotonic(), settings or ExtractSettings(), Cache(cache, samples.name)
    check_runtime(settings.runtime, settings.device, towers)
    store.create()
    blocks = (samples.samples[first : first + BLOCK] for first in range(0, len(samples), BLOCK))
    counts = _extract(blocks, len(samples), towers, store, settings, progress or usual_progress())
    return _result(counts, start, Overview.of(samples), towers, store, settings, "local")


def _result(
    counts: Counts,
    start: float,
    samples: Overview,
    towers: Sequence[Tower],
    store: Cache,
    settings: ExtractSettings,
    engine: str,
) -> Extraction:
    """The result of an extraction that began at `start`, in seconds of `time.monotonic`."""
    return Extraction(
        samples=samples,
        towers=towers,
        folder=store.folder,
        settings=settings,
        engine=engine,
        seconds=time.monotonic() - start,
        **vars(counts),
    )


@dataclass(frozen=True)
class Work:
    """The inputs of an extraction: the source of its samples, its encoders, and where the vectors go.

    `decision` is that on the cleaning, with what it means for these encoders; None where no text encoder follows it.
    `evidence` is that of the dtype, by request.
    """

    source: SampleSource
    towers: list[Tower]
    store: Cache
    request: Request
    decision: Decision | None = None
    evidence: Mapping[str, Evidence] = field(default_factory=dict)


def prepare_extraction(
    data: str | Path,
    encoders: str | Iterable[str],
    cache: str | Path,
    options: EncoderOptions | None,
    columns: Mapping[str, str] | None,
    settings: ExtractSettings,
    test: str | Path | None = None,
) -> Work:
    """Find the data and describe the encoders; loads no model and writes nothing.

    Raises `ConfigError` for an option that applies to none of the encoders.
    """
    source, options, encoders = SampleSource(data, columns), options or EncoderOptions(), listed(encoders)
    source.check()
    decision = decide_cleaning(options, source, cache)
    resolved = resolve_encoders(encoders, options, source, cache, settings.device, decision)
    towers = resolved.towers
    check_applies(towers, options, settings.runtime, settings.device)
    fingerprints = tuple(tower.spec.fingerprint for tower in towers)
    requests = [absolute_request(encoder) for encoder in encoders]
    remembered = test_of(cache, data) if test is None else absolute(test) if str(test) else ""
    named = absolute_names(options)
    recorded = replace(resolved.options, dtype=named.dtype, convolutional_dtype=named.convolutional_dtype)
    request = Request(absolute(data), source.columns, requests, recorded, fingerprints, decision, remembered)
    texts = [tower.spec for tower in towers if tower.spec.part == "text" and tower.spec.family not in RAW]
    cleanings = ", ".join(dict.fromkeys(spec.cleaning for spec in texts))
    followed = decision and cleanings and resolved.options.cleaning != options.cleaning
    shown = replace(decision, cleaning=cleanings) if decision and followed else None
    return Work(source, towers, Cache(cache, source.name), request, shown, resolved.evidence)


def settle_dtypes(work: Work, settings: ExtractSettings, progress: Progress, writes: bool = True) -> Work:
    """The work with the dtypes that a trial on the first samples shows, where `auto` is still open."""
    half = "float32" if settings.runtime in LIBRARIES else fast_half(settings.device)  # these compute in float32
    trial = FirstSamples(work.source, settings.device, settings.workers, writes, progress)
    settled = settle(Resolved(work.request.options, work.towers), work.request.options, work.store, half, trial)
    fingerprints = tuple(tower.spec.fingerprint for tower in settled.towers)
    request = replace(work.request, fingerprints=fingerprints)
    return replace(work, towers=settled.towers, request=request, evidence=settled.evidence)


def prepare_test(work: Work, test: str | Path) -> Work:
    """The work on the test data of a prepared extraction: other samples, the same encoders and options."""
    source = open_test(test, work.source)
    return replace(work, source=source, store=Cache(work.store.folder.parent, source.name))


def _extract(
    blocks: Iterable[Sequence[Sample]],
    samples: int,
    towers: Sequence[Tower],
    store: Cache,
    settings: ExtractSettings,
    progress: Progress,
) -> Counts:
    with (
        Extractor(towers, store, settings) as extractor,
        closing(extractor.planner.plan_ahead(iter(blocks), progress)) as plans,
    ):
        return extractor.encode(plans, progress, total=-(-samples // BLOCK))


class Extractor(AbstractContextManager["Extractor"]):
    """Plans blocks of samples and encodes what the cache lacks; a model is loaded when a plan first needs it."""

    def __init__(self, towers: Sequence[Tower], store: Cache, settings: ExtractSettings, writes: bool = True) -> None:
        self.towers, self.store, self.settings = list(towers), store, settings
        self.planner = Planner([tower.spec for tower in towers], store, settings.retry_failed, writes)
        self.runtime = Runtime(settings.runtime, store.folder.parent / EXPORTED, writes)
        self._towers = {tower.spec.fingerprint: tower for tower in towers}
        self._encoders: list[Batcher] = []

    def __exit__(self, *error: object) -> None:
        self.planner.__exit__(*error)

    def extract(self, samples: Sequence[Sample], progress: Progress | None = None) -> Counts:
        """Plan, encode and commit one of several blocks: when this returns, its rows outlive a power loss."""
        counts = self.encode([self.planner.plan(samples, progress)], progress)
        self.planner.refresh()
        return counts

    def encode(self, plans: Iterable[BlockPlan], progress: Progress | None = None, total: int = 0) -> Counts:
        """Encode the items of each plan and commit their rows; `total` is the number of plans, 0 if unknown.

        What was encoded is committed also where an error ends the work.
        """
        counts, writer = Counts(), None
        with ExitStack() as stack:
            for number, plan in enumerate(plans, 1):
                counts.add(plan.counts)
                if not plan.needed:
                    continue
                writer = writer or stack.enter_context(BackgroundWriter(self._shard_writer))
                count = {name: len(items) for name, items in plan.items.items()}
                self.load(plan.needed, count, progress or usual_progress(), whole=total != 1)
                for fingerprint in plan.needed:
                    writer.open(fingerprint)
                where = f" (block {number} of {total})" if total > 1 else ""
                for modality, items in plan.items.items():
                    if items:
                        self._run(modality, items, writer, counts, progress or usual_progress(), where)
        for fingerprint, rows in writer.counts.items() if writer else ():
            counts.add_rows(self._towers[fingerprint].spec.folder_name, *rows)
        for encoder in (batcher.encoder for batcher in self._encoders):
            counts.runtimes |= {spec.folder_name: encoder.note() for spec in encoder.specs if encoder.note()}
        return counts

    def load(self, fingerprints: set[str], samples: Mapping[str, int], progress: Progress, whole: bool = False) -> None:
        """Load the models of the specs with these fingerprints, each model once; `samples` counts those of a modality.

        With `whole` a model is loaded with all outputs that any block may need, not only with those named.
        """
        loaded = {name for batcher in self._encoders for name in batcher.encoder.fingerprints}
        asked = {self._towers[name].request for name in fingerprints - loaded}
        wanted = [
            tower
            for name, tower in self._towers.items()
            if name not in loaded and (name in fingerprints or (whole and tower.request in asked))
        ]
        if wanted:
            with progress.step(loading(wanted), None):
                fresh = load_encoders(wanted, self.device, replace(self.runtime, samples=samples))
            self._encoders += [Batcher(encoder, self.device, self.settings.batch_size) for encoder in fresh]

    def encoders(self, modality: str) -> list[Batcher]:
        return [batcher for batcher in self._encoders if batcher.encoder.modality == modality]

    @property
    def device(self) -> str:
        """Where the models compute: the CPU where no encoder needs torch, which is slow to import."""
        if self.settings.device in ("auto", "cpu") and not any(is_torch(tower.request) for tower in self.towers):
            return "cpu"
        return resolve_device(self.settings.device)

    def _run(
        self, modality: str, items: list[Item], writer: BackgroundWriter, counts: Counts, progress: Progress, where: str
    ) -> None:
        """Encode the items of one modality, and count failures."""
        batchers, settings = self.encoders(modality), self.settings
        encoders = [batcher.encoder for batcher in batchers]
        reader, clocks = Reader(encoders, settings.workers), counts.clocks.setdefault(modality, Clocks())
        stage = Stage(batchers, reader, writer.add, self.device, settings.batch_size, clocks, counts.add_cut)
        title = f"{modality}: {', '.join(dict.fromkeys(encoder.specs[0].model for encoder in encoders))}{where}"
        with progress.step(title, len(items)) as advance:
            counts.add_failures(items, stage.run(items, advance))

    def _shard_writer(self, fingerprint: str) -> ShardWriter:
        tower = self._towers[fingerprint]
        origin = {"request": tower.request, "versions": versions()}  # kept beside the vectors, not in the spec
        return self.store.writer(tower.spec, origin, self.planner.shards[fingerprint])
