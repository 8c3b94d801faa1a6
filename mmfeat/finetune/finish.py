"""From finished cells to a run: entries of both stages, their comparison, what predicts, and last `run.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mmfeat.encoders import EncoderOptions
from mmfeat.entries import Entry
from mmfeat.files import write_atomic, write_json
from mmfeat.finals import save_finals
from mmfeat.finetune.cells import ALPHAS, CellResult, blended
from mmfeat.finetune.early import EARLY
from mmfeat.finetune.model import HEAD, Model
from mmfeat.finetune.plan import TowerPlan
from mmfeat.finetune.results import (
    STAGE_1,
    STAGE_2,
    WISE,
    Chosen,
    against_first,
    choose_alphas,
    gap,
    make_entry,
    save_entry,
    save_final,
    warning,
)  # fmt: skip
from mmfeat.finetune.stage_one import StageOne
from mmfeat.finetune.work import Work
from mmfeat.leaderboard import leaderboard_csv
from mmfeat.ranking import rank
from mmfeat.runs import LEADERBOARD, write_run
from mmfeat.trials import Task


def finish_run(
    work: Work, config: dict[str, Any], folder: Path, first: StageOne, results: Sequence[CellResult],
    finals: Sequence[CellResult], model: Model,
) -> None:  # fmt: skip
    """Score, compare and save all there is; `model` is one to put final weights into."""
    task, stages = work.task, _stages(work, results)
    entries = _entries(work, first, results, stages)
    tests = against_first(task, entries)
    gaps = [gap(task, entry, results, alphas.folds) for entry, alphas in zip(entries, stages.values(), strict=True)]
    if work.fusion == EARLY:
        del gaps[0]["train"]  # the cells know that of their own heads
    predicts = save_finals(folder / entries[0].name, first.fitted)
    records = [_with(entries[0], scores=gaps[0], final=predicts)]
    for entry, scores, test in zip(entries[1:], gaps[1:], tests, strict=True):
        saved = _save_finals(work, folder, entry, model, first, finals, ALPHAS[stages[entry.record["head"]].final])
        records.append(_with(entry, scores=scores, over_stage_1=test, **saved))
    for number, entry in enumerate(records):
        save_entry(folder, task, entry, _curves(task, results) if number else ())
    leaderboard = rank(task, records)
    write_json(folder / f"{LEADERBOARD}.json", leaderboard)
    write_atomic(folder / f"{LEADERBOARD}.csv", leaderboard_csv(leaderboard, task.targets.classes).encode())
    about = {name: work.parent.config[name] for name in ("classes", "class_counts", "labelled")}
    about["widths"] = work.features.widths
    about["moving"] = [_moved(model, plan) for plan in work.plans]
    about["warning"] = warning(gaps[0], gaps[1], tests[0]) if work.fusion != EARLY else ""
    write_run(folder, {**config, **about, "leaderboard": leaderboard})


def _stages(work: Work, results: Sequence[CellResult]) -> dict[str, Chosen]:
    """Name of an entry -> the share of stage 2 in its weights."""
    folds = len(work.task.splits)
    nothing, whole = Chosen([0] * folds, 0), Chosen([len(ALPHAS) - 1] * folds, len(ALPHAS) - 1)
    if work.fusion == EARLY:
        return {STAGE_1: nothing, EARLY: whole}
    return {STAGE_1: nothing, STAGE_2: whole, WISE: choose_alphas(work.task, results)}


def _entries(work: Work, first: StageOne, results: Sequence[CellResult], stages: Mapping[str, Chosen]) -> list[Entry]:
    """Stage 1 as it was, then the others from their cells."""
    views = work.parent.config["options"]["views"]
    found = [_with(first.entry, head=STAGE_1, fusion=work.chosen.head, views=views, seconds=0.0)]
    for name, alphas in stages.items():
        named = {"head": name, "modalities": work.chosen.modality, "fusion": work.fusion, "views": work.views}
        if name == WISE:
            named["alphas"] = [ALPHAS[place] for place in alphas.folds]
        if name != STAGE_1:
            settings = work.settings.of_head(work.chosen.best)
            found.append(make_entry(work.task, named, results, alphas.folds, work.adjustment, settings))
    return found


def _with(entry: Entry, **more: Any) -> Entry:
    return replace(entry, record={**entry.record, **more})


def _save_finals(
    work: Work, folder: Path, entry: Entry, model: Model, first: StageOne, finals: Sequence[CellResult], alpha: float
) -> dict[str, Any]:
    """What predicts, and what the record says of it."""
    options = EncoderOptions(**work.parent.config["options"])
    saved = [
        save_final(folder / entry.name, seed, model, _blend(model, first, each, seed, alpha), options, folder.name)
        for seed, each in enumerate(finals)
    ]
    return {"alpha": alpha, "parameters": sum(p.numel() for p in model.parameters().values()), "final": saved}


def _blend(model: Model, first: StageOne, final: CellResult, seed: int, alpha: float) -> Mapping[str, Tensor]:
    """The final weights with this share of stage 2."""
    if alpha == 1.0:
        return final.state
    head = {HEAD + name: value[None] for name, value in first.finals[seed].items()}
    return blended({**model.first, **head}, final.state, alpha)


def _curves(task: Task, results: Sequence[CellResult]) -> list[dict[str, Any]]:
    return [
        {"fold": task.splits.names[fold], "seed": repeat + 1, **line}
        for (fold, repeat, _), each in zip(task.cells(STAGE_2), results, strict=True)
        for line in each.history
    ]


def _moved(model: Model, plan: TowerPlan) -> dict[str, Any]:
    """What a run tells of a tower."""
    own = next(tower for tower in model.towers if tower.plan == plan)
    count = sum(parameter.numel() for parameter in own.parameters.values())
    named = {"tower": plan.tower.spec.model, "layers": plan.count, "parameters": count}
    return {**named, "path": plan.path, "reason": plan.reason}
