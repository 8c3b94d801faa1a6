"""The reader: reads and decodes each content once and prepares it for every encoder, ahead of the encoders.

Many photos are prepared in processes, which need Pillow (or scikit-image) and no torch. Few photos, texts, and photos
whose transform needs torch are prepared in threads.
"""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from mmfeat.encoders.spec import Encoder
from mmfeat.errors import DataError
from mmfeat.extraction.missing import Item
from mmfeat.samples.contents import augment
from mmfeat.samples.dataset import content_key
from mmfeat.samples.photos import Decoding, decode_image
from mmfeat.system.hardware import cpu_count

CHUNK = 16  # items that a worker prepares at a time
PROCESSES_FROM = 2000  # photos; fewer are read before processes have started
RESTARTS = 3  # pools of reading processes that may be killed before the extraction ends with an error

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Recipe:
    """The part of an encoder that a reader needs: how to prepare an item, and which specs the encoder serves."""

    fingerprints: frozenset[str]
    view: str
    decoding: Decoding
    prepare: Callable[[Any], Any]


@dataclass(frozen=True)
class Prepared:
    """An item after reading: `inputs` and `errors` map the index of an encoder to its model input or an error text.

    `key` is empty where the content could not be read. `read` and `decode` are seconds; `decode` includes preparation,
    and `preparing` maps the index of an encoder to the seconds of its part.
    """

    item: Item
    key: bytes
    inputs: Mapping[int, Any]
    errors: Mapping[int, str]
    read: float = 0.0
    decode: float = 0.0
    preparing: Mapping[int, float] = field(default_factory=dict)


class Reader:
    """Prepares items of one modality for some encoders, in order, in `workers` threads or processes, 0: one a core."""

    def __init__(self, encoders: Sequence[Encoder], workers: int = 0) -> None:
        self._recipes = [recipe_of(encoder) for encoder in encoders]
        self._light = all(encoder.light for encoder in encoders)
        text = any(encoder.modality != "image" for encoder in encoders)
        # A tokenizer is not safe to share between threads; texts are cheap to prepare in one.
        self.workers = 1 if text else workers or cpu_count()

    def read(self, items: Sequence[Item], ahead: int) -> Iterator[Prepared]:
        """Yield all items in order, never more than about `ahead` of them in memory."""
        chunks = (items[start : start + CHUNK] for start in range(0, len(items), CHUNK))
        work = partial(prepare_chunk, self._recipes)
        many = self._light and len(items) >= PROCESSES_FROM
        pool = partial(_processes if many else ThreadPoolExecutor, self.workers)
        with warnings.catch_warnings():
            _ignore_odd_files()  # all threads share the filters
            for chunk in _in_order(work, chunks, pool, max(self.workers, -(-ahead // CHUNK))):
                yield from chunk


def recipe_of(encoder: Encoder) -> Recipe:
    """The recipe of an encoder, which a process can be sent."""
    return Recipe(encoder.fingerprints, encoder.view, encoder.specs[0].decoding, encoder.prepare)


def prepare_chunk(recipes: Sequence[Recipe], items: Sequence[Item]) -> list[Prepared]:
    """Prepare several items in one call, which saves messages between processes."""
    return [prepare(item, recipes) for item in items]


def prepare(item: Item, recipes: Sequence[Recipe]) -> Prepared:
    """Read and decode an item once, then make a model input of it for every encoder that lacks it.

    The key is taken again from the bytes that are decoded, so a file that changes between planning and reading is
    stored under its new content.
    """
    lacking = {index: recipe for index, recipe in enumerate(recipes) if item.fingerprints & recipe.fingerprints}
    start = time.perf_counter()
    key, data, error = _read(item)
    read = time.perf_counter()
    if error:
        return Prepared(item, key, {}, dict.fromkeys(lacking, error), read - start)
    inputs, errors, preparing = {}, {}, {}
    decode = functools.cache(partial(_decoded, item.modality, data))  # runs once a way of decoding
    show = functools.cache(lambda decoding, view: augment(decode(decoding)[0], view, key))  # runs once a view
    for index, recipe in lacking.items():
        content, error = decode(recipe.decoding)
        decoded = time.perf_counter()
        try:
            if not error:
                shown = content if recipe.view == "none" else show(recipe.decoding, recipe.view)
                inputs[index] = recipe.prepare(shown)
        except (ValueError, TypeError, OSError, ZeroDivisionError) as problem:
            error = f"cannot be prepared: {problem}"[:200]
        preparing[index] = time.perf_counter() - decoded
        if error:
            errors[index] = error
    return Prepared(item, key, inputs, errors, read - start, time.perf_counter() - read, preparing)


def _read(item: Item) -> tuple[bytes, Any, str]:
    """(content key, text or bytes of the file, ""), or (b"", None, error)."""
    if item.modality != "image":
        return item.key, getattr(item.sample, item.modality), ""
    assert item.sample.image is not None  # samples without an image have no items
    try:
        data = item.sample.image.read_bytes()
    except OSError as problem:
        return b"", None, f"unreadable: {problem.strerror}"
    return content_key(data), data, ""


def _decoded(modality: str, data: Any, decoding: Decoding) -> tuple[Any, str]:
    """(text or RGB picture, ""), or (None, error)."""
    return (data, "") if modality != "image" else decode_image(data, decoding)


def prefetch(function: Callable[[T], R], items: Iterable[T], threads: int, ahead: int) -> Iterator[R]:
    """`map` in threads: results in order, never more than `ahead` of them in memory."""
    return _in_order(function, items, partial(ThreadPoolExecutor, threads), ahead)


def _in_order(
    function: Callable[[T], R], items: Iterable[T], make_pool: Callable[[], Executor], ahead: int
) -> Iterator[R]:
    """`map` in a pool; a pool that broke because a process of it was killed is replaced, and its work repeated."""
    pool, restarts, source = make_pool(), 0, iter(items)
    waiting: deque[T] = deque()
    futures: deque[Future[R]] = deque()  # the futures of `waiting`, in the same order
    try:
        while True:
            waiting.extend(islice(source, ahead - len(waiting)))
            if not waiting:
                return
            try:
                futures.extend(pool.submit(function, item) for item in list(waiting)[len(futures) :])
                result = futures[0].result()
            except BrokenExecutor as error:
                restarts += 1
                if restarts > RESTARTS:
                    raise DataError(
                        f"reading processes were killed {restarts} times; is memory short? use --workers 1"
                    ) from error
                pool.shutdown(wait=False)
                pool = make_pool()
                futures.clear()
                continue
            waiting.popleft()
            futures.popleft()
            yield result
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _processes(count: int) -> Executor:
    """A pool of clean interpreters: nothing of this process is copied, so scripts need no main guard."""
    import loky

    class Pool(loky.ProcessPoolExecutor):
        """loky's executor with the `shutdown` of `concurrent.futures`, which notices every process that is killed."""

        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            super().shutdown(wait=wait, kill_workers=cancel_futures)

        def _start_executor_manager_thread(self) -> None:
            if self._executor_manager_thread is None:
                super()._start_executor_manager_thread()
                watched = (self._executor_manager_thread, self._processes, self._result_queue)
                threading.Thread(target=_end_broken, args=watched, daemon=True).start()

    return Pool(count, initializer=_follow, initargs=(os.getpid(),))


def _end_broken(manager: threading.Thread, processes: dict[int, Any], results: Any) -> None:
    """End all processes of a pool that one is gone from, and their queue of results, where loky's `manager` does not.

    A process that is killed while it sends a result keeps the queue's lock, and loky waits for the rest for ever.
    """
    from loky.backend.utils import kill_process_tree

    gone = set[int]()
    while manager.is_alive():
        if gone & processes.keys():  # loky takes less than a second where it notices
            for number in list(processes):
                if process := processes.pop(number, None):
                    kill_process_tree(process)
            with open(os.devnull, "rb") as nothing:  # loky itself closes the last end that writes
                os.dup2(nothing.fileno(), results._writer.fileno())
        gone = {number for number, process in list(processes.items()) if wait([process.sentinel], 0)}
        manager.join(timeout=1)


def _ignore_odd_files() -> None:
    """Silence Pillow's warnings about odd EXIF blocks and palettes, which decode all the same."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _follow(parent: int) -> None:
    """Make a reading process ignore Ctrl-C, which its parent handles, and end with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _ignore_odd_files()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
