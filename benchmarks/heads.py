"""Heads trained as stacks against the loop that is usually written, side by side in one run; memory; a whole sweep.

    python benchmarks/heads.py [--device cpu|cuda] [--only SECTION] [--small] [--folder FOLDER] [--data DATA]

Sections: speed memory sweep (all by default). Speed compares seconds an epoch a head: a ratio above 1 means that
mmfeat is faster. Memory needs 3 GB in FOLDER, a temporary one by default. The sweep trains on generated samples, or
on DATA with what `mmfeat extract` left in `./cache`. --small only shows that everything runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import subprocess
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

from cache import POOLED, made_keys, peak_memory, random_vectors
from mmfeat.cache.shard import Rows
from mmfeat.cache.store import Cache
from mmfeat.evaluation.splits import make_folds
from mmfeat.extraction.requests import latest_request
from mmfeat.heads.jobs import LocalEngine
from mmfeat.heads.registry import NEEDS_TOKENS, HeadSettings
from mmfeat.heads.stack import one_torch_thread
from mmfeat.samples.dataset import Sample
from mmfeat.samples.keys import ContentKeys
from mmfeat.samples.labels import Targets, indicator
from mmfeat.sweep.problem import IN_MEMORY, Problem
from mmfeat.sweep.train import Sweep, train_heads
from mmfeat.sweep.trials import HeadTrainer
from mmfeat.system.hardware import cpu_count, resolve_device
from mmfeat.system.wording import ignore

REPEATS = 3
GOALS = {("cpu", 16): 3.0, ("cpu", 64): 2.0, ("cuda", 16): 50.0, ("cuda", 64): 50.0}
SAME = 0.02  # macro-F1 by which two ways to train the same heads may differ in the mean
GOAL_MEMORY = 3.0  # GB
MEASURED = ("concat", "logistic", "ridge")
Way = Callable[[], "list[float]"]


@dataclass(frozen=True)
class Line:
    """A line of the table."""

    what: str
    figure: str
    goal: str = ""


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    device: str
    small: bool
    folder: Path
    data: str | None = None


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


def main() -> None:
    """Run the sections that were asked for and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="cpu or cuda; by default CUDA where there is one")
    parser.add_argument("--only", choices=list(SECTIONS), help="one section")
    parser.add_argument("--small", action="store_true", help="a little of everything")
    parser.add_argument("--folder", help="where to write; a temporary folder by default")
    parser.add_argument("--data", help="samples of the sweep, whose vectors are in ./cache")
    given = parser.parse_args()
    device = resolve_device(given.device)
    print(f"{machine(device)}\n`{shlex.join(['python', *sys.argv])}`\n\n| what | figure | goal |\n| --- | --- | --- |")
    for name in [given.only] if given.only else SECTIONS:
        with tempfile.TemporaryDirectory(dir=given.folder) as folder:
            for line in SECTIONS[name](Asked(device, given.small, Path(folder), given.data)):
                print(f"| {line.what} | {line.figure} | {line.goal} |", flush=True)


def machine(device: str) -> str:
    """What the figures are of."""
    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return (
        f"{cpu_count()} of {os.cpu_count()} cores{gpu}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def speed(asked: Asked) -> Iterator[Line]:
    """Stacked heads against a loop and skorch, at two batch sizes."""
    for batch_size in (16, 64):
        yield from compare(make_contest(asked.device, batch_size, asked.small))


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


def compare(contest: Contest) -> Iterator[Line]:
    """Seconds of each way in turns, so that all see the same machine; medians, ratios, and whether all learn alike."""
    count, batch_size = len(contest.task.cells("concat")), contest.settings.batch_size
    threads, ways = _ways(contest)
    title = f"{count} heads, batch {batch_size}"
    seconds, scores = take_turns(ways, contest)
    how = "" if contest.device != "cpu" else f", {threads} thread{'s' * (threads > 1)}"
    for name, value in seconds.items():
        own = "" if name == "mmfeat" else how
        yield Line(f"{title}: {name}{own}", f"{1000 * value:.3g} ms an epoch a head")
    goals = {"loop": GOALS.get((contest.device.partition(":")[0], batch_size))}
    for name in list(seconds)[:-1]:
        ratio = seconds[name] / seconds["mmfeat"]
        yield Line(f"{title}: mmfeat against {name}", f"{ratio:.2f} x", verdict(ratio, goals.get(name)))
    for name in list(seconds)[:-1]:
        differences = np.subtract(scores["mmfeat"][: len(scores[name])], scores[name])
        mean, error = differences.mean(), differences.std() / np.sqrt(len(differences))
        figure = f"{np.mean(scores[name]):.3f}, mmfeat {mean:+.3f} (standard error {error:.3f})"
        yield Line(f"{title}: validation macro-F1 of {name}", figure, verdict(abs(mean), SAME, below=True))
    if not skorch_is_there():
        yield Line(f"{title}: skorch", "not installed")


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


def memory(asked: Asked) -> Iterator[Line]:
    """Most resident memory of a process that trains on more than it may hold, mapped pages counted."""
    rows, width = (1_000_000, 1024) if not asked.small else (20_000, 64)
    write_vectors(asked.folder, rows, width)
    command = [sys.executable, __file__, "--measure", str(asked.folder), str(rows), asked.device]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            name, seconds, peak = line.split()
            what = f"{name} on {rows:,} x {width} float16 on disk, 2 folds: most resident memory so far"
            gigabytes = float(peak) / 1e9
            yield Line(what, f"{gigabytes:.2f} GB, {float(seconds):.0f} s", verdict(gigabytes, GOAL_MEMORY, below=True))
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed")


def write_vectors(folder: Path, rows: int, width: int) -> None:
    """A cache of one encoder's vectors."""
    piece = random_vectors(min(rows, 50_000), width)
    with Cache(folder, "set").writer(POOLED, {}) as writer:
        for start in range(0, rows, len(piece)):
            count = min(len(piece), rows - start)
            writer.add(Rows(made_keys(count, start), ["id"] * count, [""] * count, piece[:count]))


def measure(folder: str, rows: str, device: str) -> None:
    """In a process of its own: train each head on 2 folds, and print its name, seconds and the peak so far in bytes."""
    count = int(rows)
    keys = ContentKeys(np.array(made_keys(count)), np.ones(count, bool), ("",) * count)
    samples = [Sample(str(number)) for number in range(count)]
    features = Cache(folder, "set").load(samples, [POOLED], {"text": keys}, IN_MEMORY if count > 100_000 else 0)
    assert not features.blocks, "the vectors are to stay on disk"
    numbers = np.random.default_rng(7).integers(0, len(CLASSES), count)
    targets = Targets(CLASSES, indicator(numbers, len(CLASSES)))
    task = Problem(features.ids, targets, make_folds(targets, features.ids, np.arange(count), 2, repeats=1), 1, 42)
    engine = LocalEngine(features, targets, device, "tokens")
    settings = HeadSettings(batch_size=1024, epochs=1)
    for head in MEASURED:
        start = time.perf_counter()
        with one_torch_thread():
            HeadTrainer(task, engine, head, "text").run([settings], ignore)
        print(head, time.perf_counter() - start, peak_memory(), flush=True)
    engine.close()


def sweep(asked: Asked) -> Iterator[Line]:
    """Seconds of a sweep over all fusions and the cheap baselines with defaults, tokens in the cache."""
    out = asked.folder / "heads"
    if asked.data:
        request = latest_request("cache", asked.data)
        done = train_heads(request.data, request.encoders, out=out, options=request.options, device=asked.device)
    else:
        requests = write_extracted(asked.folder, 150 if asked.small else 4000)
        cache, table = asked.folder / "cache", asked.folder / "table.csv"
        done = train_heads(table, requests, cache=cache, out=out, options=OPTIONS, device=asked.device)
    yield from describe_sweep(done)


def describe_sweep(done: Sweep) -> Iterator[Line]:
    """Wall seconds, and the processor's seconds of each head on all modalities."""
    by_head: dict[str, float] = defaultdict(float)
    for entry in done.run.leaderboard:
        by_head[entry.head] += entry.seconds
    total = sum(by_head.values())
    yield Line(f"sweep of {done.run.results.labelled:,} samples with defaults", f"{done.seconds:.1f} s")
    for head, seconds in sorted(by_head.items(), key=lambda pair: -pair[1]):
        if seconds:
            yield Line(f"sweep: {head} on all modalities", f"{seconds:.1f} s of the processor, {seconds / total:.0%}")
    if NEEDS_TOKENS in by_head:
        rest = done.seconds * (1 - by_head[NEEDS_TOKENS] / total)
        yield Line(f"sweep: what would be left without {NEEDS_TOKENS}, about", f"{rest:.1f} s")


def verdict(value: float, wanted: float | None, below: bool = False) -> str:
    """The goal, and whether it was met."""
    if wanted is None:
        return ""
    met = value <= wanted if below else value >= wanted
    return f"{'<=' if below else '>='} {wanted:g}{'' if met else ', **missed**'}"


SECTIONS: dict[str, Callable[[Asked], Iterator[Line]]] = {"speed": speed, "memory": memory, "sweep": sweep}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(*sys.argv[2:])
    else:
        main()
