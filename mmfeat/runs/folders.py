"""Run folders: which there are, which of them a name means, and how to delete some."""

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
from mmfeat.evaluation.splits import has_splits
from mmfeat.runs.record import BEGUN, read_begun
from mmfeat.runs.run import RUN_FILE, Run, best_run, read_run
from mmfeat.system.files import alone_in, sync_folder, write_errors
from mmfeat.system.remote import absolute

GRAVE = ".mmfeat-deleted"  # in the folder of the runs; what lies there was a run
_BURIED = re.compile(r".+\.\d+")
UNFINISHED = "not finished; the same command goes on from there"


@dataclass(frozen=True)
class RunFolder:
    """A folder of a run: the finished `run`, or None and the `reason`. `asked` is what run.json or begun.json says.

    `date` is when it was begun, `bytes` what its files take.
    """

    folder: Path
    run: Run | None
    reason: str
    asked: dict[str, Any]
    date: datetime
    bytes: int

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def kind(self) -> str:
        """heads, finetune, or ? where nothing tells."""
        if not self.asked:
            return "?"
        return "finetune" if "parent" in self.asked else "heads"


def list_runs(heads: str | Path = "heads", data: str | Path | None = None) -> list[RunFolder]:
    """All run folders directly in `heads`, the newest first; of one data set if named, with those that cannot tell.

    Folders that hold no run at all are passed over. Raises `RunError` where there is no such folder.
    """
    root = Path(heads)
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; name the folder of your runs with --heads, or make one: mmfeat heads")
    places = [path for path in sorted(root.iterdir()) if is_run_folder(path)]
    found = [_described(path) for path in places]
    if data is not None:
        found = [each for each in found if each.asked.get("data", absolute(data)) == absolute(data)]
    return sorted(found, key=lambda each: (each.date, each.name), reverse=True)


def is_run_folder(path: Path) -> bool:
    """Whether this is a real folder that mmfeat made for a run, finished or not."""
    if path.is_symlink() or not path.is_dir() or path.name.startswith("."):
        return False
    with contextlib.suppress(OSError):
        return (path / RUN_FILE).is_file() or (path / BEGUN).is_file() or _is_half(path)
    return False


def _is_half(path: Path) -> bool:
    """Whether a run without a note was begun here; splits alone may be somebody's own."""
    return has_splits(path) and next(path.glob("*/trials"), None) is not None


def find_run(name: str | Path, heads: str | Path = "heads") -> Run:
    """The run that a path, a name in `heads`, or the beginning or end of just one name there means."""
    if (Path(name) / RUN_FILE).exists() or os.sep in str(name):
        return read_run(Path(name))
    root, asked = Path(heads), str(name)
    if (root / asked).is_dir():
        return read_run(root / asked)
    names = [each.name for each in root.iterdir() if is_run_folder(each)] if root.is_dir() else []
    alike = [each for each in names if asked and (each.startswith(asked) or each.endswith(asked))]
    if len(alike) != 1:
        several = f"{len(alike)} runs are called like that: {', '.join(sorted(alike)[:5])}" if alike else "no such run"
        raise RunError(f"{asked}: {several} in {root}; mmfeat runs ls lists them")
    return read_run(root / alike[0])


def choose_run(
    run: str | Path | None,
    heads: str | Path,
    data: str | Path | None = None,
    head: str | None = None,
    modalities: str | None = None,
) -> Run:
    """The run that is named, as `find_run` takes names; else the best one on `data`, if there is one; else the best of
    those like the latest, as `best_run` has it."""
    if run:
        return find_run(run, heads)
    if data:
        with contextlib.suppress(RunError):
            return best_run(Path(heads), str(data), head, modalities)
    return best_run(Path(heads), None, head, modalities)


def delete_runs(names: Sequence[str | Path], heads: str | Path = "heads", force: bool = False) -> int:
    """Delete run folders directly in `heads`, by name or path; returns the bytes.

    Nothing is deleted unless all can be. Raises `RunError` for what is no run folder or not directly there, for a link,
    for a run that another one names as its parent (unless `force`), and for one that is being written. A folder is
    first moved out of sight in one step, so a kill leaves a whole run or none.
    """
    places = check_deletable(names, heads, force)
    freed = 0
    for place in places:
        size = folder_bytes(place)
        _delete(place)
        freed += size
    return freed


def check_deletable(names: Sequence[str | Path], heads: str | Path = "heads", force: bool = False) -> list[Path]:
    """The folders that these names mean; raises what `delete_runs` raises."""
    root = Path(heads)
    if not root.is_dir():
        raise RunError(f"{root}: no such folder; name the folder of your runs with --heads")
    places = list(dict.fromkeys(_checked(name, root) for name in names))
    children = {} if force else _children(root, {place.name for place in places})
    for place in places:
        if place.name in children:
            raise RunError(f"{place}: {children[place.name]} was fine-tuned from it; delete that too, or name --force")
        with alone_in(place) as alone:
            if not alone:
                raise RunError(f"{place}: being written by another process; nothing was deleted")
    return places


def folder_bytes(folder: Path) -> int:
    """What the files in it take; links count as links."""
    sizes = 0
    for place, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # one that was deleted meanwhile
                sizes += os.lstat(os.path.join(place, file)).st_size
    return sizes


def _described(folder: Path) -> RunFolder:
    run, reason, asked = None, UNFINISHED, read_begun(folder)
    if (folder / RUN_FILE).exists() or not asked:
        try:
            run, reason = read_run(folder), ""
            asked = run.to_json()
        except RunError as error:
            reason = str(error).removeprefix(f"{folder / RUN_FILE}: ").removeprefix(f"{folder}: ")
            reason = reason if (folder / RUN_FILE).exists() else UNFINISHED
    return RunFolder(folder, run, reason, asked, _date(folder, asked), folder_bytes(folder))


def _date(folder: Path, asked: dict[str, Any]) -> datetime:
    """When the run was begun; of one without a record, when it was last written."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        found = datetime.fromisoformat(asked["record"]["started"])
        return found if found.tzinfo else found.replace(tzinfo=timezone.utc)
    file = folder / RUN_FILE
    return datetime.fromtimestamp((file if file.exists() else folder).stat().st_mtime, timezone.utc)


def _checked(name: str | Path, root: Path) -> Path:
    """The run folder that `name` means: a name in `root`, or a path to it."""
    place = root / name if os.sep not in str(name).rstrip(os.sep) else Path(str(name).rstrip(os.sep))
    if place.is_symlink():
        raise RunError(f"{place}: a link; nothing behind it is deleted, remove the link itself by hand")
    if not place.is_dir():
        raise RunError(f"{place}: no such run; mmfeat runs ls lists those in {root}")
    inside = place.resolve().parent == root.resolve() and place.name not in ("", ".", "..")
    if not inside or not is_run_folder(place) or not _is_ours(place):
        raise RunError(f"{place}: not a run folder directly in {root}; nothing was deleted (--heads names the folder)")
    return root / place.resolve().name


def _is_ours(place: Path) -> bool:
    """A file called run.json or begun.json alone may be somebody else's."""
    return has_splits(place) or "data_hash" in read_begun(place) or _described(place).run is not None


def _children(root: Path, names: set[str]) -> dict[str, str]:
    """Name of a run -> a run that was made from it and is not named itself."""
    found = {}
    for each in map(_described, filter(is_run_folder, root.iterdir())):
        if each.name not in names and each.asked.get("parent"):
            found[str(each.asked["parent"])] = each.name
    return found


def _delete(place: Path) -> None:
    grave = place.parent / GRAVE
    with alone_in(place) as alone, write_errors(place):
        if not alone:
            raise RunError(f"{place}: being written by another process; it was not deleted")
        if grave.is_symlink():
            raise RunError(f"{grave}: a link where deleted runs are put; remove it by hand")
        grave.mkdir(exist_ok=True)
        place.rename(grave / f"{place.name}.{os.getpid()}")
        sync_folder(place.parent)
        for left in [each for each in grave.iterdir() if _BURIED.fullmatch(each.name) and not each.is_symlink()]:
            shutil.rmtree(left, ignore_errors=left.name != f"{place.name}.{os.getpid()}")
        with contextlib.suppress(OSError):  # not empty: somebody else is at it
            grave.rmdir()
