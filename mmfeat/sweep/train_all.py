"""Train the run of a sweep: its entries are trained side by side, combined, ranked and written."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from mmfeat.baselines.basis import one_blas_thread
from mmfeat.cache.features import Features
from mmfeat.evaluation.protocol import files_hash, save_splits
from mmfeat.evaluation.significance import compare_with_best, holm, paired_difference
from mmfeat.heads.jobs import Engine, LocalEngine
from mmfeat.heads.registry import BASELINES, QUICK, TWINS, Plan
from mmfeat.heads.stack import one_torch_thread
from mmfeat.runs.entry import Entry, Interval, PairedTest, RunConfig, convert
from mmfeat.runs.leaderboard import BOTH, MODALITY_SETS, ablation_csv, write_leaderboard
from mmfeat.runs.record import Maker, making
from mmfeat.runs.run import ABLATION, RUN_FILE, Results, Run, write_run
from mmfeat.runs.verdict import recommend
from mmfeat.samples.labels import Targets
from mmfeat.sweep.ensembles import ensemble_entries
from mmfeat.sweep.entries import EntryTrainer, TrainedEntry
from mmfeat.sweep.problem import LabelledData, Problem
from mmfeat.sweep.trials import HeadTrainer, decide
from mmfeat.system.files import write_atomic, write_errors
from mmfeat.system.hardware import check_engine, cpu_count
from mmfeat.system.wording import Advance, Progress, ignore, interval

SHOWN = 10  # entries that are shown while the others train


def rank(problem: Problem, entries: Sequence[TrainedEntry], gains: bool = True) -> tuple[Entry, ...]:
    """The entries, best first, each with its difference from the best, p-values, and whether that is a tie.

    The first has its score as one `picked` among all, which other samples will show.

    With `gains`, an entry on both modalities has its difference from the same head on the better single one.
    """
    ordered = sorted(entries, key=lambda trained: -trained.entry.headline.value)
    tested = problem.splits.tested
    chosen = [decide(problem, trained.logits, trained.decisions)[0][:, tested] for trained in ordered]
    behind, first = compare_with_best(problem.tested, chosen, 0, problem.seed, problem.splits.tested_groups)
    gained = _gains(problem, [trained.entry for trained in ordered], chosen) if gains else {}
    best, *others = (
        replace(trained.entry, behind_best=convert(dict(test), PairedTest), tie=test["tie"], gain=gained.get(index))
        for index, (trained, test) in enumerate(zip(ordered, behind, strict=True))
    )
    return replace(best, picked=convert(vars(first), Interval)), *others


def _gains(problem: Problem, ordered: Sequence[Entry], chosen: Sequence[np.ndarray]) -> dict[int, PairedTest]:
    """Index of an entry on both modalities -> its gain, p-values adjusted for the number of heads (Holm)."""
    pairs = {}
    for index, entry in enumerate(ordered):
        alone = [other for other, candidate in enumerate(ordered) if _single(candidate, entry.head)]
        if entry.modalities == BOTH and alone:
            pairs[index] = alone[0]  # the first is the better one, since the entries are in order
    targets, groups = problem.tested, problem.splits.tested_groups
    tests = {
        index: paired_difference(targets, chosen[index], chosen[other], problem.seed, groups)
        for index, other in pairs.items()
    }
    adjusted = dict(zip(tests, holm([test.p for test in tests.values()]).tolist(), strict=True))
    return {
        index: PairedTest(**vars(test), p_holm=adjusted[index], over=ordered[pairs[index]].modalities)
        for index, test in tests.items()
    }


def _single(entry: Entry, head: str) -> bool:
    return entry.head in (head, TWINS.get(head)) and entry.modalities in MODALITY_SETS[1:]


def train_run(
    data: LabelledData,
    features: Features,
    engine: Engine,
    pairs: Sequence[tuple[str, str]],
    plan: Plan,
    config: RunConfig,
    folder: Path,
    maker: Maker,
    progress: Progress,
) -> Run:
    """Train what the run folder lacks, then combine, rank, and declare the run complete."""
    try:
        with write_errors(folder):  # a run whose search goes on is not complete
            (folder / RUN_FILE).unlink(missing_ok=True)
        with making(folder, config, maker), one_blas_thread(), one_torch_thread():  # sums depend on the threads
            save_splits(data.splits, folder, [str(sample.label) for sample in data.samples.labelled])
            protocol, products = data.protocol, config.products or "float32"
            problem = Problem(features.ids, data.targets, data.splits, protocol.seeds, protocol.seed, products)
            deadline = float("inf") if plan.time_limit is None else time.monotonic() + plan.time_limit
            trainers = Trainers(problem, engine, plan, folder, progress, deadline)
            entries = _train_all(trainers, pairs, bool(config.ensembles), bool(config.modalities))
            return _finish(problem, entries, config, maker, folder, features)
    finally:
        engine.close()


def make_engine(
    name: str,
    features: Features,
    targets: Targets,
    device: str,
    attend: str,
    workers: int = 0,
    address: str | None = None,
) -> Engine:
    """Make the engine that `--engine` names."""
    check_engine(name, address)
    if name == "ray":
        from mmfeat.sweep.on_ray import RayEngine

        return RayEngine(features, targets, device, attend, address)
    return LocalEngine(features, targets, device, attend, workers)


@dataclass(frozen=True)
class Trainers:
    """Trains entries into the run folder, each in a thread that waits for its jobs; all jobs share the engine's
    workers. No trial is begun after `deadline` (seconds of `time.monotonic`)."""

    problem: Problem
    engine: Engine
    plan: Plan
    folder: Path
    progress: Progress
    deadline: float
    board: dict[str, Entry] = field(default_factory=dict)  # the entries that are scored so far

    def score(self, title: str, wanted: Mapping[tuple[str, str], int]) -> dict[tuple[str, str], TrainedEntry]:
        """The entries of these heads and modalities, with as many seeds a fold as each is mapped to, scored out of
        fold; those that have all seeds with their final heads."""
        cells = {repeats: replace(self.problem, repeats=repeats).cells for repeats in {*wanted.values()}}
        total = sum(trials_of(self.plan, head) * len(cells[seeds](head)) for (head, _), seeds in wanted.items())
        ordered = quick_first([*wanted])
        with self.progress.step(title, total) as advance:
            calls = [partial(self._score, self._trainer(*pair, wanted[pair], advance)) for pair in ordered]
            return dict(zip(ordered, self._side_by_side(calls), strict=True))

    def _score(self, trainer: EntryTrainer) -> TrainedEntry:
        trained = trainer.score()
        self.board[trained.name] = trained.entry
        entries = sorted(self.board.copy().values(), key=lambda entry: -entry.headline.value)
        lines = [f"{interval(entry.headline)} {entry.label}" for entry in entries[:SHOWN]]
        trainer.advance(0, f"best so far {lines[0]}\n" + "\n".join(f"{'':11} {line}" for line in lines[1:]))
        return trainer.finish(trained) if self.has_all_seeds(trained) else trained

    def has_all_seeds(self, trained: TrainedEntry) -> bool:
        """Whether no race can train further heads of this entry."""
        return len(trained.logits) == self.problem.repeats_of(trained.entry.head)

    def finish(self, entries: Sequence[TrainedEntry]) -> list[TrainedEntry]:
        """The entries with their final heads."""
        with self.progress.step("final heads", len(entries)) as advance:
            return self._side_by_side([partial(self._finish, trained, advance) for trained in entries])

    def _finish(self, trained: TrainedEntry, advance: Advance) -> TrainedEntry:
        head, modality = trained.entry.head, trained.entry.modalities
        done = self._trainer(head, modality, len(trained.logits), ignore).finish(trained)
        advance(1)
        return done

    def _trainer(self, head: str, modality: str, repeats: int, advance: Advance) -> EntryTrainer:
        trainer = HeadTrainer(replace(self.problem, repeats=repeats), self.engine, head, modality)
        return EntryTrainer(trainer, self.plan, self.folder, self.deadline, advance)

    def _side_by_side(self, calls: Sequence[Callable[[], TrainedEntry]]) -> list[TrainedEntry]:
        with ThreadPoolExecutor(cpu_count() + 1) as threads:
            futures = [threads.submit(call) for call in calls]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()  # an error is raised now, not when all entries before it are done
                return [future.result() for future in futures]
            except BaseException:
                self.engine.close()  # first: the threads, for which the pool waits, wait for the engine
                for future in futures:
                    future.cancel()
                raise


def trials_of(plan: Plan, head: str) -> int:
    """How many trials a plan has for a head; a search without end counts its first."""
    if not plan.space or head in BASELINES:
        return 1
    return plan.trials or math.prod(len(values) for values in plan.space.values() if isinstance(values, Sequence))


def _train_all(
    trainers: Trainers, pairs: Sequence[tuple[str, str]], ensembles: bool, by_need: bool = False
) -> list[TrainedEntry]:
    """Train the heads, in a race if the plan has one, and combine them into ensembles; with `by_need` heads on one
    modality alone only where `alone_too` says so."""
    problem, plan = trainers.problem, trainers.plan
    fewest = 1 if plan.race else problem.repeats
    waiting = [(head, m) for head, m in pairs if by_need and m != BOTH and head not in QUICK]
    scored = trainers.score("heads", {pair: fewest for pair in pairs if pair not in waiting})
    combined: list[TrainedEntry] = []
    while True:
        entries = [scored[pair] for pair in pairs if pair in scored]
        if waiting or plan.race:
            ranked = rank(problem, [*entries, *combined], gains=False)
            wanted = dict.fromkeys(alone_too(ranked, waiting, problem), fewest)
            wanted |= dict.fromkeys(behind_in_seeds(ranked, problem.repeats), problem.repeats)
            if wanted:
                scored |= trainers.score("closer look", wanted)
                waiting, combined = [pair for pair in waiting if pair not in wanted], []
                continue
        if ensembles and not combined:
            combined = ensemble_entries(problem, entries, plan.adjustment, trainers.folder)
            if combined:
                continue  # with them more heads may tie with the first entry
        break
    dropped = [trained.updated(dropped=True) for trained in entries if not trainers.has_all_seeds(trained)]
    done = {trained.name: trained for trained in (trainers.finish(dropped) if dropped else ())}
    return [*(done.get(trained.name, trained) for trained in entries), *combined]


def quick_first(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """The heads and modalities, those first that are scored within seconds on the first modality."""
    return sorted(pairs, key=lambda pair: pair[0] not in QUICK or pair[1] != pairs[0][1])


def alone_too(ranked: Sequence[Entry], waiting: Sequence[tuple[str, str]], problem: Problem) -> list[tuple[str, str]]:
    """Of the heads that wait to be trained on one modality: all on a modality of which an entry comes first or ties
    with the first; and the best head, for its ablation, once it has all its seeds."""
    best = next(entry for entry in ranked if not entry.is_ensemble)
    tied = {entry.modalities for entry in ranked if entry.tie or entry == ranked[0]}
    is_sure = best.head in BASELINES or len(best.by_seed.values) == problem.repeats
    heads = (best.head, TWINS.get(best.head)) if is_sure else ()
    return [(head, modality) for head, modality in waiting if modality in tied or head in heads]


def behind_in_seeds(ranked: Sequence[Entry], repeats: int) -> list[tuple[str, str]]:
    """Heads and modalities with fewer than `repeats` seeds that tie with the first entry or show the ablation of the
    best head, of whose single modalities one is spared if its interval lies below that of the better one."""
    heads = [entry for entry in ranked if not entry.is_ensemble]
    best = heads[0].head
    alone = [entry for entry in heads if _single(entry, best)]
    shown = [entry for entry in heads if entry.head in (best, TWINS.get(best)) and entry not in alone]
    shown += [entry for entry in alone if entry.macro_f1.high >= alone[0].macro_f1.low]
    return [
        (entry.head, entry.modalities)
        for entry in heads
        if (entry.tie or entry in shown) and entry.head not in BASELINES and len(entry.by_seed.values) < repeats
    ]


def _finish(
    problem: Problem,
    entries: list[TrainedEntry],
    config: RunConfig,
    maker: Maker,
    folder: Path,
    features: Features,
) -> Run:
    """Rank, and declare the run complete."""
    leaderboard = rank(problem, entries)
    classes = problem.targets.classes
    write_leaderboard(folder, leaderboard, classes)
    write_atomic(folder / ABLATION, ablation_csv(leaderboard, classes).encode())
    counts = [] if problem.targets.numeric else problem.targets.matrix.sum(0).tolist()
    results = Results(
        classes=tuple(classes),
        class_counts=dict(zip(classes, counts, strict=False)),
        labelled=len(problem.targets),
        widths=features.widths,
        leaderboard=leaderboard,
        record=maker.record(config),
        recommended=recommend(leaderboard, config.encoders).name,
        splits=files_hash(folder),
    )
    return write_run(Run(folder, config, results))
