"""The forecast of a sweep: its seconds and its memory, from a few steps of each head on the user's own vectors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

from mmfeat.baselines.basis import MEMORY, one_blas_thread
from mmfeat.evaluation.protocol import has_splits
from mmfeat.heads.jobs import KEPT_BASIS, Engine, Job, LocalEngine
from mmfeat.heads.registry import BASELINES, QUICK, ZERO_SHOT, Plan
from mmfeat.heads.stack import Member, epoch_steps, one_torch_thread
from mmfeat.runs.leaderboard import BOTH
from mmfeat.samples.dataset import Data
from mmfeat.sweep.entries import assemble
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.train import SweepWork, partitions_of, prepare_sweep, train_heads
from mmfeat.sweep.train_all import trials_of
from mmfeat.sweep.trials import HeadTrainer, Outcome
from mmfeat.system.hardware import cpu_count, peak_memory, resolve_device
from mmfeat.system.wording import ignore

STEPS = 2, 10  # steps of a fusion, whose seconds differ by those of eight steps alone
ROWS = 2048, 4096  # rows on which a baseline is trained; the seconds of more are on the line through both
PREDICTED = 1024  # most validation rows of a fusion
BEST_EPOCH = 2.3  # epochs to the best one, after which `patience` more are trained; mean of many sweeps
FURTHER = 1 / 3  # share of the heads that a race trains with all seeds
ALONE = 1 / 8  # share of the heads that wait to be trained on one modality and then are
AGAIN = 0.5  # the seconds of a baseline on all rows, whose setting is known, in those of a fold
AROUND = 2.0  # the seconds of scoring, ensembles, ranking and writing, in those of scoring alone
BUSY = 0.85  # share of the time in which a worker works


@dataclass(frozen=True)
class HeadForecast:
    """Forecast of one head on one modality: its trainings with the final heads, and the processor's seconds."""

    head: str
    modality: str
    trainings: int
    seconds: float


@dataclass(frozen=True)
class SweepForecast:
    """Forecasts of all heads, the processor's seconds around their training, and the most memory, in bytes.

    Without heads, there is nothing to do: the run in `folder` is whole.
    """

    samples: int
    folder: Path
    heads: tuple[HeadForecast, ...] = ()
    around: float = 0.0
    bytes: int = 0
    workers: int = 1
    limit: float | None = None

    @property
    def by_head(self) -> list[tuple[str, int, float]]:
        """Each head with its trainings and the processor's seconds on all modalities."""
        alike = {part.head: [other for other in self.heads if other.head == part.head] for part in self.heads}
        return [
            (head, sum(part.trainings for part in parts), sum(part.seconds for part in parts))
            for head, parts in alike.items()
        ]

    @property
    def seconds(self) -> float:
        """Seconds that pass on all workers, of which the search takes about as many as its limit, if it has one."""
        spent = (sum(forecast.seconds for forecast in self.heads) + self.around) / (self.workers * BUSY)
        return spent if self.limit is None else min(spent, self.limit)


def forecast_heads(data: Data, encoders: Sequence[str], **asked: Any) -> SweepForecast:
    """Forecast `train_heads`, whose arguments these are, by a few steps of each head; nothing is written."""
    bound = signature(train_heads).bind(data, encoders, **asked)
    bound.apply_defaults()
    given = bound.arguments
    partitions, protocol = partitions_of(given), given["protocol"]
    if protocol and protocol.split_dir and not has_splits(Path(protocol.split_dir)):
        partitions = [{**partitions[0], "protocol": replace(protocol, split_dir=None)}]
    works = [prepare_sweep(partition) for partition in partitions]
    found = SweepForecast(len(works[0].labelled.targets), works[0].folder)
    if not (lacking := [work for work in works if not work.is_done]):
        return found
    work, times = lacking[0], len(lacking)  # one partition takes as long as another
    device = resolve_device(given["device"])
    workers = (given["workers"] or cpu_count()) if device == "cpu" else 1
    features, _ = work.labelled.load([tower.spec for tower in work.config.encoders])
    with one_blas_thread(), one_torch_thread():
        engine = LocalEngine(features, work.labelled.targets, device, given["attend"], workers)
        before = peak_memory()
        try:
            forecasts, around = _try(work, engine)
        finally:
            engine.close()
    at_once = (workers + 1) * (peak_memory() - before)  # as many entries are trained and scored side by side
    memory, limit = before + at_once + _held(work, engine, workers), work.plan.time_limit
    heads = tuple(replace(one, trainings=times * one.trainings, seconds=times * one.seconds) for one in forecasts)
    limit = None if limit is None else times * limit
    return replace(found, heads=heads, around=times * around, bytes=memory, workers=workers, limit=limit)


def _try(work: SweepWork, engine: LocalEngine) -> tuple[tuple[HeadForecast, ...], float]:
    """The forecast of each head, and the seconds around all of them."""
    labelled, config, plan, pairs = work.labelled, work.config, work.plan, work.config.pairs or ()
    repeats, seed = labelled.protocol.seeds, labelled.protocol.seed
    problem = Problem(
        engine.bench.features.ids, labelled.targets, labelled.splits, repeats, seed, config.products or "float32"
    )
    forecasts = []
    with work.progress.step("try heads", len(pairs)) as advance:
        for head, modality in pairs:
            trainer = HeadTrainer(problem, engine, head, modality)
            forecast = (_baseline if head in BASELINES else _fusion)(trainer, plan)
            share = ALONE if config.modalities and modality != BOTH and head not in QUICK else 1
            trainings = round(forecast.trainings * share)
            forecasts.append(replace(forecast, trainings=trainings, seconds=forecast.seconds * share))
            advance(1)
    return tuple(forecasts), AROUND * len(pairs) * _scoring(problem, plan)


def _fusion(trainer: HeadTrainer, plan: Plan) -> HeadForecast:
    """Forecast of a fusion from two trainings of one stack, the first as many steps shorter as are measured."""
    problem, settings = trainer.problem, plan.settings
    job = trainer.jobs([settings])[0]
    members = tuple(_short(member, job.members[0].standard) for member in job.members)

    def seconds(steps: int) -> float:
        tried = tuple(replace(member, steps=steps) for member in members)
        return _timed(trainer, replace(job, members=tried, predict=tuple((m.validation,) for m in tried)))

    fixed, longer = min(seconds(STEPS[0]), seconds(STEPS[0])), seconds(STEPS[1])
    step = max(0.0, longer - fixed) / (STEPS[1] - STEPS[0])
    row = max(0.0, fixed - STEPS[0] * step) / max(1, len(members[0].validation))
    best = min(BEST_EPOCH, settings.epochs)
    epochs = min(BEST_EPOCH + settings.patience, settings.epochs)
    (_, _, rows), *_ = problem.cells(trainer.head)
    each = epochs * (job.members[0].steps * step + len(rows.validation) * row) + len(rows.test) * row
    seeds = 1 + (problem.repeats - 1) * (FURTHER if plan.race else 1)
    count = trials_of(plan, trainer.head) * seeds * len(problem.splits)
    finals = seeds * plan.refit
    again = best * step * epoch_steps(len(problem.targets), settings.batch_size)
    return HeadForecast(trainer.head, trainer.modality, round(count + finals), count * each + finals * again)


def _short(member: Member, standard: np.ndarray) -> Member:
    """The member with one epoch and few validation rows; all share the statistics of the same rows."""
    settings = replace(member.settings, epochs=1, init="random")
    return replace(member, settings=settings, validation=member.validation[:PREDICTED], fold=standard)


def _baseline(trainer: HeadTrainer, plan: Plan) -> HeadForecast:
    """Forecast of a baseline from one fold, or from two parts of it where it has many rows."""
    folds, count = len(trainer.problem.splits), len(trainer.problem.targets)
    if trainer.head == ZERO_SHOT:  # needs the encoder, and next to no time
        return HeadForecast(trainer.head, trainer.modality, folds, 0.0)
    job = trainer.jobs([plan.settings])[0]
    few, many = (min(rows, count) for rows in ROWS)
    seed = 0 if _keeps_bases(trainer.engine, trainer.modality, count) else crc32(trainer.head.encode())
    each = _timed(trainer, _part(job, many / count, seed))
    if count > many:
        each += max(0.0, each - _timed(trainer, _part(job, few / count, seed))) * (count - many) / (many - few)
    return HeadForecast(trainer.head, trainer.modality, folds + plan.refit, each * (folds + AGAIN * plan.refit))


def _part(job: Job, share: float, seed: int) -> Job:
    """The first member of a job on a random share of its rows."""
    random = np.random.default_rng(seed)

    def some(rows: np.ndarray) -> np.ndarray:
        return np.sort(random.permutation(rows)[: max(1, round(share * len(rows)))]) if share < 1 else rows

    whole, test = some(job.members[0].standard), some(job.predict[0][1])
    parts = tuple(part for rows in job.members[0].parts if len(part := np.intersect1d(rows, whole)))
    validation = np.intersect1d(job.members[0].validation, whole)
    member = replace(job.members[0], validation=validation, fold=whole, parts=parts or (whole[:1],))
    return replace(job, members=(member,), predict=((validation, test),))


def _timed(trainer: HeadTrainer, job: Job) -> float:
    """The mean seconds of the members of a job."""
    (fitted,) = trainer.engine.run([job], ignore)
    return sum(one.seconds for one in fitted) / len(fitted)


def _scoring(problem: Problem, plan: Plan) -> float:
    """Seconds in which an entry with random logits is scored."""
    random, classes = np.random.default_rng(0), len(problem.targets.classes)
    logits = random.standard_normal((1, len(problem.targets), classes))
    validation = [logits[0, rows.validation] for _, _, rows in replace(problem, repeats=1).cells("concat")]
    scores = np.zeros((1, len(problem.splits)))
    start = time.thread_time()
    assemble(
        problem, "ridge", "both", [Outcome(plan.settings, logits, validation, scores, [], [], [], 0.0)], plan.adjustment
    )
    return time.thread_time() - start


def _keeps_bases(engine: Engine, modality: str, rows: int) -> bool:
    return rows * engine.bench.data("ridge", modality).width <= KEPT_BASIS


def _held(work: SweepWork, engine: LocalEngine, workers: int) -> int:
    """Bytes that baselines hold in the sweep beside those of the forecast: bases of all folds, or rows on all cores."""
    held, rows, folds = 0, len(work.labelled.targets), len(work.labelled.splits)
    for modality in {modality for head, modality in work.config.pairs or () if head in BASELINES}:
        width = engine.bench.data("ridge", modality).width
        if _keeps_bases(engine, modality, rows):
            held += folds * 4 * min(rows, width) * (rows + width)  # the other folds and all rows have a basis each
        else:
            held = max(held, workers * min(8 * max(0, rows - ROWS[1]) * width, MEMORY))
    return held
