"""Stage 2 from the head of a run: plan, extract what the cached path begins with, train every fold and seed, compare
with stage 1, and leave a run that `mmfeat submit` can use."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.baselines.basis import one_blas_thread
from mmfeat.errors import ConfigError, DataError, RunError
from mmfeat.evaluation.splits import save_splits
from mmfeat.extraction.requests import latest_request
from mmfeat.finetune.cells import Cell, CellRunner
from mmfeat.finetune.model import EARLY
from mmfeat.finetune.prepare import Asked, Work, prepare
from mmfeat.finetune.processes import Team, joined_team, own_device, train_on_ray
from mmfeat.finetune.results import STAGE_2, finish_run
from mmfeat.finetune.settings import FinetuneSettings
from mmfeat.finetune.stage_one import StageOne, best_parent, has_fusion, train_stage_one
from mmfeat.finetune.training import TrainingSetup
from mmfeat.runs.entry import RunConfig
from mmfeat.runs.folders import find_run
from mmfeat.runs.leaderboard import LEADERBOARD
from mmfeat.runs.record import Maker, making, written_call
from mmfeat.runs.run import RUN_FILE, Run, comparable_runs, finals_are_whole, read_run, reuse_run
from mmfeat.sweep.engine import LocalEngine
from mmfeat.sweep.train import train_heads
from mmfeat.sweep.trials import replayed
from mmfeat.system.files import sweep_temporaries
from mmfeat.system.hardware import check_engine, cpu_count, resolve_device
from mmfeat.system.wording import Progress, Silent

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
    cache: str | Path | None = None,
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
    command: str = "",
) -> Finetuned:
    """Train stage 2 from the best fusion of a run (`run`, or the one on `data` under `heads` that validated best).

    Where `heads` holds no run, stage 1 is trained first on what was extracted last into `cache`. `data` and `cache`
    are by default where the run found them.

    The same call on the same run gives the same folder under `out`: what it finished is not done again, and what was
    killed goes on from its checkpoint. `fusion` "early" trains early fusion on pixels instead, beside stage 1.
    The new run records `command`, by default this call.
    `seeds` and `views` are the run's by default; `workers` train side by side on a CPU, or are Ray's processes.

    Raises `ConfigError` for settings that do not fit the encoders, `RunError` where the run, its data, folds or
    weights are not what they were, `CacheMissError` where nothing was extracted, `HeadError` for a diverged training.
    """
    maker = Maker(command or written_call(finetune_heads, locals()))
    settings = settings or FinetuneSettings()
    _check(fusion, engine, ray_address, seeds, views, data)
    asked = Asked(settings, fusion, head, modalities, seeds, views, data, cache)
    places = {"run": find_run(run, heads).folder if run else None, "heads": heads, "out": out}
    if engine == "ray":
        heard = progress or Silent()
        if not run:  # here, where relative paths mean what the user means
            _train_first(data, cache or "cache", Path(heads), head, resolve_device(device), heard)
        arguments = {**places, **vars(asked), "checkpoint_seconds": checkpoint_seconds}
        arguments["command"] = maker.command
        with heard.step("fine-tuning on Ray", 1) as advance:
            folder, reused = train_on_ray(finetune_heads, arguments, workers, device, ray_address)
            advance(1)
        return Finetuned(read_run(folder), reused, maker.seconds)
    device = own_device(resolve_device(device))
    with joined_team(device) as team, one_blas_thread():
        heard = progress if progress is not None and team.leads else Silent()
        maker = replace(maker, device=device)
        result = _finetune(asked, places, maker, workers, checkpoint_seconds, team, heard)
    return replace(result, seconds=maker.seconds)


def _check(
    fusion: str | None,
    engine: str,
    ray_address: str | None,
    seeds: int | None,
    views: int | None,
    data: str | Path | None,
) -> None:
    if data is not None and not Path(data).exists():
        raise DataError(f"{data}: no such folder or table; check --data")
    if fusion not in (None, EARLY):
        raise ConfigError(f"--fusion {fusion}: stage 2 takes the run's heads (name one with --head), or early")
    check_engine(engine, ray_address)
    for name, value, least in (("seeds", seeds, 1), ("views", views, 0)):
        if value is not None and value < least:
            raise ConfigError(f"--{name} {value}: at least {least}")


def _finetune(
    asked: Asked, places: Mapping[str, Any], maker: Maker, workers: int, every: float, team: Team, progress: Progress
) -> Finetuned:
    """What each process of a team does."""
    device = maker.device
    heads, data, run = Path(places["heads"]), asked.data, places["run"]
    if team.leads and not run:
        _train_first(data, asked.cache or "cache", heads, asked.head, device, progress)
    team.wait()
    if run:
        parent = read_run(Path(run))
    else:
        alike = comparable_runs(heads, str(data) if data else None, has_fusion)
        parent = best_parent(alike, asked.head, asked.modalities)
    work, config, folder = prepare(parent, asked, device, team, places["out"], progress)
    if team.agreed([_is_done(folder)])[0]:
        shutil.rmtree(folder / CELLS, ignore_errors=True)  # of a call that was killed at its very end
        return Finetuned(reuse_run(folder, config) if team.leads else read_run(folder), True, 0.0, team.leads)
    maker = replace(maker, parents=os.path.relpath(parent.folder.parent, folder.parent))
    made = making(folder, config, maker) if team.leads else contextlib.nullcontext()
    with made:
        trained = _train(work, config, folder, maker, team, workers, every, progress)
    return Finetuned(trained, False, 0.0, team.leads)


def _train_first(
    data: str | Path | None, cache: str | Path, heads: Path, head: str | None, device: str, progress: Progress
) -> None:
    """A stage 1 where there is none: one fusion on what was extracted last."""
    with contextlib.suppress(RunError):
        comparable_runs(heads, str(data) if data else None, has_fusion)
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
    files = [folder / f"{LEADERBOARD}.{kind}" for kind in ("csv", "json")]
    return all(file.is_file() for file in files) and all(
        finals_are_whole(run.head_folder(entry), entry.final) for entry in run.leaderboard
    )


def _train(
    work: Work, config: RunConfig, folder: Path, maker: Maker, team: Team, workers: int, every: float,
    progress: Progress,
) -> Run:  # fmt: skip
    if team.leads:
        (folder / RUN_FILE).unlink(missing_ok=True)
        for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
            sweep_temporaries(place)  # of a killed call
        save_splits(work.labelled.splits, folder, [str(sample.label) for sample in work.labelled.labelled])
    first = _stage_one(work, team, workers, progress)
    count = 1 if team.size > 1 or work.device != "cpu" else workers or cpu_count()
    runner = CellRunner(lambda: work.model(team), count, work.problem.targets, team, folder / CELLS, every)
    cells = _cells(work, first)
    steps = sum(cell.steps for cell in [*cells, *_finals(work, first, ())])
    with progress.step(f"{work.title} (steps)", steps) as advance:
        results = runner.run(cells, advance)
        replay = replayed([each.best_epoch for each in results], [each.history for each in results])
        finals = runner.run(_finals(work, first, replay), advance)
    if team.leads:
        model = runner.models.get() if runner.models.qsize() else work.model(team)
        finish_run(work, config, maker, folder, first, results, finals, model)
        shutil.rmtree(folder / CELLS, ignore_errors=True)
    team.wait()
    return read_run(folder)


def _stage_one(work: Work, team: Team, workers: int, progress: Progress) -> StageOne:
    attend = str(work.parent.config.attend)
    engine = LocalEngine(work.first_features, work.problem.targets, work.device, attend, workers)
    try:
        with progress.step("stage 1", len(work.chosen.wanted) * len(work.problem.cells(work.chosen.head))) as advance:
            first = train_stage_one(work.problem, engine, work.chosen, work.adjustment, advance)
    finally:
        engine.close()
    return replace(first, cells=list(map(team.shared, first.cells)), finals=list(map(team.shared, first.finals)))


def _cells(work: Work, first: StageOne) -> list[Cell]:
    found = []
    for number, (fold, repeat, rows) in enumerate(work.problem.cells(STAGE_2)):
        setup = TrainingSetup(
            work.settings.of_head(work.chosen.folds[fold]), work.settings, rows.train, rows.validation,
            (work.problem.seed, fold, repeat, 2), first.cells[number] if work.fusion != EARLY else None,
        )  # fmt: skip
        found.append(Cell(f"{work.problem.splits.names[fold]}-{repeat + 1}", setup, rows.test))
    return found


def _finals(work: Work, first: StageOne, replay: tuple[float, ...]) -> list[Cell]:
    """On all labelled samples, for the mean number of epochs and with the mean rates of the folds."""
    everything, nothing = np.arange(len(work.problem.targets)), np.empty(0, np.int64)
    found = []
    for seed in range(work.problem.repeats):
        setup = TrainingSetup(
            work.settings.of_head(work.chosen.best), work.settings, everything, nothing,
            (work.problem.seed, len(work.problem.splits), seed, 2),
            first.finals[seed] if work.fusion != EARLY else None, replay,
        )  # fmt: skip
        found.append(Cell(f"final-{seed + 1}", setup, nothing))
    return found
