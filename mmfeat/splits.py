"""Splits: which labelled samples train, validate and test in each fold.

Samples with equal text (after cleaning) or equal photo stay on one side of every split: otherwise a
head is scored on what it has seen.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfeat.errors import DataError, RunError
from mmfeat.files import write_atomic
from mmfeat.samples import Sample
from mmfeat.texts import clean_tweet, decode_text

TRAIN, VALIDATION, TEST = "train", "validation", "test"
FINAL = "final"  # all labelled samples, none of them for testing: the head that predicts
FOLDS_FILE = "folds.csv"
VALIDATION_PARTS = 8


@dataclass(frozen=True)
class Fold:
    """Row numbers of one fold."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Splits:
    """One role for each sample (rows) in each fold (columns), the final one last."""

    ids: tuple[str, ...]
    names: tuple[str, ...]
    roles: np.ndarray

    @property
    def folds(self) -> list[Fold]:
        return [
            Fold(name, *(np.flatnonzero(column == role) for role in (TRAIN, VALIDATION, TEST)))
            for name, column in zip(self.names, self.roles.T, strict=True)
        ]

    def save(self, folder: Path) -> None:
        """Write `folds.csv`: id and one column a fold."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["id", *self.names])
        writer.writerows([id, *roles] for id, roles in zip(self.ids, self.roles.tolist(), strict=True))
        write_atomic(folder / FOLDS_FILE, text.getvalue().encode())


def make_splits(labels: np.ndarray, ids: Sequence[str], groups: np.ndarray, folds: int, seed: int) -> Splits:
    """Stratified, grouped k folds; an eighth of what is left of each validates.

    Raises `DataError` where a class has fewer samples than there are folds.
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) < 2:
        raise DataError(f"only one class ({classes[0]}) is labelled; a classifier needs two")
    if folds < 2 or counts.min() < folds:
        raise DataError(
            f"--folds {folds}: class {str(classes[counts.argmin()])!r} has {counts.min()} samples, each fold needs 1; "
            "use fewer folds (at least 2), or correct the label if it is a typo"
        )
    _check_groups(labels, groups, folds)
    roles = np.full((len(labels), folds + 1), TRAIN, dtype="U10")
    for column, test in enumerate(_parts(labels, groups, folds, seed)):
        roles[test, column] = TEST
    for column in range(folds + 1):
        rest = np.flatnonzero(roles[:, column] != TEST)
        parts = max(2, min(VALIDATION_PARTS, np.unique(labels[rest], return_counts=True)[1].min()))
        roles[rest[_parts(labels[rest], groups[rest], parts, seed)[0]], column] = VALIDATION
    for role in roles.T:
        if len(np.unique(labels[role == TRAIN])) < 2 or not (role == VALIDATION).any():
            raise DataError(f"--folds {folds}: a fold would train on one class or validate on nothing; label more")
    return Splits(tuple(ids), (*(f"fold{number}" for number in range(folds)), FINAL), roles)


def load_splits(folder: Path, ids: Sequence[str]) -> Splits:
    """The splits in `folder`, in the order of `ids`; they must be about exactly these samples."""
    path = folder / FOLDS_FILE
    try:
        text, _ = decode_text(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path}: no saved splits ({error.strerror}); --split-dir is a run folder") from error
    header, *rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row] or [[]]
    roles = {row[0]: row[1:] for row in rows}
    if len(roles) < len(rows):
        raise RunError(f"{path}: an id stands on two lines; each sample has one line")
    if set(roles) != set(ids):
        missing, extra = len(set(ids) - set(roles)), len(set(roles) - set(ids))
        raise RunError(
            f"{path}: splits of {len(roles)} samples, the data has {len(ids)} labelled ones ({missing} have no "
            f"fold, {extra} are gone); make new splits by leaving out --split-dir"
        )
    widths = {len(row) for row in rows}
    table = np.array([roles[id] for id in ids]) if widths == {len(header)} else np.empty(0)
    if header[-1] != FINAL or not table.size or not np.isin(table, (TRAIN, VALIDATION, TEST)).all():
        raise RunError(f"{path}: cells must be {TRAIN}, {VALIDATION} or {TEST} and the last column {FINAL!r}")
    has = {role: (table == role).any(axis=0) for role in (TRAIN, VALIDATION, TEST)}
    if not (has[TRAIN] & has[VALIDATION]).all() or not has[TEST][:-1].all() or has[TEST][-1]:
        raise RunError(f"{path}: each fold needs {TRAIN}, {VALIDATION} and {TEST} rows, and {FINAL!r} no {TEST} row")
    return Splits(tuple(ids), tuple(header[1:]), table)


def duplicate_groups(samples: Sequence[Sample], image_keys: np.ndarray) -> np.ndarray:
    """(N,) group numbers: samples joined by equal cleaned text or equal photo share one."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    first: dict[tuple[str, object], int] = {}
    joined = []
    for row, (sample, key) in enumerate(zip(samples, image_keys.tolist(), strict=True)):
        text = clean_tweet(sample.text or "")
        for content in [("text", text)] * bool(text) + [("image", key)] * bool(key):
            joined.append((row, first.setdefault(content, row)))
    rows, columns = np.array(joined, dtype=int).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(samples), len(samples)))
    return connected_components(graph, directed=False)[1]


def _check_groups(labels: np.ndarray, groups: np.ndarray, folds: int) -> None:
    """Each class needs samples in enough groups to be in the training part of every fold."""
    for name in np.unique(labels):
        count = len(np.unique(groups[labels == name]))
        if count < max(folds, 3):
            raise DataError(
                f"class {str(name)!r} has only {count} groups of different texts and photos, too few for "
                f"--folds {folds}; use fewer folds, or --no-group to let equal ones stand on both sides"
            )


def _parts(labels: np.ndarray, groups: np.ndarray, parts: int, seed: int) -> list[np.ndarray]:
    from sklearn.model_selection import StratifiedGroupKFold

    splitter = StratifiedGroupKFold(parts, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a class may be smaller than the number of parts
        return [test for _, test in splitter.split(labels, labels, groups)]
