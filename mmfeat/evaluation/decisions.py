"""Decisions: the calibration and thresholds that turn logits into probabilities and classes, from validation rows.

Probabilities come from one temperature (Guo et al., 2017), one bias a class, since heads train with class weights, and
a floor for labels that are wrong at random. Classes come from a logit adjustment: offsets of
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
HOTTEST = 148.0  # largest temperature; 1 / HOTTEST is the smallest
STEPS = 20  # most steps of a calibration
TOLERANCE = 1e-5  # a gain of log-loss in nats a row, below which a calibration ends
LARGEST_FLOOR = 0.5  # most of the labels that may be wrong at random
LEAST = 1e-12  # probabilities are kept this far from 0 and 1 in a logarithm
LARGEST = 1000.0  # replaces an infinite logit
STAIR = 1e-6  # penalty by |setting| that breaks ties of equal scores toward 0


@dataclass(frozen=True)
class Decision:
    """Calibrated probabilities and choices from logits (..., C).

    Probabilities are (1 - floor) softmax(scaled) + floor / C with scaled = logits / temperature + biases, multi-label
    (1 - floor) sigmoid(scaled) + floor / 2. The class chosen is argmax(scaled - offsets), multi-label every class where
    this is above 0. `biases` (C,) are absent in decisions of earlier versions, and then 0. `offsets` (C,) are
    `strength` times the log prior, multi-label the log-odds of each class's threshold; `strength` is 0 where
    multi-label thresholds were fitted. With `cuts` (C - 1,), of ordered classes, the number of the class chosen is the
    number of cuts below the expected one; all offsets are 0. Without offsets, in a regression, logits are the numbers.
    """

    temperature: float
    strength: float
    offsets: tuple[float, ...]
    multilabel: bool = False
    cuts: tuple[float, ...] | None = None
    biases: tuple[float, ...] | None = None
    floor: float = 0.0

    def __post_init__(self) -> None:
        numbers = [self.temperature, self.strength, *self.offsets, *(self.biases or ())]
        if not (self.temperature > 0 and np.isfinite(numbers).all() and 0 <= self.floor < 1):
            raise ValueError("temperature above 0, finite offsets and biases and a floor below 1 expected")
        if self.biases is not None and len(self.biases) != len(self.offsets):
            raise ValueError("as many biases as offsets expected")

    @property
    def shift(self) -> np.ndarray:
        """(C,) the biases, 0 where there are none."""
        return np.zeros(len(self.offsets)) if self.biases is None else np.array(self.biases)

    def scaled(self, logits: np.ndarray) -> np.ndarray:
        """(..., C) logits / temperature + biases."""
        return _finite(logits) / self.temperature + self.shift

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(..., C) calibrated probabilities: softmax, or for multi-label a sigmoid a class."""
        logs = self.log_probabilities(logits)
        return np.exp(logs) if self.offsets else logs

    def log_probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(..., C) logarithms of the calibrated probabilities."""
        if not self.offsets:
            return _finite(logits)
        scaled = self.scaled(logits)
        logs = -np.logaddexp(0, -scaled) if self.multilabel else _log_softmax(scaled, axis=-1)
        return np.log((1 - self.floor) * np.exp(logs) + self._least) if self.floor else logs

    def logits(self, probabilities: np.ndarray) -> np.ndarray:
        """(..., C) logits that have these probabilities."""
        if not self.offsets:
            return probabilities
        plain = np.clip((probabilities - self._least) / (1 - self.floor), LEAST, 1 - LEAST if self.multilabel else 1)
        logs = np.log(plain) - np.log1p(-plain) if self.multilabel else np.log(plain)
        return (logs - self.shift) * self.temperature

    @property
    def _least(self) -> float:
        return self.floor / (2 if self.multilabel else len(self.offsets))

    def choose(self, logits: np.ndarray) -> np.ndarray:
        """(..., C) bool: one True a row, or for multi-label any number of them."""
        if not self.offsets:
            return _finite(logits)
        if self.cuts is not None:
            above = expected_class(self.probabilities(logits))[..., None] > np.array(self.cuts)
            return indicator(above.sum(-1), len(self.offsets))
        return plain_choice(self.scaled(logits) - np.array(self.offsets), self.multilabel)

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
            cuts, biases = (
                tuple(map(float, values[name])) if values.get(name) is not None else None for name in ("cuts", "biases")
            )
            floor = float(values.get("floor", 0))
            return cls(*numbers, offsets, bool(values["multilabel"]), cuts, biases, floor)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"not a decision ({error}); run mmfeat heads again") from error


def fit_decision(
    logits: np.ndarray, targets: Targets, prior: np.ndarray, adjustment: float | None = None, seed: int = 42
) -> Decision:
    """Fit temperature, biases, floor and offsets on M rows that the head was not trained on.

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
    if targets.numeric:
        return Decision(1.0, 0.0, ())
    logits, multilabel = _finite(logits), targets.multilabel
    calibrated = calibrate(logits, targets, prior)
    if targets.ordered:
        return _fit_cuts(calibrated, logits, targets, adjustment, seed)
    units = _units(prior, multilabel)
    if adjustment is not None or not len(targets):
        return _adjusted(calibrated, adjustment or 0.0, units)
    random = np.random.default_rng(seed)
    rows = random.permutation(len(targets))[:MAX_ROWS]
    scaled, labels = calibrated.scaled(logits[rows]), targets.matrix[rows]
    if multilabel:
        scores = _resample(lambda offset: scaled > offset, LOG_ODDS, labels, random)
        return replace(calibrated, offsets=tuple(_mean_of_best(scores, LOG_ODDS).tolist()))
    scores = _resample(lambda strength: plain_choice(scaled - strength * units, False), STRENGTHS, labels, random)
    return _adjusted(calibrated, round(float(_mean_of_best(scores.mean(-1), STRENGTHS)), 3), units)


def _adjusted(decision: Decision, strength: float, units: np.ndarray) -> Decision:
    offsets = tuple((strength * units + 0.0).tolist())  # + 0 turns -0 into 0
    return replace(decision, strength=strength, offsets=offsets)


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


def calibrate(logits: np.ndarray, targets: Targets, prior: np.ndarray) -> Decision:
    """The decision with the temperature, biases and floor of the least log-loss, and without offsets.

    The likelihood of a label is that of a mixture: with the probability `floor` it was drawn at random. Newton's steps
    on the inverse of the temperature and the biases, with each label weighted by the probability that it was not drawn
    at random, alternate with steps of the floor (EM; Dempster, Laird and Rubin, 1977). One added row, labelled with the
    training prior, keeps the temperature finite where the rows are separable (as Platt, 1999, does for two classes),
    and a ridge of one row keeps the biases small where a class has few rows.
    """
    multilabel, classes = targets.multilabel, logits.shape[1]
    plain = Decision(1.0, 0.0, (0.0,) * classes, multilabel)
    if not len(targets):
        return plain
    if len(targets) > MAX_ROWS:
        rows = np.linspace(0, len(targets) - 1, MAX_ROWS).astype(np.int64)
        logits, targets = logits[rows], targets.take(rows)
    spread = logits - (0 if multilabel else logits.mean(1, keepdims=True))
    size = float(np.sqrt(np.mean(spread**2)))
    if not size > 0 or not np.isfinite(size) or not np.ptp(spread, axis=0).any():
        return plain
    likelihood = _Likelihood(np.ascontiguousarray(spread.T / size), targets, prior)
    fitted, floor = np.append(size, np.zeros(classes)), 0.0  # the inverse temperature of the inputs, and the biases
    shares, loss = likelihood.shares(fitted), np.inf
    for _ in range(STEPS):
        floor = likelihood.floor(shares, floor)
        before, step = loss, likelihood.step(shares, fitted, floor)
        for _ in range(8):  # halves of a step that goes too far
            moved = fitted - step
            moved[0] = np.clip(moved[0], size / HOTTEST, size * HOTTEST)
            shares, step = likelihood.shares(moved), step / 2
            if (loss := likelihood.loss(shares, moved, floor)) <= before:
                break
        fitted = moved
        if before - loss < TOLERANCE * len(targets):
            break
    return replace(plain, temperature=float(size / fitted[0]), biases=tuple(fitted[1:].tolist()), floor=floor)


class _Likelihood:
    """The likelihood of labels, of which some share, the floor, was drawn at random, given M inputs (C, M).

    Arrays have the classes first: they are few, and sums over the first axis are faster.
    """

    def __init__(self, inputs: np.ndarray, targets: Targets, prior: np.ndarray) -> None:
        extra = 1 / (len(targets) + 1)
        self.inputs, self.multilabel = inputs, targets.multilabel
        self.labelled = np.ascontiguousarray(targets.matrix.T)
        self.labels = (1 - extra) * self.labelled + extra * prior[:, None]
        self.chance = 1 / (2 if targets.multilabel else len(prior))

    def shares(self, fitted: np.ndarray) -> np.ndarray:
        """(C, M) probabilities without floor."""
        scaled = fitted[0] * self.inputs + fitted[1:, None]
        return np.exp(-np.logaddexp(0, -scaled) if self.multilabel else _log_softmax(scaled, axis=0))

    def of_labels(self, shares: np.ndarray) -> np.ndarray:
        """(1, M) probability of each label, multi-label (C, M) of each class's."""
        if self.multilabel:
            return np.where(self.labelled, shares, 1 - shares)
        return (shares * self.labelled).sum(0, keepdims=True)

    def loss(self, shares: np.ndarray, fitted: np.ndarray, floor: float) -> float:
        """Log-loss summed over rows, and the ridge."""
        mixed = (1 - floor) * self.of_labels(shares) + floor * self.chance
        return -float(np.log(mixed + LEAST).sum()) + float(fitted[1:] @ fitted[1:]) / 2

    def floor(self, shares: np.ndarray, floor: float) -> float:
        """Newton's next step toward the floor with the largest likelihood, which is concave in the floor."""
        likelihoods = self.of_labels(shares)
        slope = (self.chance - likelihoods) / ((1 - floor) * likelihoods + floor * self.chance + LEAST)
        return float(np.clip(floor + slope.sum() / np.vdot(slope, slope).clip(LEAST), 0, LARGEST_FLOOR))

    def step(self, shares: np.ndarray, fitted: np.ndarray, floor: float) -> np.ndarray:
        """(1 + C,) Newton's step of the log-loss; a label weighs as much as it is sure not to be drawn at random."""
        kept = (1 - floor) * self.of_labels(shares)
        sure = kept / (kept + floor * self.chance + LEAST)
        residual = sure * (shares - self.labels)
        slope = np.append(np.vdot(residual, self.inputs), residual.sum(1) + fitted[1:])
        weights = sure * (shares * (1 - shares) if self.multilabel else shares)
        moved = self.inputs if self.multilabel else self.inputs - (shares * self.inputs).sum(0)
        weighted = weights * moved
        curvature = np.diag(np.append(np.vdot(weighted, moved) + LEAST, weights.sum(1) + 1))
        curvature[0, 1:] = curvature[1:, 0] = weighted.sum(1)
        if not self.multilabel:
            curvature[1:, 1:] -= weights @ shares.T
        return np.linalg.solve(curvature, slope)


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
