"""Metrics with intervals: how well choices and probabilities of repeated trainings fit the labels.

A value is the mean over the choices given, of one prediction or of several trainings. Its interval tells how far that
mean would move with other samples: the same samples are drawn for all trainings, so the interval leaves out the
variation between trainings. Scores of choices
come from resampling, scores of probabilities from their influence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from mmfeat.evaluation.decisions import plain_choice
from mmfeat.evaluation.resampling import CHUNK, EXACT_FLOAT32, TINY, Hits, count, draw_scores, find_cells, joined_groups
from mmfeat.samples.labels import Targets

CONFIDENCE = 0.95
NORMAL, ONE_SIDED = 1.959964, 1.644854  # the normal distribution's quantiles at 97.5 % and 95 %
BINS = 15  # bins of the expected calibration error
LABELLINGS = 10, 100  # fewest and most times that labels are drawn from probabilities
LUCK_SEED = 0  # seed of those labels
SUREST = 50.0  # largest distance of log-odds
LEAST = 1e-15  # probabilities are kept this far from 0 in a logarithm


def headline(targets: Targets, chosen: np.ndarray) -> np.ndarray:
    """(...) the score by which heads are compared, of choices (..., N, C): see `Hits.headline`."""
    if targets.numeric:
        errors, spread = (chosen - targets.matrix)[..., 0], targets.matrix[:, 0] - targets.matrix.mean()
        return 1 - (errors**2).sum(-1) / max(float(spread @ spread), TINY)
    if targets.ordered:
        return count(targets.matrix, chosen, ordered=True).headline
    return np.asarray(macro_f1(targets.matrix, chosen))


def headline_name(targets: Targets) -> str:
    return "r2" if targets.numeric else "kappa" if targets.ordered else "macro_f1"


def plain_headline(targets: Targets, logits: np.ndarray) -> float:
    """The headline of the plain choices of (N, C) logits; of a regression these are the predicted numbers."""
    return float(headline(targets, logits if targets.numeric else plain_choice(logits, targets.multilabel)))


@dataclass(frozen=True)
class Score:
    """A value with its 95 % interval; all None where the value is not defined."""

    value: float | None
    low: float | None
    high: float | None


def wilson(share: Any, count: Any) -> tuple[Any, Any]:
    """The 95 % interval of a share of `count` samples (Wilson, 1927), for numbers or arrays; [0, 1] for no samples."""
    square = NORMAL**2 / np.maximum(count, LEAST)
    middle = (share + square / 2) / (1 + square)
    reach = np.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return np.maximum(middle - reach, 0.0), np.minimum(middle + reach, 1.0)


def macro_f1(labels: np.ndarray, chosen: np.ndarray) -> Any:
    """Macro-F1 of choices for labels (N, C) bool: a float for choices (N, C), an array (...) for choices (..., N, C).

    A class that is neither labelled nor chosen counts 0.
    """
    dtype: type = np.float32 if len(labels) < EXACT_FLOAT32 else np.float64
    ones: np.ndarray = np.ones(len(labels), dtype)
    hits: np.ndarray = ones @ (labels & chosen).astype(dtype)
    either: np.ndarray = ones @ labels.astype(dtype) + ones @ chosen.astype(dtype)
    f1 = 2 * hits / np.maximum(either, 1)
    return float(f1.mean(dtype=np.float64)) if chosen.ndim == 2 else f1.mean(-1, dtype=np.float64)


def confusion(labels: np.ndarray, chosen: np.ndarray, multilabel: bool = False) -> np.ndarray:
    """(C, C) counts, labels in rows, choices in columns; multi-label (C, 2, 2): [[tn, fp], [fn, tp]] a class.

    `labels` is (N, C) and `chosen` (N, C) bool, or (S, N, C), for which the mean over S is returned.
    """
    if not multilabel:
        tables = labels.T.astype(np.float64) @ chosen.astype(np.float64)
        return tables.reshape(-1, *tables.shape[-2:]).mean(0)
    counts = count(labels, chosen.reshape(-1, *labels.shape))
    hits, missed, false = counts.hits, counts.labelled - counts.hits, counts.predicted - counts.hits
    rest = len(labels) - hits - missed - false
    return np.stack([rest, false, missed, hits], axis=-1).mean(0).reshape(-1, 2, 2)


def evaluate(
    targets: Targets,
    chosen: np.ndarray,
    probabilities: np.ndarray,
    seed: int = 42,
    groups: np.ndarray | None = None,
    alone: np.ndarray | None = None,
) -> dict[str, Any]:
    """Every score of S trainings for N samples, for JSON.

    Parameters
    ----------
    targets : Targets
        Labels of the N samples.
    chosen : (S, N, C) bool
        The decisions.
    probabilities : (S, N, C)
        AUROC (macro, one class against the rest), log-loss (nats; multi-label: mean over the classes) and
        the expected calibration error are computed from the probabilities, independently of `chosen`.
    seed : int
        Seed of the draws behind the intervals.
    groups : (N,), optional
        Samples with the same number are near duplicates, and count as one in the intervals.
    alone : (T, N, C) bool, optional
        The decisions of single trainings that `chosen` combines, for the spread in `seeds`.

    Returns
    -------
    dict
        `macro_f1`, `accuracy` (multi-label: all classes right), `weighted_f1`, multi-label `micro_f1`, `auroc`,
        `log_loss`, `calibration_error`, what of it and of the mean of the classes' errors is more than chance gives
        (`calibration_excess`, `classwise_excess`) and, of ordered classes, `kappa` (weighted by the square of the
        distance), with `value`, `low`, `high` (None for an AUROC that no class defines); `seeds`;
        `classes`; `confusion`; `samples`. Of a regression: `r2`, `mae`, `rmse`, `spearman` and `seeds`; no classes and
        an empty confusion.
    """
    if targets.numeric:
        return _evaluate_numbers(targets, chosen, seed, groups, chosen if alone is None else alone)
    counts = count(targets.matrix, chosen, targets.ordered)
    single = counts if alone is None else count(targets.matrix, alone, targets.ordered)
    value, draws = draw_scores(find_cells(targets, chosen, groups), partial(_count_scores, targets.multilabel), seed)
    names = (*(["kappa"] if targets.ordered else []), "macro_f1", "accuracy", "weighted_f1")
    names += ("micro_f1",) * targets.multilabel
    scores = [percentiles(score, column) for score, column in zip(value, draws.T, strict=True)]
    areas, auroc = _auroc(targets, probabilities, groups)
    return {
        **dict(zip(names, map(vars, scores), strict=False)),
        "auroc": vars(auroc),
        "log_loss": vars(_log_loss(targets, probabilities, groups)),
        **_calibration(targets, probabilities, groups),
        "seeds": {
            name: _over_seeds(getattr(single, name)) for name in names if name not in ("weighted_f1", "micro_f1")
        },
        "classes": _classes(targets, counts, scores[len(names) :], areas),
        "confusion": confusion(targets.matrix, chosen, targets.multilabel).tolist(),
        "samples": len(targets),
    }


def _evaluate_numbers(
    targets: Targets, predicted: np.ndarray, seed: int, groups: np.ndarray | None, alone: np.ndarray
) -> dict[str, Any]:
    """The scores of predicted numbers (S, N, 1), in the units of the labels."""
    names = ("r2", "mae", "rmse")
    units = find_cells(targets, predicted, groups)
    single = find_cells(targets, alone)
    errors = single.counts(single.table().sum(0)[None])
    value, draws = draw_scores(
        units, lambda sums: np.stack([getattr(sums, name).mean(-1) for name in names], axis=-1), seed
    )
    scores = [percentiles(score, column) for score, column in zip(value, draws.T, strict=True)]
    return {
        **dict(zip(names, map(vars, scores), strict=True)),
        "spearman": vars(_spearman(targets.matrix[:, 0], predicted[..., 0], len(units.units))),
        "seeds": {name: _over_seeds(getattr(errors, name)[0]) for name in names[:2]},
        "classes": {},
        "confusion": [],
        "samples": len(targets),
    }


def _spearman(values: np.ndarray, predicted: np.ndarray, units: int) -> Score:
    """Spearman's rank correlation, the mean over seeds (S, N), with the interval of Bonett and Wright (2000); undefined
    where all predictions are equal."""
    from scipy.stats import rankdata

    ranks = rankdata(values) - (len(values) + 1) / 2
    others = rankdata(predicted, axis=1) - (len(values) + 1) / 2
    spread = np.sqrt((ranks @ ranks) * (others**2).sum(1))
    if not (spread > 0).all():
        return Score(None, None, None)
    rho = float(np.mean(others @ ranks / spread))
    middle, reach = (
        np.arctanh(np.clip(rho, LEAST - 1, 1 - LEAST)),
        NORMAL * np.sqrt((1 + rho**2 / 2) / max(units - 3, 1)),
    )
    return Score(rho, float(np.tanh(middle - reach)), float(np.tanh(middle + reach)))


def _count_scores(multilabel: bool, counts: Hits) -> np.ndarray:
    """(D, 3 + C): macro-F1, accuracy, weighted F1, multi-label micro-F1, and each class's F1, after kappa of ordered
    classes; means over seeds."""
    first = [] if counts.apart is None else [counts.kappa]
    last = [counts.micro_f1] if multilabel else []
    overall = np.stack([*first, counts.macro_f1, counts.accuracy, counts.weighted_f1, *last], axis=-1)
    return np.concatenate([overall, counts.f1], axis=-1).mean(1)


def _classes(targets: Targets, counts: Hits, f1: list[Score], areas: np.ndarray) -> dict[str, Any]:
    return {
        name: {
            "precision": float(counts.precision[:, column].mean()),
            "recall": float(counts.recall[:, column].mean()),
            "f1": vars(f1[column]),
            "auroc": None if np.isnan(areas[column]) else float(areas[column]),
            "support": int(counts.labelled[0, column]),
        }
        for column, name in enumerate(targets.classes)
    }


def _over_seeds(values: np.ndarray) -> dict[str, Any]:
    """Mean and sample standard deviation over seeds, which is 0 for a single seed."""
    spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": spread, "values": values.tolist()}


def percentiles(value: float, draws: np.ndarray) -> Score:
    """A value with the 95 % interval of its draws."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Score(float(value), float(low), float(high))


def _normal(value: float, influence: np.ndarray, most: float, groups: np.ndarray | None) -> Score:
    """A score with its interval, value +- 1.96 sqrt(sum influence^2) / N, cut to [0, most].

    `influence` (N,) is N times the contribution of each sample to the error; near duplicates (the same number in
    `groups`) add theirs up. This is the infinitesimal jackknife (Efron and Tibshirani, 1993, chapter 22), which equals
    the bootstrap of a mean without its draws.
    """
    rows, of = joined_groups(groups, len(influence))
    sums = np.concatenate([np.delete(influence, rows), np.bincount(of, influence[rows])])
    reach = NORMAL * float(np.sqrt(sums @ sums)) / max(len(influence), 1)
    return Score(float(value), max(0.0, float(value) - reach), min(most, float(value) + reach))


def _auroc(targets: Targets, probabilities: np.ndarray, groups: np.ndarray | None) -> tuple[np.ndarray, Score]:
    """(C,) area of each class against the rest, NaN without samples on both sides, and their mean.

    The interval follows DeLong, DeLong and Clarke-Pearson (1988) for the mean of correlated areas. It is symmetric on
    the scale of log-odds, where areas of few samples are closer to normal (Qin and Hotilovac, 2008).
    """
    labels = targets.matrix
    areas = np.full(labels.shape[1], np.nan)
    defined = np.flatnonzero(labels.any(0) & ~labels.all(0))
    influence = np.zeros(len(labels))
    for column in defined:
        seeds = [_area(scores[:, column], labels[:, column], influence) for scores in probabilities]
        areas[column] = np.mean(seeds)
    if not len(defined):
        return areas, Score(None, None, None)
    mean = float(areas[defined].mean())
    plain = _normal(mean, influence / (len(defined) * len(probabilities)), np.inf, groups)
    if not 0 < mean < 1 or plain.high is None:
        return areas, Score(mean, mean, mean)
    odds, factor = mean / (1 - mean), np.exp(min((plain.high - mean) / (mean * (1 - mean)), SUREST))
    return areas, Score(mean, *(float(bound / (1 + bound)) for bound in (odds / factor, odds * factor)))


def _area(scores: np.ndarray, positive: np.ndarray, influence: np.ndarray) -> float:
    """Area under the ROC curve; adds DeLong's structural components to `influence`. Ties count one half.

    One sort gives all components (Sun and Xu, 2014).
    """
    order = np.argsort(scores)
    ranked, flags = scores[order], positive[order]
    ends = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)  # the last index of each run of equal scores
    runs = np.diff(ends, prepend=-1)
    above = np.cumsum(flags)[ends]
    below = ends + 1 - above
    positives, negatives = int(above[-1]), int(below[-1])
    # A positive's component is the share of negatives below it; a negative's, the share of positives above it.
    of_positive = (below + np.append(0, below[:-1])) / 2 / negatives
    of_negative = 1 - (above + np.append(0, above[:-1])) / 2 / positives
    components = np.where(flags, np.repeat(of_positive, runs), np.repeat(of_negative, runs))
    area = float(components[flags].mean())
    sides = [len(scores) / np.sqrt(side * max(side - 1, 1)) for side in (positives, negatives)]
    influence[order] += (components - area) * np.where(flags, *sides)
    return area


def _log_loss(targets: Targets, probabilities: np.ndarray, groups: np.ndarray | None) -> Score:
    losses = np.zeros(len(targets))
    for shares in probabilities:
        right = np.where(targets.matrix, shares, 1 - shares) if targets.multilabel else shares[targets.matrix][:, None]
        losses -= np.log(np.clip(right, LEAST, 1)).mean(1) / len(probabilities)
    value = losses.mean()
    return _normal(value, losses - value, most=np.inf, groups=groups)


def _calibration(targets: Targets, probabilities: np.ndarray, groups: np.ndarray | None) -> dict[str, Any]:
    """The scores of calibration that `evaluate` names, for JSON."""
    top = _calibration_error(_confidences(targets, probabilities, targets.multilabel), len(targets), groups)
    every = _calibration_error(_confidences(targets, probabilities, True), len(targets), groups)
    errors = np.mean([calibration_errors(targets, shares, groups) for shares in probabilities], axis=0)
    return {
        "calibration_error": vars(top),
        "calibration_excess": vars(above_chance(errors[:, 0], top.high)),
        "classwise_excess": vars(above_chance(errors[:, 1:].mean(1), every.high)),
    }


def _calibration_error(
    columns: Iterator[tuple[np.ndarray, np.ndarray]], samples: int, groups: np.ndarray | None
) -> Score:
    """Expected calibration error (Guo et al., 2017), the mean over (probability, whether the class is labelled).

    The error is never negative and so, even for right probabilities, above 0 by chance, see `above_chance`.
    """
    values, influence = [], np.zeros(samples)
    for confidence, right in columns:
        bins, sums = _gaps(confidence, right[None])
        values.append(float(np.abs(sums).sum()) / max(samples, 1))
        influence += np.sign(sums)[0, bins] * (confidence - right) - values[-1]
    return _normal(float(np.mean(values)), influence / len(values), most=1.0, groups=groups)


def _gaps(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N,) the bin of each probability, and (D, BINS) sums of probabilities less those of labels (D, N)."""
    bins = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    members = (bins[:, None] == np.arange(BINS)).astype(np.float32)
    return bins, np.bincount(bins, confidence, minlength=BINS) - right.astype(np.float32) @ members


def calibration_errors(targets: Targets, probabilities: np.ndarray, groups: np.ndarray | None = None) -> np.ndarray:
    """(1 + D, 1 + C) expected calibration errors of the labels, and of D labellings drawn from probabilities (N, C).

    The first column has the error of the most probable class (multi-label: the mean of the classes), the others that of
    each class (Kull et al., 2019).
    """
    errors, top = [], np.zeros((1, len(targets)), bool)
    likely = probabilities.argmax(1)
    for column, labelled in enumerate(_labellings(targets, probabilities, groups)):
        errors.append(np.abs(_gaps(probabilities[:, column], labelled)[1]).sum(1))
        top = top | labelled & (likely == column)
    each = np.stack(errors, axis=1)
    first = each.mean(1) if targets.multilabel else np.abs(_gaps(probabilities.max(1), top)[1]).sum(1)
    return np.column_stack([first, each]) / max(len(targets), 1)


def _labellings(targets: Targets, probabilities: np.ndarray, groups: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield for each class (1 + D, N) whether it is labelled and then whether D labellings, drawn from probabilities
    (N, C), have it; near duplicates share their luck. Fewer are drawn of large tables, whose chance varies less."""
    random, (rows, of) = np.random.default_rng(LUCK_SEED), joined_groups(groups, len(targets))
    first = rows[np.unique(of, return_index=True)[1][of]]
    number = int(np.clip(CHUNK // max(probabilities.size, 1), *LABELLINGS))
    ends = probabilities.cumsum(1)
    for column, share in enumerate(probabilities.T):
        if targets.multilabel or not column:
            luck = random.random((number, len(targets)), np.float32)
            luck[:, rows] = luck[:, first]
        end = share if targets.multilabel else ends[:, column]
        yield np.concatenate([targets.matrix[None, :, column], (luck >= end - share) & (luck < end)])


def above_chance(errors: np.ndarray, high: float | None) -> Score:
    """The first of calibration errors (1 + D,), as of `calibration_errors`, less the mean of the others, at least 0.

    The lower end is the error less what 95 % of the drawn labellings stay below, so that it is 0 in 95 % of samples if
    the probabilities are right. `high` is the upper end of the error itself, to which chance adds little far from 0.
    """
    excess = float(errors[0] - errors[1:].mean())
    return Score(max(0.0, excess), max(0.0, excess - ONE_SIDED * float(errors[1:].std(ddof=1))), high)


def _confidences(targets: Targets, probabilities: np.ndarray, every: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (probability, whether the class is labelled), both (N,): each seed's top class, or its every class."""
    for shares in probabilities:
        if every:
            yield from zip(shares.T, targets.matrix.T, strict=True)
        else:
            yield shares.max(1), targets.matrix[np.arange(len(shares)), shares.argmax(1)]
