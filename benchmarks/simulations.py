"""Claims about statistics, each held against data whose truth is known: minutes, with fixed seeds.

python benchmarks/simulations.py [--small] [CLAIM ...]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from sklearn.metrics import f1_score
from table import Row, measured, show

from mmfeat.audit.label_errors import estimate_noise
from mmfeat.cache.features import Block, Features
from mmfeat.evaluation.decisions import calibrate
from mmfeat.evaluation.metrics import calibration_errors, evaluate
from mmfeat.evaluation.significance import compare_with_best
from mmfeat.evaluation.splits import make_folds
from mmfeat.heads.jobs import LocalEngine
from mmfeat.heads.registry import HeadSettings, Plan
from mmfeat.samples.labels import Targets, indicator
from mmfeat.sweep.ensembles import ensemble_entries
from mmfeat.sweep.entries import EntryTrainer, TrainedEntry
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.trials import HeadTrainer
from mmfeat.system.wording import SCORE_NAMES, ignore

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
    runs = 3 if small else 160
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


def drawn(random: np.random.Generator, rows: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,), and the choices (H, N) of heads that know 55 % of them and else guess, half of the time alike."""
    labels, guesses = (random.choice(len(CLASSES), rows, p=SHARES) for _ in range(2))
    luck, alike = random.random(rows), random.random((heads, rows)) < 0.5
    own = random.choice(len(CLASSES), (heads, rows), p=SHARES)
    known = np.where(alike, luck, random.random((heads, rows))) < 0.55
    return labels, np.where(known, labels, np.where(alike, guesses, own))


def ties(small: bool) -> Iterator[Row]:
    """Heads that are equally good: is one called worse than the first, and does the first's interval hold its score?"""
    runs = 3 if small else 200
    for heads in (2, 20):
        random, false, covered = np.random.default_rng(0), [], []
        labels, chosen = drawn(random, 200_000 // heads * 4, heads)
        truth = np.mean([f1_score(labels, one, average="macro") for one in chosen])
        for seed in range(runs):
            labels, chosen = drawn(random, 1000, heads)
            targets = Targets(CLASSES, indicator(labels, len(CLASSES)))
            choices = [indicator(one, len(CLASSES))[None] for one in chosen]
            best = int(np.argmax([f1_score(labels, one, average="macro") for one in chosen]))
            tests, first = compare_with_best(targets, choices, best, seed)
            false.append(not all(test["tie"] for test in tests))
            covered.append(first.low <= truth <= first.high)
        yield measured(f"{heads} equal heads: one called worse", 100 * np.mean(false), "% of runs", most=6)
        yield measured("what is expected of the first holds its score", 100 * np.mean(covered), "% of runs", least=90)


def clusters(small: bool) -> Iterator[Row]:
    """Intervals of macro-F1 and log-loss where rows are threes of near duplicates, alike in label and prediction."""
    runs, rows = 5 if small else 400, 600
    for share in (0.0, 0.15, 0.5):
        random, covered = np.random.default_rng(1), []
        truth = _scores(*_blurred(random, np.arange(400_000)))
        for seed in range(runs):
            triples = int(share * rows / 3)
            groups = np.concatenate([np.repeat(np.arange(triples), 3), np.arange(triples, rows - 2 * triples)])
            labels, probabilities = _blurred(random, groups)
            targets = Targets(CLASSES, indicator(labels, len(CLASSES)))
            chosen = indicator(probabilities.argmax(1), len(CLASSES))[None]
            found = evaluate(targets, chosen, probabilities[None], seed, groups)
            each = [found[name] for name in ("macro_f1", "log_loss")]
            covered.append([score["low"] <= true <= score["high"] for score, true in zip(each, truth, strict=True)])
        for name, hits in zip(("macro-F1", "log-loss"), np.mean(covered, axis=0), strict=True):
            yield measured(
                f"{share:.0%} of rows in threes: interval of {name} covers", 100 * hits, "% of runs", least=92
            )


def _blurred(random: np.random.Generator, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and calibrated probabilities of rows, which are those of their group."""
    kinds = int(groups.max()) + 1
    labels = random.choice(len(CLASSES), kinds, p=SHARES)
    logits = 1.5 * (random.standard_normal((kinds, len(CLASSES))) + 1.5 * np.eye(len(CLASSES))[labels])
    weights = np.exp(logits) * SHARES
    return labels[groups], (weights / weights.sum(1, keepdims=True))[groups]


def _scores(labels: np.ndarray, probabilities: np.ndarray) -> tuple[float, float]:
    chosen = probabilities.argmax(1)
    loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
    return f1_score(labels, chosen, average="macro"), loss


def calibration(small: bool) -> Iterator[Row]:
    """Temperature and biases fitted to logits that are too large and lean to the rare class."""
    runs, rows = 3 if small else 100, 720
    random, losses, shares = np.random.default_rng(2), [], []
    for _ in range(runs):
        labels, probabilities = _blurred(random, np.arange(2 * rows))
        targets = Targets(CLASSES, indicator(labels, len(CLASSES)))
        logits, seen, new = (
            2 * (np.log(probabilities) + np.eye(len(CLASSES))[1]),
            np.arange(rows),
            np.arange(rows, 2 * rows),
        )
        decision = calibrate(logits[seen], targets.take(seen), targets.take(seen).prior)
        found = decision.probabilities(logits[new])
        losses.append(_scores(labels[new], found)[1] - _scores(labels[new], probabilities[new])[1])
        shares.append(found[:, 1].mean() - SHARES[1])
    yield measured("log-loss of calibrated above true probabilities", 1000 * np.mean(losses), "mnats", most=10)
    yield measured("mean probability of the rare class above its share", 100 * np.mean(shares), "points", most=1)
    yield from _above_chance(small)


def _above_chance(small: bool) -> Iterator[Row]:
    """Intervals of calibration errors above chance, of right probabilities and of twice as sure ones."""
    runs, names = 5 if small else 1000, ("calibration_excess", "classwise_excess")
    for sure, kind in ((1, "right"), (2, "too sure")):
        random, covered, values = np.random.default_rng(3), [], []
        targets, probabilities = _sure(random, 400_000, sure)
        errors = calibration_errors(targets, probabilities)[0]
        truth = (errors[0], errors[1:].mean()) if sure > 1 else (0.0, 0.0)
        for _ in range(runs):
            targets, probabilities = _sure(random, 720, sure)
            scores = evaluate(targets, indicator(probabilities.argmax(1), len(CLASSES))[None], probabilities[None])
            covered.append([scores[name]["low"] <= true <= scores[name]["high"]
                            for name, true in zip(names, truth, strict=True)])  # fmt: skip
            values.append([scores[name]["value"] for name in names])
        rows = zip(names, truth, np.mean(covered, axis=0), np.mean(values, axis=0), strict=True)
        for name, true, hits, mean in rows:
            yield measured(f"{kind} probabilities: {SCORE_NAMES[name]} covers", 100 * hits, "% of runs", least=92,
                           note=f"truth {true:.3f}, mean {mean:.3f}")  # fmt: skip


def _sure(random: np.random.Generator, rows: int, sure: float) -> tuple[Targets, np.ndarray]:
    """Labels and their probabilities to the power of `sure`."""
    labels, probabilities = _blurred(random, np.arange(rows))
    weights = probabilities**sure
    return Targets(CLASSES, indicator(labels, len(CLASSES))), weights / weights.sum(1, keepdims=True)


CLAIMS = {
    "null-stacking": null_stacking,
    "audit-null": audit_null,
    "ties": ties,
    "clusters": clusters,
    "calibration": calibration,
}


def main() -> None:
    """Simulate, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=", ".join(CLAIMS))
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    show(row for name in given.claims or CLAIMS for row in CLAIMS[name](given.small))


if __name__ == "__main__":
    main()
