"""Ensembles of a sweep's entries: which heads predict together, and how much each counts.

Weights for a fold are fitted on the predictions out of fold of the other folds, so the rows that score an ensemble
had no say in it. Where there is one fold, they are fitted on its validation rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.calibration import fit_decision
from mmfeat.ensembles import blend, fit_stacking, greedy_weights, mean_weights
from mmfeat.entries import METRICS, Entry
from mmfeat.files import write_json
from mmfeat.metrics import macro_f1
from mmfeat.scoring import decide, fit_on_all, score, write_predictions
from mmfeat.targets import Targets
from mmfeat.trials import Task

TOGETHER = "ensemble"  # stands where an entry names its modalities
NO_CANDIDATES = ("prior",)
Rule = Callable[[np.ndarray], np.ndarray]  # (H, N, C) log-probabilities -> (N, C) logits
# A rule, what is saved of it, and the (M, C) logits of the rows it was fitted on, from which its decision is fitted.
Fit = tuple[Rule, dict[str, Any], np.ndarray]


@dataclass(frozen=True)
class Candidates:
    """Calibrated log-probabilities (H, N, C) of H entries, the mean over their seeds, and what each would choose."""

    entries: Sequence[Entry]
    log_probabilities: np.ndarray
    chosen: np.ndarray
    multilabel: bool

    def at(self, rows: np.ndarray) -> Candidates:
        """Only these rows."""
        return Candidates(self.entries, self.log_probabilities[:, rows], self.chosen[:, rows], self.multilabel)


def ensemble_entries(task: Task, entries: Sequence[Entry], adjustment: float | None, folder: Path) -> list[Entry]:
    """One entry for each way to combine; none where there are fewer than two heads."""
    entries = [entry for entry in entries if entry.record["head"] not in NO_CANDIDATES]
    if len(entries) < 2:
        return []
    return [_ensemble(task, entries, kind, adjustment, folder) for kind in KINDS]


def combine(record: dict[str, Any], log_probabilities: np.ndarray, multilabel: bool) -> np.ndarray:
    """(N, C) logits of a saved ensemble from those of its members (H, N, C), in the order of its `members`."""
    rule = record["rule"]
    if "weights" in rule:
        return blend(log_probabilities, np.array(rule["weights"]), multilabel)
    return _stacked(rule, multilabel)(log_probabilities)


def _ensemble(task: Task, entries: Sequence[Entry], kind: str, adjustment: float | None, folder: Path) -> Entry:
    candidates, validation = _candidates(task, entries), _validation(task, entries)
    logits = np.full((1, *candidates.log_probabilities.shape[1:]), np.nan)
    folds, decisions = [task.splits.fold(number, 0) for number in range(len(task.splits))], []
    for fold in folds:
        tests = [other.test for other in folds if other is not fold]
        rows = np.concatenate(tests) if tests else fold.validation
        labels, prior = task.targets.take(rows), task.targets.take(fold.train).prior
        rule, _, seen = KINDS[kind](candidates.at(rows) if tests else validation, labels, task.seed)
        logits[0, fold.test] = rule(candidates.log_probabilities[:, fold.test])
        decisions.append(fit_decision(seen, labels, prior, adjustment, task.seed))
    tested = task.splits.tested
    _, plain, _ = KINDS[kind](candidates.at(tested), task.targets.take(tested), task.seed)
    record = {
        "head": kind,
        "modalities": TOGETHER,
        **score(task, logits, decisions),
        "decision": fit_on_all(task, logits, adjustment).to_json(),
        "members": [entry.name for entry in entries],
        "rule": plain,
        "seconds": 0.0,
    }
    place = folder / f"{kind}-{TOGETHER}"
    write_predictions(place, task, logits, decisions)
    write_json(place / METRICS, record)
    return Entry(record, logits, decisions, [])


def _candidates(task: Task, entries: Sequence[Entry]) -> Candidates:
    pairs = [decide(task, entry.logits, entry.decisions) for entry in entries]
    mean = np.stack([np.log(np.maximum(probabilities.mean(0), 1e-12)) for _, probabilities in pairs])
    chosen = np.stack([_adjusted(task, entry) for entry in entries])
    return Candidates(entries, mean, chosen, task.targets.multilabel)


def _adjusted(task: Task, entry: Entry) -> np.ndarray:
    """(N, C) log-probabilities as the entry's decisions see them: what its choices are the largest of."""
    adjusted = np.full(entry.logits.shape[1:], np.nan)
    for fold, decision in enumerate(entry.decisions):
        test = task.splits.fold(fold, 0).test
        adjusted[test] = _shifted(decision, entry.logits[:, test]).mean(0)
    return adjusted


def _shifted(decision: Any, logits: np.ndarray) -> np.ndarray:
    scaled = logits / decision.temperature - np.array(decision.offsets)
    if decision.multilabel:
        return -np.logaddexp(0, -scaled)
    return scaled - np.logaddexp.reduce(scaled, axis=-1, keepdims=True)


def _validation(task: Task, entries: Sequence[Entry]) -> Candidates:
    """Of the first cell, which all entries have: its validation rows are theirs alike."""
    log_probabilities = [entry.decisions[0].log_probabilities(entry.validation[0]) for entry in entries]
    chosen = [_shifted(entry.decisions[0], entry.validation[0]) for entry in entries]
    return Candidates(entries, np.stack(log_probabilities), np.stack(chosen), task.targets.multilabel)


def _weighted(candidates: Candidates, weights: np.ndarray) -> Fit:
    def rule(log_probabilities: np.ndarray) -> np.ndarray:
        return blend(log_probabilities, weights, candidates.multilabel)

    return rule, {"weights": weights.tolist()}, rule(candidates.log_probabilities)


def _best(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    """The seeds of the best head together."""
    shown = candidates.chosen
    chosen = shown > np.log(0.5) if targets.multilabel else shown == shown.max(-1, keepdims=True)
    scores = [macro_f1(targets.matrix, choice) for choice in chosen]
    return _weighted(candidates, np.eye(len(scores))[int(np.argmax(scores))])


def _mean(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    """All heads that see both modalities, or all there are."""
    both = np.array([entry.record["modalities"] == "both" for entry in candidates.entries], float)
    weights = both / both.sum() if both.any() else mean_weights(len(both))
    return _weighted(candidates, weights)


def _greedy(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    """Half by greedy selection, half alike: selection alone follows the luck of some rows."""
    selected = greedy_weights(candidates.log_probabilities, targets, seed=seed)
    return _weighted(candidates, (selected + mean_weights(len(selected))) / 2)


def _stacking(candidates: Candidates, targets: Targets, seed: int) -> Fit:
    fitted = fit_stacking(candidates.log_probabilities, targets, seed)
    record = {
        "stacking": fitted.weights.tolist(), "intercept": fitted.intercept.tolist(), "penalty": fitted.penalty
    }  # fmt: skip
    return fitted.logits, record, fitted.out_of_fold


def _stacked(rule: dict[str, Any], multilabel: bool) -> Rule:
    from mmfeat.ensembles import Stacking

    weights, intercept = np.array(rule["stacking"]), np.array(rule["intercept"])
    return Stacking(weights, intercept, rule["penalty"], np.empty((0, len(intercept))), multilabel).logits


KINDS: dict[str, Callable[[Candidates, Targets, int], Fit]] = {
    "seed-average": _best,
    "mean": _mean,
    "greedy": _greedy,
    "stacking": _stacking,
}
