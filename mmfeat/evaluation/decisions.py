"""Decisions: the calibration and thresholds that turn logits into probabilities and classes, from validation rows.

Probabilities come from one temperature (Guo et al., 2017), classes from a logit adjustment: offsets of
`strength` times the log of the classes' prior (Menon et al., 2021, arXiv 2007.07314), or for multi-label a
threshold a class. As a function of a setting, macro-F1 of some hundred rows is a noisy staircase, whose top is often
luck. So the best setting is chosen on each of many draws of half the rows, and averaged (bagging, Breiman, 1996).

Of ordered classes, thresholds cut the expected number of the class, in favour of the quadratic weighted kappa.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from mmfeat.errors import RunError
from mmfeat.evaluation.resampling import quadratic_kappa
from mmfeat.samples.labels import Targets, indicator

STRENGTHS = np.arange(-10, 21) / 10  # 0 chooses the most probable class, 1 the class with the largest posterior / prior
LOG_ODDS = np.arange(-16, 9) / 4  # candidate thresholds of a multi-label class; probabilities of 2 % to 88 %
DRAWS = 100
COLUMNS = 1024  # most columns of one product
MAX_ROWS = 20_000  # most rows from which a setting is selected; more rows do not improve the selection
LOG_TEMPERATURE = 5.0  # bound of |log temperature|, so temperatures lie between 1/148 and 148
LARGEST = 1000.0  # replaces an infinite logit
STAIR = 1e-6  # penalty by |setting| that breaks ties of equal scores toward 0


@dataclass(frozen=True)
class Decision:
    """Calibrated probabilities and choices from logits (..., C).

    Probabilities are softmax(logits / temperature), multi-label sigmoid(logits / temperature). The class chosen is
    argmax(logits / temperature - offsets), multi-label every class where this is above 0. `offsets` (C,) are
    `strength` times the log prior, multi-label the log-odds of each class's threshold; `strength` is 0 where
    multi-label thresholds were fitted. With `cuts` (C - 1,), of ordered classes, the number of the class chosen is the
    number of cuts below the expected one; all offsets are 0.
    """

    temperature: float
    strength: float
    offsets: tuple[float, ...]
    multilabel: bool = False
    cuts: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and np.isfinite([self.temperature, self.strength, *self.offsets]).all()):
            raise ValueError("temperature above 0 and finite offsets expected")

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(..., C) calibrated probabilities: softmax, or for multi-label a sigmoid a class."""
        return np.exp(self.log_probabilities(logits))

    def log_probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(..., C) logarithms of the calibrated probabilities."""
        scaled = _finite(logits) / self.temperature
        return -np.logaddexp(0, -scaled) if self.multilabel else _log_softmax(scaled, axis=-1)

    def choose(self, logits: np.ndarray) -> np.ndarray:
        """(..., C) bool: one True a row, or for multi-label any number of them."""
        if self.cuts is not None:
            above = expected_class(self.probabilities(logits))[..., None] > np.array(self.cuts)
            return indicator(above.sum(-1), len(self.offsets))
        return plain_choice(_finite(logits) / self.temperature - np.array(self.offsets), self.multilabel)

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads."""
        values = {**asdict(self), "offsets": list(self.offsets)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Decision:
        """The decision that `to_json` wrote. Raises `RunError` for anything else."""
        try:
            offsets = tuple(float(offset) for offset in values["offsets"])
            numbers = float(values["temperature"]), float(values["strength"])
            cuts = tuple(map(float, values["cuts"])) if "cuts" in values else None
            return cls(*numbers, offsets, bool(values["multilabel"]), cuts)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"not a decision ({error}); run mmfeat heads again") from error


def fit_decision(
    logits: np.ndarray, targets: Targets, prior: np.ndarray, adjustment: float | None = None, seed: int = 42
) -> Decision:
    """Fit temperature and offsets on M rows that the head was not trained on.

    Parameters
    ----------
    logits : (M, C)
        M may be 0: the temperature is then 1 and, unless given, the adjustment 0.
    targets : Targets
        Labels of the M rows; some classes may have no row.
    prior : (C,)
        Share of the training samples that have each class.
    adjustment : float, optional
        A fixed strength instead of the one with the best macro-F1. 0 chooses the most probable class or, for
        multi-label, all classes of at least one half. Of ordered classes, 0 rounds the expected number and 1 chooses
        each class as often as it is labelled, for the best kappa.
    seed : int
        Seed of the draws on which settings are compared.
    """
    logits, multilabel = _finite(logits), targets.multilabel
    temperature = _fit_temperature(logits, targets, prior)
    if targets.ordered:
        return _fit_cuts(Decision(temperature, 0.0, (0.0,) * len(prior)), logits, targets, adjustment, seed)
    units = _units(prior, multilabel)
    if adjustment is not None or not len(targets):
        return _adjusted(temperature, adjustment or 0.0, units, multilabel)
    random = np.random.default_rng(seed)
    rows = random.permutation(len(targets))[:MAX_ROWS]
    scaled, labels = logits[rows] / temperature, targets.matrix[rows]
    if multilabel:
        scores = _resample(lambda offset: scaled > offset, LOG_ODDS, labels, random)
        return Decision(temperature, 0.0, tuple(_mean_of_best(scores, LOG_ODDS).tolist()), multilabel)
    scores = _resample(lambda strength: plain_choice(scaled - strength * units, False), STRENGTHS, labels, random)
    return _adjusted(temperature, round(float(_mean_of_best(scores.mean(-1), STRENGTHS)), 3), units, multilabel)


def _adjusted(temperature: float, strength: float, units: np.ndarray, multilabel: bool) -> Decision:
    return Decision(temperature, strength, tuple((strength * units + 0.0).tolist()), multilabel)  # + 0 turns -0 into 0


def _units(prior: np.ndarray, multilabel: bool) -> np.ndarray:
    """(C,) offsets at strength 1: the log prior, multi-label its log-odds; 0 for a class without training samples."""
    if multilabel:
        known = (prior > 0) & (prior < 1)
        share = np.where(known, prior, 0.5)
        return np.log(share) - np.log1p(-share)
    return np.log(np.where(prior > 0, prior, 1.0))


def expected_class(probabilities: np.ndarray) -> np.ndarray:
    """(...) the mean number of the class, counted from 0, for (..., C) probabilities of ordered classes."""
    return probabilities @ np.arange(probabilities.shape[-1])


def _fit_cuts(
    decision: Decision, logits: np.ndarray, targets: Targets, adjustment: float | None, seed: int
) -> Decision:
    """The decision with cuts between those that round the expected class and those that choose each class as often as
    it is labelled, whose choices spread less: as far from the first as gives the best kappa."""
    random = np.random.default_rng(seed)
    rows = random.permutation(len(targets))[:MAX_ROWS]
    middle = np.arange(logits.shape[1] - 1) + 0.5
    if not len(rows):
        return replace(decision, strength=adjustment or 0.0, cuts=tuple(middle.tolist()))
    expected, numbers = expected_class(decision.probabilities(logits[rows])), targets.numbers[rows]
    shift = np.quantile(expected, targets.prior.cumsum()[:-1].clip(0, 1)) - middle
    settings, strength = STRENGTHS[STRENGTHS >= 0], adjustment
    if strength is None:
        chosen = (expected > (middle + settings[:, None] * shift)[..., None]).sum(1)
        strength = round(float(_mean_of_best(_resample_kappa(chosen, numbers, random), settings)), 3)
    return replace(decision, strength=strength, cuts=tuple((middle + strength * shift).tolist()))


def _resample_kappa(chosen: np.ndarray, numbers: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """(settings, DRAWS) kappa of the classes `chosen` (settings, M) by their numbers, on draws as in `_resample`."""
    weights = _draw(len(numbers), random)
    samples = weights.sum(1)
    total, other = weights @ numbers, weights @ chosen.T
    squares = (weights @ numbers**2)[:, None] + weights @ (chosen**2).T
    return quadratic_kappa(weights @ ((chosen - numbers) ** 2).T, squares, total[:, None] * other, samples[:, None]).T


def _draw(size: int, random: np.random.Generator) -> np.ndarray:
    """(DRAWS, size) float32: how often each draw of half of the rows, with replacement, takes each row."""
    drawn = random.integers(0, size, (DRAWS, (size + 1) // 2)) + size * np.arange(DRAWS)[:, None]
    return np.bincount(drawn.ravel(), minlength=DRAWS * size).reshape(DRAWS, size).astype(np.float32)


def _resample(
    choose: Callable[[float], np.ndarray], settings: np.ndarray, labels: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """(settings, DRAWS, C) F1 of each setting on draws of half of the M rows, with replacement."""
    size, weights = len(labels), _draw(len(labels), random)
    labelled = weights @ labels.astype(np.float32)
    scores = np.empty((len(settings), *labelled.shape))
    together = max(1, COLUMNS // (2 * labels.shape[1]))  # one product for many columns is faster than one for each
    for start in range(0, len(settings), together):
        chosen = np.stack([choose(setting) for setting in settings[start : start + together]], 1)
        columns = np.stack([chosen & labels[:, None], chosen], 1).reshape(size, -1)
        hits, predicted = (weights @ columns.astype(np.float32)).reshape(DRAWS, 2, -1, labels.shape[1]).swapaxes(0, 1)
        scores[start : start + together] = (2 * hits / np.maximum(labelled[:, None] + predicted, 1)).swapaxes(0, 1)
    return scores


def _mean_of_best(scores: np.ndarray, settings: np.ndarray) -> np.ndarray:
    """The best setting of each draw, averaged over draws: scores (settings, DRAWS, ...) -> (...)."""
    nearness = STAIR * np.abs(settings).reshape(-1, *[1] * (scores.ndim - 1))
    return settings[(scores - nearness).argmax(0)].mean(0)


def plain_choice(logits: np.ndarray, multilabel: bool) -> np.ndarray:
    """(..., C) bool choices without any adjustment: the largest logit of a row, or all above 0 where multi-label."""
    return logits > 0 if multilabel else indicator(logits.argmax(-1), logits.shape[-1])


def _fit_temperature(logits: np.ndarray, targets: Targets, prior: np.ndarray) -> float:
    """The temperature with the least log-loss; 1 where the temperature makes no difference.

    One added row, labelled with the training prior, keeps the temperature finite where the rows are separable
    (as Platt, 1999, does for two classes).
    """
    from scipy.optimize import minimize_scalar

    if not len(targets):
        return 1.0
    if len(targets) > MAX_ROWS:
        rows = np.linspace(0, len(targets) - 1, MAX_ROWS).astype(np.int64)
        logits, targets = logits[rows], targets.take(rows)
    extra = 1 / (len(targets) + 1)
    labels = np.ascontiguousarray(((1 - extra) * targets.matrix + extra * prior).T)
    columns = np.ascontiguousarray(logits.T)  # classes are few, and sums over the first axis are faster
    loss = _sigmoid_loss if targets.multilabel else _softmax_loss
    minimum = minimize_scalar(
        lambda log_temperature: loss(columns * np.exp(-log_temperature), labels),
        bounds=(-LOG_TEMPERATURE, LOG_TEMPERATURE),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(minimum.x)) if minimum.fun < loss(columns, labels) - 1e-9 else 1.0


def _softmax_loss(scaled: np.ndarray, labels: np.ndarray) -> float:
    """Log-loss of (C, M) logits for (C, M) shares of each class."""
    return float(-np.vdot(labels, _log_softmax(scaled, axis=0))) / scaled.shape[1]


def _sigmoid_loss(scaled: np.ndarray, labels: np.ndarray) -> float:
    return float((np.logaddexp(0, scaled) - labels * scaled).mean())


def _log_softmax(logits: np.ndarray, axis: int) -> np.ndarray:
    shifted = logits - logits.max(axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis, keepdims=True))


def _finite(logits: np.ndarray) -> np.ndarray:
    """Float64 logits with infinite values replaced by large ones; NaN stays, as the mark of a broken head."""
    logits = np.asarray(logits, dtype=np.float64)
    if not np.isinf(logits).any():
        return logits
    largest = max(LARGEST, float(np.abs(logits[np.isfinite(logits)]).max(initial=0)))
    return np.clip(logits, -largest, largest)
