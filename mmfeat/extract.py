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
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmfeat.cache import Cache, Rows, ShardWriter, content_keys
from mmfeat.encoders import (
    Encoder,
    EncoderOptions,
    EncoderSpec,
    Tower,
    absolute_request,
    describe_encoders,
    load_encoders,
)
from mmfeat.errors import EncoderError
from mmfeat.hardware import cpu_count, resolve_device
from mmfeat.images import decode_image
from mmfeat.progress import Progress, Silent
from mmfeat.requests import Request, remember_request, resolve_options
from mmfeat.samples import MODALITIES, Sample, SampleSet, content_key, read_samples
from mmfeat.version import __version__

# On a CPU the activations of a larger batch leave the processor's caches; a GPU needs more to be busy.
BATCH_SIZES = {"cpu": 16, "mps": 64, "cuda": 256}
DEFAULT_ENCODERS = ("clip", "bert", "resnet50")

PACKAGES = ("torch", "torchvision", "open_clip_torch", "transformers", "timm", "scikit-learn", "scikit-image", "pillow")

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Item:
    """One piece of content to encode, and the fingerprints of the specs that lack it."""

    sample: Sample
    modality: str
    key: bytes
    fingerprints: frozenset[str]


@dataclass(frozen=True)
class Prepared:
    """An item after reading: for each encoder that needs it one model input, or why there is none."""

    item: Item
    key: bytes
    inputs: Mapping[str, Any]
    errors: Mapping[str, str]


@dataclass
class Extraction:
    """What an extraction found and did. By the encoder's cache folder: vectors `stored` before and `new`."""

    samples: SampleSet
    towers: list[Tower]
    folder: Path
    stored: dict[str, int] = field(default_factory=dict)
    new: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, int] = field(default_factory=dict)  # rows that hold an error, old and new
    missing: dict[str, Counter[str]] = field(default_factory=dict)  # modality -> reason -> samples
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
    progress: Progress | None = None,
) -> Extraction:
    """Encode what the cache lacks of `data`; a rerun continues after whatever stopped the last.

    `options.dtype` "auto" becomes the hardware's own. `workers` 0 means one reading thread a core,
    `batch_size` 0 what suits the device.
    """
    start = time.monotonic()
    samples = read_samples(data, columns)
    encoders, resolved = list(encoders), resolve_options(options or EncoderOptions(), device)
    towers = describe_encoders(encoders, resolved)
    result = extract_samples(
        samples, towers, cache=cache, device=device, workers=workers, batch_size=batch_size, progress=progress
    )
    requests = [absolute_request(encoder) for encoder in encoders]
    remember_request(cache, Request(os.path.abspath(data), dict(columns or {}), requests, resolved))
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
    progress: Progress | None = None,
) -> Extraction:
    """`extract_features` for samples and towers that are already read and described."""
    store = Cache(cache, samples.name)
    result = Extraction(samples, towers, store.folder)
    progress = progress or Silent()
    plan = {modality: _plan(samples, modality, towers, store, result, progress) for modality in MODALITIES}
    needed = {fingerprint for items in plan.values() for item in items for fingerprint in item.fingerprints}
    if not needed:
        return result
    wanted = [tower for tower in towers if tower.spec.fingerprint in needed]
    device = resolve_device(device)
    loaded = load_encoders(wanted, device)
    size = batch_size or BATCH_SIZES[device.split(":")[0]]
    with ExitStack() as stack:
        writers = {t.spec.fingerprint: stack.enter_context(store.writer(t.spec, _provenance(t))) for t in wanted}
        for modality, items in plan.items():
            ours = [encoder for encoder in loaded if encoder.spec.modality == modality]
            # A tokenizer is not safe to share between threads; texts are cheap to prepare in one.
            threads = 1 if modality == "text" else workers or cpu_count()
            _run(items, ours, writers, threads, size, progress, result)
    for spec in (tower.spec for tower in wanted):
        writer = writers[spec.fingerprint]
        result.new[spec.folder_name] = writer.committed - writer.failed
        result.unreadable[spec.folder_name] += writer.failed
    return result


def _plan(
    samples: SampleSet, modality: str, towers: list[Tower], store: Cache, result: Extraction, progress: Progress
) -> list[Item]:
    """What is missing of one modality: each content once, texts ordered by length."""
    specs = [tower.spec for tower in towers if tower.spec.modality == modality]
    if not specs:
        return []
    keys = content_keys(samples.samples, modality, progress)
    result.missing[modality] = Counter(reason for reason in keys.reasons if reason)
    wanted = np.unique(keys.keys[keys.present])
    lacking: dict[bytes, set[str]] = {}
    for spec in specs:
        stored, failed = store.keys(spec)
        absent = wanted[~np.isin(wanted, stored)].tolist()
        unreadable = int(np.isin(wanted, stored[failed]).sum())
        result.unreadable[spec.folder_name] = unreadable
        result.stored[spec.folder_name] = len(wanted) - len(absent) - unreadable
        for key in absent:
            lacking.setdefault(key, set()).add(spec.fingerprint)
    first: dict[bytes, Sample] = {}
    for sample, key in zip(samples.samples, keys.keys.tolist(), strict=True):
        first.setdefault(key, sample)
    items = [Item(first[key], modality, key, frozenset(lacking[key])) for key in first if key in lacking]
    return sorted(items, key=lambda item: len(item.sample.text or "")) if modality == "text" else items


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
    title = f"{items[0].modality}: {', '.join(encoder.spec.name for encoder in encoders)}"
    with progress.task(title, len(items)) as advance, warnings.catch_warnings():
        # Odd EXIF blocks and palettes warn, and decode all the same. Filters are shared by all threads.
        warnings.filterwarnings("ignore", module=r"PIL\.")
        prepared = prefetch(lambda item: prepare(item, encoders), items, threads, ahead=4 * batch_size)
        for batch in batched(prepared, batch_size):
            for encoder in encoders:
                for rows in encode_block(batch, encoder):
                    writers[encoder.spec.fingerprint].add(rows)
            for entry in batch:
                result.failures += [(entry.item.sample.id, reason) for reason in set(entry.errors.values())]
            advance(len(batch))


def prepare(item: Item, encoders: Iterable[Encoder]) -> Prepared:
    """Read and decode once; then every encoder that lacks the item prepares its own input.

    The key is taken again from the bytes that are decoded, so a file that changes between planning
    and reading is stored under what it is now.
    """
    key, content, error = _read(item)
    if error:
        return Prepared(item, key, {}, dict.fromkeys(item.fingerprints, error))
    inputs, errors = {}, {}
    for encoder in encoders:
        fingerprint = encoder.spec.fingerprint
        if fingerprint in item.fingerprints:
            try:
                inputs[fingerprint] = encoder.prepare(content)
            except (ValueError, TypeError, OSError, ZeroDivisionError) as problem:
                errors[fingerprint] = f"cannot be prepared: {problem}"[:200]
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


def encode_block(batch: list[Prepared], encoder: Encoder) -> Iterator[Rows]:
    """The rows of one batch for one encoder: vectors of what could be read, errors of what could not."""
    fingerprint, storage = encoder.spec.fingerprint, encoder.spec.storage
    good = [entry for entry in batch if fingerprint in entry.inputs]
    if good:
        vectors = encoder.embed([entry.inputs[fingerprint] for entry in good])
        stored, errors = _stored(vectors, good, encoder.spec)
        yield _rows(good, errors, stored)
    # A file that could not even be read has no content, so there is nothing to remember it by.
    bad = [entry for entry in batch if fingerprint in entry.errors and entry.key]
    if bad:
        yield _rows(bad, [entry.errors[fingerprint] for entry in bad], np.empty((len(bad), 0), dtype=storage))


def _rows(entries: list[Prepared], errors: list[str], pooled: np.ndarray) -> Rows:
    return Rows([entry.key for entry in entries], [entry.item.sample.id for entry in entries], errors, pooled)


def _stored(vectors: np.ndarray, entries: list[Prepared], spec: EncoderSpec) -> tuple[np.ndarray, list[str]]:
    """(B, D) in the storage dtype and an error for each row that is not finite.

    In half precision the dtype may be to blame, so that is an error of the whole extraction.
    """
    with np.errstate(over="ignore"):
        stored = vectors.astype(spec.storage)
    finite = np.isfinite(stored).all(axis=1)
    if not finite.all() and spec.storage != "float32":
        row = int(np.flatnonzero(~finite)[0])
        raise EncoderError(
            f"{spec.name}: sample {entries[row].item.sample.id} gives values beyond {spec.storage}; "
            "extract with --dtype float32"
        )
    stored[~finite] = np.nan
    return stored, ["" if fine else "the encoder gives no finite vector" for fine in finite]


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
