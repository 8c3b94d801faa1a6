"""Predictions out of fold of an entry, read back from its file."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.errors import RunError
from mmfeat.evaluation.protocol import read_groups
from mmfeat.runs.entry import Entry
from mmfeat.samples.labels import MULTILABEL, ORDINAL, REGRESSION, SEPARATOR, Targets, cells_of
from mmfeat.system.files import file_sha256
from mmfeat.system.notebook import Frame, Shown
from mmfeat.system.wording import counted

if TYPE_CHECKING:
    import pyarrow

OUT_OF_FOLD = "out_of_fold.csv"
CERTAIN = 0.01  # largest distance from 1 of the sum of a sample's probabilities, which are written rounded


@dataclass(frozen=True, repr=False)
class OutOfFold(Frame, Shown):
    """Predictions out of fold of one entry, for N samples, C classes and S seeds.

    `chosen` is (S, N, C) bool, the classes that each seed chose; `probabilities` is (N, C), the mean over the seeds;
    near duplicates have the same number in `groups` (N,), which is None where there are none. In a regression both are
    the numbers that are predicted.
    """

    ids: tuple[str, ...]
    targets: Targets
    chosen: np.ndarray
    probabilities: np.ndarray
    groups: np.ndarray | None = None

    def to_arrow(self) -> pyarrow.Table:
        """id, label, predicted (`voted`), right, and the probability of each class, as `p_CLASS`; of a regression the
        numbers."""
        import pyarrow

        if self.targets.numeric:
            numbers = {"label": self.targets.matrix[:, 0], "predicted": self.voted[:, 0]}
            return pyarrow.table({"id": self.ids, **numbers})
        classes = self.targets.classes
        labels, predicted = (cells_of(chosen, classes) for chosen in (self.targets.matrix, self.voted))
        columns = {"id": self.ids, "label": labels, "predicted": predicted, "right": self.right}
        return pyarrow.table(columns | {f"p_{name}": p for name, p in zip(classes, self.probabilities.T, strict=True)})

    def facts(self) -> list[str]:
        right = f"{int(self.right.sum()):,} right"
        return [counted(len(self.ids), "sample"), right, counted(len(self.chosen), "seed")]

    @property
    def voted(self) -> np.ndarray:
        """(N, C) bool: the class that most seeds chose, and of a tie the more probable one; where samples may have
        several classes, every class that at least half of the seeds chose; in a regression their mean (N, 1)."""
        votes = self.chosen.mean(0)
        if self.targets.numeric:
            return votes
        if self.targets.multilabel:
            return votes >= 0.5
        best = (votes + 1e-6 * self.probabilities).argmax(1)
        return best[:, None] == np.arange(votes.shape[1])

    @property
    def right(self) -> np.ndarray:
        """(N,) bool: whether `voted` equals the label of a sample in every class, or is less than the root mean squared
        error away from the number."""
        if self.targets.numeric:
            errors = np.abs(self.voted - self.targets.matrix)[:, 0]
            return errors <= np.sqrt((errors**2).mean())
        return (self.voted == self.targets.matrix).all(1)


def read_out_of_fold(folder: Path, entry: Entry, classes: tuple[str, ...], task: str) -> OutOfFold:
    """Read the predictions of an entry of the run in `folder`; raises `RunError` where they are missing or differ."""
    path = folder / entry.name / OUT_OF_FOLD
    try:
        data = path.read_bytes()
        if entry.predictions and hashlib.sha256(data).hexdigest() != entry.predictions:
            raise ValueError("its content is not what was saved")
        header, *rows = csv.reader(io.StringIO(data.decode(), newline=""))
        if len(rows) != entry.samples:
            raise ValueError(f"{len(rows)} of {entry.samples} samples")
        return replace(read := _parsed(header, rows, classes, task), groups=read_groups(folder, read.ids))
    except (OSError, ValueError, KeyError, IndexError, csv.Error) as error:
        raise RunError(f"{path}: not the predictions of a whole run ({error}); train it again") from error


def _parsed(header: Sequence[str], rows: Sequence[Sequence[str]], classes: tuple[str, ...], task: str) -> OutOfFold:
    if task == REGRESSION:
        return _numbers(header, rows, classes)
    multilabel = task == MULTILABEL
    seeds = sum(name.startswith("predicted_") for name in header[: len(header) - len(classes)])
    if list(header) != ["id", "label", *(f"predicted_{n + 1}" for n in range(seeds)), *(f"p_{c}" for c in classes)]:
        raise ValueError("its columns are others")
    labels, *chosen = (_label_matrix([row[column] for row in rows], classes) for column in range(1, 2 + seeds))
    probabilities = np.array([row[2 + seeds :] for row in rows], dtype=np.float64).reshape(len(rows), len(classes))
    if not np.isfinite(probabilities).all() or (not multilabel and (np.abs(probabilities.sum(1) - 1) > CERTAIN).any()):
        raise ValueError("its probabilities are none")
    targets = Targets(classes, labels, multilabel, task == ORDINAL)
    return OutOfFold(tuple(row[0] for row in rows), targets, np.stack(chosen), probabilities)


def _numbers(header: Sequence[str], rows: Sequence[Sequence[str]], classes: tuple[str, ...]) -> OutOfFold:
    if list(header) != ["id", "label", "predicted_1"]:
        raise ValueError("its columns are others")
    values = np.array([row[1:] for row in rows], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its numbers are none")
    chosen = values[None, :, 1:]
    return OutOfFold(tuple(row[0] for row in rows), Targets(classes, values[:, :1]), chosen, chosen[0])


def _label_matrix(cells: Sequence[str], classes: tuple[str, ...]) -> np.ndarray:
    """(N, C) bool: the classes in N cells; a class may hold the separator in its name where a sample has one class."""
    column = {name: index for index, name in enumerate(classes)}
    matrix = np.zeros((len(cells), len(classes)), dtype=bool)
    for row, cell in enumerate(cells):
        names = [cell] if cell in column else [name for name in cell.split(SEPARATOR) if name]
        matrix[row, [column[name] for name in names]] = True
    return matrix


def entry_is_whole(folder: Path, entry: Entry) -> bool:
    """Whether the final heads of an entry, their tuned towers and the predictions lie in `folder` with the recorded
    hashes; earlier versions recorded none of predictions."""
    towers = [(tower.file, tower.sha256) for final in entry.final for tower in final.towers]
    saved = [*((final.file, final.sha256) for final in entry.final), *towers]
    saved += [(OUT_OF_FOLD, entry.predictions)] if entry.predictions else []
    files = [(folder / Path(name).name, digest) for name, digest in saved]
    return all(file.is_file() and file_sha256(file) == digest for file, digest in files)
