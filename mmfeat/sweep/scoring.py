"""Scoring: from logits out of fold to choices, probabilities and metrics; nothing is fitted on rows that it scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.evaluation.decisions import Decision, fit_decision
from mmfeat.evaluation.metrics import evaluate
from mmfeat.runs.entry import Scores, convert
from mmfeat.runs.out_of_fold import OUT_OF_FOLD
from mmfeat.samples.labels import Targets, names_of
from mmfeat.system.files import csv_text, write_atomic

if TYPE_CHECKING:
    from mmfeat.sweep.task import Task


def cross_fit(task: Task, logits: np.ndarray, validation: list[np.ndarray], adjustment: float | None) -> list[Decision]:
    """A decision for each fold, fitted on the test rows of the others; on validation rows where there is one fold."""
    everything = range(len(task.splits))
    decisions = []
    for fold in everything:
        tests = [task.splits.fold(other, 0).test for other in everything if other != fold]
        prior = task.targets.take(task.splits.fold(fold, 0).train).prior
        if tests:
            rows = np.concatenate(tests)
            pooled, labels = _pooled(logits, rows), _repeated(task.targets, rows, len(logits))
        else:
            cells = [task.splits.fold(fold, repeat).validation for repeat in range(len(logits))]
            pooled, labels = np.concatenate(validation), task.targets.take(np.concatenate(cells))
        decisions.append(fit_decision(pooled, labels, prior, adjustment, task.seed))
    return decisions


def fit_on_all(task: Task, logits: np.ndarray, adjustment: float | None) -> Decision:
    """The decision of the final heads, fitted on all predictions out of fold."""
    rows = task.splits.tested
    labels = _repeated(task.targets, rows, len(logits))
    return fit_decision(_pooled(logits, rows), labels, task.targets.prior, adjustment, task.seed)


def decide(task: Task, logits: np.ndarray, decisions: list[Decision]) -> tuple[np.ndarray, np.ndarray]:
    """(S, N, C) choices and probabilities, each fold by its own decision; False and NaN where no fold tests."""
    chosen, probabilities = np.zeros(logits.shape, bool), np.full(logits.shape, np.nan)
    for fold, decision in enumerate(decisions):
        test = task.splits.fold(fold, 0).test
        chosen[:, test] = decision.choose(logits[:, test])
        probabilities[:, test] = decision.probabilities(logits[:, test])
    return chosen, probabilities


def score(task: Task, logits: np.ndarray, decisions: list[Decision]) -> dict[str, Any]:
    """Every score of the tested rows, by its name in an `Entry`."""
    chosen, probabilities = (values[:, task.splits.tested] for values in decide(task, logits, decisions))
    values = evaluate(task.targets.take(task.splits.tested), chosen, probabilities, task.seed)
    return vars(convert(values, Scores))


def write_predictions(folder: Path, task: Task, logits: np.ndarray, decisions: list[Decision]) -> None:
    """`out_of_fold.csv`: id, label, the choice of each seed, and the mean probability of each class."""
    chosen, probabilities = decide(task, logits, decisions)
    classes, means = task.targets.classes, probabilities.mean(0)
    seeds = [f"predicted_{seed + 1}" for seed in range(len(logits))]
    rows = [
        [
            task.ids[row],
            names_of(task.targets.matrix[row], classes),
            *(names_of(choice[row], classes) for choice in chosen),
            *(f"{value:.6f}" for value in means[row]),
        ]
        for row in task.splits.tested
    ]
    header = ["id", "label", *seeds, *(f"p_{name}" for name in classes)]
    write_atomic(folder / OUT_OF_FOLD, csv_text(header, rows).encode())


def _pooled(logits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return logits[:, rows].reshape(-1, logits.shape[-1])


def _repeated(targets: Targets, rows: np.ndarray, times: int) -> Targets:
    return targets.take(np.tile(rows, times))
