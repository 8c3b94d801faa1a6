"""Ensembles of a sweep's entries: which heads predict together, and how much each counts.

The weights for a fold are fitted on the predictions out of fold of the other folds, never on the rows that score the
ensemble; a single fold's weights are fitted on its validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfeat.evaluation.blending import blend, fit_stacking, greedy_weights, head_logits, log_loss, mean_weights
from mmfeat.evaluation.decisions import Decision, fit_decision
from mmfeat.runs.entry import TOGETHER, Rule
from mmfeat.runs.leaderboard import BOTH
from mmfeat.samples.labels import Targets
from mmfeat.sweep.entries import TrainedEntry, scored_entry
from mmfeat.sweep.problem import Problem
from mmfeat.system.hardware import cpu_count

NO_CANDIDATES = ("prior",)
PRODUCT = "product"
Fit = tuple[list[int], Rule]  # the numbers of the members, and how they are combined


@dataclass(frozen=True)
class Candidates:
    """Calibrated log-probabilities (H, N, C) of H entries, means over their seeds; numbers in a regression."""

    entries: Sequence[TrainedEntry]
    log_probabilities: np.ndarray
    decision: Decision  # of any entry and fold

    def at(self, rows: np.ndarray) -> Candidates:
        """The candidates' values at these rows."""
        return Candidates(self.entries, self.log_probabilities[:, rows], self.decision)

    def combine(self, fit: Fit) -> np.ndarray:
        """(N, C) logits of an ensemble of these candidates."""
        members, rule = fit
        return combine(rule, self.log_probabilities[members], self.decision)


def ensemble_entries(
    problem: Problem, entries: Sequence[TrainedEntry], adjustment: float | None, folder: Path
) -> list[TrainedEntry]:
    """One entry for each way to combine; none where there are fewer than two heads, and no product where fewer than two
    modalities have heads of their own, or labels are numbers."""
    entries = [entry for entry in entries if entry.entry.head not in NO_CANDIDATES]
    if len(entries) < 2:
        return []
    kinds = _kinds(problem.targets, {entry.entry.modalities for entry in entries} - {BOTH})
    logits = {kind: np.full((1, *entries[0].logits.shape[1:]), np.nan) for kind in kinds}
    decisions: dict[str, list[Decision]] = {kind: [] for kind in kinds}
    with ThreadPoolExecutor(cpu_count()) as threads:
        folds = range(len(problem.splits))
        fits = threads.map(lambda fold: list(_fit_fold(problem, entries, kinds, fold, adjustment)), folds)
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
    if rule.stacking is None or rule.intercept is None:
        raise ValueError("neither weights nor stacking")
    inputs, classes = head_logits(log_probabilities, decision.multilabel), len(rule.intercept)
    weights = np.reshape(rule.stacking, (-1, classes, classes))
    return inputs.mean(0) + np.tensordot(inputs.swapaxes(0, 1), weights, axes=2) + np.array(rule.intercept)


def _blended(log_probabilities: np.ndarray, weights: np.ndarray, decision: Decision) -> np.ndarray:
    """(N, C) logits of the weighted mean of the heads' probabilities, or of their predicted numbers."""
    if not decision.offsets:
        return np.tensordot(weights / weights.sum(), log_probabilities, axes=1)
    return blend(log_probabilities, weights, decision.multilabel)


def _kinds(targets: Targets, alone: set[str]) -> list[str]:
    """The ways to combine: `greedy` weights of numbers are those of a stacking already, and a product takes heads on
    several modalities, each `alone`."""
    without = {"stacking", PRODUCT} if targets.numeric else {PRODUCT} if len(alone) < 2 else set()
    return [kind for kind in KINDS if kind not in without]


def _fit_fold(
    problem: Problem, entries: Sequence[TrainedEntry], kinds: Sequence[str], fold: int, adjustment: float | None
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
    for kind in kinds:
        fitted = _fit(kind, seen, labels, problem.seed)
        decision = fit_decision(seen.combine(fitted), labels, prior, adjustment, problem.seed)
        yield kind, unseen.combine(fitted), decision


def _entry(
    problem: Problem, entries: Sequence[TrainedEntry], kind: str, logits: np.ndarray, decisions: list[Decision],
    adjustment: float | None, folder: Path,
) -> TrainedEntry:  # fmt: skip
    """Score an ensemble, fit the one that predicts on all tested rows, and save it."""
    tested = problem.splits.tested
    members, rule = _fit(kind, _out_of_fold(problem, entries).at(tested), problem.targets.take(tested), problem.seed)
    trained = scored_entry(
        problem, logits, decisions, [], adjustment,
        head=kind,
        modalities=TOGETHER,
        members=tuple(entries[member].name for member in members),
        rule=rule,
    )  # fmt: skip
    return trained.save(folder, problem)


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


def _fit(kind: str, candidates: Candidates, targets: Targets, seed: int) -> Fit:
    """Fit an ensemble of this kind; the mean where the heads are no better than the shares of the classes, by more than
    two standard errors of the log-loss. What is learned of such heads is what they have seen of the scored labels."""
    mean = _mean(candidates, targets, seed)
    if targets.numeric:
        return KINDS[kind](candidates, targets, seed)
    shares = np.tensordot(np.array(mean[1].weights), np.exp(candidates.log_probabilities), axes=1)
    pair = shares, targets.prior
    known, chance = (np.where(targets.matrix, one, 1 - one if targets.multilabel else 1) for one in pair)
    gains = (_log(known) - _log(chance)).sum(1)
    return KINDS[kind](candidates, targets, seed) if gains.sum() > 2 * np.sqrt((gains**2).sum()) else mean


def _weighted(weights: np.ndarray) -> Fit:
    return list(range(len(weights))), Rule(weights=tuple(weights.tolist()))


def _mean(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    """Equal weights for all heads that see both modalities, or for all heads where none does."""
    both = np.array([entry.entry.modalities == BOTH for entry in candidates.entries], float)
    weights = both / both.sum() if both.any() else mean_weights(len(both))
    return _weighted(weights)


def _greedy(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    """Half greedy selection, half equal weights: selection alone follows the luck of some rows. Numbers: see there."""
    selected = greedy_weights(candidates.log_probabilities, targets, seed=seed)
    return _weighted(selected if targets.numeric else (selected + mean_weights(len(selected))) / 2)


def _stacking(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    return _product(candidates, list(range(len(candidates.entries))), targets)


def _best_of_each(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    """The product of the best head, by log-loss, on each modality alone: few parameters, so "both" is no risk."""
    best: dict[str, tuple[float, int]] = {}
    for member, entry in enumerate(candidates.entries):
        loss = log_loss(head_logits(candidates.log_probabilities[member], candidates.decision.multilabel), targets)[0]
        best[entry.entry.modalities] = min(best.get(entry.entry.modalities, (np.inf, 0)), (loss, member))
    return _product(candidates, [member for modality, (_, member) in best.items() if modality != BOTH], targets)


def _product(candidates: Candidates, members: list[int], targets: Targets) -> Fit:
    """Those of the members that count, and their powers as a correction of the mean of their logits."""
    powers, intercept = fit_stacking(candidates.log_probabilities[members], targets)
    kept = np.flatnonzero(powers) if powers.any() else np.arange(len(powers))
    corrections = np.kron((powers[kept] - 1 / len(kept))[:, None], np.eye(len(intercept)))
    rule = Rule(stacking=tuple(map(tuple, corrections.tolist())), intercept=tuple(intercept.tolist()))
    return [members[number] for number in kept], rule


KINDS: dict[str, Callable[[Candidates, Targets, int], Fit]] = {
    "mean": _mean,
    "greedy": _greedy,
    "stacking": _stacking,
    PRODUCT: _best_of_each,
}
