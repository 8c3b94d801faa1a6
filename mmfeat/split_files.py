"""Split files: `folds.csv`, or three files of a holdout, written for later runs and read from anybody's hand."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mmfeat.errors import RunError
from mmfeat.files import csv_text, write_atomic
from mmfeat.splits import HOLDOUT, TEST, TRAIN, VALIDATION, Splits
from mmfeat.texts import decode_text

FOLDS_FILE = "folds.csv"
HOLDOUT_FILES = {TRAIN: "train_split.csv", VALIDATION: "val_split.csv", TEST: "test_split.csv"}
ROLE_COLUMN = "role"  # of `train_split.csv`: rows that validate with one seed and train with the others
FORMER_FINAL = "final"  # a column without test rows that runs once kept beside the folds

_ROLE = re.compile(f"{TRAIN}|{TEST}|{VALIDATION}(-[1-9][0-9]?)?")


def save_splits(splits: Splits, folder: Path, labels: Sequence[str]) -> None:
    """Write `folds.csv`, id and one column a fold; a holdout goes to three files of id and label.

    `val_split.csv` is empty where each repeat validates on a part of `train_split.csv`.
    """
    if splits.names != (HOLDOUT,):
        write_atomic(
            folder / FOLDS_FILE,
            csv_text(["id", *splits.names], np.column_stack([splits.ids, splits.roles]).tolist()).encode(),
        )
        return
    roles = splits.roles[:, 0].tolist()
    header = ["guid", "tag"] + [ROLE_COLUMN] * bool(splits.parts(0))
    for file, name in HOLDOUT_FILES.items():
        rows = [row for row in zip(splits.ids, labels, roles, strict=True) if _file_of(row[2]) == file]
        width = len(header) if file == TRAIN else 2
        write_atomic(folder / name, csv_text(header[:width], [row[:width] for row in rows]).encode())


def has_splits(folder: Path) -> bool:
    """Whether `load_splits` would find files there."""
    return any((folder / name).is_file() for name in (FOLDS_FILE, HOLDOUT_FILES[TRAIN]))


def load_splits(folder: Path, ids: Sequence[str]) -> Splits:
    """The splits in `folder`, in the order of `ids`; they must be about exactly these samples.

    Reads `folds.csv`, or the three files of a holdout: id first, header optional, other columns ignored. Raises
    `RunError` with file and remedy for anything that is no split of these samples.
    """
    path, names, rows = _read_files(folder)
    roles = {row[0]: row[1:] for row in rows}
    if len(roles) < len(rows):
        raise RunError(f"{path}: an id stands on two lines; each sample has one line")
    if set(roles) != set(ids):
        missing, extra = len(set(ids) - set(roles)), len(set(roles) - set(ids))
        raise RunError(
            f"{path}: splits of {len(roles)} samples, the data has {len(ids)} labelled ones ({missing} have no "
            f"fold, {extra} are gone); make new splits by leaving out --split-dir"
        )
    splits = Splits(tuple(ids), names, _role_table(path, [roles[id] for id in ids], len(names)))
    for number in range(len(names)):
        folds = [splits.fold(number, repeat) for repeat in range(splits.parts(number) or 1)]
        if not all(len(fold.train) and len(fold.validation) and len(fold.test) for fold in folds):
            raise RunError(f"{path}: each fold needs {TRAIN}, {VALIDATION} and {TEST} rows, {names[number]!r} has not")
    if twice := int(((splits.roles == TEST).sum(axis=1) > 1).sum()):
        raise RunError(f"{path}: {twice} samples are {TEST} in several folds; test each of them once")
    return splits


def read_roles(folder: Path) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Names of the folds, the id of each line, and its roles (M, F), of any samples; an id may stand on several lines.

    For who wants to know what is wrong with splits that `load_splits` refuses. Raises `RunError` for what is no split.
    """
    path, names, rows = _read_files(folder)
    return names, [row[0] for row in rows], _role_table(path, [row[1:] for row in rows], len(names))


def _file_of(role: str) -> str:
    """The role that names the file of a holdout: who validates only now and then stands with those who train."""
    return TRAIN if role.startswith(f"{VALIDATION}-") else role


def _read_files(folder: Path) -> tuple[Path, tuple[str, ...], list[list[str]]]:
    """The file to name in errors, the names of the folds, and rows of id and roles."""
    path = folder / FOLDS_FILE
    if path.is_file() or not has_splits(folder):
        return path, *_read_folds(path)
    return folder / HOLDOUT_FILES[TRAIN], (HOLDOUT,), list(_read_holdout(folder))


def _read_rows(path: Path) -> list[list[str]]:
    try:
        text, _ = decode_text(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: no saved splits ({error.strerror}); --split-dir is a run folder") from error
    return [row for row in csv.reader(io.StringIO(text, newline="")) if row]


def _read_folds(path: Path) -> tuple[tuple[str, ...], list[list[str]]]:
    """Names of the folds, and rows of id and roles."""
    header, *rows = _read_rows(path) or [[]]
    if {len(row) for row in rows} != {len(header)} or len(header) < 2:
        raise RunError(f"{path}: each line must have an id and one cell a fold, under a header of their names")
    if header[-1] == FORMER_FINAL and len(header) > 2 and TEST not in {row[-1] for row in rows}:
        header, rows = header[:-1], [row[:-1] for row in rows]
    return tuple(header[1:]), rows


def _read_holdout(folder: Path) -> Iterator[list[str]]:
    """Id and role of each line of the three files; without `val_split.csv`, `train_split.csv` must tell."""
    for role, name in HOLDOUT_FILES.items():
        path = folder / name
        if role == VALIDATION and not path.is_file():
            continue
        rows = _read_rows(path)
        header = rows.pop(0) if rows and rows[0][0].strip().lower() in ("guid", "id") else []
        column = header.index(ROLE_COLUMN) if role == TRAIN and ROLE_COLUMN in header else None
        for row in rows:
            yield [row[0].strip(), role if column is None else row[column] if column < len(row) else ""]


def _role_table(path: Path, rows: list[list[str]], folds: int) -> np.ndarray:
    if wrong := {cell for row in rows for cell in row if not _ROLE.fullmatch(cell)}:
        raise RunError(
            f"{path}: {min(wrong)!r} is no role; cells must be {TRAIN}, {VALIDATION} or {TEST}, "
            f"or {VALIDATION}-1, {VALIDATION}-2 and so on"
        )
    return np.array(rows).reshape(-1, folds)
