"""Heads trained as stacks against the loop that is usually written and skorch; memory; a whole sweep and its scaling.

Speed compares seconds an epoch a head: a ratio above 1 means that mmfeat is faster. Memory needs 3 GB of disk.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sequential import Cell, Recipe, skorch_is_there, train_by_index, train_with_loader, train_with_skorch
from synthetic import CLASSES, OPTIONS, WIDTHS, Made, make_samples, make_splits, write_extracted
from table import Row, in_process, measured, print_json

from cache import POOLED, made_keys, random_vectors
from mmfeat.baselines.basis import one_blas_thread
from mmfeat.cache.shard import Rows
from mmfeat.cache.store import Cache
from mmfeat.evaluation.splits import make_folds
from mmfeat.heads.jobs import LocalEngine
from mmfeat.heads.registry import NEEDS_TOKENS, HeadSettings
from mmfeat.heads.stack import one_torch_thread
from mmfeat.samples.dataset import Sample
from mmfeat.samples.keys import ContentKeys
from mmfeat.samples.labels import Targets, indicator
from mmfeat.sweep.problem import IN_MEMORY, Problem
from mmfeat.sweep.train import Sweep, train_heads
from mmfeat.sweep.trials import HeadTrainer
from mmfeat.system.hardware import peak_memory
from mmfeat.system.wording import ignore

REPEATS = 3
GOALS = {16: 3.0, 64: 2.0}  # on a CPU, by batch size
SAME = 0.02  # macro-F1 by which two ways to train the same heads may differ in the mean
GOAL_MEMORY = 3.0  # GB
MEASURED = ("concat", "logistic", "ridge")
Way = Callable[[], "list[float]"]


@dataclass(frozen=True)
class Contest:
    """The same heads for every way: those that mmfeat trains, and how many of them are trained one after another."""

    made: Made
    task: Problem
    settings: HeadSettings
    device: str
    sequential: int
    rounds: int = REPEATS

    @property
    def recipe(self) -> Recipe:
        own = self.settings
        return Recipe(own.batch_size, own.epochs, own.learning_rate, own.weight_decay, own.dropout)

    def cells(self) -> list[Cell]:
        """The first heads' data as a loop sees them."""
        vectors, numbers = self.made.vectors, self.made.targets.numbers
        cells = self.task.cells("concat")[: self.sequential]
        return [Cell.of(vectors, numbers, rows.train, rows.validation, seed) for seed, (_, _, rows) in enumerate(cells)]


def speed(small: bool) -> Iterator[Row]:
    """Stacked heads against a loop and skorch, at two batch sizes."""
    for batch_size in (16, 64):
        yield from compare(make_contest("cpu", batch_size, small), GOALS[batch_size])


def make_contest(device: str, batch_size: int, small: bool) -> Contest:
    """Fixed epochs, no early stopping: concat heads of 1,408 columns on 2,560 training and 640 validation rows."""
    cuda = device.startswith("cuda")
    folds, repeats, sequential = (1, 256, 8) if cuda else (5, 3, 15)
    samples, epochs, widths = 4000, 3, WIDTHS
    if small:
        folds, repeats, sequential, samples, widths = 2, 2, 4, 400, {"image": 64, "text": 32}
    made = make_samples(samples, widths)
    splits = make_splits(samples, folds)
    settings = HeadSettings(batch_size=batch_size, epochs=epochs, patience=epochs)
    task = Problem(splits.ids, made.targets, splits, repeats, 42)
    return Contest(made, task, settings, device, sequential, 1 if small else REPEATS)


def compare(contest: Contest, goal: float | None) -> Iterator[Row]:
    """Seconds of each way in turns, so that all see the same machine; medians, ratios, and whether all learn alike."""
    count, batch_size = len(contest.task.cells("concat")), contest.settings.batch_size
    threads, ways = _ways(contest)
    title = f"{count} heads, batch {batch_size}"
    seconds, scores = take_turns(ways, contest)
    how = "" if contest.device != "cpu" else f", {threads} thread{'s' * (threads > 1)}"
    for name, value in seconds.items():
        yield measured(f"{title}: {name}{'' if name == 'mmfeat' else how}", 1000 * value, "ms an epoch a head")
    for name in list(seconds)[:-1]:
        ratio, least = seconds[name] / seconds["mmfeat"], goal if name == "loop" else None
        yield measured(f"{title}: mmfeat against {name}", ratio, "x", least=least)
    for name in list(seconds)[:-1]:
        differences = np.subtract(scores["mmfeat"][: len(scores[name])], scores[name])
        mean, error = differences.mean(), differences.std() / np.sqrt(len(differences))
        note = f"{name} {np.mean(scores[name]):.3f}, mmfeat {mean:+.3f}, standard error {error:.3f}"
        yield measured(f"{title}: macro-F1 apart from {name}", abs(mean), most=SAME, note=note)
    if not skorch_is_there():
        yield Row(f"{title}: skorch", "not installed")


def _ways(contest: Contest) -> tuple[int, dict[str, Way]]:
    """mmfeat last. The loop takes as many threads as torch chooses, or one if that is faster."""
    cells, recipe, device = contest.cells(), contest.recipe, contest.device
    threads = torch.get_num_threads()
    if device == "cpu":
        threads = min({threads, 1}, key=lambda each: _probe(cells[0], recipe, each))
    named = {"loop": train_with_loader, "loop without a loader": train_by_index}
    if skorch_is_there():
        named["skorch"] = train_with_skorch

    def one_after_another(train: Callable[[Cell, Recipe, str], float]) -> list[float]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return [train(cell, recipe, device) for cell in cells]
        finally:
            torch.set_num_threads(before)

    ways: dict[str, Way] = {name: partial(one_after_another, train) for name, train in named.items()}
    return threads, {**ways, "mmfeat": partial(train_stacked, contest)}


def _probe(cell: Cell, recipe: Recipe, threads: int) -> float:
    """Seconds of one head of the loop, the faster of two."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return min(timed(lambda: [train_with_loader(cell, recipe, "cpu")])[0] for _ in range(2))
    finally:
        torch.set_num_threads(before)


def train_stacked(contest: Contest) -> list[float]:
    """Validation macro-F1 of each head, trained as `mmfeat heads` trains them: on all cores, or all on the GPU."""
    engine = LocalEngine(contest.made.features, contest.made.targets, contest.device, "tokens")
    try:
        with one_torch_thread():
            (outcome,) = HeadTrainer(contest.task, engine, "concat", "both").run([contest.settings], ignore)
    finally:
        engine.close()
    return outcome.scores.T.ravel().tolist()  # fold after fold, as the cells


def take_turns(ways: dict[str, Way], contest: Contest) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Median seconds an epoch a head of some rounds, and the scores; a GPU warms up in a round that does not count."""
    seconds: dict[str, list[float]] = defaultdict(list)
    scores: dict[str, list[float]] = {}
    for turn in range(0 if contest.device == "cpu" else -1, contest.rounds):
        for name, way in ways.items():
            taken, scores[name] = timed(way)
            if turn >= 0:
                seconds[name].append(taken / len(scores[name]) / contest.settings.epochs)
    return {name: statistics.median(values) for name, values in seconds.items()}, scores


def timed(way: Way) -> tuple[float, list[float]]:
    """Seconds, and what the way gives; its scores are on the CPU, so the GPU has done its work."""
    start = time.perf_counter()
    scores = way()
    return time.perf_counter() - start, scores


def memory(small: bool) -> Iterator[Row]:
    """Most resident memory of a process that trains on more than it may hold, mapped pages counted."""
    rows, width = (1_000_000, 1024) if not small else (20_000, 64)
    with tempfile.TemporaryDirectory() as folder:
        write_vectors(Path(folder), rows, width)
        yield from in_process(__file__, ["--disk", folder, str(rows)])


def write_vectors(folder: Path, rows: int, width: int) -> None:
    """A cache of one encoder's vectors."""
    piece = random_vectors(min(rows, 50_000), width)
    with Cache(folder, "set").writer(POOLED, {}) as writer:
        for start in range(0, rows, len(piece)):
            count = min(len(piece), rows - start)
            writer.add(Rows(made_keys(count, start), ["id"] * count, [""] * count, piece[:count]))


def on_disk(folder: str, rows: str) -> Iterator[Row]:
    """In a process of its own: train each head on 2 folds."""
    count = int(rows)
    keys = ContentKeys(np.array(made_keys(count)), np.ones(count, bool), ("",) * count)
    samples = [Sample(str(number)) for number in range(count)]
    features = Cache(folder, "set").load(samples, [POOLED], {"text": keys}, IN_MEMORY if count > 100_000 else 0)
    assert not features.blocks, "the vectors are to stay on disk"
    numbers = np.random.default_rng(7).integers(0, len(CLASSES), count)
    targets = Targets(CLASSES, indicator(numbers, len(CLASSES)))
    task = Problem(features.ids, targets, make_folds(targets, features.ids, np.arange(count), 2, repeats=1), 1, 42)
    engine = LocalEngine(features, targets, "cpu", "tokens")
    for head in MEASURED:
        start = time.process_time()
        with one_torch_thread():
            HeadTrainer(task, engine, head, "text").run([HeadSettings(batch_size=1024, epochs=1)], ignore)
        spent, peak = time.process_time() - start, peak_memory() / 1e9
        what = f"{head} on {count:,} vectors on disk, 2 folds: most resident memory so far"
        yield measured(what, peak, "GB", most=GOAL_MEMORY, note=f"{spent:.0f} s of CPU")
    engine.close()


def scaling(small: bool) -> Iterator[Row]:
    """CPU seconds of each head as samples, columns or classes grow; each size in a process of its own."""
    for samples, columns, classes in ((20_000, 1408, 3), (100_000, 1408, 3), (20_000, 4096, 3), (20_000, 1408, 100)):
        sizes = (samples // 50, columns // 16, classes) if small else (samples, columns, classes)
        yield from in_process(__file__, ["--scale", *map(str, sizes)])


def scale(samples: str, columns: str, classes: str) -> Iterator[Row]:
    """In a process of its own: each head on 2 folds, half of the columns photos, half texts."""
    count, width, kinds = int(samples), int(columns) // 2, int(classes)
    numbers = np.random.default_rng(7).permutation(np.arange(count) % kinds)
    made = make_samples(count, {"image": width, "text": width}, numbers)
    ids = made.features.ids
    task = Problem(ids, made.targets, make_folds(made.targets, ids, np.arange(count), 2, repeats=1), 1, 42)
    engine = LocalEngine(made.features, made.targets, "cpu", "tokens")
    for head in ("concat", "film", "prior", "knn", "ridge", "logistic", "svm"):
        start = time.process_time()
        with one_torch_thread(), one_blas_thread():
            HeadTrainer(task, engine, head, "both").run([HeadSettings(epochs=2)], ignore)
        spent = time.process_time() - start
        what = f"{head}: {count:,} samples, {2 * width:,} columns, {kinds} classes"
        yield Row(
            what, f"{spent:.1f} s of CPU, {1e6 * spent / count:.0f} us a sample, {peak_memory() / 1e9:.2f} GB", spent
        )
    engine.close()


def sweep(small: bool) -> Iterator[Row]:
    """Seconds of a sweep over all fusions and the cheap baselines with defaults, tokens in the cache."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requests = write_extracted(folder, 150 if small else 4000)
        cache, table, out = folder / "cache", folder / "table.csv", folder / "heads"
        done = train_heads(table, requests, cache=cache, out=out, options=OPTIONS, device="cpu")
        yield from describe_sweep(done)


def describe_sweep(done: Sweep) -> Iterator[Row]:
    """Wall seconds, and the processor's seconds of each head on all modalities."""
    by_head: dict[str, float] = defaultdict(float)
    for entry in done.run.leaderboard:
        by_head[entry.head] += entry.seconds
    total = sum(by_head.values())
    yield measured(f"sweep of {done.run.results.labelled:,} samples with defaults and tokens", done.seconds, "s")
    for head, seconds in sorted(by_head.items(), key=lambda pair: -pair[1]):
        if seconds:
            yield measured(f"sweep: {head} on all modalities", seconds, "s of CPU", note=f"{seconds / total:.0%}")
    attention, film = by_head.get(NEEDS_TOKENS), by_head.get("film")
    if attention and film:
        yield measured(f"sweep: {NEEDS_TOKENS} against film", attention / film, "x the CPU time", most=3.0)


if __name__ == "__main__":
    print_json({"--disk": on_disk, "--scale": scale}[sys.argv[1]](*sys.argv[2:]))
