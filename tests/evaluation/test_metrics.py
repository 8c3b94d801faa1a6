"""Every score against scikit-learn's, every interval against resampling or a known formula."""

from __future__ import annotations

import json
import time
import warnings

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    multilabel_confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
)

from mmfeat.evaluation import metrics, resampling
from mmfeat.evaluation.metrics import BINS, calibration_errors, confusion, evaluate, macro_f1
from mmfeat.samples.labels import Targets, indicator

NAMES = ("a", "b", "c")


def make(classes: int = 3, samples: int = 400, seeds: int = 3, multilabel: bool = False, ties: bool = False):
    """Labels, and what heads of some skill chose and how sure they were."""
    random = np.random.default_rng(classes + samples)
    names = tuple(f"class{number}" for number in range(classes))
    if multilabel:
        labels = random.random((samples, classes)) < np.linspace(0.1, 0.6, classes)
    else:
        labels = indicator(random.choice(classes, samples, p=np.linspace(3, 1, classes) / (2 * classes)), classes)
    logits = random.normal(0, 1, (seeds, samples, classes)) + random.normal(0, 1, (samples, classes)) + 2 * labels - 1
    if multilabel:
        probabilities = 1 / (1 + np.exp(-logits))
        chosen = probabilities > 0.5
    else:
        probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        chosen = indicator(probabilities.argmax(-1), classes)
    return Targets(names, labels, multilabel), chosen, probabilities.round(1) if ties else probabilities


CASES = {"three": {}, "binary": {"classes": 2}, "multilabel": {"multilabel": True}, "ties": {"ties": True}}


@pytest.mark.parametrize("case", CASES)
def test_scores_equal_scikit_learn(case: str) -> None:
    targets, chosen, probabilities = make(**CASES[case])
    report, labels = evaluate(targets, chosen, probabilities), targets.matrix
    averages = {"macro_f1": "macro", "weighted_f1": "weighted"} | (
        {"micro_f1": "micro"} if case == "multilabel" else {}
    )
    assert ("micro_f1" in report) == (case == "multilabel")  # else it is the accuracy
    for name, average in averages.items():
        assert report[name]["value"] == pytest.approx(np.mean([f1_score(labels, c, average=average) for c in chosen]))
    assert report["accuracy"]["value"] == pytest.approx(np.mean([accuracy_score(labels, c) for c in chosen]))
    areas = np.mean([roc_auc_score(labels, p, average=None) for p in probabilities], axis=0)
    assert report["auroc"]["value"] == pytest.approx(areas.mean())
    expected = np.mean([precision_recall_fscore_support(labels, c)[:3] for c in chosen], axis=0).T
    for row, name in enumerate(targets.classes):
        ours = report["classes"][name]
        assert (ours["precision"], ours["recall"], ours["f1"]["value"]) == pytest.approx(expected[row])
        assert (ours["auroc"], ours["support"]) == pytest.approx((areas[row], labels[:, row].sum()))
    assert report["samples"] == 400
    json.dumps(report, allow_nan=False)


def test_log_loss_equals_scikit_learn() -> None:
    targets, chosen, probabilities = make()
    expected = np.mean([log_loss(targets.numbers, each) for each in probabilities])
    assert evaluate(targets, chosen, probabilities)["log_loss"]["value"] == pytest.approx(expected)
    targets, chosen, probabilities = make(multilabel=True)
    each = [log_loss(y, p) for run in probabilities for y, p in zip(targets.matrix.T, run.T, strict=True)]
    assert evaluate(targets, chosen, probabilities)["log_loss"]["value"] == pytest.approx(np.mean(each))


def test_confusion_equals_scikit_learn() -> None:
    targets, chosen, probabilities = make()
    expected = [confusion_matrix(targets.numbers, each.argmax(1)) for each in chosen]
    assert confusion(targets.matrix, chosen[0]).tolist() == expected[0].tolist()
    np.testing.assert_allclose(evaluate(targets, chosen, probabilities)["confusion"], np.mean(expected, axis=0))
    targets, chosen, probabilities = make(multilabel=True)
    expected = [multilabel_confusion_matrix(targets.matrix, each) for each in chosen]
    assert confusion(targets.matrix, chosen[0], multilabel=True).tolist() == expected[0].tolist()
    np.testing.assert_allclose(evaluate(targets, chosen, probabilities)["confusion"], np.mean(expected, axis=0))


@pytest.mark.parametrize("multilabel", [False, True])
def test_calibration_error_is_the_textbook_sum(multilabel: bool) -> None:
    targets, chosen, probabilities = make(multilabel=multilabel)
    errors = []
    for run in probabilities:
        columns = list(zip(run.T, targets.matrix.T, strict=True)) if multilabel else [(run.max(1), None)]
        for confidence, right in columns:
            right = run.argmax(1) == targets.numbers if right is None else right
            bins = [(confidence * BINS >= low) & (confidence * BINS < low + 1) for low in range(BINS)]
            parts = [rows.mean() * abs(confidence[rows].mean() - right[rows].mean()) for rows in bins if rows.any()]
            errors.append(sum(parts))
    score = evaluate(targets, chosen, probabilities)["calibration_error"]
    assert score["value"] == pytest.approx(np.mean(errors))


@pytest.mark.parametrize("multilabel", [False, True])
def test_errors_above_chance_are_errors_less_those_of_labels_drawn_one_by_one(
    multilabel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twins share their luck: chance gives more of fewer groups."""
    targets, chosen, probabilities = make(multilabel=multilabel)
    shares, random = probabilities[0], np.random.default_rng(1)
    groups = np.where(np.arange(400) < 200, np.arange(400) // 4, np.arange(400))
    rows = np.where(np.arange(400) < 200, np.arange(400) // 4 * 4, np.arange(400))
    for twins, of in ((None, np.arange(400)), (groups, rows)):
        shared, found = shares[of], []
        monkeypatch.setattr(metrics, "LABELLINGS", (1, 1))
        for _ in range(150):
            luck = random.random((400, 3 if multilabel else 1))[of]
            drawn = luck < shared if multilabel else indicator((luck > shared.cumsum(1)).sum(1).clip(0, 2), 3)
            found.append(calibration_errors(Targets(NAMES, drawn, multilabel), shared)[0])
        monkeypatch.undo()
        expected = np.mean(found, axis=0)
        errors = calibration_errors(targets, shared, twins)
        np.testing.assert_allclose(errors[1:].mean(0), expected, rtol=0.1)
        report = evaluate(targets, chosen[:1], shared[None], groups=twins)
        chance = [report["calibration_error"]["value"] - report["calibration_excess"]["value"],
                  errors[0, 1:].mean() - report["classwise_excess"]["value"]]  # fmt: skip
        assert chance == pytest.approx([expected[0], expected[1:].mean()], rel=0.1)
        assert report["calibration_excess"]["low"] < report["calibration_excess"]["value"] < expected[0] + 0.1


def test_certain_and_right_is_perfectly_calibrated() -> None:
    targets, _, _ = make()
    report = evaluate(targets, targets.matrix[None], targets.matrix[None].astype(float))
    for name in ("calibration_error", "calibration_excess", "classwise_excess"):
        assert report[name] == {"value": 0, "low": 0, "high": 0}
    assert report["log_loss"]["value"] == 0
    assert report["auroc"] == {"value": 1, "low": 1, "high": 1}


@pytest.mark.parametrize("multilabel", [False, True])
def test_intervals_are_those_of_the_plain_bootstrap(multilabel: bool) -> None:
    """The shortcuts (multinomial draws, influence) against resampling rows one by one, all seeds alike."""
    targets, chosen, probabilities = make(multilabel=multilabel)
    report = evaluate(targets, chosen, probabilities)
    random, plain = np.random.default_rng(1), []
    for _ in range(400):
        rows = random.integers(0, 400, 400)
        labels, p = targets.matrix[rows], probabilities[:, rows]
        likelihoods = np.where(labels, p, 1 - p) if multilabel else p[:, labels]
        area = np.mean([roc_auc_score(labels, each) for each in p])
        plain.append((macro_f1(labels, chosen[:, rows]).mean(), area, -np.log(likelihoods).mean()))
    expected = np.percentile(plain, [2.5, 97.5], axis=0)
    for name, (low, high) in zip(("macro_f1", "auroc", "log_loss"), expected.T, strict=True):
        reach = (high - low) / 2
        np.testing.assert_allclose([report[name]["low"], report[name]["high"]], [low, high], atol=0.25 * reach)


def test_interval_of_the_auroc_is_delongs() -> None:
    """Against the sums over all pairs of the paper."""
    targets, chosen, probabilities = make(classes=2, samples=120, seeds=1)
    positive, scores = targets.matrix[:, 1], probabilities[0, :, 1]
    wins = (scores[positive][:, None] > scores[~positive]).astype(float)
    variance = wins.mean(1).var(ddof=1) / positive.sum() + wins.mean(0).var(ddof=1) / (~positive).sum()
    score = evaluate(targets, chosen, probabilities)["auroc"]
    middle, (low, high) = score["value"], (np.log(score[end] / (1 - score[end])) for end in ("low", "high"))
    assert (high - low) / 2 == pytest.approx(1.959964 * np.sqrt(variance) / (middle * (1 - middle)))
    assert (high + low) / 2 == pytest.approx(np.log(middle / (1 - middle)))


def test_the_jackknife_of_large_tables_agrees_with_the_bootstrap(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, chosen, probabilities = make(samples=2000, multilabel=True)
    drawn = evaluate(targets, chosen, probabilities, seed=1)
    monkeypatch.setattr(resampling, "MAX_CELLS", 0)
    monkeypatch.setattr(resampling, "CHUNK", 500)  # several pieces
    left_out = evaluate(targets, chosen, probabilities, seed=1)
    for name in ("macro_f1", "accuracy", "weighted_f1", "micro_f1"):
        assert left_out[name]["value"] == drawn[name]["value"]
        reach = drawn[name]["high"] - drawn[name]["low"]
        assert left_out[name]["high"] - left_out[name]["low"] == pytest.approx(reach, rel=0.1)


@pytest.mark.parametrize("cells", [20_000, 0], ids=["bootstrap", "jackknife"])
def test_intervals_of_near_duplicates_are_those_of_drawn_groups(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against drawing groups one by one, of which half have four samples; rows alone would be surer."""
    targets, chosen, probabilities = make(samples=400, seeds=2)
    groups = np.where(np.arange(400) < 200, np.arange(400) // 4 % 25, np.arange(400))
    monkeypatch.setattr(resampling, "MAX_CELLS", cells)
    monkeypatch.setattr(resampling, "CHUNK", 20_000)
    report = evaluate(targets, chosen, probabilities, groups=groups)
    random, members = np.random.default_rng(1), [np.flatnonzero(groups == group) for group in np.unique(groups)]
    plain = []
    for _ in range(600):
        rows = np.concatenate([members[group] for group in random.integers(0, len(members), len(members))])
        labels, p = targets.matrix[rows], probabilities[:, rows]
        right = (chosen[:, rows] == labels).all(-1).mean()
        area = np.mean([roc_auc_score(labels, each) for each in p])
        plain.append((macro_f1(labels, chosen[:, rows]).mean(), right, area, -np.log(p[:, labels]).mean()))
    expected = np.percentile(plain, [2.5, 97.5], axis=0)
    for name, (low, high) in zip(("macro_f1", "accuracy", "auroc", "log_loss"), expected.T, strict=True):
        reach = (high - low) / 2
        np.testing.assert_allclose([report[name]["low"], report[name]["high"]], [low, high], atol=0.25 * reach)


def test_seeds_are_told_apart_and_averaged() -> None:
    targets, chosen, probabilities = make()
    report = evaluate(targets, chosen, probabilities)
    values = [f1_score(targets.matrix, each, average="macro") for each in chosen]
    seeds = report["seeds"]["macro_f1"]
    assert seeds["values"] == pytest.approx(values)
    assert (seeds["mean"], seeds["std"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert evaluate(targets, chosen[:1], probabilities[:1])["seeds"]["macro_f1"]["std"] == 0


def test_classes_that_are_not_there_make_neither_warnings_nor_nan() -> None:
    labels = indicator([0, 0, 1], 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = evaluate(Targets(NAMES, labels), labels[None], labels[None].astype(float))
        alone = evaluate(Targets(NAMES, labels[:2]), labels[None, :2], labels[None, :2].astype(float))
    assert report["classes"]["c"]["f1"]["value"] == 0
    assert report["classes"]["c"]["auroc"] is None
    assert report["macro_f1"]["value"] == pytest.approx(2 / 3)
    assert report["auroc"]["value"] == 1
    assert alone["auroc"] == {"value": None, "low": None, "high": None}
    json.dumps([report, alone], allow_nan=False)


def test_macro_f1_of_many_choices_at_once() -> None:
    targets, chosen, _ = make()
    assert macro_f1(targets.matrix, chosen).tolist() == [macro_f1(targets.matrix, each) for each in chosen]
    assert isinstance(macro_f1(targets.matrix, chosen[0]), float)
    expected = f1_score(targets.matrix, chosen[0], average="macro")
    assert macro_f1(targets.matrix, chosen[0]) == pytest.approx(expected)


def test_the_same_seed_gives_the_same_report() -> None:
    given = make()
    assert evaluate(*given, seed=1) == evaluate(*given, seed=1)
    assert evaluate(*given, seed=1)["macro_f1"] != evaluate(*given, seed=2)["macro_f1"]


def test_a_report_is_quick() -> None:
    given = make(samples=3600)
    evaluate(*given)
    start = time.process_time()
    evaluate(*given)
    assert time.process_time() - start < 0.3
