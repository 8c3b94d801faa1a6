"""Stage 1: the head of a run, trained again on each fold, because a run keeps only the heads that predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfeat.engine import Engine
from mmfeat.entries import Entry, Plan, assemble, best_outcome, refit
from mmfeat.errors import RunError
from mmfeat.heads import FUSIONS
from mmfeat.heads.jobs import Fitted
from mmfeat.heads.settings import HeadSettings, settings_of
from mmfeat.runs import Run
from mmfeat.trials import Outcome, Task, load_outcome, run_trials


@dataclass(frozen=True)
class StageOne:
    """The head's entry, its tensors by cell (fold after fold, as `Task.cells`), and those trained on everything."""

    entry: Entry
    settings: list[HeadSettings]  # of each fold
    cells: list[dict[str, Tensor]]
    finals: list[Fitted]
    best: HeadSettings


def has_fusion(run: Run) -> bool:
    """Whether stage 2 can start from one of its heads."""
    return not run.is_finetuned and any(entry["head"] in FUSIONS for entry in run.leaderboard)


def best_fusion(run: Run, head: str | None, modalities: str | None) -> tuple[str, str]:
    """(head, modalities) of the fusion that validated best; its scores on test rows have no say.

    Without `modalities` one on both is taken if there is any.
    """
    entries = [each for each in run.matching(head, modalities) if each["head"] in FUSIONS]
    if not entries:
        known = ", ".join(
            f"{each['head']} on {each['modalities']}" for each in run.leaderboard if each["head"] in FUSIONS
        )
        raise RunError(f"{run.folder}: stage 2 needs a fusion; it has {known or 'none'}: train one with mmfeat heads")
    if modalities is None:
        entries = [each for each in entries if each["modalities"] == "both"] or entries
    best = max(entries, key=lambda each: best_outcome(trials_of(run, each["head"], each["modalities"])).score)
    return best["head"], best["modalities"]


def trials_of(run: Run, head: str, modalities: str) -> list[Outcome]:
    """The finished trials of one head."""
    folder = run.folder / f"{head}-{modalities}" / "trials"
    found = [load_outcome(path.with_suffix("")) for path in sorted(folder.glob("*.json"))]
    outcomes = [outcome for outcome in found if outcome is not None]
    if not outcomes:
        raise RunError(f"{folder}: no trials of this head; delete the run and train it again with mmfeat heads")
    return outcomes


def train_stage_one(
    task: Task, engine: Engine, run: Run, head: str, modality: str, advance: Callable[[int], None]
) -> StageOne:
    """Each fold with the settings that validated best there, as in the run; equal to the run's up to rounding."""
    before = trials_of(run, head, modality)
    per_fold = [max(before, key=lambda outcome: outcome.scores.mean(0)[fold]) for fold in range(len(task.splits))]
    wanted = list(dict.fromkeys(outcome.settings for outcome in per_fold))
    trained = run_trials(task, engine, head, modality, wanted, advance, keep=True)
    by_settings = {outcome.settings: outcome for outcome in trained}
    entry = assemble(task, head, modality, trained, Plan(settings_of({}), adjustment=run.config["plan"]["adjustment"]))
    cells = [
        _tensors(by_settings[per_fold[fold].settings].fitted[number])
        for number, (fold, _, _) in enumerate(task.cells(head))
    ]
    best = best_outcome(trained)
    settings = [outcome.settings for outcome in per_fold]
    return StageOne(entry, settings, cells, refit(task, engine, head, modality, best), best.settings)


def _tensors(fitted: Fitted) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value.copy()) for name, value in fitted.tensors.items()}


def final_tensors(stage: StageOne, seed: int) -> dict[str, Tensor]:
    """The head of one seed that was trained on everything."""
    return _tensors(stage.finals[seed])
