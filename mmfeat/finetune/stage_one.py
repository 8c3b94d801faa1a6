"""Stage 1: the head of a run, trained again on each fold, because a run keeps only the heads that predict."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmfeat.errors import RunError
from mmfeat.heads.jobs import Fitted
from mmfeat.heads.registry import FUSIONS, HeadSettings
from mmfeat.runs.run import Run
from mmfeat.sweep.engine import Engine
from mmfeat.sweep.entries import TrainedEntry, assemble, best_outcome
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.trials import Outcome, load_outcome, refit, run_trials


@dataclass(frozen=True)
class ChosenHead:
    """A head of a run with the settings that validated best there: in each fold, and over all of them."""

    head: str
    modality: str
    folds: list[HeadSettings]
    best: HeadSettings
    trials: int

    @property
    def wanted(self) -> list[HeadSettings]:
        """Every setting once."""
        return list(dict.fromkeys([*self.folds, self.best]))


@dataclass(frozen=True)
class StageOne:
    """The head's entry, its tensors by cell (fold after fold, as `Task.cells`), and those trained on everything."""

    entry: TrainedEntry
    cells: list[dict[str, Tensor]]
    finals: list[dict[str, Tensor]]
    fitted: list[Fitted]


def has_fusion(run: Run) -> bool:
    """Whether stage 2 can start from one of its heads."""
    return not run.is_finetuned and any(entry.head in FUSIONS for entry in run.leaderboard)


def best_parent(runs: Sequence[Run], head: str | None, modalities: str | None) -> Run:
    """The run whose best fusion validated best; runs that lack it, or their trials, are passed over."""
    scores: list[float] = []
    for run in runs:
        scores.append(-1.0)
        with contextlib.suppress(RunError):
            found = best_fusion(run, head, modalities)
            scores[-1] = best_outcome(trials_of(run, *found)).score
    return runs[max(range(len(runs)), key=scores.__getitem__)]


def best_fusion(run: Run, head: str | None, modalities: str | None) -> tuple[str, str]:
    """(head, modalities) of the fusion that validated best; its scores on test rows have no say.

    Without `modalities` one on both is taken if there is any.
    """
    entries = [each for each in run.matching(head, modalities) if each.head in FUSIONS]
    if not entries:
        known = ", ".join(each.label for each in run.leaderboard if each.head in FUSIONS)
        raise RunError(f"{run.folder}: stage 2 needs a fusion; it has {known or 'none'}: train one with mmfeat heads")
    if modalities is None:
        entries = [each for each in entries if each.modalities == "both"] or entries
    best = max(entries, key=lambda each: best_outcome(trials_of(run, each.head, each.modalities)).score)
    return best.head, best.modalities


def trials_of(run: Run, head: str, modalities: str) -> list[Outcome]:
    """The finished trials of one head."""
    folder = run.folder / f"{head}-{modalities}" / "trials"
    found = [load_outcome(path.with_suffix("")) for path in sorted(folder.glob("*.json"))]
    outcomes = [outcome for outcome in found if outcome is not None]
    if not outcomes:
        raise RunError(f"{folder}: no trials of this head; delete the run and train it again with mmfeat heads")
    return outcomes


def chosen_head(run: Run, head: str, modality: str) -> ChosenHead:
    """The head with the settings that its run chose."""
    outcomes = trials_of(run, head, modality)
    folds = [
        max(outcomes, key=lambda outcome: outcome.scores.mean(0)[fold]).settings
        for fold in range(len(run.config.folds))
    ]
    return ChosenHead(head, modality, folds, best_outcome(outcomes).settings, len(outcomes))


def train_stage_one(
    problem: Problem, engine: Engine, chosen: ChosenHead, adjustment: float | None, advance: Callable[[int], None]
) -> StageOne:
    """Each fold with its settings, and heads on everything with the best; equal to the run's up to rounding."""
    wanted = chosen.wanted
    trained = run_trials(problem, engine, chosen.head, chosen.modality, wanted, advance, keep=True)
    places = [wanted.index(settings) for settings in chosen.folds]
    entry = assemble(problem, chosen.head, chosen.modality, trained, adjustment, places)
    # The optimism belongs to the search of the run, not to this training.
    record = replace(entry.entry, trials=chosen.trials, settings=chosen.best, optimism=None)
    cells = [
        _tensors(trained[places[fold]].fitted[number]) for number, (fold, _, _) in enumerate(problem.cells(chosen.head))
    ]
    fitted = refit(problem, engine, chosen.head, chosen.modality, trained[wanted.index(chosen.best)])
    return StageOne(replace(entry, entry=record), cells, list(map(_tensors, fitted)), fitted)


def _tensors(fitted: Fitted) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value.copy()) for name, value in fitted.tensors.items()}
