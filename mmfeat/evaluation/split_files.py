"""The files that keep splits: `folds.csv`, or the three files of a holdout."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mmfeat.errors import RunError
from mmfeat.evaluation.resampling import joined_groups
from mmfeat.evaluation.splits import HOLDOUT, Splits
from mmfeat.samples.encodings import decode_text
from mmfeat.samples.labels import TEST, TRAIN, VALIDATION
from mmfeat.system.files import csv_text, file_sha256, write_atomic

FOLDS_FILE = "folds.csv"
HOLDOUT_FILES = {TRAIN: "train_split.csv", VALIDATION: "val_split.csv", TEST: "test_split.csv"}
GROUP_COLUMN = "group"  # column of the numbers of groups of near duplicates; empty for a sample that has none
ROLE_COLUMN = "role"  # column of `train_split.csv`, for rows that validate with one seed and train with the others
FORMER_FINAL = "final"  # name of a column without test rows that earlier versions kept beside the folds

_ROLE = re.compile(f"{TRAIN}|{TEST}|{VALIDATION}(-[1-9][0-9]?)?")


def save_splits(splits: Splits, folder: Path, labels: Sequence[str]) -> None:
    """Write `folds.csv` with an id and one column for each fold; a holdout goes to three files of id and label.

    Where samples are near duplicates, a last column has the numbers of their groups. `val_split.csv` is empty where
    each repeat validates on a part of `train_split.csv`.
    """
    rows, of = joined_groups(splits.groups, len(splits.ids))
    groups = np.full((len(splits.ids), 1 if len(rows) else 0), "", dtype="U20")
    groups[rows] = of[:, None]
    last = [GROUP_COLUMN] * groups.shape[1]
    if splits.names != (HOLDOUT,):
        table = np.column_stack([splits.ids, splits.roles, groups]).tolist()
        write_atomic(folder / FOLDS_FILE, csv_text(["id", *splits.names, *last], table).encode())
        return
    roles = splits.roles[:, 0].tolist()
    for file, name in HOLDOUT_FILES.items():
        shown = [ROLE_COLUMN] if file == TRAIN and splits.parts(0) else []
        lines = [
            [id, label, *[role][: len(shown)], *group]
            for id, label, role, group in zip(splits.ids, labels, roles, groups.tolist(), strict=True)
            if _file_of(role) == file
        ]
        write_atomic(folder / name, csv_text(["guid", "tag", *shown, *last], lines).encode())


def has_splits(folder: Path) -> bool:
    """Whether the folder holds files that `load_splits` reads."""
    return any((folder / name).is_file() for name in (FOLDS_FILE, HOLDOUT_FILES[TRAIN]))


def files_hash(folder: Path) -> str:
    """SHA-256 of the files that keep the splits in a folder; empty where there are none."""
    files = [folder / name for name in (FOLDS_FILE, *HOLDOUT_FILES.values()) if (folder / name).is_file()]
    return hashlib.sha256("".join(map(file_sha256, files)).encode()).hexdigest() if files else ""


def check_splits(folder: Path, digest: str) -> None:
    """Raise `RunError` where the splits of a run are not those that were saved, whose hash is `digest`."""
    if digest not in ("", files_hash(folder)):  # earlier versions recorded none
        raise RunError(f"{folder}: its splits are not those that were saved; run mmfeat heads again")


def load_splits(folder: Path, ids: Sequence[str]) -> Splits:
    """The splits in `folder`, in the order of `ids`; they must be about exactly these samples.

    Reads `folds.csv`, or the three files of a holdout: id first, header optional, other columns ignored. Raises
    `RunError` with file and remedy for anything that is no split of these samples.
    """
    path, names, rows, groups = _read_files(folder)
    roles = {row[0]: row[1:] for row in rows}
    if len(roles) < len(rows):
        raise RunError(f"{path}: an id stands on two lines; each sample has one line")
    if set(roles) != set(ids):
        missing, extra = len(set(ids) - set(roles)), len(set(roles) - set(ids))
        raise RunError(
            f"{path}: splits of {len(roles)} samples, the data has {len(ids)} labelled ones ({missing} have no "
            f"fold, {extra} are gone); make new splits by leaving out --split-dir"
        )
    table = _role_table(path, [roles[id] for id in ids], len(names))
    splits = Splits(tuple(ids), names, table, group_numbers(groups, ids))
    for number in range(len(names)):
        folds = [splits.fold(number, repeat) for repeat in range(splits.parts(number) or 1)]
        if not all(len(fold.train) and len(fold.validation) and len(fold.test) for fold in folds):
            raise RunError(f"{path}: each fold needs {TRAIN}, {VALIDATION} and {TEST} rows, {names[number]!r} has not")
    if twice := int(((splits.roles == TEST).sum(axis=1) > 1).sum()):
        raise RunError(f"{path}: {twice} samples are {TEST} in several folds; test each of them once")
    return splits


def read_roles(folder: Path) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Names of the folds, the id of each line, and its roles (M, F), of any samples; an id may stand on several lines.

    The audit uses this to name the fault of splits that `load_splits` refuses. Raises `RunError` for other files.
    """
    path, names, rows, _ = _read_files(folder)
    return names, [row[0] for row in rows], _role_table(path, [row[1:] for row in rows], len(names))


def read_groups(folder: Path, ids: Sequence[str]) -> np.ndarray | None:
    """The groups of near duplicates of some samples, by the splits in `folder`; None where these name none."""
    return group_numbers(_read_files(folder)[-1], ids) if has_splits(folder) else None


def group_numbers(groups: Mapping[str, str], ids: Sequence[str]) -> np.ndarray | None:
    """(N,) the number of the group of each id; an id without a group is alone. None where no id has a group."""
    named = [groups.get(id) or f" {row}" for row, id in enumerate(ids)]
    return np.unique(named, return_inverse=True)[1] if any(groups.values()) else None


def _file_of(role: str) -> str:
    """The role whose file holds a row of a holdout: rows that validate in one repeat are written with training rows."""
    return TRAIN if role.startswith(f"{VALIDATION}-") else role


def _read_files(folder: Path) -> tuple[Path, tuple[str, ...], list[list[str]], dict[str, str]]:
    """(file to name in errors, names of the folds, rows of id and roles, id -> group)."""
    path = folder / FOLDS_FILE
    if path.is_file() or not has_splits(folder):
        return path, *_read_folds(path)
    groups: dict[str, str] = {}
    return folder / HOLDOUT_FILES[TRAIN], (HOLDOUT,), list(_read_holdout(folder, groups)), groups


def _read_rows(path: Path) -> list[list[str]]:
    try:
        text, _ = decode_text(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: no saved splits ({error.strerror}); --split-dir is a run folder") from error
    return [row for row in csv.reader(io.StringIO(text, newline="")) if row]


def _read_folds(path: Path) -> tuple[tuple[str, ...], list[list[str]], dict[str, str]]:
    """Names of the folds, rows of id and roles, and the group of each id that has one."""
    header, *rows = _read_rows(path) or [[]]
    if {len(row) for row in rows} != {len(header)} or len(header) < 2:
        raise RunError(f"{path}: each line must have an id and one cell a fold, under a header of their names")
    groups: dict[str, str] = {}
    if header[-1] == GROUP_COLUMN and len(header) > 2:
        groups = {row[0]: row[-1] for row in rows}
        header, rows = header[:-1], [row[:-1] for row in rows]
    if header[-1] == FORMER_FINAL and len(header) > 2 and TEST not in {row[-1] for row in rows}:
        header, rows = header[:-1], [row[:-1] for row in rows]
    return tuple(header[1:]), rows, groups


def _read_holdout(folder: Path, groups: dict[str, str]) -> Iterator[list[str]]:
    """Yield id and role of each line of the three files, and add its group to `groups`; without `val_split.csv`,
    `train_split.csv` needs roles."""
    for role, name in HOLDOUT_FILES.items():
        path = folder / name
        if role == VALIDATION and not path.is_file():
            continue
        rows = _read_rows(path)
        header = rows.pop(0) if rows and rows[0][0].strip().lower() in ("guid", "id") else []
        for row in rows:
            cells = dict(zip(header, row, strict=False))
            groups[row[0].strip()] = cells.get(GROUP_COLUMN, "")
            has_role = role == TRAIN and ROLE_COLUMN in header
            yield [row[0].strip(), cells.get(ROLE_COLUMN, "") if has_role else role]


def _role_table(path: Path, rows: list[list[str]], folds: int) -> np.ndarray:
    if wrong := {cell for row in rows for cell in row if not _ROLE.fullmatch(cell)}:
        raise RunError(
            f"{path}: {min(wrong)!r} is no role; cells must be {TRAIN}, {VALIDATION} or {TEST}, "
            f"or {VALIDATION}-1, {VALIDATION}-2 and so on"
        )
    return np.array(rows).reshape(-1, folds)
