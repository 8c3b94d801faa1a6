"""Drift: what differs from the labelled samples is told, what chance or the head's own confusion brings is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chi2_contingency

from mmfeat.prediction.drift import compare_counts, label_drift, missing_drift
from mmfeat.samples.dataset import Sample
from mmfeat.samples.labels import indicator

CLASSES = ("a", "b", "c")


def choices(*counts: int) -> np.ndarray:
    return indicator(np.repeat(np.arange(len(counts)), counts), len(counts))


def test_the_chance_is_that_of_the_g_test() -> None:
    for before, now in (([500, 300, 200], [90, 70, 40]), ([50, 30, 20], [25, 30, 25]), ([4000, 100], [800, 32])):
        expected = chi2_contingency([before, now], correction=False, lambda_="log-likelihood").pvalue
        assert compare_counts(np.array(before), np.array(now)) == pytest.approx(expected, abs=0.03)


def test_chance_alone_warns_as_often_as_it_says() -> None:
    """The share of p below 0.05 among samples of one population, rare classes too."""
    random = np.random.default_rng(1)
    shares = np.array([0.9, 0.08, 0.02])
    low = [compare_counts(random.multinomial(300, shares), random.multinomial(60, shares)) < 0.05 for _ in range(150)]
    assert 0 < np.mean(low) < 0.12


def test_a_shift_is_told_with_its_size() -> None:
    line = label_drift(choices(400, 300, 300), choices(20, 60, 20), CLASSES, False)
    assert "b 60.0% instead of 30.0%; 30% of the predictions shifted, p 0.0001" in line


def test_what_is_tiny_or_chance_is_not_told() -> None:
    assert label_drift(choices(40000, 30000, 30000), choices(42000, 29000, 29000), CLASSES, False) == ""  # 2 points
    assert label_drift(choices(400, 300, 300), choices(3, 5, 2), CLASSES, False) == ""  # ten samples
    assert label_drift(choices(400, 300, 300), choices(0, 0, 0), CLASSES, False) == ""


def test_a_few_samples_say_nothing_of_a_share() -> None:
    """One sample without a photo once warned: the chance of that is 1 in 1,000 where all labelled ones have one."""
    before = [Sample(str(row), "text", Path("photo")) for row in range(1000)]
    lacking = [Sample(str(row), "text") for row in range(20)]
    assert missing_drift(before, lacking[:1]) == missing_drift(before, lacking[:19]) == []
    (line,) = missing_drift(before, lacking)
    assert line.startswith("100.0% of these samples have no photo")
    assert label_drift(choices(1000, 0, 0), choices(0, 0, 1), CLASSES, False) == ""
    assert label_drift(choices(1000, 0, 0), choices(0, 0, 19), CLASSES, False) == ""
    assert label_drift(choices(1000, 0, 0), choices(0, 0, 20), CLASSES, False)


def test_several_labels_are_compared_class_by_class() -> None:
    random = np.random.default_rng(0)
    before, now = random.random((800, 3)) < 0.3, random.random((200, 3)) < 0.3
    assert label_drift(before, now, CLASSES, True) == ""
    now[:, 1] = random.random(200) < 0.6
    assert "b 6" in label_drift(before, now, CLASSES, True)


def test_missing_parts_are_compared() -> None:
    whole = [Sample(str(n), "text", None) for n in range(100)]
    mute = [Sample(str(n), None if n % 3 else "text", None) for n in range(60)]
    (line,) = missing_drift(whole, mute)
    assert line.startswith("66.7% of these samples have no text, but 0.0% of the labelled ones (p 0.0001)")
    assert missing_drift(whole, whole[:50]) == missing_drift([], mute) == missing_drift(whole, mute, ["image"]) == []
