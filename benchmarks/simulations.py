"""Claims about statistics, each held against data whose truth is known: minutes, with fixed seeds.

python benchmarks/simulations.py [--small] [CLAIM ...]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from table import Row, measured, show

from mmfeat.audit.label_errors import estimate_noise
from mmfeat.cache.features import Block, Features
from mmfeat.evaluation.splits import make_folds
from mmfeat.heads.jobs import LocalEngine
from mmfeat.heads.registry import HeadSettings, Plan
from mmfeat.samples.labels import Targets, indicator
from mmfeat.sweep.ensembles import ensemble_entries
from mmfeat.sweep.entries import EntryTrainer, TrainedEntry
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.trials import HeadTrainer
from mmfeat.system.wording import ignore

CLASSES = ("negative", "neutral", "positive")
SHARES = (0.3, 0.1, 0.6)
ROWS, WIDTH = 600, 16
HEADS = ("knn", "ridge", "logistic", "svm")


def null_problem(seed: int, rows: int) -> tuple[Problem, Features]:
    """Vectors of texts and photos that know nothing about the labels."""
    random = np.random.default_rng(seed)
    ids = tuple(map(str, range(rows)))
    targets = Targets(CLASSES, indicator(random.choice(len(CLASSES), rows, p=SHARES), len(CLASSES)))
    blocks = tuple(
        Block(name, name, random.standard_normal((rows, WIDTH), np.float32), np.ones(rows, bool), name)
        for name in ("image", "text")
    )
    return Problem(ids, targets, make_folds(targets, ids, np.arange(rows), 5, seed, 1), 1, seed), Features(ids, blocks)


def trained(problem: Problem, features: Features, folder: Path) -> list[TrainedEntry]:
    """Baselines on both modalities and on each alone."""
    engine = LocalEngine(features, problem.targets, "cpu", "tokens", 1)
    pairs = [(head, modality) for head in HEADS for modality in ("both", "text", "image")]
    trainers = [HeadTrainer(problem, engine, *pair) for pair in pairs]
    entries = [EntryTrainer(one, Plan(HeadSettings()), folder, np.inf, ignore).score() for one in trainers]
    engine.close()
    return entries


def excess(problem: Problem, entry: TrainedEntry) -> tuple[float, bool]:
    """Macro-F1 less what as many choices of each class have by chance, and whether its interval lies above that."""
    counts = np.array(entry.entry.confusion)
    labelled, predicted = counts.sum(1), counts.sum(0)
    chance = (2 * labelled * predicted / counts.sum() / np.maximum(labelled + predicted, 1)).mean()
    return entry.entry.macro_f1.value - chance, entry.entry.macro_f1.low > chance


def null_stacking(small: bool) -> Iterator[Row]:
    """Ensembles of heads on labels at random."""
    runs = 3 if small else 80
    found: dict[str, list[tuple[float, bool]]] = {}
    for seed in range(runs):
        problem, features = null_problem(seed, ROWS // 4 if small else ROWS)
        with tempfile.TemporaryDirectory() as folder:
            entries = trained(problem, features, Path(folder))
            for entry in [entries[0], *ensemble_entries(problem, entries, None, Path(folder))]:
                found.setdefault(entry.entry.head, []).append(excess(problem, entry))
    for kind, values in found.items():
        gains, above = np.array(values, float).T
        yield measured(
            f"random labels: interval of {kind} above chance",
            100 * above.mean(),
            "% of runs",
            most=6,
            note=f"macro-F1 {gains.mean():+.4f}",
        )


def audit_null(small: bool) -> Iterator[Row]:
    """What an audit claims by calibrated probabilities: of labels drawn from them, and with 8 % of labels moved on."""
    random, runs = np.random.default_rng(0), 5 if small else 100
    for skill in (0.5, 1.0, 2.0, 3.0):
        claims, covered = [], []
        for seed in range(runs):
            truth = random.choice(len(CLASSES), ROWS * 3, p=SHARES)
            logits = skill * (random.standard_normal((len(truth), len(CLASSES))) + skill * np.eye(len(CLASSES))[truth])
            weights = np.exp(logits) * SHARES
            probabilities = weights / weights.sum(1, keepdims=True)
            claims.append(estimate_noise(truth, probabilities, seed, draws=2).claimed)
            labels = np.where(random.random(len(truth)) < 0.08, (truth + 1) % len(CLASSES), truth)
            noise = estimate_noise(labels, probabilities, seed)
            covered.append(noise.wrong.low <= np.mean(labels != truth) <= noise.wrong.high)
        accuracy = np.mean(probabilities.argmax(1) == truth)
        yield measured(f"no label wrong, head of accuracy {accuracy:.2f}: claimed", 100 * np.mean(claims),
                       "% of runs", most=6)  # fmt: skip
        if skill >= 3:
            yield measured("8 % wrong, the same head: interval covers", 100 * np.mean(covered), "% of runs", least=90)


CLAIMS = {"null-stacking": null_stacking, "audit-null": audit_null}


def main() -> None:
    """Simulate, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    show(row for name in given.claims or CLAIMS for row in CLAIMS[name](given.small))


if __name__ == "__main__":
    main()
