"""Sweeps that take a second: few heads on the demo data, and tasks on made-up vectors for single entries."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.encoders.spec import EncoderOptions
from mmfeat.evaluation.decisions import Decision
from mmfeat.evaluation.protocol import Protocol
from mmfeat.evaluation.splits import make_folds, make_holdout
from mmfeat.extraction.extract import extract_features
from mmfeat.heads.jobs import LocalEngine
from mmfeat.heads.registry import HeadSettings, PlanRecord
from mmfeat.runs.entry import Entry, RunConfig
from mmfeat.runs.run import Results, Run
from mmfeat.samples.labels import Targets
from mmfeat.sweep.entries import EntryTrainer, TrainedEntry
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.search import Plan
from mmfeat.sweep.train import Sweep, train_heads
from mmfeat.sweep.trials import HeadTrainer, score
from mmfeat.system.wording import ignore
from tests.heads import toy_features

BUILT_IN = ["hashing", "hog"]
FLOAT32 = EncoderOptions(dtype="float32", cleaning="tweet")
QUICK = Plan(HeadSettings(epochs=2))
SMALL = Protocol(folds=2, seeds=2)
FEW = {"fusion": ["concat"], "baselines": ["knn", "logistic"], "modalities": ["both"]}
NO_HEADS = {"fusion": ["none"], "baselines": ["knn"], "modalities": ["text"]}


def make_place(demo_folder: Path, place: Path, encoders: Sequence[str] = BUILT_IN) -> Path:
    """A working folder with the demo data and its cache."""
    shutil.copytree(demo_folder, place / "demo")
    extract_features(place / "demo", list(encoders), cache=place / "cache", options=FLOAT32)
    return place


def sweep(place: Path, encoders: Sequence[str] = BUILT_IN, **changes: Any) -> Sweep:
    """A small sweep over the demo data of `place`, or its forecast by another `function`."""
    arguments = {"cache": place / "cache", "out": place / "heads", "options": FLOAT32, "plan": QUICK, "protocol": SMALL}
    data = changes.pop("data", place / "demo")
    return changes.pop("function", train_heads)(data, list(encoders), **{**arguments, **FEW, **changes})


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def results(run: Run) -> dict[str, bytes]:
    """What a run says and what predicts, file by file, without the times that it took."""
    kept = ("*/final-*", "*/out_of_fold.csv", "*/curves.csv", "*/trials/*.safetensors", "ablation.csv", "*.csv")
    files = {str(path.relative_to(run.folder)): path.read_bytes() for name in kept for path in run.folder.glob(name)}
    del files["leaderboard.csv"]
    return {**files, "leaderboard.json": without_times(run.folder / "leaderboard.json")}


def without_times(path: Path) -> bytes:
    return json.dumps([{**entry, "seconds": 0} for entry in json.loads(path.read_text())]).encode()


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a file is written again."""
    found = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path.relative_to(folder)): (stat.st_ino, stat.st_mtime_ns) for path, stat in found.items()}


def toy_task(targets: Targets = toy_features.TARGETS, folds: int = 3, seeds: int = 2, **holdout: Any) -> Problem:
    """300 made-up samples in folds, or with `shares` in a holdout."""
    ids, groups = tuple(map(str, range(len(targets)))), np.arange(len(targets))
    if holdout:
        return Problem(ids, targets, make_holdout(targets, ids, groups, seed=1, repeats=seeds, **holdout), seeds, 1)
    return Problem(ids, targets, make_folds(targets, ids, groups, folds, 1, seeds), seeds, 1)


def toy_entry(
    task: Problem, folder: Path, plan: Plan = QUICK, head: str = "concat", deadline: float = np.inf
) -> TrainedEntry:
    """A real head on the made-up vectors."""
    engine = LocalEngine(toy_features.features(), task.targets, "cpu", "tokens", 1)
    try:
        trainer = HeadTrainer(task, engine, head, "both")
        entry = EntryTrainer(trainer, plan, folder, deadline, ignore)
        return entry.finish(entry.score())
    finally:
        engine.close()


def run_of(folder: Path, targets: Targets, leaderboard: Sequence[Entry], **config: Any) -> Run:
    """A run that says little but its leaderboard."""
    asked = {"version": "0", "columns": {}, "data": "data", "cache": "cache", "dataset": "data", "data_hash": "0"}
    asked |= {"folds": ("fold0", "fold1"), "splits_hash": "0", "encoders": (), "options": FLOAT32, "protocol": SMALL}
    task = "multilabel" if targets.multilabel else "multiclass"
    made = RunConfig(**{**asked, "task": task, "attend": "", "plan": PlanRecord(HeadSettings(), {}), **config})
    counts = dict(zip(targets.classes, targets.matrix.sum(0).tolist(), strict=True))
    return Run(folder, made, Results(targets.classes, counts, len(targets), {}, tuple(leaderboard)))


def made_up_entry(task: Problem, name: str, skill: float, seeds: int = 2, modality: str = "both") -> TrainedEntry:
    """An entry of invented logits: the better, the more `skill`."""
    random = np.random.default_rng(sum(map(ord, name)))
    noise = random.standard_normal((seeds, *task.targets.matrix.shape))
    logits = noise + skill * task.targets.matrix
    validation = [
        logits[repeat, task.splits.fold(fold, repeat).validation]
        for fold in range(len(task.splits))
        for repeat in range(seeds)
    ]
    width = len(task.targets.classes)
    plain = Decision(1.0, 0.0, (0.0,) * width, task.targets.multilabel)
    decisions = [plain] * len(task.splits)
    entry = Entry(head=name, modalities=modality, **score(task, logits, decisions), decision=plain)
    return TrainedEntry(entry, logits, decisions, validation)
