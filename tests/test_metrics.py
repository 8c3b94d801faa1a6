import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from mmfeat.metrics import confusion, evaluate, paired_difference

RNG = np.random.default_rng(0)
LABELS = RNG.choice(3, 400, p=[0.6, 0.3, 0.1])
GOOD = np.where(RNG.random(400) < 0.8, LABELS, RNG.integers(0, 3, 400))
BAD = np.where(RNG.random(400) < 0.5, LABELS, RNG.integers(0, 3, 400))
NAMES = ("a", "b", "c")


def test_scores_equal_scikit_learn() -> None:
    report = evaluate(LABELS, GOOD, NAMES, seed=0)
    assert report["macro_f1"]["value"] == pytest.approx(f1_score(LABELS, GOOD, average="macro"))
    assert report["accuracy"]["value"] == pytest.approx(accuracy_score(LABELS, GOOD))
    precision, recall, f1, support = precision_recall_fscore_support(LABELS, GOOD)
    for number, name in enumerate(NAMES):
        ours = report["classes"][name]
        expected = (precision[number], recall[number], f1[number], support[number])
        assert (ours["precision"], ours["recall"], ours["f1"]["value"], ours["support"]) == pytest.approx(expected)
    assert report["confusion"] == confusion(LABELS, GOOD, 3).tolist()


def test_interval_is_the_plain_bootstrap() -> None:
    """The multinomial shortcut against resampling rows one by one."""
    plain = []
    for _ in range(1500):
        rows = RNG.integers(0, 400, 400)
        plain.append(f1_score(LABELS[rows], GOOD[rows], average="macro"))
    score = evaluate(LABELS, GOOD, NAMES, seed=0)["macro_f1"]
    np.testing.assert_allclose([score["low"], score["high"]], np.percentile(plain, [2.5, 97.5]), atol=0.01)


def test_paired_difference() -> None:
    value = f1_score(LABELS, GOOD, average="macro") - f1_score(LABELS, BAD, average="macro")
    better = paired_difference(LABELS, GOOD, BAD, 3, seed=0)
    assert better.value == pytest.approx(value)
    assert better.low > 0
    assert paired_difference(LABELS, BAD, GOOD, 3, seed=0).value == pytest.approx(-value)
    same = paired_difference(LABELS, GOOD, GOOD, 3, seed=0)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_pairing_is_what_makes_it_sharp() -> None:
    nearly = GOOD.copy()
    wrong = np.flatnonzero(GOOD != LABELS)[:12]
    nearly[wrong] = LABELS[wrong]
    assert paired_difference(LABELS, nearly, GOOD, 3, seed=0).low > 0


def test_many_classes_fit_in_memory() -> None:
    labels, one, other = np.random.default_rng(1).integers(0, 500, (3, 2000))
    assert abs(paired_difference(labels, one, other, 500, seed=0).value) < 0.05


def test_a_class_that_is_never_there_counts_zero() -> None:
    report = evaluate(np.array([0, 0, 1]), np.array([0, 0, 1]), NAMES, seed=0)
    assert report["classes"]["c"]["f1"]["value"] == 0
    assert report["macro_f1"]["value"] == pytest.approx(2 / 3)
