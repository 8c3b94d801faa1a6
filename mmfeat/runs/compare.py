"""Comparison of runs: the settings that differ, the scores side by side, and whether differences are more than noise.

Runs are tested against each other only where their data and folds are the same, but for corrections of labels: scores
on other rows, or of heads that were trained on other rows, say nothing about each other.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import RunError
from mmfeat.evaluation.metrics import evaluate
from mmfeat.evaluation.significance import LEVEL, Difference, holm, majority, mcnemar, paired_difference
from mmfeat.runs.entry import NUMBER_SCORES, Entry, RunConfig, convert
from mmfeat.runs.record import CHECKSUM, OutOfFold, checksum
from mmfeat.runs.run import Run
from mmfeat.samples.corrections import LABELS
from mmfeat.system.files import read_json, write_json
from mmfeat.system.wording import head_label

MISSING = "-"  # the text of a setting that a run does not have
# Setting -> the name of its flag, where that is another; and what no flag sets.
FLAGS = {
    "protocol.kind": "protocol",
    "protocol.shares": "split",
    "protocol.grouped": "group",
    "plan.method": "search",
    "plan.adjustment": "logit_adjustment",
    "options.convolutional_dtype": "dtype",
    "pairs": "fusion",
}
PLAIN = ("heads", "dataset", "version", "parent", "prefixes")
LEFT_OUT = (
    "data",
    "cache",
    "columns",
    "splits_hash",
    "data_hash",
    "table_hash",
    "folds",
)  # paths, and what `reasons` is about
PARTITIONS = "partitions.json"


@dataclass(frozen=True)
class RunTest:
    """The test of one run's entry against the first run's, on the `samples` that both have out of fold.

    `difference` is the score (`Scores.headline`) of this entry minus that of the first, from the paired bootstrap;
    `p_holm` is its p-value and `mcnemar_holm` that of McNemar's test (`mcnemar`), both adjusted for the number of runs
    (Holm). Numbers are never right, and have NaN for McNemar's test. `otherwise` is the difference against the other
    labels of a `Comparison`, None where all labels are the same.
    """

    difference: Difference
    p_holm: float
    mcnemar: float
    mcnemar_holm: float
    samples: int
    otherwise: Difference | None = None

    @property
    def tie(self) -> bool:
        """Whether the difference may be noise."""
        return self.p_holm >= LEVEL


@dataclass(frozen=True)
class Comparison:
    """Runs side by side with one entry of each; all tuples are in the order of `runs`.

    `settings` maps the dotted name of every setting that differs to its text in each run. `tests` is None for the first
    run and for runs that are not comparable with it; `reasons` says why they are not, and is "" for all others.
    `preselected` says that the entries were named beforehand; otherwise each is the best of its run by the very scores
    that are compared. Where runs differ in corrections of labels, all scores and tests are against the labels of the
    run `scored`, the last one that has corrections; `otherwise` is the first run with other labels, and `relabelled`
    the number of samples out of fold whose labels differ between these two.
    """

    runs: tuple[Run, ...]
    entries: tuple[Entry, ...]
    settings: Mapping[str, tuple[str, ...]]
    tests: tuple[RunTest | None, ...]
    reasons: tuple[str, ...]
    preselected: bool
    scored: int = 0
    otherwise: int = 0
    relabelled: int = 0

    @property
    def fair(self) -> bool:
        return not any(self.reasons)


def compare_runs(
    runs: Sequence[Run], head: str | None = None, modalities: str | None = None, seed: int = 42
) -> Comparison:
    """Compare one entry of each run with that of the first: the best one, or the best of a head and a modality set.

    The best entry of a run was chosen by the very scores that are compared; name `head` and `modalities` to test what
    was planned beforehand. Raises `RunError` for fewer than two runs and for predictions that cannot be read.
    """
    if len(runs) < 2:
        raise RunError("one run alone has nothing to be compared with; name two or more")
    entries = [run.entry(head, modalities) for run in runs]
    reasons = ["", *(why_not_comparable(runs[0], run) for run in runs[1:])]
    fair = [index for index, reason in enumerate(reasons) if not reason]
    compared, hashes = fair[1:], [run.config.data_hash for run in runs]
    scored = max((index for index in fair if runs[index].config.corrections), default=0)
    otherwise = next((index for index in fair if hashes[index] != hashes[scored]), scored)
    read = {index: runs[index].out_of_fold(entries[index]) for index in fair if compared}
    predicted = {index: _labelled_by(out_of_fold, read[scored]) for index, out_of_fold in read.items()}
    results = [_paired(predicted[0], predicted[index], runs[index], seed) for index in compared]
    others, relabelled = dict[int, Difference](), 0
    if otherwise != scored:
        entries = [_rescored(entry, predicted.get(index)) for index, entry in enumerate(entries)]
        told = {index: _labelled_by(out_of_fold, read[otherwise]) for index, out_of_fold in read.items()}
        others = {index: _paired(told[0], told[index], runs[index], seed)[0] for index in compared}
        relabelled = int((told[0].targets.matrix != predicted[0].targets.matrix).any(1).sum())
    adjusted = holm([difference.p for difference, _, _ in results])
    disagreement = holm([p for _, p, _ in results])
    tests: list[RunTest | None] = [None] * len(runs)
    for index, (difference, p, samples), p_holm, mcnemar_holm in zip(
        compared, results, adjusted, disagreement, strict=True
    ):
        tests[index] = RunTest(difference, float(p_holm), p, float(mcnemar_holm), samples, others.get(index))
    told_apart = _differences(runs), tuple(tests), tuple(reasons), head is not None, scored, otherwise, relabelled
    return Comparison(tuple(runs), tuple(entries), *told_apart)


def why_not_comparable(one: Run, other: Run) -> str:
    """Say why the scores of two runs cannot be compared; "" if they can."""
    if one.config.task != other.config.task:
        return f"another task ({other.config.task})"
    if one.config.given_hash != other.config.given_hash:
        return "other data: labels, texts or photos of the labelled samples differ"
    if one.classes != other.classes:
        return "other classes: corrections left one without a sample"
    if one.config.splits_hash != other.config.splits_hash:
        seeds = [run.config.protocol.seeds for run in (one, other)]
        if one.config.folds == other.config.folds and seeds[0] != seeds[1]:
            return (
                f"other folds or validation rows ({seeds[0]} and {seeds[1]} seeds); --split-dir makes runs share them"
            )
        return "other folds; --split-dir makes runs share them"
    return ""


def flat_settings(config: RunConfig) -> dict[str, str]:
    """Dotted name -> text of every setting of a run, without paths and hashes of its data."""
    settings: dict[str, str] = {}
    for name, value in config.to_json().items():
        if name in ("encoders", "prefixes"):
            specs = [EncoderSpec.from_json(tower["spec"]) for tower in value]
            settings[name] = ", ".join(f"{spec.name} {spec.fingerprint[:8]}" for spec in specs)
        elif name == "table":
            settings[name] = ", ".join(column.label for column in config.table or ())
        elif name == "corrections":
            settings[LABELS] = f"{value['count']:,} by {Path(value['file']).name}, hash {value['sha256'][:8]}"
        elif name == "rare":
            settings[name] = str(config.rare)
        elif name not in LEFT_OUT:
            settings |= _flat(name, value)
    return settings


def flag_of(setting: str) -> str:
    """What a user calls a setting of `flat_settings`: the flag that sets it, where one does."""
    if setting in PLAIN or setting.startswith(("finetune.", "stage_1.")):
        return setting.rpartition(".")[2].replace("_", " ")
    return "--" + FLAGS.get(setting, setting.rpartition(".")[2]).replace("_", "-")


def _labelled_by(predictions: OutOfFold, labels: OutOfFold) -> OutOfFold:
    """Predictions of the samples that `labels` has, too, with its labels."""
    row_of = {id: row for row, id in enumerate(labels.ids)}
    rows = [row for row, id in enumerate(predictions.ids) if id in row_of]
    ids = tuple(predictions.ids[row] for row in rows)
    targets = labels.targets.take(np.array([row_of[id] for id in ids], int))
    groups = None if predictions.groups is None else predictions.groups[rows]
    return OutOfFold(ids, targets, predictions.chosen[:, rows], predictions.probabilities[rows], groups)


def _rescored(entry: Entry, predictions: OutOfFold | None) -> Entry:
    """The entry with the scores of its decisions against the labels of `predictions`."""
    if predictions is None or not predictions.ids:
        return entry
    probabilities = np.broadcast_to(predictions.probabilities, predictions.chosen.shape)
    scores = evaluate(predictions.targets, predictions.chosen, probabilities, groups=predictions.groups)
    of_choices = {"macro_f1", "micro_f1", "accuracy", "weighted_f1", "classes", "confusion", "kappa", *NUMBER_SCORES}
    names = of_choices & scores.keys()
    return Entry.from_json(entry.to_json() | {name: scores[name] for name in names})


def _paired(first: OutOfFold, second: OutOfFold, other: Run, seed: int) -> tuple[Difference, float, int]:
    """Test predictions of `other` against those of the first run: difference of scores, McNemar's p, number of
    samples."""
    row_of = {id: row for row, id in enumerate(second.ids)}
    shared = [(row, row_of[id]) for row, id in enumerate(first.ids) if id in row_of]
    if not shared:
        raise RunError(f"{other.folder}: no sample out of fold is one of the first run; train one of them again")
    rows, other_rows = map(np.array, zip(*shared, strict=True))
    targets = first.targets.take(rows)
    chosen, other_chosen = first.chosen[:, rows], second.chosen[:, other_rows]
    groups = None if first.groups is None else first.groups[rows]
    if targets.numeric:
        return paired_difference(targets, other_chosen, chosen, seed, groups), math.nan, len(rows)
    right, other_right = (majority((choice == targets.matrix).all(-1)) for choice in (chosen, other_chosen))
    return paired_difference(targets, other_chosen, chosen, seed, groups), mcnemar(other_right, right), len(rows)


def _differences(runs: Sequence[Run]) -> dict[str, tuple[str, ...]]:
    columns = [flat_settings(run.config) for run in runs]
    names = dict.fromkeys(name for settings in columns for name in settings)
    rows = {name: tuple(settings.get(name, MISSING) for settings in columns) for name in names}
    return {name: values for name, values in rows.items() if len(set(values)) > 1}


def _flat(name: str, value: Any) -> dict[str, str]:
    if isinstance(value, Mapping):
        return {path: text for key, inner in value.items() for path, text in _flat(f"{name}.{key}", inner).items()}
    if name == "pairs":
        return {"heads": ", ".join(head_label(head, modality) for head, modality in value)}
    return {name: ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)}


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
