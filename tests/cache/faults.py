"""Faults against the cache's writer: each kind is a function that counts how many of its points survived.

A point survives if every acknowledged row is readable and bit-exact, a rerun completes the set, files that were
committed keep inode and content, each row is stored once, and no temporary file is left. Each kind takes an empty
folder to work in.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import filelock  # noqa: F401  here, not in every fork
import h5py  # noqa: F401
import numpy as np
import xxhash  # noqa: F401

from mmfeat.cache.shard import Rows
from mmfeat.cache.store import Cache
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.samples.dataset import Sample, content_key
from mmfeat.system.locks import LOCK
from tests.cache.power import Disk
from tests.cache.syscalls import Call, Fault, Outcome, trace

SPEC = EncoderSpec("hashing", "text", "", "builtin:1", "float32", "float32", cleaning="tweet")
COUNT, BROKEN = 16, 15
ALL = frozenset(range(COUNT))
TEXTS = [f"text {number}" for number in range(COUNT)]
NUMBERS = {content_key(text.encode()): number for number, text in enumerate(TEXTS)}
VECTORS = np.random.default_rng(1).standard_normal((COUNT, 16)).astype(np.float32)
VECTORS[BROKEN] = np.nan
BATCHES = (range(5), range(5, 10), range(10, COUNT))
CPUS = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
WORKERS, LIMIT = 8, 300  # processes, seconds

Acknowledge: TypeAlias = Callable[[bytes], object]
Batches: TypeAlias = Iterable[Iterable[int]]
Point: TypeAlias = "tuple[str, Callable[[Path], None]]"  # its name, and what is done with a new root


@dataclass(frozen=True)
class Tally:
    """How many points were tried, and what went wrong at which."""

    tried: int
    failures: list[str]

    @property
    def survived(self) -> int:
        return self.tried - len(self.failures)


def kills(folder: Path, every: int = 1) -> Tally:
    """SIGKILL just before each system call of any kind, which is also just after each, or before one of `every`."""
    calls = trace(partial(work, folder / "reference")).calls
    return _tally(
        folder,
        [
            (f"before call {at}, {calls[at]}", partial(_kill, Fault(at, "kill before"), every_call=True))
            for at in _edges(calls)[::every]
        ],
    )


def kills_within(folder: Path) -> Tally:
    """SIGKILL while the kernel is at the end of a call that changed something."""
    changes = _changes(_reference(folder))
    return _tally(folder, [(f"in call {at}, {call}", partial(_kill, Fault(at, "kill after"))) for at, call in changes])


def kills_of_a_rerun(folder: Path) -> Tally:
    """SIGKILL around each call that changes something, in a run that takes up after a first kill."""
    first_shard = next(at for at, call in enumerate(_reference(folder)) if call.name == "link")
    first = Fault(first_shard, "kill after")  # it leaves a temporary file that is a second name of a shard
    root = folder / "undisturbed" / "cache"
    root.parent.mkdir()
    _run(root, first)
    points: list[Point] = []
    for at, call in _changes(_run(root).calls):
        for action in ("kill before", "kill after"):
            points.append((f"{action} call {at}, {call}", partial(_kill, Fault(at, action), first=first)))
    return _tally(folder, points)


def refusals(folder: Path, number: int, *, lasting: bool) -> Tally:
    """Error `number` from each call that may need space; if `lasting`, from all such calls after it too."""
    later = (lambda call: call.takes_space) if lasting else None
    changes = [(at, call) for at, call in _changes(_reference(folder)) if call.takes_space]
    return _tally(
        folder,
        [(f"call {at}, {call}", partial(_refuse, Fault(at, "fail", number, later))) for at, call in changes],
    )


def poor_file_systems(folder: Path) -> Tally:
    """No locks, or no hard links, from some call on: the work is done all the same."""
    lacks = {"flock": errno.ENOLCK, "link": errno.EPERM}
    points: list[Point] = []
    for at, call in enumerate(_reference(folder)):
        if number := lacks.get(call.name):
            lacking = Fault(at, "fail", number, partial(_is_named, call.name))
            points.append((f"from call {at} on, no {call.name}", partial(_refuse, lacking, patient=True)))
    return _tally(folder, points)


def short_writes(folder: Path) -> Tally:
    """Each write does half of its work; this write only, and this and all later writes."""
    calls = _reference(folder)
    whole = _contents(folder / "reference" / "cache")
    points: list[Point] = []
    for at, call in _changes(calls):
        for later in (None, lambda call: call.writes) if call.writes else ():
            name = f"call {at}{' and later' if later else ''}, {call}"
            points.append((name, partial(_shorten, Fault(at, "short", lasting=later), whole)))
    return _tally(folder, points)


def power_losses(folder: Path, mode: str, seeds: Sequence[int] = (0,)) -> Tally:
    """Power lost after each call that changes something; `seeds` only matter in the mode `random`."""
    calls, points = _reference(folder), []
    for at, call in _changes(calls):
        kept = [done.data for done in calls[: at + 1] if done.name == "acknowledge"]
        for seed in seeds:
            lose = partial(_lose_power, folder / "reference", calls[: at + 1], kept, mode, seed)
            points.append((f"after call {at}, {call}, seed {seed}", lose))
    return _tally(folder, points)


def power_losses_after_a_rerun(folder: Path, mode: str) -> Tally:
    """A kill, a rerun that ends well, then the power: what the rerun only found there must be as safe as its own."""
    changes = _changes(_reference(folder))
    return _tally(
        folder,
        [
            (f"first run killed in call {at}, {call}", partial(_lose_power_later, Fault(at, "kill after"), mode))
            for at, call in changes
        ],
    )


def races(folder: Path, seeds: Iterable[int], processes: int = 4, killed: int = 2) -> Tally:
    """Processes write the same rows at once, in shards that overlap; some are killed at calls drawn by chance."""
    length = len(_reference(folder))
    return _tally(folder, [(f"seed {seed}", partial(_race, length, seed, processes, killed)) for seed in seeds])


def work(root: Path, acknowledge: Acknowledge, batches: Batches = BATCHES) -> None:
    """Compute what is missing, committing and acknowledging after each batch."""
    cache = Cache(root, "set")
    missing = ALL - stored(cache)
    with cache.writer(SPEC, {}) as writer:
        for batch in batches:
            if numbers := [number for number in batch if number in missing]:
                writer.add(rows(numbers))
                writer.commit()
                acknowledge(json.dumps(numbers).encode())


def rows(numbers: list[int]) -> Rows:
    """What an encoder gives for these numbers: vectors, one of them broken."""
    return Rows(
        [content_key(TEXTS[number].encode()) for number in numbers],
        [f"s{number}" for number in numbers],
        ["not decodable" if number == BROKEN else "" for number in numbers],
        VECTORS[numbers],
    )


def check(root: Path, acknowledged: list[bytes]) -> None:
    """The promise: nothing acknowledged is lost, a rerun adds the rest, and what was there stays as it was."""
    cache = Cache(root, "set")
    found, before = stored(cache), committed(root)
    lost = _numbers(acknowledged) - found
    assert not lost, f"lost {sorted(lost)}"
    compare(cache, found)
    work(root, lambda item: None)
    compare(cache, ALL)
    after = committed(root)
    touched = [name for name in before if after.get(name) != before[name]]
    assert not touched, f"committed files changed: {touched}"
    # Keys lie plainly in the files, so they can be counted without asking the code under test.
    copies = {number: sum(data.count(key) for _, data in after.values()) for key, number in NUMBERS.items()}
    wrong = {number: count for number, count in copies.items() if count != 1 and number != BROKEN}
    assert not wrong, f"rows that are not stored exactly once: {wrong}"
    temporary = [path.name for path in root.rglob("*.tmp")]
    assert not temporary, f"left over: {temporary}"


def stored(cache: Cache) -> set[int]:
    """Numbers of the rows in the cache; only the broken one may be marked as failed."""
    keys, failed = cache.row_index(SPEC).unique()
    numbers = [NUMBERS[key] for key in keys.tolist()]
    assert [number == BROKEN for number in numbers] == failed.tolist(), "errors at the wrong rows"
    return set(numbers)


def compare(cache: Cache, numbers: Iterable[int]) -> None:
    """Each of these rows is loaded bit by bit as it was given."""
    order = sorted(numbers)
    (block,) = cache.load([Sample(f"s{number}", TEXTS[number]) for number in order], [SPEC]).blocks
    good = [number for number in order if number != BROKEN]
    assert block.mask.tolist() == [number != BROKEN for number in order], "errors at the wrong rows"
    assert block.vectors[block.mask].tobytes() == VECTORS[good].tobytes(), "vectors that were never written"


def committed(root: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and content of every file that is not a temporary one."""
    paths = [path for path in root.rglob("*") if path.is_file() and not path.name.endswith((".tmp", LOCK))]
    return {str(path.relative_to(root)): (path.stat().st_ino, path.read_bytes()) for path in paths}


def _tally(folder: Path, points: Sequence[Point]) -> Tally:
    """Try all points, each with a root of its own, on all CPUs; a tracer and its child take turns on one."""
    cpus = sorted(CPUS)[:WORKERS]
    workers = [_start(folder, list(enumerate(points))[place :: len(cpus)], cpu) for place, cpu in enumerate(cpus)]
    failures = []
    for pid, handle in workers:
        with open(handle, encoding="utf-8") as report:
            failures += json.loads(report.read() or '["a worker died"]')
        os.waitpid(pid, 0)
    return Tally(len(points), failures)


def _start(folder: Path, points: list[tuple[int, Point]], cpu: int) -> tuple[int, int]:
    """A process that tries these points and reports what failed; its id and where it reports."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    try:
        signal.alarm(LIMIT)  # a worker that hangs dies, and its child with it
        os.sched_setaffinity(0, {cpu})
        failures = [failure for number, point in points if (failure := _try(folder / f"{number}", *point))]
        with open(writer, "w", encoding="utf-8") as report:
            json.dump(failures, report)
    finally:
        os._exit(0)


def _try(folder: Path, name: str, attempt: Callable[[Path], None]) -> str:
    folder.mkdir()
    try:
        attempt(folder / "cache")
    except Exception as error:
        return f"{name}: {type(error).__name__}: {error}"
    finally:
        shutil.rmtree(folder)
    return ""


def _kill(fault: Fault, root: Path, *, first: Fault | None = None, every_call: bool = False) -> None:
    before = _run(root, first).acknowledged if first else []
    outcome = _run(root, fault, every_call=every_call)
    if outcome.hit or not every_call:  # memory, of all things, is not always asked for as often
        assert outcome.status == -signal.SIGKILL, f"status {outcome.status} {outcome.error}"
    check(root, before + outcome.acknowledged)


def _refuse(fault: Fault, root: Path, *, patient: bool = False) -> None:
    """One clear error, unless there is another way to all rows, which a `patient` writer has to find."""
    outcome = _run(root, fault)
    assert outcome.hit, "no such call"
    if outcome.status:
        assert outcome.status == 1, f"status {outcome.status}"
        assert outcome.error.startswith("WriteError: "), outcome.error
        assert str(root) in outcome.error, outcome.error
    assert not (outcome.status and patient), outcome.error
    assert outcome.status or _numbers(outcome.acknowledged) == ALL, "no error, but not all was done"
    check(root, outcome.acknowledged)


def _is_named(name: str, call: Call) -> bool:
    return call.name == name


def _shorten(fault: Fault, whole: dict[str, bytes], root: Path) -> None:
    outcome = _run(root, fault)
    assert outcome.hit, "no such call"
    assert outcome.status == 0, f"status {outcome.status} {outcome.error}"
    assert _contents(root) == whole, "the files differ from those of whole writes"
    check(root, outcome.acknowledged)


def _lose_power(disk: Path, calls: list[Call], acknowledged: list[bytes], mode: str, seed: int, root: Path) -> None:
    """What is left of the root `cache` on `disk` when the power goes after these calls."""
    model = Disk(disk)
    for call in calls:
        model.apply(call)
    left = root.parent / "left"
    model.lose_power(left, mode, seed)
    check(left / "cache", acknowledged)


def _lose_power_later(fault: Fault, mode: str, root: Path) -> None:
    disk = root.parent / "disk"
    disk.mkdir()
    calls = [call for outcome in (_run(disk / "cache", fault), _run(disk / "cache")) for call in outcome.calls]
    _lose_power(disk, calls, [json.dumps(sorted(ALL)).encode()], mode, 0, root)


def _race(length: int, seed: int, processes: int, killed: int, root: Path) -> None:
    os.sched_setaffinity(0, CPUS)  # at once, not in turns
    chance = random.Random(seed)
    actions = [chance.choice(["kill before", "kill after"]) if number < killed else "" for number in range(processes)]
    faults = [Fault(chance.randrange(length), action) if action else None for action in actions]
    batches = [_cut(chance) for _ in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        outcomes = list(pool.map(partial(_run, root), faults, batches))
    for outcome in outcomes:
        expected = -signal.SIGKILL if outcome.hit else 0
        assert outcome.status == expected, f"status {outcome.status} {outcome.error}"
    check(root, [item for outcome in outcomes for item in outcome.acknowledged])


def _run(root: Path, fault: Fault | None = None, batches: Batches = BATCHES, *, every_call: bool = False) -> Outcome:
    """The work in a process of its own; counted are its calls below the folder that holds `root`, or all."""
    below = None if every_call else root.parent
    return trace(lambda acknowledge: work(root, acknowledge, batches), below, fault)


def _reference(folder: Path) -> list[Call]:
    """The calls of an undisturbed run in `folder/reference/cache`."""
    base = folder / "reference"
    base.mkdir()
    outcome = _run(base / "cache")
    assert outcome.status == 0, outcome.error
    return outcome.calls


def _edges(calls: list[Call]) -> list[int]:
    """Numbers of the calls; of equal calls on one file in a row, which differ in nothing, the first and the last."""
    names = ["", *(str(call) if call.paths else f"{at}" for at, call in enumerate(calls)), ""]
    return [at for at in range(len(calls)) if not names[at] == names[at + 1] == names[at + 2]]


def _changes(calls: list[Call]) -> list[tuple[int, Call]]:
    """Calls that change something, with their numbers."""
    return [(at, calls[at]) for at in _edges(calls) if calls[at].changes]


def _contents(root: Path) -> dict[str, bytes]:
    return {name: data for name, (_, data) in committed(root).items()}


def _numbers(acknowledged: list[bytes]) -> set[int]:
    return {number for item in acknowledged for number in json.loads(item)}


def _cut(chance: random.Random) -> list[list[int]]:
    """All numbers in an order drawn by chance, cut into pieces of two to five."""
    order, pieces = chance.sample(range(COUNT), COUNT), []
    while order:
        size = chance.randint(2, 5)
        pieces.append(order[:size])
        order = order[size:]
    return pieces
