"""Label errors: what confident learning finds, and the ceiling that noise puts on scores."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmfeat.audit.label_errors import _joint, estimate_noise, find_label_errors, planted_found
from mmfeat.evaluation.protocol import Protocol
from mmfeat.extraction.extract import extract_features
from mmfeat.report.facts import data_section, doubted_rows, duplicates_section
from mmfeat.report.section import Subject
from tests.audit.planted import BROKEN, COLUMNS, PLANTED, TWICE, make_shop
from tests.sweep.small_sweeps import BUILT_IN, FLOAT32, sweep


def noisy(count: int = 3000, wrong: float = 0.1, skill: float = 3.0, seed: int = 1) -> tuple[np.ndarray, ...]:
    """True classes, labels of which some share is moved on by one class, probabilities about the truth."""
    random = np.random.default_rng(seed)
    truth = random.choice(3, count, p=[0.5, 0.3, 0.2])
    labels = np.where(random.random(count) < wrong, (truth + 1) % 3, truth)
    logits = random.standard_normal((count, 3)) + skill * np.eye(3)[truth]
    weights = np.exp(skill * logits) * [0.5, 0.3, 0.2]  # as sure as such logits make one
    return truth, labels, weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("seed", "skill"), [(1, 3.0), (2, 1.5), (3, 0.5)])
def test_equal_to_cleanlab(seed: int, skill: float) -> None:
    count = pytest.importorskip("cleanlab.count")
    issues = pytest.importorskip("cleanlab.filter").find_label_issues
    _, labels, probabilities = noisy(600, 0.15, skill, seed)
    found = find_label_errors(labels, probabilities)
    expected = issues(labels, probabilities, filter_by="confident_learning", n_jobs=1)
    assert sorted(found.rows.tolist()) == np.flatnonzero(expected).tolist()
    joint = count.estimate_joint(labels, probabilities)
    # cleanlab rounds its calibrated counts to whole samples
    ours = _joint(labels, probabilities, probabilities.argmax(1), np.ones(600))
    np.testing.assert_allclose(ours, joint, atol=1.5 / 600)


def test_moved_labels_are_found_and_named_rightly() -> None:
    truth, labels, probabilities = noisy(skill=6.0)
    found = find_label_errors(labels, probabilities)
    moved = np.flatnonzero(truth != labels)
    assert len(np.intersect1d(found.rows, moved)) > 0.85 * len(moved)
    assert (found.suggested == truth[found.rows]).mean() > 0.95
    assert (found.suggested != labels[found.rows]).all()


def test_the_surest_errors_come_first() -> None:
    _, labels, probabilities = noisy()
    found = find_label_errors(labels, probabilities)
    margin = probabilities[found.rows, found.suggested] - probabilities[found.rows, labels[found.rows]]
    assert (np.diff(margin) <= 0).all()
    assert (margin > 0).all()


def test_the_share_of_wrong_labels_is_told_with_an_interval_that_holds_it() -> None:
    truth, labels, probabilities = noisy(skill=6.0)
    noise = estimate_noise(labels, probabilities)
    share = (truth != labels).mean()
    assert noise.wrong.low < share < noise.wrong.high
    assert noise.accuracy.value == pytest.approx(1 - noise.wrong.value)
    matrix = [np.mean(labels[labels == name] != truth[labels == name]) for name in range(3)]
    assert [score.value for score in noise.by_class] == pytest.approx(matrix, abs=0.03)


def test_the_ceiling_is_the_score_of_the_truth_against_the_labels() -> None:
    """Where the head knows the truth for sure, nothing is estimated."""
    from sklearn.metrics import accuracy_score, f1_score

    truth, labels, _ = noisy(500)
    noise = estimate_noise(labels, 1e-6 + (1 - 3e-6) * np.eye(3)[truth])
    assert noise.accuracy.value == pytest.approx(accuracy_score(labels, truth))
    assert noise.macro_f1.value == pytest.approx(f1_score(labels, truth, average="macro"))
    assert noise.macro_f1.low < noise.macro_f1.value < noise.macro_f1.high


def test_clean_labels_have_no_errors_and_no_ceiling_below_one() -> None:
    truth, _, _ = noisy(300)
    probabilities = 1e-6 + (1 - 3e-6) * np.eye(3)[truth]
    assert len(find_label_errors(truth, probabilities).rows) == 0
    noise = estimate_noise(truth, probabilities)
    assert (noise.macro_f1.value, noise.macro_f1.low, noise.wrong.high) == pytest.approx((1, 1, 0))


def test_the_likeliest_class_is_never_called_wrong() -> None:
    _, labels, probabilities = noisy(skill=0.3)
    found = find_label_errors(labels, probabilities)
    assert (probabilities.argmax(axis=1)[found.rows] != labels[found.rows]).all()


def test_a_class_without_labels_takes_part_in_nothing() -> None:
    """As in a holdout's small test part."""
    _, labels, probabilities = noisy(200)
    rows = labels != 2
    found = find_label_errors(labels[rows], probabilities[rows])
    assert 2 not in found.suggested
    noise = estimate_noise(labels[rows], probabilities[rows])
    assert noise.by_class[2].value is None
    assert noise.by_class[0].value is not None
    assert np.isfinite(noise.joint).all()


def test_one_class_has_no_errors() -> None:
    found = find_label_errors(np.zeros(5, int), np.ones((5, 1)))
    assert len(found.rows) == len(found.suggested) == 0
    assert estimate_noise(np.zeros(5, int), np.ones((5, 1))).accuracy.value == 1


def test_the_seed_fixes_the_intervals() -> None:
    _, labels, probabilities = noisy(300)
    assert estimate_noise(labels, probabilities, 1).macro_f1 == estimate_noise(labels, probabilities, 1).macro_f1
    assert estimate_noise(labels, probabilities, 1).macro_f1 != estimate_noise(labels, probabilities, 2).macro_f1


def test_wrong_input_is_refused() -> None:
    with pytest.raises(ValueError, match="4 labels and probabilities of shape"):
        find_label_errors(np.zeros(4, int), np.ones((3, 2)))
    with pytest.raises(ValueError, match="finite"):
        find_label_errors(np.zeros(2, int), np.array([[0.5, 0.5], [np.nan, np.nan]]))
    with pytest.raises(ValueError, match="no sample"):
        estimate_noise(np.empty(0, int), np.empty((0, 3)))


@pytest.mark.parametrize("skill", [0.5, 2.0])
def test_labels_drawn_from_the_head_s_own_probabilities_give_no_claim(skill: float) -> None:
    _, _, probabilities = noisy(500, 0.0, skill)
    random, claims = np.random.default_rng(3), []
    for _ in range(60):
        labels = (random.random((500, 1)) > probabilities.cumsum(1)[:, :-1]).sum(1)
        claims.append(estimate_noise(labels, probabilities, draws=2).claimed)
    assert np.mean(claims) <= 0.08


@pytest.mark.parametrize("floor", [0.0, 0.12])
def test_planted_errors_are_claimed_and_covered_with_a_good_head(floor: float) -> None:
    """Also with a head that allows for them, as calibration makes it."""
    covered = []
    for seed in range(8):
        truth, labels, probabilities = noisy(2000, 0.08, 3.0, seed)
        noise = estimate_noise(labels, (1 - floor) * probabilities + floor / 3, floor=floor)
        assert noise.claimed
        covered.append(noise.wrong.low <= np.mean(labels != truth) <= noise.wrong.high)
    assert np.mean(covered) >= 0.85


def test_planted_errors_are_found_more_often_than_by_chance() -> None:
    _, labels, probabilities = noisy(1000, 0.0, 3.0)
    assert planted_found(labels, probabilities) > 0.8
    assert planted_found(labels, np.random.default_rng(0).permutation(probabilities)) < 0.1


def test_planted_errors_of_a_shop_are_found(tmp_path: Path) -> None:
    """Of 40 labels changed on purpose the recommended entry doubts at least 34; at most a tenth of doubts are false."""
    planted, columns = make_shop(tmp_path / "shop"), dict(pair.split("=") for pair in COLUMNS.split(","))
    data = tmp_path / "shop/listings.csv"
    extract_features(data, BUILT_IN, cache=tmp_path / "cache", options=FLOAT32, columns=columns)
    asked = {"fusion": ["gated"], "baselines": ["ridge"], "modalities": ["both"]}  # the default sweep recommends gated
    asked["protocol"] = Protocol(folds=5, seeds=1)
    subject = Subject.of(sweep(tmp_path, data=data, columns=columns, **asked).run)
    doubted = {subject.predictions().ids[row] for row in doubted_rows(subject)}
    assert len(doubted & set(planted)) >= 0.85 * PLANTED
    assert len(doubted - set(planted)) <= 0.1 * len(doubted)
    (_, missing), duplicates = data_section(subject).tables, duplicates_section(subject)
    assert [[row[0], row[2]] for row in missing.rows] == [["photo", str(BROKEN)]]
    assert duplicates
    assert duplicates.words[0].startswith(f"{2 * TWICE} samples")
