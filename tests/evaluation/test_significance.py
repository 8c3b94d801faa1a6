"""Paired tests: right values, right error rates, and Holm's and McNemar's numbers worked out elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binom, kstest
from sklearn.metrics import f1_score

from mmfeat.evaluation import resampling
from mmfeat.evaluation.significance import compare_with_best, holm, majority, mcnemar, paired_difference
from mmfeat.samples.labels import Targets, indicator

NAMES = ("a", "b", "c")


def make(skills: list[float], samples: int = 400, seed: int = 0, seeds: int = 3) -> tuple[Targets, list[np.ndarray]]:
    """Labels, and decisions of heads that are right with probability `skills`, else guess."""
    random = np.random.default_rng(seed)
    numbers = random.choice(3, samples, p=[0.6, 0.3, 0.1])
    heads = []
    for skill in skills:
        knows = random.random((seeds, samples)) < skill
        heads.append(indicator(np.where(knows, numbers, random.choice(3, (seeds, samples), p=[0.6, 0.3, 0.1])), 3))
    return Targets(NAMES, indicator(numbers, 3)), heads


def mean_f1(targets: Targets, chosen: np.ndarray) -> float:
    return float(np.mean([f1_score(targets.matrix, each, average="macro", zero_division=0) for each in chosen]))


def test_difference_of_means_over_seeds() -> None:
    targets, (good, bad) = make([0.8, 0.5])
    better = paired_difference(targets, good, bad[:2])
    assert better.value == pytest.approx(mean_f1(targets, good) - mean_f1(targets, bad[:2]))
    assert 0 < better.low < better.value < better.high
    assert better.p < 0.01
    worse = paired_difference(targets, bad[:2], good)
    assert (worse.value, worse.p) == pytest.approx((-better.value, better.p))
    assert (worse.low, worse.high) == pytest.approx((-better.high, -better.low), abs=0.01)  # other draws


def test_a_head_is_a_tie_with_itself_however_many_seeds_tell_it() -> None:
    targets, (good,) = make([0.7], seeds=1)
    same = paired_difference(targets, good, np.concatenate([good, good, good]))
    assert (same.value, same.low, same.high, same.p) == pytest.approx((0, 0, 0, 1), abs=1e-9)


def test_interval_is_that_of_resampled_rows() -> None:
    targets, (one, other) = make([0.7, 0.6])
    random = np.random.default_rng(5)
    plain = []
    for _ in range(400):
        rows = random.integers(0, 400, 400)
        part = targets.take(rows)
        plain.append(mean_f1(part, one[:1, rows]) - mean_f1(part, other[:1, rows]))
    ours = paired_difference(targets, one[:1], other[:1])
    np.testing.assert_allclose([ours.low, ours.high], np.percentile(plain, [2.5, 97.5]), atol=0.012)


def test_pairing_is_what_makes_it_sharp() -> None:
    targets, (head,) = make([0.7], seeds=1)
    nearly = head.copy()
    wrong = np.flatnonzero((head[0] != targets.matrix).any(1))[:12]
    nearly[0, wrong] = targets.matrix[wrong]
    assert paired_difference(targets, nearly, head).low > 0


def test_p_values_are_uniform_where_heads_are_equally_good() -> None:
    p_values = []
    for seed in range(150):
        targets, (one, other) = make([0.6, 0.6], samples=300, seed=seed, seeds=1)
        p_values.append(paired_difference(targets, one, other, seed).p)
    assert kstest(p_values, "uniform").pvalue > 0.01


def test_large_tables_get_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, (one, other) = make([0.65, 0.61], samples=2000)
    drawn = paired_difference(targets, one, other)
    monkeypatch.setattr(resampling, "MAX_CELLS", 0)
    normal = paired_difference(targets, one, other)
    assert normal.value == drawn.value
    assert normal.p == pytest.approx(drawn.p, abs=0.03)
    np.testing.assert_allclose([normal.low, normal.high], [drawn.low, drawn.high], atol=0.003)
    assert paired_difference(targets, one, one).p == 1


def test_many_classes_fit_in_memory() -> None:
    labels, one, other = indicator(np.random.default_rng(1).integers(0, 300, (3, 2000)), 300)
    assert abs(paired_difference(Targets(tuple(map(str, range(300))), labels), one[None], other[None]).value) < 0.05


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (3, 3), (1, 0), (6, 1), (2, 14), (40, 70)])
def test_mcnemar_is_the_exact_test_with_mid_p(wins: int, losses: int) -> None:
    """Twice the tail of the binomial, its last term counted by half; a tie gives 1."""
    one = np.repeat([True, False, True, False], [wins, losses, 20, 10])
    other = np.repeat([False, True, True, False], [wins, losses, 20, 10])
    fewer, total = min(wins, losses), wins + losses
    expected = 2 * (binom.cdf(fewer, total, 0.5) - 0.5 * binom.pmf(fewer, total, 0.5)) if wins != losses else 1.0
    assert mcnemar(one, other) == pytest.approx(expected)
    assert mcnemar(one, other) == mcnemar(other, one)


def test_majority_is_more_than_half() -> None:
    correct = np.array([[1, 1, 0, 0], [1, 0, 0, 1]], dtype=bool)
    assert majority(correct).tolist() == [True, False, False, False]
    assert majority(np.vstack([correct, [[0, 1, 0, 1]]]).astype(bool)).tolist() == [True, True, False, True]


def test_holm_on_an_example_by_hand() -> None:
    assert holm([0.04, 0.01, 0.03, 0.005]).tolist() == pytest.approx([0.06, 0.03, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert holm([]).tolist() == []


def test_heads_are_compared_with_the_best() -> None:
    targets, heads = make([0.78, 0.8, 0.4, 0.8])
    best = int(np.argmax([mean_f1(targets, head) for head in heads]))
    entries, _ = compare_with_best(targets, heads, best)
    assert entries[best]["tie"]
    assert (entries[best]["value"], entries[best]["p"], entries[best]["p_holm"]) == (0, 1, 1)
    for head, entry in zip(heads, entries, strict=True):
        assert entry["value"] == pytest.approx(mean_f1(targets, heads[best]) - mean_f1(targets, head))
        assert entry["tie"] == (entry["p_holm"] >= 0.05)
    others = [row for row in range(4) if row != best]
    expected = holm([entries[row]["mcnemar"] for row in others])
    assert [entries[row]["mcnemar_holm"] for row in others] == pytest.approx(expected)
    assert all(entries[row]["p_holm"] >= entries[row]["p"] for row in others)
    assert [entry["tie"] for entry in entries] == [True, True, False, True]
    json.dumps(entries, allow_nan=False)


def test_many_heads_do_not_make_every_difference_a_tie() -> None:
    """The smallest p-value is that of one draw, however many pairs of heads there are."""
    targets, heads = make([0.9] + [0.3] * 79, samples=300, seeds=1)
    assert not any(entry["tie"] for entry in compare_with_best(targets, heads, 0)[0][1:])


def test_a_single_head_is_the_best() -> None:
    targets, heads = make([0.7])
    (entry,), picked = compare_with_best(targets, heads, 0)
    assert entry["tie"]
    assert picked.value == pytest.approx(mean_f1(targets, heads[0]))  # nothing was picked


def test_equal_heads_tie_and_the_first_of_them_is_not_praised_for_its_luck() -> None:
    """Of 12 equal heads the first is well above their score; 95 % of runs should call none of them worse."""
    truth = mean_f1(*_only(make([0.5], samples=200_000, seeds=1)))
    called_worse, praised, expected, covered = [], [], [], []
    for seed in range(60):
        targets, heads = make([0.5] * 12, samples=300, seed=seed + 1, seeds=1)
        scores = [mean_f1(targets, head) for head in heads]
        entries, picked = compare_with_best(targets, heads, int(np.argmax(scores)))
        assert picked.value is not None
        assert picked.low is not None
        assert picked.high is not None
        called_worse.append(not all(entry["tie"] for entry in entries))
        praised.append(max(scores) - truth)
        expected.append(picked.value - truth)
        covered.append(picked.low <= truth <= picked.high)
    assert np.mean(called_worse) <= 0.1
    assert np.mean(praised) > 0.03
    assert abs(np.mean(expected)) < 0.01
    assert np.mean(covered) > 0.88


def test_copies_of_samples_make_nothing_surer() -> None:
    """Each sample five times, as a group: the intervals and p-values of the samples once."""
    targets, (one, other) = make([0.7, 0.62], samples=200)
    rows = np.repeat(np.arange(200), 5)
    many, choices = targets.take(rows), (one[:, rows], other[:, rows])
    once, grouped = paired_difference(targets, one, other), paired_difference(many, *choices, groups=rows)
    assert (grouped.value, grouped.low, grouped.high) == pytest.approx((once.value, once.low, once.high), abs=0.01)
    assert grouped.p == pytest.approx(once.p, abs=0.05)
    alone = paired_difference(many, *choices)
    assert alone.high - alone.low < 0.6 * (once.high - once.low)


def test_groups_of_one_change_nothing() -> None:
    targets, (one, other) = make([0.7, 0.62], samples=200)
    assert paired_difference(targets, one, other, groups=np.arange(200)) == paired_difference(targets, one, other)


def _only(made: tuple[Targets, list[np.ndarray]]) -> tuple[Targets, np.ndarray]:
    targets, (head,) = made
    return targets, head
