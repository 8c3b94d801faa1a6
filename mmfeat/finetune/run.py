"""Stage 2 from the head of a run: plan, extract what the cached path begins with, train every fold and seed, compare
with stage 1, and leave a run that `mmfeat submit` can use."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.encoders import EncoderOptions
from mmfeat.engine import ENGINES, LocalEngine
from mmfeat.entries import Entry, finals_are_whole, replayed, save_finals
from mmfeat.errors import ConfigError
from mmfeat.features import Features
from mmfeat.files import sweep_temporaries, write_atomic, write_json
from mmfeat.finetune.cells import ALPHAS, Brought, Cell, Classroom, blended
from mmfeat.finetune.early import EARLY
from mmfeat.finetune.model import Model
from mmfeat.finetune.movers import Part
from mmfeat.finetune.ray_train import train_on_ray
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
from mmfeat.finetune.settings import FinetuneSettings
from mmfeat.finetune.stage_one import StageOne, final_tensors, has_fusion, train_stage_one
from mmfeat.finetune.team import Team, joined_team, own_device
from mmfeat.finetune.training import Lesson
from mmfeat.finetune.work import Asked, Work, prepare
from mmfeat.hardware import cpu_count, resolve_device
from mmfeat.heads.basis import one_blas_thread
from mmfeat.heads.stack import epoch_steps
from mmfeat.leaderboard import leaderboard_csv
from mmfeat.progress import Progress, Silent
from mmfeat.ranking import rank
from mmfeat.requests import latest_request
from mmfeat.runs import LEADERBOARD, RUN_FILE, Run, best_run, read_run, reuse_run, write_run
from mmfeat.sweep import train_heads
from mmfeat.trials import Task

CELLS = "cells"
SAVED_SECONDS = 30.0  # between checkpoints


@dataclass(frozen=True)
class Finetuned:
    """The run of a fine-tuning, and whether it was there already."""

    run: Run
    reused: bool
    seconds: float
    leads: bool = True


def finetune_heads(
    run: str | Path | None = None,
    *,
    data: str | Path | None = None,
    cache: str | Path = "cache",
    heads: str | Path = "heads",
    out: str | Path = "heads",
    settings: FinetuneSettings | None = None,
    fusion: str | None = None,
    head: str | None = None,
    modalities: str | None = None,
    seeds: int | None = None,
    views: int | None = None,
    checkpoint_seconds: float = SAVED_SECONDS,
    engine: str = "local",
    ray_address: str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
) -> Finetuned:
    """Train stage 2 from the best fusion of a run (`run`, or the best one on `data` under `heads`).

    Where `heads` holds no run, stage 1 is trained first on what was extracted last into `cache`.

    The same call on the same run gives the same folder under `out`: what it finished is not done again, and what was
    killed goes on from its checkpoint. `fusion` "early" trains early fusion on pixels instead, beside stage 1.
    """
    start, settings = time.monotonic(), settings or FinetuneSettings()
    _check(fusion, engine)
    device = own_device(resolve_device(device))
    asked = Asked(settings, fusion, head, modalities, seeds, views)
    places = {"run": run, "data": data, "cache": cache, "heads": heads, "out": out}
    if engine == "ray":
        arguments = {**places, **vars(asked), "checkpoint_seconds": checkpoint_seconds}
        folder, reused = train_on_ray(finetune_heads, arguments, workers, device.startswith("cuda"), ray_address)
        return Finetuned(read_run(folder), reused, time.monotonic() - start)
    with joined_team(device) as team, one_blas_thread():
        result = _finetune(asked, places, device, workers, checkpoint_seconds, team, progress or Silent())
    return replace(result, seconds=time.monotonic() - start)


def _check(fusion: str | None, engine: str) -> None:
    if fusion not in (None, EARLY):
        raise ConfigError(f"--fusion {fusion}: stage 2 takes the run's heads (name one with --head), or early")
    if engine not in ENGINES:
        raise ConfigError(f"--engine {engine}: use one of {', '.join(ENGINES)}")


def _finetune(
    asked: Asked, places: Mapping[str, Any], device: str, workers: int, every: float, team: Team, progress: Progress
) -> Finetuned:
    """What each process of a team does."""
    heads, data, run = Path(places["heads"]), places["data"], places["run"]
    if team.leads and not run:
        _train_first(data, places["cache"], heads, asked.head, device, progress)
    team.wait()
    if run:
        parent = read_run(Path(run))
    else:
        parent = best_run(heads, str(data) if data else None, asked.head, asked.modalities, has_fusion)
    work, config, folder = prepare(parent, asked, device, team, places["out"], progress)
    if _is_done(folder):
        return Finetuned(reuse_run(folder, config), True, 0.0, team.leads)
    return Finetuned(_train(work, config, folder, team, workers, every, progress), False, 0.0, team.leads)


def _train_first(
    data: str | Path | None, cache: str | Path, heads: Path, head: str | None, device: str, progress: Progress
) -> None:
    """A stage 1 where there is none: one fusion on what was extracted last."""
    if any(heads.glob(f"*/{RUN_FILE}")):
        return
    asked = latest_request(cache, data)
    train_heads(
        asked.data, asked.encoders, cache=cache, out=heads, options=asked.options, columns=asked.columns,
        fusion=[head or "concat"], baselines=["none"], ensembles=False, device=device, progress=progress,
    )  # fmt: skip


def _is_done(folder: Path) -> bool:
    if not (folder / RUN_FILE).exists():
        return False
    run = read_run(folder)
    return all(finals_are_whole(run.head_folder(entry), entry["final"]) for entry in run.leaderboard)


def _train(
    work: Work, config: dict[str, Any], folder: Path, team: Team, workers: int, every: float, progress: Progress
) -> Run:
    if team.leads:
        (folder / RUN_FILE).unlink(missing_ok=True)
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            sweep_temporaries(place)  # of a killed call
        work.problem.splits.save(folder, [str(sample.label) for sample in work.problem.labelled])
    first = _stage_one(work, workers, progress)
    count = 1 if team.size > 1 or work.device != "cpu" else workers or cpu_count()
    room = Classroom(lambda: work.model(team), count, work.task.targets, team, folder / CELLS, every)
    lessons = _cells(work, first)
    steps = sum(_steps(cell) for cell in lessons)
    with progress.task(f"{work.title} (steps)", steps + work.task.repeats * _steps(lessons[0])) as advance:
        brought = room.run(lessons, advance)
        finals = room.run(_finals(work, first, brought), advance)
    if team.leads:
        _finish(work, config, folder, first, brought, finals, room)
    team.wait()
    return read_run(folder)


def _stage_one(work: Work, workers: int, progress: Progress) -> StageOne:
    plain = _plain_features(work)
    engine = LocalEngine(plain, work.task.targets, work.device, str(work.parent.config["attend"]), workers)
    try:
        with progress.task("stage 1", len(work.task.cells(work.head))) as advance:
            return train_stage_one(work.task, engine, work.parent, work.head, work.modality, advance)
    finally:
        engine.close()


def _plain_features(work: Work) -> Features:
    """What the run's own heads saw."""
    names = {tower.spec.folder_name for tower in work.parent.towers}
    blocks = tuple(block for block in work.features.blocks if block.name in names)
    return Features(work.features.ids, blocks, tuple(block for block in work.features.mapped if block.name in names))


def _cells(work: Work, first: StageOne) -> list[Cell]:
    found = []
    for number, (fold, repeat, rows) in enumerate(work.task.cells(work.head)):
        start = first.cells[number] if work.fusion != EARLY else None
        settings = work.settings.of_head(first.settings[fold])
        lesson = Lesson(settings, work.settings, rows.train, rows.validation, (work.task.seed, fold, repeat, 2), start)
        found.append(Cell(f"{work.task.splits.names[fold]}-{repeat + 1}", lesson, rows.test))
    return found


def _finals(work: Work, first: StageOne, brought: Sequence[Brought]) -> list[Cell]:
    """On all labelled samples, for the mean number of epochs and with the mean rates of the folds."""
    everything, nothing = np.arange(len(work.task.targets)), np.empty(0, np.int64)
    replay = replayed([each.best_epoch for each in brought], [each.history for each in brought])
    settings = work.settings.of_head(first.best)
    return [
        Cell(
            f"final-{seed + 1}",
            Lesson(
                settings, work.settings, everything, nothing, (work.task.seed, len(work.task.splits), seed, 2),
                final_tensors(first, seed) if work.fusion != EARLY else None, replay,
            ),
            nothing,
        )
        for seed in range(work.task.repeats)
    ]  # fmt: skip


def _steps(cell: Cell) -> int:
    lesson = cell.lesson
    return lesson.plan.epochs * epoch_steps(len(lesson.train), lesson.settings.batch_size)


def _finish(
    work: Work, config: dict[str, Any], folder: Path, first: StageOne, brought: Sequence[Brought],
    finals: Sequence[Brought], room: Classroom,
) -> None:  # fmt: skip
    """Entries, their comparison, what predicts, and last `run.json`."""
    task = work.task
    model = room.models.get() if room.models.qsize() else work.model(room.team)
    stages = _stages(work, brought)
    entries = _entries(work, first, brought, stages)
    tests = against_first(task, entries)
    gaps = [gap(task, entry, brought, alphas.folds) for entry, alphas in zip(entries, stages.values(), strict=True)]
    predicts = save_finals(folder / entries[0].name, work.head, first.finals)
    records = [Entry({**entries[0].record, "scores": gaps[0], "final": predicts}, *_rest(entries[0]))]
    for entry, scores, test in zip(entries[1:], gaps[1:], tests, strict=True):
        alpha = ALPHAS[stages[entry.record["head"]].final]
        saved = _save_finals(work, folder, entry, model, first, finals, alpha)
        records.append(Entry({**entry.record, "scores": scores, "over_stage_1": test, **saved}, *_rest(entry)))
    for number, entry in enumerate(records):
        save_entry(folder, task, entry, _curves(task, brought) if number else ())
    leaderboard = rank(task, records)
    write_json(folder / f"{LEADERBOARD}.json", leaderboard)
    write_atomic(folder / f"{LEADERBOARD}.csv", leaderboard_csv(leaderboard, task.targets.classes).encode())
    about = {name: work.parent.config[name] for name in ("widths", "classes", "class_counts", "labelled")}
    about["moving"] = [_moved(model, part) for part in work.parts]
    about["warning"] = warning(gaps[0], gaps[1], tests[0]) if work.fusion != EARLY else ""
    write_run(folder, {**config, **about, "leaderboard": leaderboard})
    shutil.rmtree(folder / CELLS, ignore_errors=True)


def _stages(work: Work, brought: Sequence[Brought]) -> dict[str, Chosen]:
    """Name of an entry -> the share of stage 2 in its weights."""
    folds = len(work.task.splits)
    nothing, whole = Chosen([0] * folds, 0), Chosen([len(ALPHAS) - 1] * folds, len(ALPHAS) - 1)
    if work.fusion == EARLY:
        return {STAGE_1: nothing, EARLY: whole}
    return {STAGE_1: nothing, STAGE_2: whole, WISE: choose_alphas(work.task, brought)}


def _entries(work: Work, first: StageOne, brought: Sequence[Brought], stages: Mapping[str, Chosen]) -> list[Entry]:
    """Stage 1 as it was, then the others from what the cells brought."""
    task, adjustment = work.task, work.parent.config["plan"]["adjustment"]
    settings = work.settings.of_head(first.best)
    record = {**first.entry.record, "head": STAGE_1, "fusion": work.head, "seconds": 0.0}
    return [replace(first.entry, record=record)] + [
        make_entry(task, name, work.modality, work.fusion, brought, alphas.folds, adjustment, settings)
        for name, alphas in stages.items()
        if name != STAGE_1
    ]


def _rest(entry: Entry) -> tuple[Any, Any, Any]:
    return entry.logits, entry.decisions, entry.validation


def _save_finals(
    work: Work, folder: Path, entry: Entry, model: Model, first: StageOne, finals: Sequence[Brought], alpha: float
) -> dict[str, Any]:
    """What predicts, and what the record says of it."""
    options = EncoderOptions(**work.parent.config["options"])
    saved = [
        save_final(folder / entry.name, seed, model, _blend(model, first, each, seed, alpha), options, folder.name)
        for seed, each in enumerate(finals)
    ]
    return {"alpha": alpha, "parameters": sum(p.numel() for p in model.parameters().values()), "final": saved}


def _blend(model: Model, first: StageOne, final: Brought, seed: int, alpha: float) -> Mapping[str, Any]:
    if alpha == 1.0:
        return final.state
    head = {f"head.{name}": value[None] for name, value in final_tensors(first, seed).items()}
    return blended({**head, **model.first}, final.state, alpha)


def _curves(task: Task, brought: Sequence[Brought]) -> list[dict[str, Any]]:
    return [
        {"fold": task.splits.names[fold], "seed": repeat + 1, **line}
        for (fold, repeat, _), each in zip(task.cells(STAGE_2), brought, strict=True)
        for line in each.history
    ]


def _moved(model: Model, part: Part) -> dict[str, Any]:
    """What a run tells of a tower."""
    movers = [mover for mover in model.movers if mover.part == part]
    count = sum(parameter.numel() for mover in movers for parameter in mover.parameters.values())
    named = {"tower": part.tower.spec.model, "layers": part.count, "parameters": count}
    return {**named, "path": part.path, "reason": part.reason}
