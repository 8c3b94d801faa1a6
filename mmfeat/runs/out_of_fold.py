"""Predictions out of fold, as a run keeps them beside each of its entries."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfeat.errors import RunError
from mmfeat.runs.entry import Entry
from mmfeat.runs.run import Run
from mmfeat.samples.labels import SEPARATOR, Targets

CERTAIN = 0.01  # probabilities of one class a sample add up to 1 within the digits that are written


@dataclass(frozen=True)
class OutOfFold:
    """Of N samples and C classes: `chosen` (S, N, C) bool of each seed, `probabilities` (N, C), their mean."""

    ids: tuple[str, ...]
    targets: Targets
    chosen: np.ndarray
    probabilities: np.ndarray

    @property
    def voted(self) -> np.ndarray:
        """(N, C) bool: the choice of most seeds, of equally many the more probable; multi-label what half chose."""
        votes = self.chosen.mean(0)
        if self.targets.multilabel:
            return votes >= 0.5
        best = (votes + 1e-6 * self.probabilities).argmax(1)
        return best[:, None] == np.arange(votes.shape[1])

    @property
    def right(self) -> np.ndarray:
        """(N,) bool: whether all classes of the voted choice are right."""
        return (self.voted == self.targets.matrix).all(1)


def read_predictions(run: Run, entry: Entry) -> OutOfFold:
    """Those of one entry of the run's leaderboard; raises `RunError` where the file is missing or not of this run."""
    path = run.head_folder(entry) / OUT_OF_FOLD
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *lines = csv.reader(file)
        if len(lines) != entry.samples:
            raise ValueError(f"{len(lines)} of {entry.samples} samples")
        return _parsed(header, lines, run.classes, run.config.is_multilabel)
    except (OSError, ValueError, KeyError, IndexError, csv.Error) as error:
        raise RunError(f"{path}: not the predictions of a whole run ({error}); train it again") from error


def _parsed(
    header: Sequence[str], lines: Sequence[Sequence[str]], classes: tuple[str, ...], multilabel: bool
) -> OutOfFold:
    seeds = sum(name.startswith("predicted_") for name in header[: len(header) - len(classes)])
    if list(header) != ["id", "label", *(f"predicted_{n + 1}" for n in range(seeds)), *(f"p_{c}" for c in classes)]:
        raise ValueError("its columns are others")
    labels = _matrix([line[1] for line in lines], classes)
    chosen = np.stack([_matrix([line[2 + seed] for line in lines], classes) for seed in range(seeds)])
    probabilities = np.array([line[2 + seeds :] for line in lines], dtype=np.float64).reshape(len(lines), len(classes))
    if not np.isfinite(probabilities).all() or (not multilabel and (np.abs(probabilities.sum(1) - 1) > CERTAIN).any()):
        raise ValueError("its probabilities are none")
    return OutOfFold(tuple(line[0] for line in lines), Targets(classes, labels, multilabel), chosen, probabilities)


def _matrix(cells: Sequence[str], classes: tuple[str, ...]) -> np.ndarray:
    """(N, C) bool of label cells, whose names may hold the separator where a sample has one class."""
    column = {name: number for number, name in enumerate(classes)}
    matrix = np.zeros((len(cells), len(classes)), dtype=bool)
    for row, cell in enumerate(cells):
        names = [cell] if cell in column else [name for name in cell.split(SEPARATOR) if name]
        matrix[row, [column[name] for name in names]] = True
    return matrix


OUT_OF_FOLD = "out_of_fold.csv"
