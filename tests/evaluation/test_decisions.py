"""Decisions: known temperatures and priors are found again, and odd validation parts break nothing."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from mmfeat.errors import RunError
from mmfeat.evaluation.decisions import Decision, fit_decision
from mmfeat.evaluation.metrics import evaluate, macro_f1
from mmfeat.samples.labels import Targets, indicator

PRIOR = np.array([0.6, 0.3, 0.1])
NAMES = ("a", "b", "c")


def make(samples: int, seed: int = 0, distance: float = 1.2) -> tuple[np.ndarray, Targets]:
    """Exact log-posteriors of three normal classes, and the labels."""
    random = np.random.default_rng(seed)
    numbers = random.choice(3, samples, p=PRIOR)
    places = random.normal(0, 1, (samples, 3)) + distance * indicator(numbers, 3)
    return places * distance + np.log(PRIOR), Targets(NAMES, indicator(numbers, 3))


def make_multilabel(samples: int, seed: int = 0) -> tuple[np.ndarray, Targets]:
    random = np.random.default_rng(seed)
    share = np.array([0.05, 0.2, 0.5])
    labels = random.random((samples, 3)) < share
    places = random.normal(0, 1, labels.shape) + 1.5 * labels
    return 1.5 * places - 1.125 + np.log(share / (1 - share)), Targets(NAMES, labels, multilabel=True)


@pytest.mark.parametrize("maker", [make, make_multilabel])
@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_the_temperature_undoes_a_scale(maker, scale: float) -> None:
    logits, targets = maker(6000)
    decision = fit_decision(logits * scale, targets, targets.prior, adjustment=0.0)
    assert decision.temperature == pytest.approx(scale, rel=0.08)
    probabilities = decision.probabilities(logits * scale)[None]
    report = evaluate(targets, decision.choose(logits * scale)[None], probabilities)
    assert report["calibration_error"]["value"] < 0.03


def test_probabilities_and_choices_are_those_of_the_formula() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (2, 50, 3))
    decision = Decision(2.0, 1.0, tuple(np.log(PRIOR).tolist()))
    powers = np.exp(logits / 2)
    np.testing.assert_allclose(decision.probabilities(logits), powers / powers.sum(-1, keepdims=True))
    expected = (decision.probabilities(logits) / PRIOR).argmax(-1)
    assert (decision.choose(logits).argmax(-1) == expected).all()
    assert (decision.choose(logits).sum(-1) == 1).all()
    several = Decision(2.0, 0.0, (0.0, 1.0, -1.0), multilabel=True)
    thresholds = 1 / (1 + np.exp(-np.array(several.offsets)))
    np.testing.assert_allclose(several.probabilities(logits), 1 / (1 + np.exp(-logits / 2)))
    assert (several.choose(logits) == (several.probabilities(logits) > thresholds)).all()


def test_a_fixed_adjustment_is_taken_as_it_is() -> None:
    logits, targets = make(500)
    plain = fit_decision(logits, targets, PRIOR, adjustment=0.0)
    assert plain.offsets == (0, 0, 0)
    assert (plain.choose(logits).argmax(1) == plain.probabilities(logits).argmax(1)).all()
    full = fit_decision(logits, targets, PRIOR, adjustment=1.0)
    assert (full.strength, full.offsets) == (1.0, pytest.approx(np.log(PRIOR)))


@pytest.mark.parametrize("maker", [make, make_multilabel])
def test_the_chosen_adjustment_helps_on_other_rows(maker) -> None:
    gains = []
    for seed in range(10):
        logits, targets = maker(800, seed)
        unseen, expected = maker(4000, 100 + seed)
        choices = [fit_decision(logits, targets, targets.prior, fixed).choose(unseen) for fixed in (None, 0.0)]
        gains.append(np.subtract(*macro_f1(expected.matrix, np.stack(choices))))
    assert np.mean(gains) > 0.015
    assert min(gains) > 0


def test_it_beats_the_single_best_setting_on_the_same_rows() -> None:
    """Why draws are averaged: the top of the staircase is luck."""
    grid = np.arange(-10, 21) / 10
    gains = []
    for seed in range(60):
        logits, targets = make(250, seed)
        unseen, expected = make(4000, 1000 + seed)
        offsets = grid[:, None] * np.log(PRIOR)
        top = offsets[macro_f1(targets.matrix, indicator((logits - offsets[:, None]).argmax(-1), 3)).argmax()]
        ours = fit_decision(logits, targets, PRIOR).choose(unseen)
        theirs = indicator((unseen - top).argmax(-1), 3)
        gains.append(np.subtract(*macro_f1(expected.matrix, np.stack([ours, theirs]))))
    assert np.mean(gains) > 0


def test_a_prior_that_training_already_balanced_is_not_taken_out_again() -> None:
    """Class weights shift the logits, and biases take that out: probabilities and choices are as without weights."""
    logits, targets = make(3000)
    plain, balanced = fit_decision(logits, targets, PRIOR), fit_decision(logits - np.log(PRIOR), targets, PRIOR)
    assert 0.4 < plain.strength < 1.4
    assert balanced.strength == pytest.approx(plain.strength, abs=0.05)
    shifted = logits - np.log(PRIOR)
    np.testing.assert_allclose(balanced.probabilities(shifted), plain.probabilities(logits), atol=0.01)
    assert (balanced.choose(shifted) == plain.choose(logits)).all(1).mean() > 0.98


@pytest.mark.parametrize("multilabel", [False, True])
def test_calibration_finds_temperature_biases_and_wrong_labels(multilabel: bool) -> None:
    """Logits that are three times too sure, shifted by class, with 8 % of the labels drawn at random."""
    random = np.random.default_rng(0)
    true, shift = random.normal(size=(20_000, 3)) * 2, np.array([0.5, 0.0, -0.5])
    if multilabel:
        labels = random.random(true.shape) < 1 / (1 + np.exp(-true))
        labels = np.where(random.random(true.shape) < 0.08, random.random(true.shape) < 0.5, labels)
    else:
        drawn = (true + random.gumbel(size=true.shape)).argmax(1)
        labels = indicator(np.where(random.random(20_000) < 0.08, random.integers(0, 3, 20_000), drawn), 3)
    found = fit_decision(3 * (true - shift), Targets(tuple("abc"), labels, multilabel), labels.mean(0))
    assert found.temperature == pytest.approx(3, rel=0.08)
    assert found.floor == pytest.approx(0.08, abs=0.015)
    biases = np.array(found.biases)
    np.testing.assert_allclose(biases - (0 if multilabel else biases.mean()), shift, atol=0.08)
    assert found.probabilities(3 * (true - shift)).mean(0) == pytest.approx(labels.mean(0), abs=0.005)


def test_probabilities_come_back_as_logits() -> None:
    for multilabel in (False, True):
        decision = Decision(2.0, 0.0, (0.0, 0.1, 0.2), multilabel, biases=(0.5, 0.0, -0.5), floor=0.05)
        shares = decision.probabilities(np.random.default_rng(0).normal(size=(50, 3)) * 4)
        np.testing.assert_allclose(decision.probabilities(decision.logits(shares)), shares, atol=1e-9)
        assert multilabel or shares.sum(1) == pytest.approx(np.ones(50))
        assert shares.min() >= 0.05 / (2 if multilabel else 3)


def test_decisions_of_before_are_read_as_they_were() -> None:
    old = {"temperature": 2.0, "strength": 1.0, "offsets": [0.5, -0.5], "multilabel": False}
    read, logits = Decision.from_json(old), np.array([[1.0, 3.0], [2.0, 0.5]])
    scaled = np.exp(logits / 2)
    np.testing.assert_allclose(read.probabilities(logits), scaled / scaled.sum(1, keepdims=True))
    assert (read.choose(logits).argmax(1) == (logits / 2 - [0.5, -0.5]).argmax(1)).all()


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 10])
def test_few_or_separable_rows_give_a_sound_decision(rows: int, multilabel: bool) -> None:
    labels = indicator(np.arange(rows) % 2, 3).reshape(rows, 3)  # the third class is not there
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for logits in (labels * 5.0, np.where(labels, np.inf, -np.inf), np.where(labels, 0.0, -np.inf), labels * 0.0):
            decision = fit_decision(logits, Targets(NAMES, labels, multilabel), np.array([0.5, 0.5, 0.0]))
            probabilities = decision.probabilities(logits)
            assert np.isfinite([decision.temperature, *decision.offsets]).all()
            assert np.isfinite(decision.log_probabilities(logits)).all()
            assert ((probabilities >= 0) & (probabilities <= 1)).all()
    if rows == 0:
        assert decision == Decision(1.0, 0.0, (0.0, 0.0, 0.0), multilabel)


def test_ten_separable_rows_are_not_certainty() -> None:
    labels = indicator(np.arange(10) % 2, 3)
    decision = fit_decision(labels * 5.0, Targets(NAMES, labels), np.array([0.45, 0.45, 0.1]))
    assert 0.9 < decision.probabilities(labels * 5.0).max() < 0.99


def test_a_class_that_training_lacked_is_not_pushed() -> None:
    logits, targets = make(400)
    decision = fit_decision(logits, targets, np.array([0.7, 0.3, 0.0]), adjustment=1.0)
    assert decision.offsets == pytest.approx([np.log(0.7), np.log(0.3), 0])


def test_logits_without_content_change_nothing() -> None:
    _, targets = make(300)
    assert fit_decision(np.zeros((300, 3)), targets, PRIOR, adjustment=0.0).temperature == 1


@pytest.mark.parametrize("maker", [make, make_multilabel])
def test_json_round_trip(maker) -> None:
    logits, targets = maker(300)
    decision = fit_decision(logits, targets, targets.prior)
    assert Decision.from_json(json.loads(json.dumps(decision.to_json(), allow_nan=False))) == decision
    assert decision == fit_decision(logits, targets, targets.prior)


@pytest.mark.parametrize(
    "change", [{"temperature": 0}, {"offsets": ["x"]}, {"offsets": [float("nan")]}, {"strength": None}]
)
def test_foreign_json_is_refused(change: dict) -> None:
    with pytest.raises(RunError, match="not a decision"):
        Decision.from_json({**Decision(1.0, 0.0, (0.0,)).to_json(), **change})
