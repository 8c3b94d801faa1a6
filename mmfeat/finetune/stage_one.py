"""Stage 1: the run that stage 2 starts from, trained first where there is none, and its best fusion, trained again on
each fold because a run keeps only the heads that predict."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfeat.errors import MmfeatError, RunError
from mmfeat.extraction.requests import latest_request
from mmfeat.finetune.processes import Execution
from mmfeat.finetune.settings import FinetuneArguments
from mmfeat.heads.jobs import Engine, Fitted
from mmfeat.heads.registry import is_fusion
from mmfeat.runs.entry import ChosenHead, Entry
from mmfeat.runs.run import Run, comparable_runs, read_run
from mmfeat.runs.verdict import near_best
from mmfeat.sweep.entries import TrainedEntry, assemble, best_outcome
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.train import train_heads
from mmfeat.sweep.trials import HeadTrainer, Outcome, load_outcome
from mmfeat.system.wording import Advance, Progress


@dataclass(frozen=True)
class StageOne:
    """Stage 1 trained again: its entry, the tensors of each cell (in the order of `Problem.cells`), and for each seed
    the `fitted` head on all labelled samples with its tensors (`finals`)."""

    entry: TrainedEntry
    cells: list[dict[str, Tensor]]
    finals: list[dict[str, Tensor]]
    fitted: list[Fitted]


def find_parent(arguments: FinetuneArguments, execution: Execution) -> Run:
    """The run that stage 2 starts from: the one named, or the best on the data, trained first where there is none."""
    if execution.team.leads and not arguments.run:
        train_missing_parent(arguments, execution.team.device, execution.progress)
    execution.team.wait()
    if arguments.run:
        return read_run(Path(arguments.run))
    return best_parent(_parents(arguments), arguments.head, arguments.modalities)


def train_missing_parent(arguments: FinetuneArguments, device: str, progress: Progress) -> None:
    """Train a fusion on what was extracted last, unless `heads` holds a run that stage 2 can start from."""
    with contextlib.suppress(RunError):
        _parents(arguments)
        return
    cache = arguments.cache or "cache"
    request = latest_request(cache, arguments.data)
    head = arguments.head or "concat"
    try:
        train_heads(
            request.data, request.encoders, cache=cache, out=arguments.heads, options=request.options,
            columns=request.columns, fusion=[head], baselines=["none"], ensembles=False,
            device=device, progress=progress,
        )  # fmt: skip
    except MmfeatError as error:  # its remedy names flags of another command
        raise RunError(
            f"{arguments.heads}: no run has a fusion to start from; train one with mmfeat heads --fusion {head} first, "
            f"which says here: {error}"
        ) from error


def _parents(arguments: FinetuneArguments) -> list[Run]:
    """The comparable runs under `heads` that stage 2 can start from, oldest first. Raises `RunError` without any."""
    return comparable_runs(Path(arguments.heads), str(arguments.data) if arguments.data else None, has_fusion)


def has_fusion(run: Run) -> bool:
    return not run.is_finetuned and any(is_fusion(entry.head) for entry in run.leaderboard)


def best_parent(runs: Sequence[Run], head: str | None, modalities: str | None) -> Run:
    """The run whose best fusion scores best; a run without such a fusion or without its trials comes last."""

    def score(run: Run) -> float:
        with contextlib.suppress(RunError):
            fusion = best_fusion(run, head, modalities)
            _trials(run, fusion)
            return fusion.headline.value
        return -1.0

    return max(runs, key=score)


def best_fusion(run: Run, head: str | None, modalities: str | None) -> Entry:
    """The fusion that comes first in the leaderboard, or without `modalities` the first on both within one standard
    error of it, which has more that can be trained. Few validation rows would choose a worse one."""
    entries = [entry for entry in run.matching(head, modalities) if is_fusion(entry.head)]
    if not entries:
        known = ", ".join(entry.label for entry in run.leaderboard if is_fusion(entry.head))
        raise RunError(f"{run.folder}: stage 2 needs a fusion; it has {known or 'none'}: train one with mmfeat heads")
    if modalities is None:
        entries = [entry for entry in near_best(entries) if entry.modalities == "both"] or entries
    return entries[0]


def _trials(run: Run, entry: Entry) -> list[Outcome]:
    folder = run.head_folder(entry) / "trials"
    loaded = [load_outcome(path.with_suffix("")) for path in sorted(folder.glob("*.json"))]
    outcomes = [outcome for outcome in loaded if outcome is not None]
    if not outcomes:
        raise RunError(f"{folder}: no trials of this head; delete the run and train it again with mmfeat heads")
    return outcomes


def chosen_head(run: Run, entry: Entry) -> ChosenHead:
    """The head of an entry with the settings that validated best in its run."""
    outcomes = _trials(run, entry)
    best = np.stack([outcome.scores.mean(0) for outcome in outcomes]).argmax(0)
    folds = [outcomes[index].settings for index in best]
    return ChosenHead(entry.head, entry.modalities, folds, best_outcome(outcomes).settings, len(outcomes))


def train_stage_one(
    problem: Problem, engine: Engine, chosen: ChosenHead, adjustment: float | None, advance: Advance
) -> StageOne:
    """Train the head on each fold with that fold's settings, and on all labelled samples with the best ones. The heads
    equal those of the run up to rounding."""
    wanted, trainer = chosen.wanted, HeadTrainer(problem, engine, chosen.head, chosen.modality)
    trained = trainer.run(wanted, advance, keep=True)
    positions = [wanted.index(settings) for settings in chosen.folds]
    entry = assemble(problem, chosen.head, chosen.modality, trained, adjustment, positions)
    # The optimism belongs to the search of the run, not to this training.
    entry = entry.updated(trials=chosen.trials, settings=chosen.best, optimism=None)
    cells = [
        _tensors(trained[positions[fold]].fitted[number])
        for number, (fold, _, _) in enumerate(problem.cells(chosen.head))
    ]
    fitted = trainer.refit(trained[wanted.index(chosen.best)])
    return StageOne(entry, cells, list(map(_tensors, fitted)), fitted)


def _tensors(fitted: Fitted) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value.copy()) for name, value in fitted.tensors.items()}
