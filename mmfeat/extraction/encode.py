"""The pipeline of an extraction: reader -> encoders -> writer, none of which waits for another without need."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np

from mmfeat.cache.shard import Rows
from mmfeat.cache.writer import ShardWriter
from mmfeat.encoders.spec import Encoder, EncoderSpec, Values
from mmfeat.errors import EncoderError
from mmfeat.extraction.counts import Clocks
from mmfeat.extraction.missing import Item
from mmfeat.extraction.reader import Prepared, Reader
from mmfeat.system.wording import Advance

# On a CPU the activations of a larger batch leave the processor's caches, and a fixed size gives the same sums twice.
CPU_SIZES = {"image": 16, "text": 32}
PROBED_SIZES = (32, 64, 128, 256, 512)
WORTH_MORE = 1.05  # as fast, for twice the memory


class Batcher:
    """Gives an encoder as much at once as suits the device; `size` 0 has it find out."""

    def __init__(self, encoder: Encoder, device: str, size: int = 0) -> None:
        self.encoder, self.device, self._reason = encoder, device, ""
        self.size = size or (CPU_SIZES[encoder.modality] if device == "cpu" else 0)

    def launch(self, inputs: list[Any]) -> Callable[[], list[Values]]:
        """Start with any number of inputs; the function waits for their values. Nothing is lost where memory is."""
        if not self.size:
            self.size = self._probe(inputs)
        waits: list[Callable[[], list[Values]]] = []
        start = 0
        while start < len(inputs):
            piece = inputs[start : start + self.size]
            if (wait := self._try(piece)) is not None:
                waits.append(wait)
                start += len(piece)
                continue
            if len(piece) == 1:
                raise EncoderError(
                    f"{self.encoder.specs[0].name}: memory is too short for a single sample ({self._reason}); use "
                    "--dtype bfloat16, another --device or a smaller model"
                )
            self.size = -(-len(piece) // 2)
        return lambda: _joined([wait() for wait in waits])

    def _try(self, piece: list[Any]) -> Callable[[], list[Values]] | None:
        """None where there is too little memory."""
        try:
            return self.encoder.launch(piece)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            self._reason = " ".join(str(error).split())[:120]
        self._empty_caches()  # here the failed pass's tensors are gone, in the handler they are not
        return None

    def _probe(self, inputs: list[Any]) -> int:
        """The smallest size beyond which encoding gets no faster, on copies of the longest inputs."""
        best, chosen = 0.0, PROBED_SIZES[0]
        for size in PROBED_SIZES:
            batch = (inputs * -(-size // len(inputs)))[:size]
            seconds = min(self._seconds(batch) for _ in range(2))
            if size / seconds < WORTH_MORE * best or not np.isfinite(seconds):
                break
            best, chosen = size / seconds, size
        return chosen

    def _seconds(self, batch: list[Any]) -> float:
        """How long a batch takes, infinite if it does not fit."""
        start = time.perf_counter()
        wait = self._try(batch)
        if wait is None:
            return float("inf")
        wait()
        return time.perf_counter() - start

    def _empty_caches(self) -> None:
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if self.device == "mps":
            with contextlib.suppress(RuntimeError):
                torch.mps.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA, Apple's and the CPU's allocators have words for it; oneDNN, short of memory, only ever says the last."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "could not create a primitive")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def _joined(parts: list[list[Values]]) -> list[Values]:
    """The values of all pieces, for each output."""
    if len(parts) == 1:
        return parts[0]
    return [
        np.concatenate(values) if isinstance(values[0], np.ndarray) else [row for rows in values for row in rows]
        for values in zip(*parts, strict=True)
    ]


WINDOWS = {"cpu": {"image": 16, "text": 256}}  # samples that are read, sorted by length and encoded together
GPU_WINDOW = {"image": 512, "text": 4096}
TEXT_BATCHES = 8  # in a window, where the size of a batch is given
QUEUED = 8  # results on their way to the writer
TICK = 1.0  # seconds after which an idle writer looks whether a commit is due

T = TypeVar("T")


class Sink(Protocol):
    """Takes over rows of a spec, by its fingerprint."""

    def add(self, fingerprint: str, rows: Rows, clocks: Clocks) -> None: ...


class BackgroundWriter:
    """Takes rows over and commits them in a thread; leaving the context, for whatever reason, commits the rest.

    `make` gives the shard writer of a fingerprint.
    """

    def __init__(self, make: Callable[[str], ShardWriter]) -> None:
        self._make = make
        self._writers: dict[str, ShardWriter] = {}
        self._open = ExitStack()
        self._queue: queue.Queue[tuple[str, Rows, Clocks] | None] = queue.Queue(QUEUED)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def open(self, fingerprint: str) -> None:
        """Be ready for rows of a spec. Raises `WriteError` where they could not be written, before any work."""
        if fingerprint not in self._writers:
            self._writers[fingerprint] = self._open.enter_context(self._make(fingerprint))

    def add(self, fingerprint: str, rows: Rows, clocks: Clocks) -> None:
        """Hand some rows over; waits only where the disk is slower than the encoders."""
        if self._error is not None:
            raise self._error
        with clocks.time("blocked"):
            self._queue.put((fingerprint, rows, clocks))

    @property
    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Rows with values that were committed, rows that hold an error, and rows found there, by fingerprint."""
        return {name: (each.committed, each.failed, each.found) for name, each in self._writers.items()}

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end()
        except KeyboardInterrupt:  # once more of them leaves at once
            self._end()
            raise
        finally:
            self._open.__exit__(kind, error, trace)
        if self._error is not None and error is None:
            raise self._error

    def _end(self) -> None:
        """Wait until everything is committed."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        """After an error, which the main thread raises, the rest is taken and dropped: nobody waits for ever."""
        clocks, ended = Clocks(), False
        while not ended:
            try:
                given = self._queue.get(timeout=TICK)
                ended = given is None
            except queue.Empty:
                given = None
            if given is not None:
                clocks = given[2]
            try:
                with clocks.time("write"):
                    self._write(given, ended)
            except BaseException as error:
                self._error = self._error or error

    def _write(self, given: tuple[str, Rows, Clocks] | None, everything: bool) -> None:
        if self._error is not None:
            return
        if given is not None:
            self._writers[given[0]].add(given[1])
        for writer in list(self._writers.values()):  # also those whose rows came earlier
            if everything:
                writer.commit()
            writer.commit_if_due()


@dataclass
class Stage:
    """What runs over the items of one modality."""

    encoders: list[Batcher]
    reader: Reader
    writer: Sink
    device: str
    batch_size: int = 0
    clocks: Clocks = field(default_factory=Clocks)
    _since: float = 0.0

    def run(self, items: Sequence[Item], advance: Advance) -> Iterator[tuple[str, str]]:
        """Encode and write all items; yields (sample id, reason) of what could not be read or encoded."""
        modality = items[0].modality
        size = WINDOWS.get(self.device, GPU_WINDOW)[modality]
        if self.batch_size:
            size = self.batch_size * (TEXT_BATCHES if modality == "text" else 1)
        depth = 0 if self.device == "cpu" else 1  # of the windows that a device works on while the next is prepared
        self.clocks.workers = self.reader.workers
        running: deque[tuple[list[Prepared], list[Callable[[], Blocks]]]] = deque()
        self._since = time.perf_counter() - self.clocks.wall
        try:
            for window in batched(self._read(items, ahead=4 * size), size):
                with self.clocks.time("encode"):
                    running.append((window, [start_block(window, n, each) for n, each in enumerate(self.encoders)]))
                while len(running) > depth:
                    yield from self._finish(*running.popleft(), advance)
            while running:
                yield from self._finish(*running.popleft(), advance)
        except KeyboardInterrupt:  # what the device has begun is worth keeping
            for begun in running:
                list(self._finish(*begun, advance))
            raise
        finally:
            self.clocks.wall = time.perf_counter() - self._since

    def _read(self, items: Sequence[Item], ahead: int) -> Iterator[Prepared]:
        source = self.reader.read(items, ahead)
        while True:
            with self.clocks.time("starved"):
                prepared = next(source, None)
            if prepared is None:
                return
            self.clocks.read += prepared.read
            self.clocks.decode += prepared.decode
            yield prepared

    def _finish(
        self, window: list[Prepared], waits: list[Callable[[], Blocks]], advance: Advance
    ) -> Iterator[tuple[str, str]]:
        """Hand over what a window gave. What could not even be read gives no row; what is not finite only its row."""
        failures = {(entry.item.sample.id, reason) for entry in window for reason in entry.errors.values()}
        for wait in waits:
            with self.clocks.time("encode"):
                blocks = wait()
            for spec, rows in blocks:
                self.writer.add(spec.fingerprint, rows, self.clocks)
                failures.update(pair for pair in zip(rows.ids, rows.errors, strict=True) if pair[1])
        self.clocks.wall = time.perf_counter() - self._since
        advance(len(window), str(self.clocks))
        yield from sorted(failures)


Blocks = list[tuple[EncoderSpec, Rows]]


def start_block(window: list[Prepared], number: int, encoder: Batcher) -> Callable[[], Blocks]:
    """Start encoding what could be read, shortest last; the function waits for the rows of each output."""
    good = [entry for entry in window if number in entry.inputs]
    # A file that could not even be read has no content, so there is nothing to remember it by.
    bad = [entry for entry in window if number in entry.errors and entry.key]
    if (length := encoder.encoder.length) is not None:
        good.sort(key=lambda entry: -length(entry.inputs[number]))
    specs = encoder.encoder.specs
    wait = encoder.launch([entry.inputs[number] for entry in good]) if good else list
    return lambda: [
        *(pair for spec, values in zip(specs, wait(), strict=False) for pair in _good_rows(spec, good, values)),
        *(pair for spec in specs for pair in _bad_rows(spec, bad, [entry.errors[number] for entry in bad])),
    ]


def _good_rows(spec: EncoderSpec, entries: list[Prepared], values: Values) -> Iterator[tuple[EncoderSpec, Rows]]:
    stored, errors = _stored(values, entries, spec)
    if lacking := _lacking(spec, entries):
        yield spec, _rows(entries, errors, stored).take(lacking)


def _bad_rows(spec: EncoderSpec, entries: list[Prepared], errors: list[str]) -> Iterator[tuple[EncoderSpec, Rows]]:
    if lacking := _lacking(spec, entries):
        nothing = np.empty((len(entries), 0), dtype=spec.storage)
        values = nothing if spec.output == "pooled" else [nothing[:0]] * len(entries)
        yield spec, _rows(entries, errors, values).take(lacking)


def _lacking(spec: EncoderSpec, entries: list[Prepared]) -> list[int]:
    return [number for number, entry in enumerate(entries) if spec.fingerprint in entry.item.fingerprints]


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
