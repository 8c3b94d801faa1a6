"""Locks between processes: the system holds each on a file and gives it up when the process ends, however it ends.

Correctness must not rely on a lock, since a file system may have none, and a process that holds one may have been
stopped: locks only save work that is done twice, and a run from deletion while it is written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from mmfeat.system.files import temporary_beside

LOCK = ".lock"
LOCK_SECONDS = 30.0


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other writers out of `folder`, if that is possible; the block runs without the lock after `LOCK_SECONDS`."""
    with _held(folder / LOCK, LOCK_SECONDS):
        yield


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Mark an existing folder as one in which this process writes; other processes may write in the folder, too."""
    is_written(folder)  # deletes what killed processes left
    with _held(temporary_beside(folder / "writer").with_suffix(LOCK)):
        yield


def is_written(folder: Path) -> bool:
    """Whether a process is writing in `folder`; lock files of processes that were killed are deleted."""
    free = []
    for file in (*folder.glob(LOCK), *folder.glob(f".*{LOCK}")):
        with _held(file) as ours:
            free.append(ours)
    return not all(free)


@contextlib.contextmanager
def _held(file: Path, seconds: float = 0.0) -> Iterator[bool]:
    """Hold the lock of `file`, which is deleted at the end; yields False if another keeps the lock for `seconds`.

    On a file system without locks it yields True, since nothing there can be locked.
    """
    from filelock import FileLock, Timeout

    lock, free = FileLock(file), True
    try:
        lock.acquire(timeout=seconds, poll_interval=0.02)
    except Timeout:
        free = False
    except (OSError, NotImplementedError):
        pass
    try:
        yield free
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows deletes the file on release
                file.unlink()  # whoever waits for the lock sees that the file is gone, and makes another
            with contextlib.suppress(OSError):
                lock.release()
