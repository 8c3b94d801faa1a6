"""Locks between processes: kept while their holder lives, given up when it is killed, and no file of them stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmfeat.cache.store import Cache
from mmfeat.system import locks
from mmfeat.system.locks import is_written, locked_folder, writing_in


@contextlib.contextmanager
def other_process(context: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is inside `context` of `folder` until its input ends or it is killed."""
    script = (
        f"import sys\nfrom pathlib import Path\nfrom mmfeat.system.locks import {context}\n"
        f"with {context}(Path(sys.argv[1])):\n    print('inside', flush=True)\n    sys.stdin.read()\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], **pipes) as child:  # type: ignore[call-overload]
        assert child.stdout.readline() == "inside\n"
        yield child


def seconds_to_lock(folder: Path) -> float:
    start = time.monotonic()
    with locked_folder(folder):
        return time.monotonic() - start


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path: Path, number: signal.Signals) -> None:
    with other_process("locked_folder", tmp_path) as child:
        os.kill(child.pid, number)
        child.wait()
    assert [path.name for path in tmp_path.iterdir()] == [locks.LOCK]
    assert seconds_to_lock(tmp_path) < 1
    assert not list(tmp_path.iterdir())


def test_an_extraction_sweeps_the_locks_of_killed_ones(tmp_path: Path) -> None:
    cache, folder = Cache(tmp_path, "set"), tmp_path / "set" / "encoder"
    folder.mkdir(parents=True)
    with other_process("locked_folder", folder) as child:
        cache.create()
        assert [path.name for path in folder.iterdir()] == [locks.LOCK]
        os.kill(child.pid, signal.SIGKILL)
    cache.create()
    assert not list(folder.iterdir())


def test_a_lock_is_waited_for_and_then_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "LOCK_SECONDS", 0.3)
    with other_process("locked_folder", tmp_path) as child:
        assert 0.3 <= seconds_to_lock(tmp_path) < 5
        monkeypatch.setattr(locks, "LOCK_SECONDS", 30)
        assert child.stdin is not None
        child.stdin.close()  # it ends while this process waits
        assert seconds_to_lock(tmp_path) < 20
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_until_the_last_writer_ended(tmp_path: Path) -> None:
    assert not is_written(tmp_path)
    with other_process("writing_in", tmp_path) as first, other_process("writing_in", tmp_path) as second:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        assert is_written(tmp_path)
        with writing_in(tmp_path):
            assert is_written(tmp_path)
            assert len(list(tmp_path.iterdir())) == 2  # the file of the killed writer is swept
        os.kill(second.pid, signal.SIGKILL)
        second.wait()
        assert not is_written(tmp_path)
    assert not list(tmp_path.iterdir())
