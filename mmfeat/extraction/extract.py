"""Extraction: samples x encoders -> cache, only what is missing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, absolute_request, describe_encoders, is_torch
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError
from mmfeat.extraction.counts import Clocks, Counts
from mmfeat.extraction.missing import Missing, Planner
from mmfeat.extraction.requests import Request, begin_request, remember_request, resolve_options
from mmfeat.extraction.worker import Extractor, ExtractSettings
from mmfeat.samples.dataset import Overview, Sample, SampleSet, SampleSource
from mmfeat.system.hardware import check_engine, resolve_device
from mmfeat.system.remote import absolute
from mmfeat.system.wording import Advance, Progress, Silent

DEFAULT_ENCODERS = ("clip", "bert", "resnet50")
BLOCK = 65_536  # samples that are in memory at once; the next block is planned while one is encoded


@dataclass(frozen=True, kw_only=True)
class Extraction:
    """Result of an extraction: its samples and encoders, the cache folder of the data set, and what was counted.

    `stored`, `new` and `unreadable` count vectors by the encoder's cache folder: in the cache before, committed, and
    rows that hold an error. `missing` counts samples by modality and reason, and `examples` has one id for each.
    `failed` is the number of samples that could not be read or encoded this time; `failures` lists the first as
    (sample id, reason). `clocks` are the seconds of each step, by modality.
    """

    samples: Overview
    towers: Sequence[Tower]
    folder: Path
    settings: ExtractSettings
    engine: str
    seconds: float
    stored: Counter[str]
    new: Counter[str]
    unreadable: Counter[str]
    missing: Mapping[str, Counter[str]]
    examples: Mapping[str, Mapping[str, str]]
    failures: Sequence[tuple[str, str]]
    failed: int
    clocks: Mapping[str, Clocks]

    @property
    def nothing_to_do(self) -> bool:
        """Whether there was nothing to encode."""
        return not any(self.new.values()) and not self.failed


def extract_features(
    data: str | Path,
    encoders: Iterable[str] = DEFAULT_ENCODERS,
    *,
    cache: str | Path = "cache",
    options: EncoderOptions | None = None,
    columns: Mapping[str, str] | None = None,
    settings: ExtractSettings | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    progress: Progress | None = None,
) -> Extraction:
    """Encode what the cache lacks of `data`; a rerun continues after whatever stopped the last.

    `options.dtype` "auto" becomes the hardware's own. `data` may be larger than memory. With the engine "ray" blocks of
    samples go to the workers of a Ray cluster, which write to a `cache` that all of them see.
    """
    start = time.monotonic()
    check_engine(engine, ray_address)
    settings, progress = settings or ExtractSettings(), progress or Silent()
    if engine == "local" and settings.device not in ("auto", "cpu"):  # torch is slow to import where nobody needs it
        resolve_device(settings.device)
    work = prepare_extraction(data, encoders, cache, options, columns, settings)
    overview = work.source.overview()
    work.store.create()
    begin_request(cache, work.request)
    if engine == "ray":
        from mmfeat.extraction.on_ray import extract_on_ray

        counts = extract_on_ray(work.source, work.towers, work.store, settings, ray_address, progress, len(overview))
    else:
        counts = _extract(work.source.blocks(BLOCK), len(overview), work.towers, work.store, settings, progress)
    remember_request(cache, work.request)
    return Extraction(
        samples=overview,
        towers=work.towers,
        folder=work.store.folder,
        settings=settings,
        engine=engine,
        seconds=time.monotonic() - start,
        **vars(counts),
    )


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
    store.create()
    blocks = (samples.samples[first : first + BLOCK] for first in range(0, len(samples), BLOCK))
    counts = _extract(blocks, len(samples), towers, store, settings, progress or Silent())
    return Extraction(
        samples=Overview.of(samples),
        towers=towers,
        folder=store.folder,
        settings=settings,
        engine="local",
        seconds=time.monotonic() - start,
        **vars(counts),
    )


@dataclass(frozen=True)
class Work:
    """An extraction that was asked for: where its samples come from and what they go through."""

    source: SampleSource
    towers: list[Tower]
    store: Cache
    request: Request


def prepare_extraction(
    data: str | Path,
    encoders: Iterable[str],
    cache: str | Path,
    options: EncoderOptions | None,
    columns: Mapping[str, str] | None,
    settings: ExtractSettings,
) -> Work:
    """Find the data and describe the encoders; nothing is loaded or written.

    Raises `ConfigError` for what is asked for and applies to none of the encoders.
    """
    source = SampleSource(data, columns)
    encoders, resolved = list(encoders), resolve_options(options or EncoderOptions(), settings.device)
    towers = describe_encoders(encoders, resolved)
    _check_applies(towers, resolved, settings)
    fingerprints = tuple(tower.spec.fingerprint for tower in towers)
    requests = [absolute_request(encoder) for encoder in encoders]
    request = Request(absolute(data), dict(columns or {}), requests, resolved, fingerprints)
    return Work(source, towers, Cache(cache, source.name), request)


def _check_applies(towers: Sequence[Tower], options: EncoderOptions, settings: ExtractSettings) -> None:
    names = ", ".join(dict.fromkeys(tower.spec.model for tower in towers))
    if settings.compiled and not any(is_torch(tower.request) for tower in towers):
        raise ConfigError(f"--compile: there is no torch model in {names}; leave it out")
    if settings.compiled and not any(is_torch(t.request) and t.spec.output == "pooled" for t in towers):
        raise ConfigError("--compile: it applies to pooled vectors, and --outputs asks for none; leave it out")
    for flag, value in (("--views", options.views), ("--draft", options.draft)):
        if value and not any(tower.spec.modality == "image" for tower in towers):
            raise ConfigError(f"{flag} {value}: it is about photos, and {names} takes none; leave it out")


def _extract(
    blocks: Iterable[Sequence[Sample]],
    samples: int,
    towers: Sequence[Tower],
    store: Cache,
    settings: ExtractSettings,
    progress: Progress,
) -> Counts:
    """Encode one block of samples after the other in this process."""
    with (
        Extractor(towers, store, settings) as extractor,
        closing(_planned(extractor.planner, iter(blocks), progress)) as plans,
    ):
        return extractor.encode(plans, progress, total=-(-samples // BLOCK))


def _planned(
    planner: Planner, blocks: Iterator[Sequence[Sample]], progress: Progress
) -> Generator[Missing, None, None]:
    """The plans of all blocks, each made while the one before it is encoded; the first shows how it goes."""
    plan, rest = _plan_next(planner, blocks, progress), Unseen()
    with ThreadPoolExecutor(1) as pool:
        try:
            while plan is not None:
                upcoming = pool.submit(_plan_next, planner, blocks, rest)
                yield plan
                plan = upcoming.result()
        finally:
            rest.stopped = True


def _plan_next(planner: Planner, blocks: Iterator[Sequence[Sample]], progress: Progress) -> Missing | None:
    block = next(blocks, None)
    return None if block is None else planner.plan(block, progress)


class Unseen:
    """Progress that nobody sees; what it follows ends soon after it was stopped."""

    def __init__(self) -> None:
        self.stopped = False

    @contextmanager
    def step(self, title: str, total: int | None) -> Iterator[Advance]:
        yield self._advance

    def _advance(self, steps: int, note: str = "") -> None:
        if self.stopped:
            raise CancelledError
