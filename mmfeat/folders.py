"""Folders that are written whole: filled beside their place, and put there in one step."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from mmfeat.files import make_folder, stale_temporaries, sync_folder, temporary_beside, write_errors


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill. It takes the place of `folder`, which is then deleted; what fails before leaves that as it was.

    Of what a killed process left, an earlier folder that it had moved aside is put back, the rest is deleted. Raises
    `WriteError` where the disk does not let it.
    """
    with write_errors(folder):
        make_folder(folder.parent)
        _recover(folder)
        place = temporary_beside(folder)
        place.mkdir()
        try:
            yield place
            _put(place, folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _put(place: Path, folder: Path) -> None:
    """Rename the finished folder into place; an earlier one makes room and is then deleted."""
    old = _old(folder)
    if folder.exists():
        folder.rename(old)
    try:
        place.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    """Where an earlier folder is put while the new one takes its place."""
    return folder.parent / f".{folder.name}.old"


def _recover(folder: Path) -> None:
    """As if nobody had been killed: the earlier folder is there until the new one is."""
    old = _old(folder)
    if old.is_dir() and not old.is_symlink():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    for stale in stale_temporaries(folder.parent):
        if stale.name.startswith(f".{folder.name}.") and stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)
