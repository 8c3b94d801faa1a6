"""The call `finetune_heads`: find the parent run, prepare stage 2, train every fold and seed, compare with stage 1, and
leave a run that `mmfeat submit` can use."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from mmfeat.baselines.basis import one_blas_thread
from mmfeat.evaluation.protocol import save_splits
from mmfeat.finetune.cells import CellRunner, final_cells, fold_cells
from mmfeat.finetune.prepare import Experiment, prepare
from mmfeat.finetune.processes import CHECKPOINT_SECONDS, Execution, Team, joined_team, train_on_ray
from mmfeat.finetune.results import TrainedStages, finish_run
from mmfeat.finetune.settings import FinetuneArguments, FinetuneSettings
from mmfeat.finetune.stage_one import StageOne, find_parent, train_missing_parent, train_stage_one
from mmfeat.heads.jobs import LocalEngine
from mmfeat.heads.stack import one_torch_thread
from mmfeat.runs.record import Maker, making, written_call
from mmfeat.runs.run import RUN_FILE, Run, find_run, read_run, reuse_run
from mmfeat.samples.dataset import Data, name_of
from mmfeat.sweep.trials import replayed
from mmfeat.system.hardware import check_engine, resolve_device
from mmfeat.system.notebook import usual_progress
from mmfeat.system.wording import Progress, Silent

CELLS = "cells"  # the folder of unfinished trainings in a run


@dataclass(frozen=True)
class Finetuned:
    """The run of a fine-tuning, whether it is `reused` from an earlier call, and whether this process `leads` its team,
    and so reports the run."""

    run: Run
    reused: bool
    seconds: float
    leads: bool = True


def finetune_heads(
    run: str | Path | None = None,
    *,
    data: Data = None,
    cache: str | Path | None = None,
    heads: str | Path = "heads",
    out: str | Path = "heads",
    settings: FinetuneSettings | None = None,
    fusion: str | None = None,
    head: str | None = None,
    modalities: str | None = None,
    seeds: int | None = None,
    views: int | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    engine: str = "local",
    ray_address: str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
    command: str = "",
) -> Finetuned:
    """Train stage 2 from the best fusion of a run: `run`, or the run on `data` under `heads` that validated best.

    Where `heads` holds no run, stage 1 is trained first on the vectors that were extracted last into `cache`. `data`,
    `cache`, `seeds` and `views` are those of the run by default. `fusion` "early" trains early fusion on pixels
    instead, beside stage 1. `workers` trainings run side by side on a CPU; with the engine "ray", `workers` processes
    share each training. The new run under `out` records `command`, by default this call.

    The same call on the same run finds the finished run, and goes on from the checkpoints of a killed call.

    Raises `ConfigError` for settings that do not fit the encoders, `RunError` where the run, its data, folds or
    weights have changed, `CacheMissError` where nothing was extracted, `HeadError` for a diverged training.
    """
    data = name_of(data)
    maker = Maker(command or written_call(finetune_heads, locals()))
    arguments = FinetuneArguments(
        settings or FinetuneSettings(), run=run, heads=heads, out=out, data=data, cache=cache, fusion=fusion, head=head,
        modalities=modalities, seeds=seeds, views=views,
    )  # fmt: skip
    check_engine(engine, ray_address)
    arguments = replace(arguments, run=find_run(run, heads).folder if run else None)
    if engine == "ray":
        execution = Execution(Team(device=device), workers, checkpoint_seconds, progress or usual_progress())
        return _finetune_on_ray(arguments, execution, maker, ray_address)
    with joined_team(resolve_device(device)) as team, one_blas_thread():
        heard = progress or usual_progress() if team.leads else Silent()
        execution = Execution(team, workers, checkpoint_seconds, heard)
        result = _finetune(arguments, execution, replace(maker, device=team.device))
    return replace(result, seconds=maker.seconds)


def _finetune_on_ray(
    arguments: FinetuneArguments, execution: Execution, maker: Maker, address: str | None
) -> Finetuned:
    """Call `finetune_heads` in the processes of a Ray cluster; each of them resolves `execution.team.device`."""
    device, progress = execution.team.device, execution.progress
    if not arguments.run:  # stage 1 is trained here, where relative paths are what the user means
        train_missing_parent(arguments, resolve_device(device), progress)
    passed = {**vars(arguments), "checkpoint_seconds": execution.checkpoint_seconds, "command": maker.command}
    with progress.step("fine-tuning on Ray", 1) as advance:
        folder, reused = train_on_ray(finetune_heads, passed, execution.workers, device, address)
        advance(1)
    return Finetuned(read_run(folder), reused, maker.seconds)


def _finetune(arguments: FinetuneArguments, execution: Execution, maker: Maker) -> Finetuned:
    team, parent = execution.team, find_parent(arguments, execution)
    experiment = prepare(parent, arguments, execution)
    folder, config = experiment.folder, experiment.config
    is_done = (folder / RUN_FILE).exists() and read_run(folder).is_whole()
    if team.agreed([is_done])[0]:
        shutil.rmtree(folder / CELLS, ignore_errors=True)  # left by a call that was killed at its very end
        return Finetuned(reuse_run(folder, config) if team.leads else read_run(folder), True, 0.0, team.leads)
    maker = replace(maker, parents=os.path.relpath(parent.folder.parent, folder.parent))
    with making(folder, config, maker) if team.leads else contextlib.nullcontext():
        run = _train(experiment, execution, maker)
    return Finetuned(run, False, 0.0, team.leads)


def _train(experiment: Experiment, execution: Execution, maker: Maker) -> Run:
    team, folder, labelled = execution.team, experiment.folder, experiment.labelled
    if team.leads:
        (folder / RUN_FILE).unlink(missing_ok=True)
        save_splits(labelled.splits, folder, [str(sample.label) for sample in labelled.samples.labelled])
    first = _train_stage_one(experiment, execution)
    runner = CellRunner(experiment, execution, folder / CELLS)
    cells = fold_cells(experiment, first)
    steps = sum(cell.steps for cell in [*cells, *final_cells(experiment, first, ())])
    with execution.progress.step(f"{experiment.title} (steps)", steps) as advance:
        results = runner.run(cells, advance)
        replay = replayed([result.best_epoch for result in results], [result.history for result in results])
        finals = runner.run(final_cells(experiment, first, replay), advance)
    if team.leads:
        finish_run(experiment, TrainedStages(first, results, finals, runner.spare_model()), maker)
        shutil.rmtree(folder / CELLS, ignore_errors=True)
    team.wait()
    return read_run(folder)


def _train_stage_one(experiment: Experiment, execution: Execution) -> StageOne:
    """Train stage 1 in every process; all processes go on with the tensors of the first process."""
    problem, chosen, team = experiment.problem, experiment.chosen, execution.team
    attend, towers = str(experiment.parent.config.attend), experiment.parent.towers
    features = experiment.features.named([tower.spec.folder_name for tower in towers])
    engine = LocalEngine(features, problem.targets, team.device, attend, execution.workers)
    try:
        with (
            one_torch_thread(),
            execution.progress.step("stage 1", len(chosen.wanted) * len(problem.cells(chosen.head))) as advance,
        ):
            first = train_stage_one(problem, engine, chosen, experiment.adjustment, advance)
    finally:
        engine.close()
    return replace(first, cells=list(map(team.shared, first.cells)), finals=list(map(team.shared, first.finals)))
