"""Leaks: samples of a test or validation part that, or a twin of which, also stand in the part that trains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfeat.audit.twins import Twins
from mmfeat.errors import RunError
from mmfeat.evaluation.splits import TEST, TRAIN, VALIDATION, read_roles
from mmfeat.samples.dataset import Sample

SAME = "sample"  # the sample itself stands in both parts
UNLABELLED = "unlabelled"
LABELLED = "labelled"


@dataclass(frozen=True)
class Leak:
    """A sample (row number) of part `part` in fold `fold`, and who of the part `other_part` gives it away."""

    fold: str
    part: str
    row: int
    other_part: str
    other: int
    modality: str
    kind: str


@dataclass(frozen=True)
class GivenSplits:
    """Splits as they are, right or wrong: the row number (M,) of each line, -1 for an id that the data lack, and
    its roles (M, F); `unsplit` counts labelled samples on no line, `doubled` ids on several."""

    folder: str
    names: tuple[str, ...]
    rows: np.ndarray
    roles: np.ndarray
    unknown: int
    unsplit: int
    doubled: int

    def parts(self) -> dict[str, np.ndarray]:
        """The parts in which classes are counted: each fold's test part, or all three of a holdout."""
        if len(self.names) > 1:
            return {name: self.rows[self.roles[:, column] == TEST] for column, name in enumerate(self.names)}
        role = np.char.partition(self.roles[:, 0], "-")[:, 0] if len(self.roles) else self.roles[:, 0]
        found = {name: self.rows[role == name] for name in (TRAIN, VALIDATION, TEST)}
        return {name: rows for name, rows in found.items() if len(rows)}


def read_given_splits(folder: Path, samples: Sequence[Sample]) -> GivenSplits:
    """The splits in a folder, of whichever samples they are. Raises `RunError` where they are of none of these."""
    names, ids, roles = read_roles(folder)
    row_of = {sample.id: row for row, sample in enumerate(samples)}
    rows = np.array([row_of.get(id, -1) for id in ids], dtype=int)
    known = rows >= 0
    if not known.any():
        example = f" (first id: {ids[0]})" if ids else ""
        raise RunError(f"{folder}: splits of none of these samples{example}; name their own with --split-dir")
    labelled = {row for row, sample in enumerate(samples) if sample.label is not None}
    unsplit = len(labelled - set(rows.tolist()))
    doubled = len(ids) - len(set(ids))
    return GivenSplits(str(folder), names, rows[known], roles[known], int((~known).sum()), unsplit, doubled)


def find_leaks(splits: GivenSplits, twins: Mapping[str, Twins]) -> list[Leak]:
    """Leaks of test parts from all else of their folds, and of fixed validation parts from the training part.

    One line for each sample, fold and way (the sample itself, its text, its photo), however many twins it has.
    """
    found: list[Leak] = []
    for column, name in enumerate(splits.names):
        roles = splits.roles[:, column]
        for part, others in ((TEST, roles != TEST), (VALIDATION, (roles != TEST) & (roles != VALIDATION))):
            held, rest = splits.rows[roles == part], splits.rows[others]
            role_of = dict(zip(rest.tolist(), roles[others].tolist(), strict=True))
            found += [
                Leak(name, part, row, role_of[other], other, modality, kind)
                for row, other, modality, kind in _given_away(held, rest, twins)
            ]
    return found


def find_shared(samples: Sequence[Sample], twins: Mapping[str, Twins]) -> list[Leak]:
    """Unlabelled samples with a labelled twin: no leak of a score, and good to know before one predicts."""
    has = np.array([sample.label is not None for sample in samples], bool)
    pairs = _given_away(np.flatnonzero(~has), np.flatnonzero(has), twins)
    return [Leak("", UNLABELLED, row, LABELLED, other, modality, kind) for row, other, modality, kind in pairs]


def _given_away(held: np.ndarray, rest: np.ndarray, twins: Mapping[str, Twins]) -> Iterator[tuple[int, int, str, str]]:
    """(row, the first twin among the rest, in what, exact or near) of the rows that have one."""
    both = set(np.intersect1d(held, rest).tolist())
    yield from ((row, row, SAME, "exact") for row in sorted(both))
    for modality, each in twins.items():
        exact, near = (_first_twins(groups, held, rest) for groups in (each.exact, each.near))
        for row, equal, alike in zip(held.tolist(), exact.tolist(), near.tolist(), strict=True):
            if alike >= 0 and row not in both:
                yield row, equal if equal >= 0 else alike, modality, "exact" if equal >= 0 else "near"


def _first_twins(groups: np.ndarray, held: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """For each held row (H,) the first row of the rest in its group, -1 where there is none."""
    first = np.full(int(groups.max(initial=-1)) + 2, -1)
    backwards = rest[::-1][groups[rest[::-1]] >= 0]
    first[groups[backwards]] = backwards  # the last that is written is the first of the rest
    return np.where(groups[held] >= 0, first[groups[held]], -1)
