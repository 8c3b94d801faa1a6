"""Drift: whether the samples to predict look like those a run was trained on.

Predicted shares are not compared with the training prior, from which a classifier's own confusion parts them even where
nothing changed, but with the shares that the same entry predicts for the labelled samples, each out of fold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mmfeat.errors import RunError
from mmfeat.runs.entry import Entry
from mmfeat.runs.out_of_fold import read_predictions
from mmfeat.runs.run import Run
from mmfeat.samples.dataset import MODALITIES, PART, Sample

DRAWS = 9999
SIGNIFICANT = 0.01
LEAST_SHIFT = 0.05  # share of the samples that has to be different before it is worth a line
LEAST = 1e-7  # below what out_of_fold.csv can say of a probability


def out_of_fold_choices(run: Run, entry: Entry) -> np.ndarray | None:
    """(M, C) bool: what the entry chooses for labelled samples that it was not trained on, the mean over its seeds.

    The probabilities are those out of fold, the decision is the one that predicts. None where the file is not whole.
    """
    try:
        probabilities = read_predictions(run, entry).probabilities
    except RunError:
        return None
    decision = entry.decision
    logs = np.log(np.clip(probabilities, LEAST, 1))
    if decision.multilabel:
        logs -= np.log(np.clip(1 - probabilities, LEAST, 1))
    return decision.choose(logs * decision.temperature)


def label_drift(before: np.ndarray, now: np.ndarray, classes: Sequence[str], multilabel: bool, seed: int = 42) -> str:
    """One line where choices (N, C) `now` are spread otherwise than (M, C) `before`; "" where not, or hardly."""
    if not len(before) or not len(now):
        return ""
    shift = now.mean(0) - before.mean(0)
    if multilabel:  # a test for each class, Bonferroni
        tables = [(_yes_no(each), _yes_no(other)) for each, other in zip(before.T, now.T, strict=True)]
        chances = [compare_counts(*table, seed) for table in tables]
        p, size = min(1.0, min(chances) * len(classes)), float(np.abs(shift).max())
    else:
        p, size = compare_counts(before.sum(0), now.sum(0), seed), float(np.abs(shift).sum() / 2)
    if p >= SIGNIFICANT or size < LEAST_SHIFT:
        return ""
    column = int(np.abs(shift).argmax())
    seen = f"{classes[column]} {now[:, column].mean():.1%} instead of {before[:, column].mean():.1%}"
    return (
        f"these samples are predicted otherwise than labelled ones out of fold ({seen}; "
        f"{'up to ' if multilabel else ''}{size:.0%} of the predictions shifted, p {_shown(p)}): they may come from "
        "elsewhere, and scores of the run may not hold for them"
    )


def missing_drift(
    before: Sequence[Sample], now: Sequence[Sample], modalities: Sequence[str] = MODALITIES, seed: int = 42
) -> list[str]:
    """A line for each of the modalities that is missing more or less often `now`."""
    lines = []
    for modality in modalities:
        tables = [np.array([getattr(sample, modality) is None for sample in part], bool) for part in (before, now)]
        if not all(map(len, tables)):
            continue
        shares = [table.mean() for table in tables]
        if abs(shares[1] - shares[0]) < LEAST_SHIFT:
            continue
        p = compare_counts(_yes_no(tables[0]), _yes_no(tables[1]), seed)
        if p < SIGNIFICANT:
            lines.append(
                f"{shares[1]:.1%} of these samples have no {PART[modality]}, of the labelled ones {shares[0]:.1%} "
                f"(p {_shown(p)}): scores of the run may not hold for them"
            )
    return lines


def compare_counts(before: np.ndarray, now: np.ndarray, seed: int = 42) -> float:
    """How likely two samples of one population differ in their (C,) counts by as much as these.

    The G statistic (likelihood ratio) of the 2 x C table, against `DRAWS` tables with the same margins: a permutation
    test, exact up to the draws and valid for rare classes (Patefield, 1981).
    """
    before, now = np.asarray(before, np.int64), np.asarray(now, np.int64)
    both = before + now
    random = np.random.default_rng(seed)
    drawn = random.multivariate_hypergeometric(both, int(now.sum()), size=DRAWS, method="marginals")
    found = _g_statistic(now[None], both)[0]
    as_far = int((_g_statistic(drawn, both) >= found - 1e-9).sum())
    return (1 + as_far) / (1 + DRAWS)


def _g_statistic(now: np.ndarray, both: np.ndarray) -> np.ndarray:
    """(D,) of (D, C) counts in one of two samples, whose other part is the rest of (C,) `both`."""
    total, size = both.sum(), now.sum(1, keepdims=True)
    found = np.zeros(len(now))
    for part, whole in ((now, size), (both - now, total - size)):
        expected = both * whole / max(total, 1)
        logs = np.log(np.where(part > 0, part, 1)) - np.log(np.where(part > 0, expected, 1))
        found += 2 * (part * logs).sum(1)
    return found


def _yes_no(values: np.ndarray) -> np.ndarray:
    return np.array([values.sum(), len(values) - values.sum()])


def _shown(p: float) -> str:
    return f"{p:.4f}".rstrip("0")
