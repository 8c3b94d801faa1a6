"""Ensembles: weights for the heads' probabilities, or a small model of them, from validation rows only.

Shapes: H heads, M validation rows, N rows of any kind, C classes. Inputs are calibrated log-probabilities (H, N, C),
multi-label the log-probability of each class on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mmfeat.evaluation.decisions import Decision, fit_decision
from mmfeat.samples.labels import Targets

LEAST = 1e-12  # probabilities are kept this far from 0 and 1 in a logarithm
LEAST_LOGIT = float(np.log(1e-6))  # smallest logit of a head in a stacking
LARGEST_BAR = 80.0  # largest logarithm of a bar, which stays finite in float32
BAGS = 20  # number of random halves of the heads from which ensembles are selected
SORTED = 5  # most of the best heads whose mean the selection starts with
HEAVY = 1e3  # weight of the sum of weights beside the errors
LOSS_SHARE = 0.1  # weight of the log-loss beside macro-F1
RIDGE = 100.0  # rows that the penalty on the powers of a stacking counts as


def mean_weights(heads: int) -> np.ndarray:
    return np.full(heads, 1 / heads)


def blend(log_probabilities: np.ndarray, weights: np.ndarray, multilabel: bool = False) -> np.ndarray:
    """(N, C) log of the weighted mean of the heads' probabilities (H, N, C); multi-label the log-odds of the mean."""
    mean = np.tensordot(weights / weights.sum(), np.exp(log_probabilities), axes=1)
    if not multilabel:
        return np.log(np.maximum(mean, LEAST))
    mean = np.clip(mean, LEAST, 1 - LEAST)
    return np.log(mean) - np.log1p(-mean)


def greedy_weights(validation: np.ndarray, targets: Targets, rounds: int = 15, seed: int = 42) -> np.ndarray:
    """Weights of heads by ensemble selection (Caruana et al., 2004).

    Starting with the best heads, each round adds the head, possibly once more, with which the mean scores best; the
    best ensemble of all rounds is kept. The selection runs in `BAGS` random halves of the heads, and the weights are
    averaged. The score is macro-F1 - 0.1 log-loss (nats), because macro-F1 alone follows the luck of single rows.
    Classes are chosen with the offsets that `fit_decision` finds for the mean of all heads.

    Parameters
    ----------
    validation : (H, M, C)
        Log-probabilities; without rows all heads weigh the same.
    targets : Targets
        Labels of the M rows.

    Returns
    -------
    (H,) array
        Weights that add up to 1. Of a regression: `validation` holds numbers, and the weights of all heads are fitted.
    """
    heads = len(validation)
    if not len(targets) or heads == 1:
        return mean_weights(heads)
    if targets.numeric:
        return _stacked_regressions(validation[..., 0], targets.matrix[:, 0])
    random = np.random.default_rng(seed)
    candidates = _Candidates.of(validation, targets)
    size = min(heads, max(3, (heads + 1) // 2))
    weights = np.zeros(heads)
    for _ in range(BAGS if size < heads else 1):
        pool = np.sort(random.permutation(heads)[:size])
        weights[pool] += _select(candidates.take(pool), rounds)
    return weights / weights.sum()


def _stacked_regressions(predicted: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(H,) weights of predicted numbers (H, M) that leave the least squared error, none below 0 and all adding up to 1
    (Breiman, 1996)."""
    from scipy.optimize import nnls

    scale = max(float(values.std()), np.finfo(np.float32).tiny)
    columns, wanted = ((part - values.mean()) / scale for part in (predicted.T, values))
    bound = HEAVY * np.sqrt(len(values))  # one more row, which weighs so much that the sum is 1
    weights, _ = nnls(np.vstack([columns, np.full(len(predicted), bound)]), np.append(wanted, bound))
    return weights / weights.sum()


@dataclass(frozen=True)
class _Candidates:
    """The heads from which an ensemble is selected, as arrays from which scores are fast to compute.

    `probabilities` (H, C, M) are the heads' outputs, `likelihoods` (H, 1, M), multi-label (H, C, M), the probabilities
    of the true labels, `labels` (C, M) the labels. `bars` (C, 1) are thresholds of the probabilities for multi-label,
    and divisors of the probabilities before the argmax for multi-class.
    """

    probabilities: np.ndarray
    likelihoods: np.ndarray
    labels: np.ndarray
    bars: np.ndarray
    multilabel: bool

    @classmethod
    def of(cls, log_probabilities: np.ndarray, targets: Targets) -> _Candidates:
        # float32 with the rows as the last axis halves the time of the selection's many rounds.
        probabilities = np.ascontiguousarray(np.exp(log_probabilities).transpose(0, 2, 1), dtype=np.float32)
        labels = np.ascontiguousarray(targets.matrix.T)
        likelihoods = np.where(labels, probabilities, 1 - probabilities)
        if not targets.multilabel:
            likelihoods = (probabilities * labels).sum(1, keepdims=True)
        bars = _bars(log_probabilities, targets).astype(np.float32)[:, None]
        return cls(probabilities, likelihoods, labels, bars, targets.multilabel)

    def take(self, heads: np.ndarray) -> _Candidates:
        return replace(self, probabilities=self.probabilities[heads], likelihoods=self.likelihoods[heads])

    def __len__(self) -> int:
        return len(self.probabilities)

    def scores(self, sums: np.ndarray, likelihoods: np.ndarray, sizes: np.ndarray | float) -> np.ndarray:
        """(K,) scores of K ensembles, given the sums of their heads' arrays and the numbers of their heads."""
        share = 1 / np.broadcast_to(np.asarray(sizes, dtype=np.float32), len(sums))[:, None, None]
        loss = -np.log(np.maximum(likelihoods * share, np.float32(LEAST))).mean((1, 2))
        chosen = sums * share > self.bars if self.multilabel else _first_largest(sums / self.bars)
        predicted = np.count_nonzero(chosen, axis=-1)
        hits = np.count_nonzero(chosen & self.labels, axis=-1)
        f1 = 2 * hits / np.maximum(predicted + np.count_nonzero(self.labels, axis=-1), 1)
        return f1.mean(-1) - LOSS_SHARE * loss


def _first_largest(values: np.ndarray) -> np.ndarray:
    """(K, C, M) bool, True at the first largest of each C values: as `argmax`, which is slow along a middle axis."""
    chosen = values == values.max(1, keepdims=True)
    free = ~chosen[:, 0]
    for row in range(1, values.shape[1]):
        chosen[:, row] &= free
        free &= ~chosen[:, row]
    return chosen


def _bars(log_probabilities: np.ndarray, targets: Targets) -> np.ndarray:
    """(C,) `bars` of `_Candidates`, from the decision that is fitted to the mean of all heads.

    Every ensemble gets a decision of its own later. A selection by plain choices would reward heads that predict rare
    classes often, which a decision achieves for any head.
    """
    mean = blend(log_probabilities, mean_weights(len(log_probabilities)), targets.multilabel)
    decision = fit_decision(mean, replace(targets, ordered=False), targets.prior)
    offsets = np.clip(decision.temperature * (np.array(decision.offsets) - decision.shift), -LARGEST_BAR, LARGEST_BAR)
    return 1 / (1 + np.exp(-offsets)) if targets.multilabel else np.exp(offsets)


def _select(pool: _Candidates, rounds: int) -> np.ndarray:
    """(H,) weights of one greedy selection."""
    alone = pool.scores(pool.probabilities, pool.likelihoods, 1)
    order = np.argsort(-alone, kind="stable")[:SORTED]
    sizes = np.arange(1, len(order) + 1)
    sums, likelihoods = pool.probabilities[order].cumsum(0), pool.likelihoods[order].cumsum(0)
    starts = pool.scores(sums, likelihoods, sizes)
    first = int(starts.argmax())
    picked = np.bincount(order[: first + 1], minlength=len(pool)).astype(float)
    best, best_score = picked / picked.sum(), starts[first]
    total, likelihood = sums[first], likelihoods[first]
    for _ in range(rounds):
        scores = pool.scores(total + pool.probabilities, likelihood + pool.likelihoods, picked.sum() + 1)
        head = int(scores.argmax())
        picked[head] += 1
        total, likelihood = total + pool.probabilities[head], likelihood + pool.likelihoods[head]
        if scores[head] > best_score:
            best, best_score = picked / picked.sum(), scores[head]
    return best


def fit_stacking(validation: np.ndarray, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Powers (H,) of the heads' probabilities, and the log (C,) of a factor for each class, whose product has the least
    log-loss (stacking; Wolpert, 1992), from log-probabilities (H, M, C) and the labels of their rows.

    No power is below 0, which regularises enough (Breiman, 1996): else heads that saw the labels of the rows to be
    scored would be turned against these labels. A ridge of `RIDGE` rows leads to the mean of the logits where few rows,
    or heads that tell nothing, would leave the powers to luck.
    """
    from scipy.optimize import minimize

    inputs = head_logits(validation, targets.multilabel)
    heads, rows, classes = inputs.shape
    start = np.append(mean_weights(heads), np.zeros(classes))
    ridge = RIDGE / max(rows, 1)

    def objective(fitted: np.ndarray) -> tuple[float, np.ndarray]:
        loss, residual = log_loss(np.tensordot(fitted[:heads], inputs, axes=1) + fitted[heads:], targets)
        slopes = np.append(np.tensordot(inputs, residual, axes=2), residual.sum(0))
        moved = fitted - start
        return loss + ridge / 2 * float(moved @ moved), slopes + ridge * moved

    bounds = [(0, None)] * heads + [(None, None)] * classes
    fitted = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds).x if rows else start
    return fitted[:heads], fitted[heads:]


def log_loss(logits: np.ndarray, targets: Targets) -> tuple[float, np.ndarray]:
    """Mean log-loss (multi-label: summed over classes) and its (M, C) gradient by the logits."""
    labels, rows = targets.matrix, len(targets)
    if targets.multilabel:
        below = np.logaddexp(0, -logits)
        return float((below + ~labels * logits).sum()) / rows, (np.exp(-below) - labels) / rows
    shifted = logits - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return float(-log_probabilities[labels].sum()) / rows, (np.exp(log_probabilities) - labels) / rows


def head_logits(log_probabilities: np.ndarray, multilabel: bool) -> np.ndarray:
    """(H, N, C) log-probabilities or log-odds without extremes, so that a certain head does not dominate sums."""
    if multilabel:
        odds = log_probabilities - np.log(np.maximum(-np.expm1(log_probabilities), LEAST))
        return np.clip(odds, LEAST_LOGIT, -LEAST_LOGIT)
    return np.maximum(log_probabilities, LEAST_LOGIT)


def mean_logits(logits: np.ndarray, decision: Decision) -> np.ndarray:
    """(S, N, C) logits -> (N, C) whose calibrated probabilities are the mean of the S heads' probabilities."""
    if len(logits) == 1:
        return logits[0]
    return decision.logits(decision.probabilities(logits).mean(0))
