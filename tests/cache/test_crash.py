"""What the cache promises when a process is killed, a disk refuses, or the power goes.

The faults are real: they are put between the process and the kernel, at each system call in turn.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from posix import fsync  # `os.fsync` does nothing in tests

import pytest

from tests.cache import faults, power, syscalls
from tests.cache.faults import Tally
from tests.cache.power import Disk
from tests.cache.syscalls import Fault, trace

pytestmark = [
    pytest.mark.skipif(bool(syscalls.unavailable()), reason=syscalls.unavailable() or "can be traced"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]


def test_the_tracer_sees_calls_and_puts_faults_in_their_way(tmp_path: Path) -> None:
    def work(acknowledge: Callable[[bytes], object]) -> None:
        (tmp_path / "made").mkdir(exist_ok=True)
        handle = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
        acknowledge(str(os.writev(handle, [b"012345", b"6789"])).encode())

    def names(fault: Fault | None = None) -> tuple[list[str], syscalls.Outcome]:
        outcome = trace(work, tmp_path, fault)
        left = sorted(path.name for path in tmp_path.iterdir())
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        return left, outcome

    left, whole = names()
    assert [call.name for call in whole.calls] == ["mkdir", "open", "writev", "acknowledge"]
    assert (left, whole.status, whole.acknowledged) == (["file", "made"], 0, [b"10"])
    assert (whole.calls[2].data, whole.calls[2].offset) == (b"0123456789", 0)
    os.remove(tmp_path / "file")
    assert names(Fault(0, "kill before"))[0] == []
    assert names(Fault(0, "kill after"))[0] == ["made"]
    left, failed = names(Fault(0, "fail", errno.ENOSPC))
    assert (left, failed.status) == ([], 1)
    assert failed.error.startswith("OSError: [Errno 28] No space left on device")
    assert names(Fault(2, "short"))[1].acknowledged == [b"6"]
    assert (tmp_path / "file").read_bytes() == b"012345"


def test_the_tracer_follows_threads_and_ends_what_hangs(tmp_path: Path) -> None:
    def work(acknowledge: Callable[[bytes], object]) -> None:
        thread = threading.Thread(target=(tmp_path / "made").mkdir)
        thread.start()
        thread.join()
        time.sleep(60)

    outcome = trace(work, tmp_path, limit=0.5)
    assert [call.name for call in outcome.calls] == ["mkdir"]
    assert outcome.status == -signal.SIGALRM


PARTS = {b"", b"n", b"ne", b"new", b"\0", b"\0\0", b"\0\0\0"}


@pytest.mark.parametrize(
    ("sync_file", "sync_folder", "possible"),
    [(False, False, {None, *PARTS}), (True, False, {None, b"new"}), (False, True, PARTS), (True, True, {b"new"})],
)
def test_the_disk_forgets_what_was_not_synced(
    tmp_path: Path, sync_file: bool, sync_folder: bool, possible: set[bytes | None]
) -> None:
    def work(acknowledge: Callable[[bytes], object]) -> None:
        handle = os.open(tmp_path / "disk" / "temporary", os.O_CREAT | os.O_WRONLY)
        os.write(handle, b"new")
        if sync_file:
            fsync(handle)
        os.rename(tmp_path / "disk" / "temporary", tmp_path / "disk" / "file")
        if sync_folder:
            fsync(os.open(tmp_path / "disk", os.O_RDONLY))

    (tmp_path / "disk").mkdir()
    disk, found = Disk(tmp_path / "disk"), set()
    for call in trace(work, tmp_path / "disk").calls:
        disk.apply(call)
    for mode, seed in [*((mode, 0) for mode in power.MODES), *(("random", seed) for seed in range(1, 100))]:
        left = tmp_path / f"{mode}-{seed}"
        disk.lose_power(left, mode, seed)
        found.add((left / "file").read_bytes() if (left / "file").exists() else None)
    assert found == possible


@pytest.fixture(scope="module")
def small() -> Iterator[Executor]:
    """A process with little in its memory: each fault forks it, and some tests before have imported torch."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        yield process


def expect(tally: Tally, points: int) -> None:
    """All points survived, and there were enough of them."""
    if tally.failures or tally.tried < points:
        pytest.fail("\n".join([f"survived {tally.survived} / {tally.tried}", *tally.failures]), pytrace=False)


@pytest.mark.parametrize(
    ("kind", "points"),
    [(partial(faults.kills, every=3), 33), (faults.kills_within, 30), (faults.kills_of_a_rerun, 30)],
    ids=["any call", "within a call", "the rerun"],
)
def test_a_kill_loses_nothing(small: Executor, tmp_path: Path, kind: Callable[[Path], Tally], points: int) -> None:
    expect(small.submit(kind, tmp_path).result(), points)


@pytest.mark.parametrize(("number", "lasting"), [(errno.ENOSPC, False), (errno.EDQUOT, True), (errno.EIO, True)])
def test_a_disk_that_refuses_is_one_clear_error(small: Executor, tmp_path: Path, number: int, lasting: bool) -> None:
    expect(small.submit(faults.refusals, tmp_path, number, lasting=lasting).result(), 20)


def test_locks_and_links_are_not_needed(small: Executor, tmp_path: Path) -> None:
    expect(small.submit(faults.poor_file_systems, tmp_path).result(), 4)


def test_short_writes_change_nothing(small: Executor, tmp_path: Path) -> None:
    expect(small.submit(faults.short_writes, tmp_path).result(), 4)


@pytest.mark.parametrize("mode", power.MODES)
def test_a_power_loss_at_any_call_loses_nothing(small: Executor, tmp_path: Path, mode: str) -> None:
    expect(small.submit(faults.power_losses, tmp_path, mode, range(2) if mode == "random" else [0]).result(), 30)


def test_a_power_loss_after_a_rerun_loses_nothing(small: Executor, tmp_path: Path) -> None:
    expect(small.submit(faults.power_losses_after_a_rerun, tmp_path, "nothing").result(), 30)


def test_processes_that_race_store_each_row_once(small: Executor, tmp_path: Path) -> None:
    expect(small.submit(faults.races, tmp_path, range(6)).result(), 6)
