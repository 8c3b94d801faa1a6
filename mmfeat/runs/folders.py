"""Run folders: list those in a folder, finished or not, and delete some of them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mmfeat.errors import RunError
from mmfeat.evaluation.protocol import has_splits
from mmfeat.runs.record import read_begun
from mmfeat.runs.run import RUN_FILE, Run, is_run_folder, read_run
from mmfeat.system.files import sync_folder, write_errors
from mmfeat.system.locks import is_written
from mmfeat.system.remote import absolute

GRAVE = ".mmfeat-deleted"  # the folder beside the runs into which a run is moved to be deleted
_BURIED = re.compile(r".+\.\d+")
UNFINISHED = "not finished; the same command goes on from there"


@dataclass(frozen=True)
class RunFolder:
    """A folder of a run: `run` if it is finished and can be read, otherwise None and the `reason`.

    `recorded` holds the values of `run.json` or `begun.json`, and is empty where neither can be read; `date` is the
    start of the training, and `bytes` the size of all files.
    """

    folder: Path
    run: Run | None
    reason: str
    recorded: dict[str, Any]
    date: datetime
    bytes: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def kind(self) -> str:
        """`heads` or `finetune`, and `?` where nothing is recorded."""
        if not self.recorded:
            return "?"
        return "finetune" if "parent" in self.recorded else "heads"


def list_runs(heads: str | Path = "heads", data: str | Path | None = None) -> list[RunFolder]:
    """List the run folders directly in `heads`, the newest first.

    With `data`, folders that record other data are left out; those without a readable record stay. Folders without a
    run are passed over. Raises `RunError` where there is no folder `heads`.
    """
    root = Path(heads)
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; name the folder of your runs with --heads, or make one: mmfeat heads")
    folders = [_described(path) for path in sorted(root.iterdir()) if is_run_folder(path)]
    if data is not None:
        folders = [folder for folder in folders if folder.recorded.get("data", absolute(data)) == absolute(data)]
    return sorted(folders, key=lambda folder: (folder.date, folder.name), reverse=True)


def delete_runs(names: Sequence[str | Path], heads: str | Path = "heads", force: bool = False) -> int:
    """Delete run folders directly in `heads`, by name or path; returns the bytes.

    Nothing is deleted unless every folder can be. Raises `RunError` for a path that is no run folder directly in
    `heads`, for a link, for a run that is being written, and, unless `force`, for the parent of another run. A folder
    is first moved into `GRAVE` in one step, so a kill leaves a whole run or none.
    """
    freed = 0
    for folder in check_deletable(names, heads, force):
        size = folder_bytes(folder)
        _delete(folder)
        freed += size
    return freed


def check_deletable(names: Sequence[str | Path], heads: str | Path = "heads", force: bool = False) -> list[Path]:
    """Return the folders that `delete_runs` would delete; raises the same errors."""
    root = Path(heads)
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; name the folder of your runs with --heads")
    _empty(root / GRAVE)  # a call that was killed may have moved the named run there
    folders = list(dict.fromkeys(_checked(name, root) for name in names))
    children = {} if force else _children(root, {folder.name for folder in folders})
    for folder in folders:
        if folder.name in children:
            raise RunError(
                f"{folder}: {children[folder.name]} was fine-tuned from it; delete that too, or name --force"
            )
        if is_written(folder):
            raise RunError(f"{folder}: being written by another process; nothing was deleted")
    return folders


def folder_bytes(folder: Path) -> int:
    size = 0
    for path, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # the file was deleted meanwhile
                size += os.lstat(os.path.join(path, file)).st_size
    return size


def _described(folder: Path) -> RunFolder:
    run, reason, recorded = None, UNFINISHED, read_begun(folder)
    if (folder / RUN_FILE).exists():
        try:
            run, reason = read_run(folder), ""
            recorded = run.to_json()
        except RunError as error:
            reason = str(error).removeprefix(f"{folder / RUN_FILE}: ").removeprefix(f"{folder}: ")
    return RunFolder(folder, run, reason, recorded, _date(folder, recorded), folder_bytes(folder))


def _date(folder: Path, recorded: dict[str, Any]) -> datetime:
    """The recorded start of the training; without a record, the time at which the folder last changed."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        started = datetime.fromisoformat(recorded["record"]["started"])
        return started if started.tzinfo else started.replace(tzinfo=timezone.utc)
    file = folder / RUN_FILE
    return datetime.fromtimestamp((file if file.exists() else folder).stat().st_mtime, timezone.utc)


def _checked(name: str | Path, root: Path) -> Path:
    """Return the run folder that `name` means, a name in `root` or a path; raises `RunError` unless it can go."""
    path = str(name).rstrip(f"/{os.sep}")
    folder = Path(path) if os.path.dirname(path) else root / path
    if folder.is_symlink():
        raise RunError(f"{folder}: a link; nothing behind it is deleted, remove the link itself by hand")
    if not folder.is_dir():
        raise RunError(f"{folder}: no such run; mmfeat runs ls lists those in {root}")
    inside = folder.resolve().parent == root.resolve() and folder.name not in ("", ".", "..")
    if not inside or not is_run_folder(folder) or not _is_ours(folder):
        raise RunError(f"{folder}: not a run folder directly in {root}; nothing was deleted (--heads names the folder)")
    return root / folder.resolve().name


def _is_ours(folder: Path) -> bool:
    """Whether a run folder holds more than a `run.json` or `begun.json` that another program may have written."""
    return has_splits(folder) or "data_hash" in read_begun(folder) or _described(folder).run is not None


def _children(root: Path, names: set[str]) -> dict[str, str]:
    """Name of a parent run -> name of a run that was fine-tuned from it, without the runs in `names`."""
    others = [_described(path) for path in root.iterdir() if path.name not in names and is_run_folder(path)]
    return {str(run.recorded["parent"]): run.name for run in others if run.recorded.get("parent")}


def _delete(folder: Path) -> None:
    grave = folder.parent / GRAVE
    with write_errors(folder):
        if is_written(folder):
            raise RunError(f"{folder}: being written by another process; it was not deleted")
        if grave.is_symlink():
            raise RunError(f"{grave}: a link where deleted runs are put; remove it by hand")
        grave.mkdir(exist_ok=True)
        buried = grave / f"{folder.name}.{os.getpid()}"
        folder.rename(buried)
        sync_folder(folder.parent)
        with contextlib.suppress(FileNotFoundError):  # another process empties the grave
            shutil.rmtree(buried)
        _empty(grave)


def _empty(grave: Path) -> None:
    """Delete the runs that were moved here, and the folder."""
    with contextlib.suppress(OSError):  # there is none, or another process is still deleting there
        for path in [] if grave.is_symlink() else list(grave.iterdir()):
            if _BURIED.fullmatch(path.name) and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        grave.rmdir()
