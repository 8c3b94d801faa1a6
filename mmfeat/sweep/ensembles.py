"""Ensembles of a sweep's entries: which heads predict together, and how much each counts.

The weights for a fold are fitted on the predictions out of fold of the other folds, never on the rows that score the
ensemble; a single fold's weights are fitted on its validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.evaluation.blending import blend, fit_stacking, greedy_weights, mean_weights
from mmfeat.evaluation.decisions import Decision, fit_decision
from mmfeat.runs.entry import TOGETHER, Rule, convert
from mmfeat.samples.labels import Targets
from mmfeat.sweep.entries import TrainedEntry, scored_entry
from mmfeat.sweep.problem import Problem
from mmfeat.system.hardware import cpu_count

NO_CANDIDATES = ("prior",)
Combine = Callable[[np.ndarray], np.ndarray]  # (H, N, C) log-probabilities -> (N, C) logits
# A rule, its record for JSON, and its (M, C) logits of the rows that it was fitted on, for fitting its decision.
Fit = tuple[Combine, dict[str, Any], np.ndarray]


@dataclass(frozen=True)
class Candidates:
    """Calibrated log-probabilities (H, N, C) of H entries, means over their seeds; numbers in a regression."""

    entries: Sequence[TrainedEntry]
    log_probabilities: np.ndarray
    decision: Decision  # of any entry and fold

    def at(self, rows: np.ndarray) -> Candidates:
        """The candidates' values at these rows."""
        return Candidates(self.entries, self.log_probabilities[:, rows], self.decision)


def ensemble_entries(
    problem: Problem, entries: Sequence[TrainedEntry], adjustment: float | None, folder: Path
) -> list[TrainedEntry]:
    """One entry for each way to combine; none where there are fewer than two heads."""
    entries = [entry for entry in entries if entry.entry.head not in NO_CANDIDATES]
    if len(entries) < 2:
        return []
    kinds = _kinds(problem.targets)
    logits = {kind: np.full((1, *entries[0].logits.shape[1:]), np.nan) for kind in kinds}
    decisions: dict[str, list[Decision]] = {kind: [] for kind in kinds}
    with ThreadPoolExecutor(cpu_count()) as threads:
        fits = threads.map(lambda fold: list(_fit_fold(problem, entries, fold, adjustment)), range(len(problem.splits)))
        for fold, fitted in enumerate(fits):
            for kind, given, decision in fitted:
                logits[kind][0, problem.splits.fold(fold, 0).test] = given
                decisions[kind].append(decision)
        return list(
            threads.map(
                lambda kind: _entry(problem, entries, kind, logits[kind], decisions[kind], adjustment, folder), kinds
            )
        )


def combine(rule: Rule, log_probabilities: np.ndarray, decision: Decision) -> np.ndarray:
    """(N, C) logits of a saved ensemble from the (H, N, C) log-probabilities of its `members`, in order."""
    if rule.weights is not None:
        return _blended(log_probabilities, np.array(rule.weights), decision)
    return _stacked(rule, decision.multilabel)(log_probabilities)


def _blended(log_probabilities: np.ndarray, weights: np.ndarray, decision: Decision) -> np.ndarray:
    """(N, C) logits of the weighted mean of the heads' probabilities, or of their predicted numbers."""
    if not decision.offsets:
        return np.tensordot(weights / weights.sum(), log_probabilities, axes=1)
    return blend(log_probabilities, weights, decision.multilabel)


def _kinds(targets: Targets) -> list[str]:
    """The ways to combine: `greedy` weights of numbers are those of a stacking already."""
    return [kind for kind in KINDS if kind != "stacking" or not targets.numeric]


def _fit_fold(
    problem: Problem, entries: Sequence[TrainedEntry], fold: int, adjustment: float | None
) -> Iterator[tuple[str, np.ndarray, Decision]]:
    """Fit each kind on the other folds, or in a holdout on the validation rows; gives the (n, C) logits of the fold's
    test rows and the decision on them. The members use their decisions of this fold: others have seen its labels."""
    parts = [problem.splits.fold(other, 0) for other in range(len(problem.splits))]
    tests = [part.test for other, part in enumerate(parts) if other != fold]
    rows = np.concatenate(tests) if tests else parts[fold].validation
    given = [entry.logits[:, rows] if tests else entry.validation[0][None] for entry in entries]
    seen = _decided_by(fold, entries, given)
    unseen = _decided_by(fold, entries, [entry.logits[:, parts[fold].test] for entry in entries])
    labels, prior = problem.targets.take(rows), problem.targets.take(parts[fold].train).prior
    for kind in _kinds(labels):
        rule, _, fitted_on = KINDS[kind](seen, labels, problem.seed)
        decision = fit_decision(fitted_on, labels, prior, adjustment, problem.seed)
        yield kind, rule(unseen.log_probabilities), decision


def _entry(
    problem: Problem, entries: Sequence[TrainedEntry], kind: str, logits: np.ndarray, decisions: list[Decision],
    adjustment: float | None, folder: Path,
) -> TrainedEntry:  # fmt: skip
    """Score an ensemble, fit the one that predicts on all tested rows, and save it."""
    tested = problem.splits.tested
    _, plain, _ = KINDS[kind](_out_of_fold(problem, entries).at(tested), problem.targets.take(tested), problem.seed)
    trained = scored_entry(
        problem, logits, decisions, [], adjustment,
        head=kind,
        modalities=TOGETHER,
        members=tuple(member.name for member in entries),
        rule=convert(plain, Rule),
    )  # fmt: skip
    trained.save(folder, problem)
    return trained


def _decided_by(fold: int, entries: Sequence[TrainedEntry], logits: Sequence[np.ndarray]) -> Candidates:
    """The candidates that give these (S, N, C) logits, each with its decision of one fold."""
    pairs = [(entry.decisions[fold], given) for entry, given in zip(entries, logits, strict=True)]
    mean = np.stack([decision.probabilities(given).mean(0) for decision, given in pairs])
    decision = entries[0].decisions[fold]
    return Candidates(entries, _log(mean) if decision.offsets else mean, decision)


def _out_of_fold(problem: Problem, entries: Sequence[TrainedEntry]) -> Candidates:
    """The candidates on all rows, each fold's rows with the decisions of that fold."""
    mean = np.full((len(entries), *entries[0].logits.shape[1:]), np.nan)
    for fold in range(len(problem.splits)):
        test = problem.splits.fold(fold, 0).test
        mean[:, test] = _decided_by(fold, entries, [entry.logits[:, test] for entry in entries]).log_probabilities
    return Candidates(entries, mean, entries[0].decisions[0])


def _log(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, 1e-12))


def _weighted(candidates: Candidates, weights: np.ndarray) -> Fit:
    def rule(log_probabilities: np.ndarray) -> np.ndarray:
        return _blended(log_probabilities, weights, candidates.decision)

    return rule, {"weights": weights.tolist()}, rule(candidates.log_probabilities)


def _mean(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    """Equal weights for all heads that see both modalities, or for all heads where none does."""
    both = np.array([entry.entry.modalities == "both" for entry in candidates.entries], float)
    weights = both / both.sum() if both.any() else mean_weights(len(both))
    return _weighted(candidates, weights)


def _greedy(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    """Half greedy selection, half equal weights: selection alone follows the luck of some rows. Numbers: see there."""
    selected = greedy_weights(candidates.log_probabilities, targets, seed=seed)
    return _weighted(candidates, selected if targets.numeric else (selected + mean_weights(len(selected))) / 2)


def _stacking(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    fitted = fit_stacking(candidates.log_probabilities, targets, seed)
    record = {
        "stacking": fitted.weights.tolist(), "intercept": fitted.intercept.tolist(), "penalty": fitted.penalty
    }  # fmt: skip
    return fitted.logits, record, fitted.out_of_fold


def _stacked(rule: Rule, multilabel: bool) -> Combine:
    from mmfeat.evaluation.blending import Stacking

    if rule.stacking is None or rule.intercept is None or rule.penalty is None:
        raise ValueError("neither weights nor stacking")
    weights, intercept = np.array(rule.stacking), np.array(rule.intercept)
    return Stacking(weights, intercept, rule.penalty, np.empty((0, len(intercept))), multilabel).logits


KINDS: dict[str, Callable[[Candidates, Targets, int], Fit]] = {
    "mean": _mean,
    "greedy": _greedy,
    "stacking": _stacking,
}
