"""The run of a sweep: its entries are trained side by side, combined, ranked and written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.committee import ensemble_entries
from mmfeat.engine import Engine
from mmfeat.entries import Entry, train_entry
from mmfeat.errors import HeadError
from mmfeat.features import Features
from mmfeat.files import sweep_temporaries, write_atomic, write_errors, write_json
from mmfeat.hardware import cpu_count
from mmfeat.heads import BASELINES
from mmfeat.heads.basis import one_blas_thread
from mmfeat.leaderboard import ablation_csv, leaderboard_csv
from mmfeat.problem import Problem
from mmfeat.progress import Progress
from mmfeat.ranking import rank
from mmfeat.records import Maker, making
from mmfeat.runs import ABLATION, LEADERBOARD, RUN_FILE, Run, write_run
from mmfeat.samples import SampleSet
from mmfeat.split_files import save_splits
from mmfeat.trials import Task
from mmfeat.tuning import Plan


def train_run(
    problem: Problem,
    features: Features,
    engine: Engine,
    pairs: Sequence[tuple[str, str]],
    plan: Plan,
    config: dict[str, Any],
    folder: Path,
    maker: Maker,
    progress: Progress,
) -> Run:
    """Train what the run folder lacks, then combine, rank, and declare the run complete."""
    try:
        _check_features(problem.samples, features)
        with write_errors(folder):  # a search that goes on is no finished run meanwhile
            (folder / RUN_FILE).unlink(missing_ok=True)
        with making(folder, config, maker), one_blas_thread():  # sums of several threads are other ones elsewhere
            for place in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
                sweep_temporaries(place)  # of a killed call
            save_splits(problem.splits, folder, [str(sample.label) for sample in problem.labelled])
            task = Task(features.ids, problem.targets, problem.splits, problem.protocol.seeds, problem.protocol.seed)
            entries = _train_all(task, engine, pairs, plan, folder, progress)
            return _finish(task, entries, {**config, "record": maker.record(config)}, plan, folder, features)
    finally:
        engine.close()


def _train_all(
    task: Task, engine: Engine, pairs: Sequence[tuple[str, str]], plan: Plan, folder: Path, progress: Progress
) -> list[Entry]:
    """Every pair's entry. Their jobs share the engine's workers; the threads here wait for them."""
    deadline = float("inf") if plan.time_limit is None else time.monotonic() + plan.time_limit
    total = sum(_trainings(task, head, plan) for head, _ in pairs)
    with progress.task("heads", total) as advance, ThreadPoolExecutor(cpu_count() + 1) as threads:
        futures = [
            threads.submit(train_entry, task, engine, head, modality, plan, folder, deadline, advance)
            for head, modality in pairs
        ]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()  # what went wrong is told now, not when all before it are done
            return [future.result() for future in futures]
        except BaseException:
            engine.close()  # before the threads are waited for, which wait for it
            for future in futures:
                future.cancel()
            raise


def _trainings(task: Task, head: str, plan: Plan) -> int:
    """How many trainings the progress bar counts for a head; a search without end is counted by its first trial."""
    trials = 1
    if plan.space and head not in BASELINES:
        sizes = [len(values) for values in plan.space.values() if isinstance(values, Sequence)]
        trials = plan.trials or int(np.prod(sizes))
    return trials * len(task.cells(head)) + plan.refit * task.repeats_of(head)


def _finish(
    task: Task, entries: list[Entry], config: dict[str, Any], plan: Plan, folder: Path, features: Features
) -> Run:
    """Combine, rank, and declare the run complete."""
    if config["ensembles"]:
        entries = entries + ensemble_entries(task, entries, plan.adjustment, folder)
    leaderboard = rank(task, entries)
    classes = task.targets.classes
    write_json(folder / f"{LEADERBOARD}.json", leaderboard)
    write_atomic(folder / f"{LEADERBOARD}.csv", leaderboard_csv(leaderboard, classes).encode())
    write_atomic(folder / ABLATION, ablation_csv(leaderboard, classes).encode())
    counts = task.targets.matrix.sum(0).tolist()
    return write_run(
        folder,
        {
            **config,
            "widths": features.widths,
            "classes": list(classes),
            "class_counts": dict(zip(classes, counts, strict=True)),
            "labelled": len(task.targets),
            "leaderboard": leaderboard,
        },
    )


def _check_features(samples: SampleSet, features: Features) -> None:
    """An encoder that saw none of the samples is refused."""
    if empty := [name for name, mask in features.masks.items() if not mask.any()]:
        raise HeadError(
            f"{samples.source}: no labelled sample has a vector of {', '.join(empty)}; leave it out of --encoders"
        )
