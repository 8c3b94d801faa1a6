"""Locks of folders that say "somebody writes here": any number of writers may hold one, and nobody deletes meanwhile.

The lock is the kernel's, on the folder itself, and ends with its process. Where a file system has no locks it is
always free: nothing but the wish to not delete what is being written may depend on it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Say that this process writes in `folder`, which exists; others may say so too."""
    with _locked(folder, exclusive=False):
        yield


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Keep writers from beginning in `folder`; yields False where one is at work there."""
    with _locked(folder, exclusive=True) as alone:
        yield alone


@contextlib.contextmanager
def _locked(folder: Path, exclusive: bool) -> Iterator[bool]:
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            free = True
        yield free
    finally:
        os.close(handle)
