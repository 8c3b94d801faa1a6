"""The pipeline of an extraction: reader -> encoders -> writer.

The three run side by side: the next samples are read and the last rows are written while encoders compute.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from mmfeat.cache.shard import Rows
from mmfeat.cache.store import ShardWriter
from mmfeat.encoders.spec import Encoder, EncoderSpec, Values
from mmfeat.errors import EncoderError
from mmfeat.extraction.missing import Clocks, Item
from mmfeat.extraction.reader import Prepared, Reader
from mmfeat.samples.keys import BY_ID
from mmfeat.system.wording import Advance

# On a CPU the activations of a larger batch leave the processor's caches, and a fixed size gives the same sums twice.
CPU_SIZES = {"image": 16, "text": 32, BY_ID: 256}
PROBED_SIZES = (32, 64, 128, 256, 512)
WORTH_MORE = 1.05  # speed-up that is worth twice the memory


class Batcher:
    """Encodes in batches of `size` inputs, of the size that suits the device where `size` is 0.

    A batch that does not fit in memory is halved.
    """

    def __init__(self, encoder: Encoder, device: str, size: int = 0) -> None:
        self.encoder, self.device, self._reason = encoder, device, ""
        self.size = size or (CPU_SIZES[encoder.modality] if device == "cpu" else 0)

    def launch(self, inputs: list[Any]) -> Callable[[], list[Values]]:
        """Start encoding any number of inputs; the function waits for the values of each output."""
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
        """Start one batch; None where memory is too short for the batch."""
        try:
            return self.encoder.launch(piece)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            self._reason = " ".join(str(error).split())[:120]
        self._empty_caches()  # only outside the handler are the tensors of the failed pass free
        return None

    def _probe(self, inputs: list[Any]) -> int:
        """The smallest batch size beyond which encoding gets no faster, on copies of the longest inputs."""
        best, chosen = 0.0, PROBED_SIZES[0]
        for size in PROBED_SIZES:
            batch = (inputs * -(-size // len(inputs)))[:size]
            seconds = min(self._seconds(batch) for _ in range(2))
            if size / seconds < WORTH_MORE * best or not np.isfinite(seconds):
                break
            best, chosen = size / seconds, size
        return chosen

    def _seconds(self, batch: list[Any]) -> float:
        """Seconds that a batch takes, infinite if the batch does not fit in memory."""
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
    """Whether an error means that memory is short; "could not create a primitive" is all that oneDNN says of it."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "could not create a primitive")
    return isinstance(error, MemoryError) or any(phrase in str(error) for phrase in words)


def _joined(parts: list[list[Values]]) -> list[Values]:
    if len(parts) == 1:
        return parts[0]
    return [
        np.concatenate(values) if isinstance(values[0], np.ndarray) else [row for rows in values for row in rows]
        for values in zip(*parts, strict=True)
    ]


# A window is the samples that are read, sorted by length and encoded together.
WINDOWS = {"cpu": {"image": 16, "text": 256, BY_ID: 4096}}
GPU_WINDOW = {"image": 512, "text": 4096, BY_ID: 4096}
TEXT_BATCHES = 8  # batches a window of texts, where the user sets the size of a batch
QUEUED = 8  # blocks of rows that wait for the writer at most
TICK = 1.0  # seconds between two looks of an idle writer whether a commit is due

T = TypeVar("T")


class BackgroundWriter:
    """Writes and commits rows in a thread; leaving the context, for whatever reason, commits the rest.

    `make` maps the fingerprint of a spec to its shard writer.
    """

    def __init__(self, make: Callable[[str], ShardWriter]) -> None:
        self._make = make
        self._writers: dict[str, ShardWriter] = {}
        self._open = ExitStack()
        self._queue: queue.Queue[tuple[str, Rows, Clocks] | None] = queue.Queue(QUEUED)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)

    def open(self, fingerprint: str) -> None:
        """Open the shard writer of a spec. Raises `WriteError`, before any work, where rows cannot be written."""
        if fingerprint not in self._writers:
            self._writers[fingerprint] = self._open.enter_context(self._make(fingerprint))

    def add(self, fingerprint: str, rows: Rows, clocks: Clocks) -> None:
        """Queue rows of a spec; waits only where the disk is slower than the encoders."""
        if self._error is not None:
            raise self._error
        with clocks.time("blocked"):
            self._queue.put((fingerprint, rows, clocks))

    @property
    def counts(self) -> dict[str, tuple[int, int, int]]:
        """Numbers of rows by fingerprint: committed with values, holding an error, and met in the cache by then."""
        return {name: (writer.committed, writer.failed, writer.by_others) for name, writer in self._writers.items()}

    def __enter__(self) -> BackgroundWriter:
        self._thread.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._end()
        except KeyboardInterrupt:  # a second Ctrl-C leaves at once
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
        """Write what is queued. After an error, which the main thread raises, the queue is drained and dropped."""
        clocks, ended = Clocks(), False
        while not ended:
            try:
                entry = self._queue.get(timeout=TICK)
                ended = entry is None
            except queue.Empty:
                entry = None
            if entry is not None:
                clocks = entry[2]
            try:
                with clocks.time("write"):
                    self._write(entry, ended)
            except BaseException as error:
                self._error = self._error or error

    def _write(self, entry: tuple[str, Rows, Clocks] | None, everything: bool) -> None:
        """Write one entry of the queue and commit what is due, or everything."""
        if self._error is not None:
            return
        if entry is not None:
            self._writers[entry[0]].add(entry[1])
        for writer in list(self._writers.values()):
            if everything:
                writer.commit()
            writer.commit_if_due()


@dataclass
class Stage:
    """The pipeline of one modality: one reader, encoders side by side, and `add`, which takes over their rows.

    `add` is given the fingerprint of a spec, rows of it, and the clocks. `count_cut` is told of each text that was cut:
    the cache folder of its row and the tokens that were kept.
    """

    encoders: list[Batcher]
    reader: Reader
    add: Callable[[str, Rows, Clocks], None]
    device: str
    batch_size: int = 0
    clocks: Clocks = field(default_factory=Clocks)
    count_cut: Callable[[str, int], None] = lambda folder, limit: None
    _since: float = 0.0

    def run(self, items: Sequence[Item], advance: Advance) -> Iterator[tuple[str, str, bytes]]:
        """Encode and write all items; yields (sample id, reason, key) of each that could not be read or encoded."""
        modality = items[0].modality
        size = WINDOWS.get(self.device, GPU_WINDOW)[modality]
        if self.batch_size:
            size = self.batch_size * (TEXT_BATCHES if modality == "text" else 1)
        depth = 0 if self.device == "cpu" else 1  # windows that a GPU works on while the next one is prepared
        self.clocks.workers = self.reader.workers
        running: deque[tuple[list[Prepared], list[Callable[[], Blocks]]]] = deque()
        self._since = time.perf_counter() - self.clocks.wall
        try:
            for window in batched(self._read(items, ahead=4 * size), size):
                with self.clocks.time("encode"):
                    waits = [start_block(window, index, batcher) for index, batcher in enumerate(self.encoders)]
                    running.append((window, waits))
                while len(running) > depth:
                    yield from self._finish(*running.popleft(), advance)
            while running:
                yield from self._finish(*running.popleft(), advance)
        except KeyboardInterrupt:  # windows that the device works on are worth keeping
            for started in running:
                list(self._finish(*started, advance))
            raise
        finally:
            self.clocks.wall = time.perf_counter() - self._since

    def _read(self, items: Sequence[Item], ahead: int) -> Iterator[Prepared]:
        """Read items, and add up the seconds that readers worked and encoders waited."""
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
    ) -> Iterator[tuple[str, str, bytes]]:
        """Write the rows of a window; yields its failures: unreadable files, which have no row, and rows of errors."""
        failures = {
            (entry.item.sample.id, reason, entry.item.key) for entry in window for reason in entry.errors.values()
        }
        for wait in waits:
            with self.clocks.time("encode"):
                blocks = wait()
            for spec, rows in blocks:
                self.add(spec.fingerprint, rows, self.clocks)
                failures.update(failure for failure in zip(rows.ids, rows.errors, rows.keys, strict=True) if failure[1])
        for index, batcher in enumerate(self.encoders):
            for entry in window:
                for spec in batcher.encoder.specs if (kept := tokens_kept(entry, index)) else ():
                    if spec.fingerprint in entry.item.fingerprints:
                        self.count_cut(spec.folder_name, kept)
        self.clocks.wall = time.perf_counter() - self._since
        advance(len(window), str(self.clocks))
        yield from sorted(failures)


def tokens_kept(entry: Prepared, index: int) -> int:
    """The tokens of a text that was cut for the encoder with this index in `Prepared.inputs`; 0 for any other sample.

    It is known once the sample was encoded.
    """
    return getattr(entry.inputs.get(index), "cut", 0)


Blocks = list[tuple[EncoderSpec, Rows]]


def start_block(window: list[Prepared], index: int, batcher: Batcher) -> Callable[[], Blocks]:
    """Start encoding a window, longest inputs first; the function waits for the rows of each output.

    `index` is that of the encoder in `Prepared.inputs`.
    """
    good = [entry for entry in window if index in entry.inputs]
    # A file that cannot be read has no content key, so its error cannot be stored.
    bad = [entry for entry in window if index in entry.errors and entry.key]
    if (length := batcher.encoder.length) is not None:
        good.sort(key=lambda entry: -length(entry.inputs[index]))
    specs = batcher.encoder.specs
    wait = batcher.launch([entry.inputs[index] for entry in good]) if good else list

    def finished() -> Blocks:
        blocks: Blocks = []
        for spec, values in zip(specs, wait(), strict=False):
            blocks += _lacking_rows(spec, good, *_stored(spec, good, values))
        for spec in specs:
            nothing = np.empty((len(bad), 0), dtype=spec.storage)
            lost = nothing if spec.output == "pooled" else [nothing[:0]] * len(bad)
            blocks += _lacking_rows(spec, bad, lost, [entry.errors[index] for entry in bad])
        return blocks

    return finished


def _lacking_rows(spec: EncoderSpec, entries: list[Prepared], values: Values, errors: list[str]) -> Blocks:
    """The rows of the entries that lack `spec`, none of them where no entry does."""
    lacking = [row for row, entry in enumerate(entries) if spec.fingerprint in entry.item.fingerprints]
    rows = Rows([entry.key for entry in entries], [entry.item.sample.id for entry in entries], errors, values)
    return [(spec, rows.take(lacking))] if lacking else []


def _stored(spec: EncoderSpec, entries: list[Prepared], values: Values) -> tuple[Values, list[str]]:
    """The values in the storage dtype, and the error of each sample whose values are not all finite, else "".

    In half precision the dtype may be to blame, so a value that is not finite ends the extraction.
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
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
