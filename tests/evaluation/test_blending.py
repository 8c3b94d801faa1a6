"""Ensembles: weights are weights, good heads get them, and what was not learned from is predicted better."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mmfeat.evaluation.blending import blend, fit_stacking, greedy_weights, head_logits, mean_weights
from mmfeat.evaluation.decisions import Decision, fit_decision
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.samples.labels import Targets, indicator

PRIOR = np.array([0.6, 0.3, 0.1])
NAMES = ("a", "b", "c")


def make(skills: list[float], samples: int = 900, seed: int = 0, multilabel: bool = False):
    """Calibrated log-probabilities (H, N, 3) of heads that see the classes this far apart, and the labels."""
    random = np.random.default_rng(seed)
    labels = indicator(random.choice(3, samples, p=PRIOR), 3)
    if multilabel:
        labels = random.random((samples, 3)) < PRIOR
    targets, given = Targets(NAMES, labels, multilabel), []
    for skill in skills:
        places = random.normal(0, 1, (samples, 3)) + skill * labels
        odds = np.log(PRIOR / (1 - PRIOR)) - skill**2 / 2 if multilabel else np.log(PRIOR)
        logits = skill * places + odds
        given.append(fit_decision(logits, targets, PRIOR, adjustment=0.0).log_probabilities(logits))
    return np.array(given), targets


def halves(skills: list[float], seed: int = 0, multilabel: bool = False):
    """Validation and unseen rows."""
    given, targets = make(skills, 1500, seed, multilabel)
    return given[:, :700], targets.take(slice(0, 700)), given[:, 700:], targets.take(slice(700, None))


def score(log_probabilities: np.ndarray, targets: Targets) -> float:
    chosen = log_probabilities > 0 if targets.multilabel else indicator(log_probabilities.argmax(-1), 3)
    return macro_f1(targets.matrix, chosen)


def loss(logits: np.ndarray, targets: Targets) -> float:
    """Log-loss of logits as they are."""
    return -float(Decision(1.0, 0.0, (0.0,) * 3).log_probabilities(logits)[targets.matrix].mean())


def test_blend_is_the_weighted_mean_probability() -> None:
    given, _ = make([1.0, 0.5])
    mean = 0.25 * np.exp(given[0]) + 0.75 * np.exp(given[1])
    np.testing.assert_allclose(np.exp(blend(given, np.array([0.25, 0.75]))), mean)
    np.testing.assert_allclose(np.exp(blend(given, np.array([1.0, 3.0]))), mean)
    several, _ = make([1.0, 0.5], multilabel=True)
    mean = np.exp(several).mean(0)
    np.testing.assert_allclose(1 / (1 + np.exp(-blend(several, mean_weights(2), multilabel=True))), mean)


@pytest.mark.parametrize("multilabel", [False, True])
def test_blend_of_certain_heads_is_finite(multilabel: bool) -> None:
    certain = np.full((2, 4, 3), -np.inf)
    certain[:, :, 0] = 0.0
    with np.errstate(all="raise"):
        assert np.isfinite(blend(certain, mean_weights(2), multilabel)).all()


@pytest.mark.parametrize("multilabel", [False, True])
def test_greedy_weights_go_to_good_heads(multilabel: bool) -> None:
    given, targets = make([1.3, 0.0, 1.3, 0.0, 0.2, 0.0], multilabel=multilabel)
    given[[1, 3, 4, 5]] = np.random.default_rng(0).permutation(given[0])  # one head on other samples, four times
    weights = greedy_weights(given, targets)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()
    assert weights[[0, 2]].sum() > 0.7
    assert (greedy_weights(given, targets) == weights).all()


@pytest.mark.parametrize("multilabel", [False, True])
def test_greedy_beats_the_best_head_and_the_mean_on_unseen_rows(multilabel: bool) -> None:
    """Three good heads, and a weak one that stands there ten times over."""
    over_best, over_mean = [], []
    for seed in range(8):
        validation, targets, unseen, expected = halves([1.0, 0.9, 0.8, 0.3], seed, multilabel)
        validation, unseen = (part[[0, 1, 2, *[3] * 10]] for part in (validation, unseen))

        def decided(weights: np.ndarray, on: np.ndarray, labels: Targets) -> float:
            decision = fit_decision(blend(validation, weights, multilabel), targets, PRIOR)  # noqa: B023
            return macro_f1(labels.matrix, decision.choose(blend(on, weights, multilabel)))

        ours = decided(greedy_weights(validation, targets), unseen, expected)
        best = max(np.eye(13), key=lambda weights: decided(weights, validation, targets))
        over_best.append(ours - decided(best, unseen, expected))
        over_mean.append(ours - decided(mean_weights(13), unseen, expected))
    assert np.mean(over_best) > 0.02
    assert np.mean(over_mean) > 0.02


def test_one_head_or_no_rows_leave_nothing_to_choose() -> None:
    given, targets = make([1.0, 0.5])
    assert greedy_weights(given[:1], targets).tolist() == [1]
    assert greedy_weights(given[:, :0], targets.take(slice(0, 0))).tolist() == [0.5, 0.5]


def test_a_single_round_of_a_single_bag_by_hand() -> None:
    """Two heads that are each right where the other is wrong, and surely so, are best together."""
    labels = indicator([0, 1, 0, 1], 2)
    first = np.array([[0.9, 0.1], [0.1, 0.9], [0.4, 0.6], [0.6, 0.4]])
    given = np.log(np.stack([first, first[[2, 3, 0, 1]], np.full((4, 2), 0.5)]))
    targets = Targets(("a", "b"), labels)
    weights = greedy_weights(given, targets, rounds=1)
    assert weights.tolist() == [0.5, 0.5, 0]
    assert macro_f1(labels, indicator(blend(given, weights).argmax(1), 2)) == 1


def stack(fitted: tuple[np.ndarray, np.ndarray], given: np.ndarray, multilabel: bool = False) -> np.ndarray:
    powers, intercept = fitted
    return np.tensordot(powers, head_logits(given, multilabel), axes=1) + intercept


@pytest.mark.parametrize("multilabel", [False, True])
def test_stacking_trusts_good_heads_and_never_turns_one_round(multilabel: bool) -> None:
    """Beside a good head stand a useless one, and one whose votes for two classes are swapped."""
    validation, targets, unseen, expected = halves([1.0, 1.5, 0.0, 1.5], multilabel=multilabel)
    validation[3], unseen[3] = validation[3][:, [1, 0, 2]], unseen[3][:, [1, 0, 2]]
    fitted = fit_stacking(validation, targets)
    powers, _ = fitted
    assert powers.min() >= 0
    assert powers[:2].min() > 0.4
    assert powers[3] < 0.2
    assert score(stack(fitted, unseen, multilabel), expected) > score(unseen[1], expected) + 0.01
    assert score(stack(fitted, unseen, multilabel), expected) > score(unseen.mean(0), expected) + 0.05
    assert all((first == second).all() for first, second in zip(fit_stacking(validation, targets), fitted, strict=True))


@pytest.mark.parametrize("multilabel", [False, True])
def test_stacking_of_noise_stays_near_the_prior(multilabel: bool) -> None:
    validation, targets, unseen, expected = halves([0.0] * 12, multilabel=multilabel)
    fitted = fit_stacking(validation, targets)
    decision = fit_decision(stack(fitted, validation, multilabel), targets, PRIOR, adjustment=0.0)
    likelihood = np.where(expected.matrix, decision.probabilities(stack(fitted, unseen, multilabel)), 1)
    prior = np.where(expected.matrix, PRIOR, 1)
    assert -np.log(likelihood).sum() < 1.02 * -np.log(prior).sum()


def test_stacking_fits_few_rows_little_better_than_it_predicts_others() -> None:
    fitted, others = [], []
    for seed in range(6):
        given, targets = make([0.4] * 12, 1200, seed)
        part = targets.take(slice(0, 150))
        stacking = fit_stacking(given[:, :150], part)
        fitted.append(loss(stack(stacking, given[:, :150]), part))
        others.append(loss(stack(stacking, given[:, 150:]), targets.take(slice(150, None))))
    assert np.mean(fitted) == pytest.approx(np.mean(others), abs=0.06)


def test_stacking_copes_with_few_rows_certain_heads_and_an_absent_class() -> None:
    labels = indicator(np.arange(20) % 2, 3)
    certain = np.where(labels, 0.0, -np.inf)[None].repeat(3, axis=0)
    targets = Targets(NAMES, labels)
    for rows in (0, 4, 20):
        logits = stack(fit_stacking(certain[:, :rows], targets.take(slice(0, rows))), certain)
        assert np.isfinite(logits).all()
        assert (logits.argmax(1) == labels.argmax(1)).all()


def test_both_are_quick() -> None:
    given, targets = make(list(np.linspace(0.3, 1, 40)), samples=1100)
    start = time.process_time()
    greedy_weights(given, targets)
    greedy = time.process_time() - start
    fit_stacking(given[:20], targets)
    assert greedy < 0.6
    assert time.process_time() - start - greedy < 2
