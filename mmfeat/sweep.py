"""The sweep: every head x modality over the same folds and seeds, scored out of fold, ranked with intervals.

Nothing is selected on the data it is scored on: early stopping and settings look at validation parts of the training
folds, thresholds and ensembles at the other folds.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.choice import MODALITY_SETS, choose_pairs, needed_towers, usable_towers
from mmfeat.cluster import ENGINES
from mmfeat.committee import ensemble_entries
from mmfeat.encoders import EncoderOptions, describe_encoders
from mmfeat.engine import Engine, make_engine
from mmfeat.entries import Entry, Plan, train_entry
from mmfeat.errors import ConfigError, HeadError
from mmfeat.features import Features
from mmfeat.files import sweep_temporaries, write_atomic, write_json
from mmfeat.finals import finals_are_whole
from mmfeat.hardware import cpu_count, resolve_device
from mmfeat.heads import BASELINES, HeadSettings
from mmfeat.heads.basis import one_blas_thread
from mmfeat.leaderboard import ablation_csv, leaderboard_csv
from mmfeat.problem import Problem, read_problem
from mmfeat.progress import Progress, Silent
from mmfeat.protocol import Protocol
from mmfeat.ranking import rank
from mmfeat.records import Maker, making, written_call
from mmfeat.requests import resolve_options
from mmfeat.runs import ABLATION, LEADERBOARD, RUN_FILE, Run, read_run, reuse_run, run_name, write_run
from mmfeat.samples import SampleSet
from mmfeat.search import METHODS
from mmfeat.split_files import save_splits
from mmfeat.trials import Task
from mmfeat.version import __version__

TASKS = ("multiclass", "multilabel")
CHEAP_BASELINES = ("prior", "knn", "ridge", "logistic", "svm")
NAMED_HEADS = 3  # of a run folder; the names of more would be too long to read
IN_MEMORY = 1 << 30  # bytes of pooled vectors; more stay on disk and are read batch by batch


@dataclass(frozen=True)
class Sweep:
    """A run, whether it was there already, where splits were written for later runs, and what a user should be told."""

    run: Run
    reused: bool
    seconds: float
    new_splits: Path | None = None
    notes: tuple[str, ...] = ()


def train_heads(
    data: str | Path,
    encoders: Sequence[str],
    *,
    cache: str | Path = "cache",
    out: str | Path = "heads",
    options: EncoderOptions | None = None,
    columns: Mapping[str, str] | None = None,
    fusion: Sequence[str] = ("all",),
    baselines: Sequence[str] = CHEAP_BASELINES,
    modalities: Sequence[str] = MODALITY_SETS,
    protocol: Protocol | None = None,
    plan: Plan | None = None,
    ensembles: bool = True,
    task: str = "multiclass",
    attend: str = "tokens",
    engine: str = "local",
    ray_address: str | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
    command: str = "",
) -> Sweep:
    """Train and rank heads on the cached vectors of the labelled samples of `data`.

    The same configuration on the same data and vectors gives the same run folder: it is not trained twice, and what an
    interrupted call finished is not done again. `command` is recorded. Raises `CacheMissError` where vectors miss.
    """
    maker = Maker(command or written_call(train_heads, locals()), split_dir=protocol.split_dir if protocol else None)
    protocol, plan, progress = protocol or Protocol(), plan or Plan(HeadSettings()), progress or Silent()
    _check(task, attend, plan, engine)
    options = resolve_options(options or EncoderOptions(), device)
    towers = usable_towers(describe_encoders(list(encoders), options))
    pairs = choose_pairs(fusion, baselines, modalities, towers, attend)
    towers = needed_towers(towers, pairs, attend)
    problem = read_problem(data, columns, cache, task, protocol, progress)
    config = {
        "version": __version__,
        "columns": dict(columns or {}),
        **problem.config,
        "encoders": [{"request": tower.request, "spec": asdict(tower.spec)} for tower in towers],
        "options": asdict(options),
        "task": task,
        "attend": attend,
        "pairs": [list(pair) for pair in pairs],
        "ensembles": ensembles,
        "protocol": {**asdict(protocol), "split_dir": None},
        "plan": _plan_record(plan),
        "trials": plan.trials,
    }
    folder = Path(out) / run_name(config, _label(pairs))
    if (folder / RUN_FILE).exists() and _is_done(read_run(folder), plan):
        return Sweep(reuse_run(folder, config), True, maker.seconds, problem.new_splits, problem.notes)
    (folder / RUN_FILE).unlink(missing_ok=True)  # a search that goes on is no finished run meanwhile
    features = problem.store.load(problem.labelled, [tower.spec for tower in towers], problem.keys, IN_MEMORY)
    _check_features(problem.samples, features)
    maker = replace(maker, device=resolve_device(device))
    runner = make_engine(engine, features, problem.targets, maker.device, attend, workers, ray_address)
    run = _train_run(problem, features, runner, pairs, plan, config, folder, maker, progress)
    return Sweep(run, False, maker.seconds, problem.new_splits, problem.notes)


def _train_run(
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


def _check(task: str, attend: str, plan: Plan, engine: str) -> None:
    for flag, value, known in (
        ("--task", task, TASKS),
        ("--attend", attend, ("tokens", "pooled")),
        ("--search", plan.method, METHODS),
        ("--engine", engine, ENGINES),
    ):
        if value not in known:
            raise ConfigError(f"{flag} {value}: use one of {', '.join(known)}")


def _check_features(samples: SampleSet, features: Features) -> None:
    """An encoder that saw none of the samples is refused."""
    if empty := [name for name, mask in features.masks.items() if not mask.any()]:
        raise HeadError(
            f"{samples.source}: no labelled sample has a vector of {', '.join(empty)}; leave it out of --encoders"
        )


def _is_done(run: Run, plan: Plan) -> bool:
    """Whether a finished run needs nothing: its files are whole, no search was cut short by time, and no more trials
    are asked for than then."""
    before = run.config["trials"]
    enough = not plan.space or before is None or (plan.trials is not None and plan.trials <= before)
    files = [run.folder / f"{LEADERBOARD}.csv", run.folder / f"{LEADERBOARD}.json", run.folder / ABLATION]
    return (
        enough
        and all(entry.get("search_over", True) for entry in run.leaderboard)
        and all(file.is_file() for file in files)
        and all(finals_are_whole(run.head_folder(entry), entry.get("final", [])) for entry in run.leaderboard)
    )


def _plan_record(plan: Plan) -> dict[str, Any]:
    """For JSON; how long a search may take is no part of what it does: it can be prolonged."""
    record = {**asdict(plan), "time_limit": None, "trials": None}
    return {**record, "space": {name: _values(values) for name, values in plan.space.items()}}


def _values(values: Any) -> Any:
    return list(values) if isinstance(values, Sequence) else asdict(values)


def _label(pairs: Sequence[Sequence[str]]) -> str:
    """What a run folder is called after."""
    heads = list(dict.fromkeys(head for head, _ in pairs))
    return "-".join(heads) if len(heads) <= NAMED_HEADS else f"{len(heads)}-heads"
