"""Paired tests: is one head better than another on the same samples, or is that noise?

The tests are about the trained heads as they are, on other samples from the same population. The
variation between trainings is left out; the spread over seeds shows that variation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfeat.evaluation.metrics import DRAWS, Hits, draw_scores, find_cells, percentiles
from mmfeat.samples.labels import Targets

LEVEL = 0.05  # p-values below it count as significant
ROUNDING = 1e-7  # smaller differences are rounding errors
SEED = 42  # seed with which `compare_pairs` draws


@dataclass(frozen=True)
class Difference:
    """A difference of macro-F1 with its 95 % interval and two-sided p-value."""

    value: float
    low: float
    high: float
    p: float


def paired_difference(targets: Targets, one: np.ndarray, other: np.ndarray, seed: int = 42) -> Difference:
    """Macro-F1 of `one` (S, N, C) less that of `other` (S2, N, C), each the mean over its seeds.

    Paired bootstrap over samples (Efron and Tibshirani, 1993; Berg-Kirkpatrick et al., 2012). The null
    hypothesis is that both would have the same macro-F1 on the population from which the samples were drawn.
    The p-value is twice the share of draws on the other side of 0, counting the data as one draw more
    (Davison and Hinkley, 1997), so it is never 0.
    """
    value, draws = _draw_macro_f1(targets, [one, other], seed, DRAWS)
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
    targets: Targets, all_chosen: Sequence[np.ndarray], best: int, seed: int = 42
) -> list[dict[str, Any]]:
    """Compare the macro-F1 of each head with the macro-F1 of head number `best`, for JSON.

    `all_chosen` holds the decisions (S, N, C) bool of each head; S may differ. An entry has the difference `value`,
    best less this head, with `low`, `high` and `p` as in `paired_difference`; `mcnemar` of the seeds' majorities;
    both p-values adjusted for the number of comparisons (`p_holm`, `mcnemar_holm`); and `tie`: `p_holm` >= `LEVEL`.

    The best head was selected on these very samples, which makes every other head look a little worse than it is.
    """
    # With this many draws, a difference that no draw contradicts can still pass Holm's adjustment.
    value, draws = _draw_macro_f1(targets, all_chosen, seed, max(DRAWS, 80 * len(all_chosen)))
    differences = [
        _difference(value[best] - one, draws[:, best] - row) for one, row in zip(value, draws.T, strict=True)
    ]
    correct = [majority((chosen == targets.matrix).all(-1)) for chosen in all_chosen]
    disagreement = np.array([mcnemar(correct[best], other) for other in correct])
    others = np.arange(len(all_chosen)) != best
    adjusted, adjusted_disagreement = np.ones((2, len(all_chosen)))
    adjusted[others] = holm(np.array([difference.p for difference in differences])[others])
    adjusted_disagreement[others] = holm(disagreement[others])
    return [
        {
            **vars(difference),
            "p_holm": float(adjusted[row]),
            "mcnemar": float(disagreement[row]),
            "mcnemar_holm": float(adjusted_disagreement[row]),
            "tie": bool(adjusted[row] >= LEVEL),
        }
        for row, difference in enumerate(differences)
    ]


def compare_pairs(targets: Targets, all_chosen: Sequence[np.ndarray]) -> tuple[list[list[Difference]], np.ndarray]:
    """Compare every head with every other: a table of differences, row less column, and adjusted p-values (H, H).

    The p-values are adjusted for all pairs (Holm), and 1 on the diagonal. `all_chosen` is as in `compare_with_best`.
    """
    heads = len(all_chosen)
    upper = np.triu_indices(heads, 1)
    value, draws = _draw_macro_f1(targets, all_chosen, SEED, max(DRAWS, 80 * len(upper[0])))
    table = [
        [_difference(value[row] - value[column], draws[:, row] - draws[:, column]) for column in range(heads)]
        for row in range(heads)
    ]
    adjusted = np.ones((heads, heads))
    adjusted[upper] = holm([table[row][column].p for row, column in zip(*upper, strict=True)])
    return table, np.minimum(adjusted, adjusted.T)


def _draw_macro_f1(
    targets: Targets, all_chosen: Sequence[np.ndarray], seed: int, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """(H,) macro-F1 of each head, the mean over its seeds, and (draws, H) the same on resampled samples."""
    starts = np.cumsum([0, *(len(chosen) for chosen in all_chosen)])

    def scores(counts: Hits) -> np.ndarray:
        sums = np.add.reduceat(counts.macro_f1, starts[:-1], axis=-1)
        return sums / np.diff(starts)

    return draw_scores(find_cells(targets.matrix, np.concatenate(list(all_chosen))), scores, seed, draws)


def _difference(value: float, draws: np.ndarray) -> Difference:
    fewer = min(np.count_nonzero(draws < ROUNDING), np.count_nonzero(draws > -ROUNDING))
    return Difference(**vars(percentiles(value, draws)), p=min(1.0, 2 * (int(fewer) + 1) / (len(draws) + 1)))
