"""Partitions: the scores of a run's entries over several partitions into folds, each of which is a run of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from mmfeat.errors import RunError
from mmfeat.runs.entry import convert
from mmfeat.runs.record import CHECKSUM, checksum
from mmfeat.runs.run import Run
from mmfeat.system.files import read_json, write_json
from mmfeat.system.wording import head_label

PARTITIONS = "partitions.json"


@dataclass(frozen=True)
class Spread:
    """The scores of an entry, one a partition; in `dropped` partitions the entry was left with one seed."""

    head: str
    modalities: str
    scores: tuple[float, ...]
    dropped: int

    @property
    def label(self) -> str:
        return head_label(self.head, self.modalities)

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)

    @property
    def span(self) -> str:
        """As in `0.596 to 0.608`."""
        return f"{min(self.scores):.3f} to {max(self.scores):.3f}"


@dataclass(frozen=True)
class Partitions:
    """The names of the runs, that of the first partition first, the seeds of their folds, the name of the score, and
    the spread of each entry that all runs have, the best mean first."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    score: str
    entries: tuple[Spread, ...]


def keep_partitions(runs: Sequence[Run]) -> Partitions:
    """Compare runs of one configuration on several partitions, and write that into the folder of the first run."""
    boards = [{entry.name: entry for entry in run.leaderboard} for run in runs]
    spreads = []
    for name, entry in boards[0].items():
        if all(name in board for board in boards):
            scores = tuple(float(board[name].headline.value) for board in boards)
            dropped = sum(bool(board[name].dropped) for board in boards)
            spreads.append(Spread(entry.head, entry.modalities, scores, dropped))
    entries = sorted(spreads, key=lambda spread: -spread.mean)
    names, seeds = tuple(run.name for run in runs), tuple(run.config.protocol.seed for run in runs)
    partitions = Partitions(names, seeds, runs[0].leaderboard[0].headline_name, tuple(entries))
    with contextlib.suppress(RunError):
        if read_partitions(runs[0]) == partitions:
            return partitions
    values = asdict(partitions)
    write_json(runs[0].folder / PARTITIONS, {**values, CHECKSUM: checksum(values)})
    return partitions


def read_partitions(run: Run) -> Partitions | None:
    """The partitions that were compared with a run; None where there are none, or where the run has other scores since.

    Raises `RunError` where the file is not what was saved.
    """
    file = run.folder / PARTITIONS
    try:
        values = read_json(file)
        if not isinstance(values, dict) or values.get(CHECKSUM) != checksum(values):
            raise ValueError("its content is not what was saved")
        partitions = convert(values, Partitions)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: {error}; delete the file, mmfeat heads --fold-seeds writes it again") from error
    scores = {(entry.head, entry.modalities): entry.headline.value for entry in run.leaderboard}
    current = all(scores.get((one.head, one.modalities)) == one.scores[0] for one in partitions.entries)
    return partitions if current else None
