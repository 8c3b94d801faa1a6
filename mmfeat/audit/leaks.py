"""Leaks: samples of a test or validation part that stand, themselves or as a twin, also in the training part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfeat.audit.twins import Twins
from mmfeat.errors import RunError
from mmfeat.evaluation.split_files import read_roles
from mmfeat.evaluation.splits import TEST, TRAIN, VALIDATION
from mmfeat.samples.dataset import Sample

SAME = "sample"  # modality of a leak whose sample itself stands in both parts
UNLABELLED = "unlabelled"
LABELLED = "labelled"


@dataclass(frozen=True)
class Leak:
    """A sample `row` of `part` in `fold`, and its twin `other` (row) in `other_part`."""

    fold: str
    part: str
    row: int
    other_part: str
    other: int
    modality: str
    kind: str


@dataclass(frozen=True)
class GivenSplits:
    """Splits as read, right or wrong: row (M,) and roles (M, F) of each line whose id the data have.

    `unknown` counts lines with another id, `unsplit` labelled samples on no line, `doubled` ids on several lines.
    """

    folder: str
    names: tuple[str, ...]
    rows: np.ndarray
    roles: np.ndarray
    unknown: int
    unsplit: int
    doubled: int

    def parts(self) -> dict[str, np.ndarray]:
        """Rows by part, for counts of classes: the test part of each fold, or the three parts of a holdout."""
        if len(self.names) > 1:
            return {name: self.rows[self.roles[:, column] == TEST] for column, name in enumerate(self.names)}
        role = np.char.partition(self.roles[:, 0], "-")[:, 0] if len(self.roles) else self.roles[:, 0]
        parts = {name: self.rows[role == name] for name in (TRAIN, VALIDATION, TEST)}
        return {name: rows for name, rows in parts.items() if len(rows)}


def read_given_splits(folder: Path, samples: Sequence[Sample]) -> GivenSplits:
    """Read the splits in a folder. Raises `RunError` where the splits name none of the samples."""
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
    """Leaks from the rest of a fold into its test part, and from the training part into a fixed validation part.

    A sample has one leak for each fold and modality (the sample itself, text, photo), however many twins it has.
    """
    leaks: list[Leak] = []
    for column, name in enumerate(splits.names):
        roles = splits.roles[:, column]
        for part, others in ((TEST, roles != TEST), (VALIDATION, (roles != TEST) & (roles != VALIDATION))):
            held, rest = splits.rows[roles == part], splits.rows[others]
            role_of = dict(zip(rest.tolist(), roles[others].tolist(), strict=True))
            leaks += [
                Leak(name, part, row, role_of[other], other, modality, kind)
                for row, other, modality, kind in _given_away(held, rest, twins)
            ]
    return leaks


def find_shared(samples: Sequence[Sample], twins: Mapping[str, Twins]) -> list[Leak]:
    """Unlabelled samples with a labelled twin, which leak into no score but matter for a prediction."""
    has = np.array([sample.label is not None for sample in samples], bool)
    pairs = _given_away(np.flatnonzero(~has), np.flatnonzero(has), twins)
    return [Leak("", UNLABELLED, row, LABELLED, other, modality, kind) for row, other, modality, kind in pairs]


def _given_away(held: np.ndarray, rest: np.ndarray, twins: Mapping[str, Twins]) -> Iterator[tuple[int, int, str, str]]:
    """(row, first twin among the rest, modality, exact or near) for each held row with a twin."""
    both = set(np.intersect1d(held, rest).tolist())
    yield from ((row, row, SAME, "exact") for row in sorted(both))
    for modality, part in twins.items():
        exact, near = (_first_twins(groups, held, rest) for groups in (part.exact, part.near))
        for row, equal, alike in zip(held.tolist(), exact.tolist(), near.tolist(), strict=True):
            if alike >= 0 and row not in both:
                yield row, equal if equal >= 0 else alike, modality, "exact" if equal >= 0 else "near"


def _first_twins(groups: np.ndarray, held: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """(H,) the first row of `rest` in the group of each held row, -1 without one."""
    first = np.full(int(groups.max(initial=-1)) + 2, -1)
    backwards = rest[::-1][groups[rest[::-1]] >= 0]
    first[groups[backwards]] = backwards  # the last row written to a group stays: the first of `rest`
    return np.where(groups[held] >= 0, first[groups[held]], -1)
