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
    from mmfeat.sweep.problem import Problem


def cross_fit(
    problem: Problem, logits: np.ndarray, validation: list[np.ndarray], adjustment: float | None
) -> list[Decision]:
    """A decision for each fold, fitted on the test rows of the others; on validation rows where there is one fold."""
    everything = range(len(problem.splits))
    decisions = []
    for fold in everything:
        tests = [problem.splits.fold(other, 0).test for other in everything if other != fold]
        prior = problem.targets.take(problem.splits.fold(fold, 0).train).prior
        if tests:
            rows = np.concatenate(tests)
            pooled, labels = _pooled(logits, rows), _repeated(problem.targets, rows, len(logits))
        else:
            cells = [problem.splits.fold(fold, repeat).validation for repeat in range(len(logits))]
            pooled, labels = np.concatenate(validation), problem.targets.take(np.concatenate(cells))
        decisions.append(fit_decision(pooled, labels, prior, adjustment, problem.seed))
    return decisions


def fit_on_all(problem: Problem, logits: np.ndarray, adjustment: float | None) -> Decision:
    """The decision of the final heads, fitted on all predictions out of fold."""
    rows = problem.splits.tested
    labels = _repeated(problem.targets, rows, len(logits))
    return fit_decision(_pooled(logits, rows), labels, problem.targets.prior, adjustment, problem.seed)


def decide(problem: Problem, logits: np.ndarray, decisions: list[Decision]) -> tuple[np.ndarray, np.ndarray]:
    """(S, N, C) choices and probabilities, each fold by its own decision; False and NaN where no fold tests."""
    chosen, probabilities = np.zeros(logits.shape, bool), np.full(logits.shape, np.nan)
    for fold, decision in enumerate(decisions):
        test = problem.splits.fold(fold, 0).test
        chosen[:, test] = decision.choose(logits[:, test])
        probabilities[:, test] = decision.probabilities(logits[:, test])
    return chosen, probabilities


def score(problem: Problem, logits: np.ndarray, decisions: list[Decision]) -> dict[str, Any]:
    """Every score of the tested rows, by its name in an `Entry`."""
    chosen, probabilities = (values[:, problem.splits.tested] for values in decide(problem, logits, decisions))
    values = evaluate(problem.targets.take(problem.splits.tested), chosen, probabilities, problem.seed)
    return vars(convert(values, Scores))


def write_predictions(folder: Path, problem: Problem, logits: np.ndarray, decisions: list[Decision]) -> None:
    """`out_of_fold.csv`: id, label, the choice of each seed, and the mean probability of each class."""
    chosen, probabilities = decide(problem, logits, decisions)
    classes, means = problem.targets.classes, probabilities.mean(0)
    seeds = [f"predicted_{seed + 1}" for seed in range(len(logits))]
    rows = [
        [
            problem.ids[row],
            names_of(problem.targets.matrix[row], classes),
            *(names_of(choice[row], classes) for choice in chosen),
            *(f"{value:.6f}" for value in means[row]),
        ]
        for row in problem.splits.tested
    ]
    header = ["id", "label", *seeds, *(f"p_{name}" for name in classes)]
    write_atomic(folder / OUT_OF_FOLD, csv_text(header, rows).encode())


def _pooled(logits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return logits[:, rows].reshape(-1, logits.shape[-1])


def _repeated(targets: Targets, rows: np.ndarray, times: int) -> Targets:
    return targets.take(np.tile(rows, times))
