"""Paired tests: is one head better than another on the same samples, or is that noise?

The tests are about the trained heads as they are, on other samples from the same population. The
variation between trainings is left out; the spread over seeds shows that variation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfeat.evaluation.metrics import Score, percentiles
from mmfeat.evaluation.resampling import Errors, Hits, draw_scores, find_cells
from mmfeat.samples.labels import Targets

LEVEL = 0.05  # p-values below it count as significant
ROUNDING = 1e-7  # smaller differences are rounding errors
SEED = 42  # seed with which `compare_pairs` draws


@dataclass(frozen=True)
class Difference:
    """A difference of two heads' scores with its 95 % interval and two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def paired_difference(
    targets: Targets, one: np.ndarray, other: np.ndarray, seed: int = 42, groups: np.ndarray | None = None
) -> Difference:
    """Score of `one` (S, N, C) less that of `other` (S2, N, C), each the mean over its seeds: macro-F1, for ordered
    classes kappa (`Hits.headline`).

    Paired bootstrap over samples (Efron and Tibshirani, 1993; Berg-Kirkpatrick et al., 2012); near duplicates, which
    have the same number in `groups` (N,), are drawn together. The null hypothesis is that both would have the same
    score on the population from which the samples were drawn.
    The p-value is twice the share of draws on the other side of 0, counting the data as one draw more
    (Davison and Hinkley, 1997), so it is never 0.
    """
    value, draws = _draw_headlines(targets, [one, other], seed, groups)
    return _difference(value[0] - value[1], draws[:, 0] - draws[:, 1])


def majority(correct: np.ndarray) -> np.ndarray:
    """(N,) whether more than half of the seeds (S, N) are right."""
    return 2 * np.count_nonzero(correct, axis=0) > len(correct)


def mcnemar(correct_one: np.ndarray, correct_other: np.ndarray) -> float:
    """P-value of the hypothesis that two heads are right equally often, given correctness (N,) bool of each.

    The exact conditional test with mid-p over the samples where one head is right and the other wrong, which is
    neither too careful nor too bold for few such samples (Fagerland, Lydersen and Laake, 2013).
    """
    from scipy.special import bdtr

    wins = int(np.count_nonzero(correct_one & ~correct_other))
    losses = int(np.count_nonzero(correct_other & ~correct_one))
    fewer, total = min(wins, losses), wins + losses
    if wins == losses:
        return 1.0
    below = float(bdtr(fewer - 1, total, 0.5)) if fewer else 0.0
    return below + float(bdtr(fewer, total, 0.5))  # mid-p: twice the tail less the probability of this very count


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """(K,) p-values adjusted for K comparisons, to be compared with `LEVEL` all at once (Holm, 1979)."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values)
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def compare_with_best(
    targets: Targets, all_chosen: Sequence[np.ndarray], best: int, seed: int = 42, groups: np.ndarray | None = None
) -> tuple[list[dict[str, Any]], Score]:
    """Compare the score (see `paired_difference`) of each head with that of number `best`, scored as one picked.

    `all_chosen` holds the decisions (S, N, C) bool of each head; S may differ. The first result has an entry for each
    head, for JSON: the difference `value`, best less this head, with `low`, `high` and `p` as in `paired_difference`;
    `p_holm`, adjusted as in `compare_pairs`, since any head may come first by chance; `mcnemar` of the seeds'
    majorities and `mcnemar_holm`, adjusted by Holm; and `tie`: `p_holm` >= `LEVEL`. The second is as in `picked`.
    """
    value, draws = _draw_headlines(targets, all_chosen, seed, groups)
    differences = [
        _difference(value[best] - one, draws[:, best] - row) for one, row in zip(value, draws.T, strict=True)
    ]
    adjusted = np.maximum(_adjusted(value, draws)[best], [difference.p for difference in differences])
    disagreement = _disagreement(targets, all_chosen, best)
    entries = [
        {
            **vars(difference),
            "p_holm": float(adjusted[head]),
            **disagreement[head],
            "tie": bool(adjusted[head] >= LEVEL),
        }
        for head, difference in enumerate(differences)
    ]
    return entries, picked(value, draws, best)


def _disagreement(targets: Targets, all_chosen: Sequence[np.ndarray], best: int) -> list[dict[str, float]]:
    """McNemar's p-values of each head against the best, with those adjusted by Holm; none of numbers, which are never
    right."""
    if targets.numeric:
        return [{} for _ in all_chosen]
    correct = [majority((chosen == targets.matrix).all(-1)) for chosen in all_chosen]
    p_values = np.array([mcnemar(correct[best], other) for other in correct])
    others = np.arange(len(all_chosen)) != best
    adjusted = np.ones(len(all_chosen))
    adjusted[others] = holm(p_values[others])
    return [
        {"mcnemar": p, "mcnemar_holm": p_holm} for p, p_holm in zip(p_values.tolist(), adjusted.tolist(), strict=True)
    ]


def compare_pairs(
    targets: Targets, all_chosen: Sequence[np.ndarray], groups: np.ndarray | None = None
) -> tuple[list[list[Difference]], np.ndarray]:
    """Compare every head with every other: a table of differences, row less column, and adjusted p-values (H, H).

    A p-value is the share of draws in which the largest studentised difference of any pair, the heads being equal, is
    as large as this one (Westfall and Young, 1993). `all_chosen` is as in `compare_with_best`.
    """
    value, draws = _draw_headlines(targets, all_chosen, SEED, groups)
    heads = range(len(all_chosen))
    table = [
        [_difference(value[row] - value[other], draws[:, row] - draws[:, other]) for other in heads] for row in heads
    ]
    return table, np.maximum(_adjusted(value, draws), [[difference.p for difference in row] for row in table])


def picked(value: np.ndarray, draws: np.ndarray, best: int) -> Score:
    """The score of head `best`, had it been picked on other samples than those that score it, with its interval.

    Of the scores (H,) of all heads, the largest is partly luck. Two thirds of the samples, drawn without replacement,
    pick the best head, and the last third scores it; the mean over such draws has no luck in it (as in BBC-CV of
    Tsamardinos, Greasidou and Borboudakis, 2018, which takes the bootstrap's rows). A part's scores move by as much as
    those of the bootstrap (D, H), `draws`, less the factor sqrt(2), and those of its rest twice as far the other way.
    """
    moved = (draws - value) / np.sqrt(2)
    rest = value - 2 * moved
    chosen = np.argmax(value + moved, axis=1)
    luck = value[best] - value.mean() - float((rest[np.arange(len(rest)), chosen] - rest.mean(1)).mean())
    return percentiles(value[best] - max(luck, 0.0), draws[:, best] - max(luck, 0.0))


def _adjusted(value: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """(H, H) p-values of all differences between scores (H,), of which `draws` (D, H) hold other draws."""
    largest, heads = np.zeros(len(draws)), len(value)
    observed = np.zeros((heads, heads))
    for row in range(heads - 1):
        differences, moved = value[row] - value[row + 1 :], draws[:, row, None] - draws[:, row + 1 :]
        spread = moved.std(0)
        spread[spread < ROUNDING] = np.inf  # heads that choose alike
        observed[row, row + 1 :] = np.abs(differences) / spread
        largest = np.maximum(largest, (np.abs(moved - differences) / spread).max(1))
    observed += observed.T
    reached = len(draws) - np.searchsorted(np.sort(largest), observed - ROUNDING)
    p = (reached + 1) / (len(draws) + 1)
    return np.where(observed > 0, p, 1.0)


def _draw_headlines(
    targets: Targets, all_chosen: Sequence[np.ndarray], seed: int, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """(H,) score of each head, the mean over its seeds, and (D, H) the same on resampled samples."""
    starts = np.cumsum([0, *(len(chosen) for chosen in all_chosen)])

    def scores(counts: Hits | Errors) -> np.ndarray:
        sums = np.add.reduceat(counts.headline, starts[:-1], axis=-1)
        return sums / np.diff(starts)

    return draw_scores(find_cells(targets, np.concatenate(list(all_chosen)), groups), scores, seed)


def _difference(value: float, draws: np.ndarray) -> Difference:
    fewer = min(np.count_nonzero(draws < ROUNDING), np.count_nonzero(draws > -ROUNDING))
    return Difference(**vars(percentiles(value, draws)), p=min(1.0, 2 * (int(fewer) + 1) / (len(draws) + 1)))
