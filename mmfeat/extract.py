"""Extraction: samples x encoders -> cache, only what is missing.

reader (threads: read, hash, decode once, prepare for every encoder) -> mapper (embed a batch) ->
writer (shards), under one small runner.
"""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmfeat.cache import Cache, Rows, ShardWriter
from mmfeat.encoders import (
    Encoder,
    EncoderOptions,
    EncoderSpec,
    Tower,
    Values,
    absolute_request,
    describe_encoders,
    load_encoders,
)
from mmfeat.errors import EncoderError
from mmfeat.hardware import cpu_count, resolve_device
from mmfeat.images import decode_image
from mmfeat.plan import Item, make_plan
from mmfeat.progress import Progress, Silent
from mmfeat.requests import Request, begin_request, remember_request, resolve_options
from mmfeat.samples import SampleSet, content_key, read_samples
from mmfeat.version import __version__
from mmfeat.views import augment

# On a CPU the activations of a larger batch leave the processor's caches; a GPU needs more to be busy.
BATCH_SIZES = {"cpu": 16, "mps": 64, "cuda": 256}
DEFAULT_ENCODERS = ("clip", "bert", "resnet50")

PACKAGES = ("torch", "torchvision", "open_clip_torch", "transformers", "timm", "scikit-learn", "scikit-image", "pillow")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Prepared:
    """An item after reading: by the encoder's number one model input, or why there is none."""

    item: Item
    key: bytes
    inputs: Mapping[int, Any]
    errors: Mapping[int, str]


@dataclass
class Extraction:
    """What an extraction found and did. By the encoder's cache folder: vectors `stored` before and `new`."""

    samples: SampleSet
    towers: list[Tower]
    folder: Path
    stored: dict[str, int]
    new: dict[str, int]
    unreadable: dict[str, int]  # rows that hold an error, old and new
    missing: dict[str, Counter[str]]  # modality -> reason -> samples
    failures: list[tuple[str, str]] = field(default_factory=list)  # (sample id, reason), this time
    seconds: float = 0.0

    @property
    def nothing_to_do(self) -> bool:
        return not any(self.new.values()) and not self.failures


def extract_features(
    data: str | Path,
    encoders: Iterable[str] = DEFAULT_ENCODERS,
    *,
    cache: str | Path = "cache",
    options: EncoderOptions | None = None,
    columns: Mapping[str, str] | None = None,
    device: str = "auto",
    workers: int = 0,
    batch_size: int = 0,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """Encode what the cache lacks of `data`; a rerun continues after whatever stopped the last.

    `options.dtype` "auto" becomes the hardware's own. `workers` 0 means one reading thread a core,
    `batch_size` 0 what suits the device. What could not be read or encoded is remembered with its
    error and tried again only with `retry_failed`.
    """
    start = time.monotonic()
    samples = read_samples(data, columns)
    encoders, resolved = list(encoders), resolve_options(options or EncoderOptions(), device)
    towers = describe_encoders(encoders, resolved)
    requests = [absolute_request(encoder) for encoder in encoders]
    fingerprints = tuple(tower.spec.fingerprint for tower in towers)
    request = Request(os.path.abspath(data), dict(columns or {}), requests, resolved, fingerprints)
    Cache(cache, samples.name).create()
    begin_request(cache, request)
    result = extract_samples(
        samples,
        towers,
        cache=cache,
        device=device,
        workers=workers,
        batch_size=batch_size,
        retry_failed=retry_failed,
        progress=progress,
    )
    remember_request(cache, request)
    result.seconds = time.monotonic() - start
    return result


def extract_samples(
    samples: SampleSet,
    towers: list[Tower],
    *,
    cache: str | Path,
    device: str = "auto",
    workers: int = 0,
    batch_size: int = 0,
    retry_failed: bool = False,
    progress: Progress | None = None,
) -> Extraction:
    """`extract_features` for samples and towers that are already read and described."""
    store = Cache(cache, samples.name)
    store.create()
    progress = progress or Silent()
    plan = make_plan(samples, [tower.spec for tower in towers], store, progress, retry_failed)
    result = Extraction(samples, towers, store.folder, plan.stored, {}, plan.unreadable, plan.missing)
    needed = plan.needed
    wanted = [tower for tower in towers if tower.spec.fingerprint in needed]
    if not wanted:
        return result
    device = resolve_device(device)
    loaded = load_encoders(wanted, device)
    size = batch_size or BATCH_SIZES[device.split(":")[0]]
    with ExitStack() as stack:
        writers = {}
        for spec, provenance in ((tower.spec, _provenance(tower)) for tower in wanted):
            writer = store.writer(spec, provenance, plan.shards[spec.fingerprint])
            writers[spec.fingerprint] = stack.enter_context(writer)
        for modality, items in plan.items.items():
            ours = [encoder for encoder in loaded if encoder.modality == modality]
            # A tokenizer is not safe to share between threads; texts are cheap to prepare in one.
            threads = 1 if modality == "text" else workers or cpu_count()
            _run(items, ours, writers, threads, size, progress, result)
    for spec in (tower.spec for tower in wanted):
        writer = writers[spec.fingerprint]
        result.new[spec.folder_name] = writer.committed - writer.failed
        result.unreadable[spec.folder_name] += writer.failed
    return result


def _run(
    items: list[Item],
    encoders: list[Encoder],
    writers: Mapping[str, ShardWriter],
    threads: int,
    batch_size: int,
    progress: Progress,
    result: Extraction,
) -> None:
    """reader -> mapper -> writer."""
    if not items:
        return
    title = f"{items[0].modality}: {', '.join(dict.fromkeys(encoder.specs[0].model for encoder in encoders))}"
    with progress.task(title, len(items)) as advance, warnings.catch_warnings():
        # Odd EXIF blocks and palettes warn, and decode all the same. Filters are shared by all threads.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        prepared = prefetch(lambda item: prepare(item, encoders), items, threads, ahead=4 * batch_size)
        for batch in batched(prepared, batch_size):
            # What could not even be read gives no row, and what is not finite shows only in its row.
            failures = {(entry.item.sample.id, reason) for entry in batch for reason in entry.errors.values()}
            for number, encoder in enumerate(encoders):
                for spec, rows in encode_block(batch, number, encoder):
                    writers[spec.fingerprint].add(rows)
                    failures.update(pair for pair in zip(rows.ids, rows.errors, strict=True) if pair[1])
            result.failures += sorted(failures)
            for writer in writers.values():  # also those whose rows came earlier, of texts or for another encoder
                writer.commit_if_due()
            advance(len(batch))


def prepare(item: Item, encoders: Sequence[Encoder]) -> Prepared:
    """Read and decode once; then every encoder that lacks the item prepares its own input.

    The key is taken again from the bytes that are decoded, so a file that changes between planning
    and reading is stored under what it is now.
    """
    key, content, error = _read(item)
    ours = {n: encoder for n, encoder in enumerate(encoders) if item.fingerprints & encoder.fingerprints}
    if error:
        return Prepared(item, key, {}, dict.fromkeys(ours, error))
    inputs, errors = {}, {}
    for number, encoder in ours.items():
        try:
            inputs[number] = encoder.prepare(augment(content, encoder.view, key) if encoder.view != "none" else content)
        except (ValueError, TypeError, OSError, ZeroDivisionError) as problem:
            errors[number] = f"cannot be prepared: {problem}"[:200]
    return Prepared(item, key, inputs, errors)


def _read(item: Item) -> tuple[bytes, Any, str]:
    """(content key, text or RGB picture, "") or (key, None, why not)."""
    if item.modality == "text":
        return item.key, item.sample.text, ""
    assert item.sample.image is not None  # only samples with an image are planned
    try:
        data = item.sample.image.read_bytes()
    except OSError as problem:
        return b"", None, f"unreadable: {problem.strerror}"
    return content_key(data), *decode_image(data)


def encode_block(batch: list[Prepared], number: int, encoder: Encoder) -> Iterator[tuple[EncoderSpec, Rows]]:
    """The rows of one batch for each output of an encoder: values of what could be read, errors of what could not."""
    good = [entry for entry in batch if number in entry.inputs]
    # A file that could not even be read has no content, so there is nothing to remember it by.
    bad = [entry for entry in batch if number in entry.errors and entry.key]
    outputs = encoder.embed([entry.inputs[number] for entry in good]) if good else []
    for spec, values in zip(encoder.specs, outputs, strict=False):
        stored, errors = _stored(values, good, spec)
        lacking = [n for n, entry in enumerate(good) if spec.fingerprint in entry.item.fingerprints]
        if lacking:
            yield spec, _rows(good, errors, stored).take(lacking)
    for spec in encoder.specs:
        if lacking := [n for n, entry in enumerate(bad) if spec.fingerprint in entry.item.fingerprints]:
            nothing = np.empty((len(bad), 0), dtype=spec.storage)
            values = nothing if spec.output == "pooled" else [nothing[:0]] * len(bad)
            yield spec, _rows(bad, [entry.errors[number] for entry in bad], values).take(lacking)


def _rows(entries: list[Prepared], errors: list[str], values: Values) -> Rows:
    return Rows([entry.key for entry in entries], [entry.item.sample.id for entry in entries], errors, values)


def _stored(values: Values, entries: list[Prepared], spec: EncoderSpec) -> tuple[Values, list[str]]:
    """The values in the storage dtype, and an error for each sample of which not all are finite.

    In half precision the dtype may be to blame, so that is an error of the whole extraction.
    """
    with np.errstate(over="ignore"):
        stored = [value.astype(spec.storage) for value in values]
    errors = ["" if np.isfinite(value).all() else "the encoder gives no finite vector" for value in stored]
    if any(errors) and spec.storage != "float32":
        first = next(entry for entry, error in zip(entries, errors, strict=True) if error)
        raise EncoderError(
            f"{spec.name}: sample {first.item.sample.id} gives values beyond {spec.storage}; "
            "extract with --dtype float32"
        )
    if spec.output != "pooled":
        return [value[:0] if error else value for value, error in zip(stored, errors, strict=True)], errors
    pooled = np.stack(stored)
    pooled[[bool(error) for error in errors]] = np.nan
    return pooled, errors


def prefetch(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[R]:
    """`map` in threads, in order, never more than `ahead` results in memory."""
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future[R]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    batch: list[T] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _provenance(tower: Tower) -> dict[str, Any]:
    """What does not change a vector but tells where it came from."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {"mmfeat": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"request": tower.request, "versions": versions}
