"""Every baseline learns, chooses on rows that are left out, and comes back from JSON and arrays as it was."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mmfeat.baselines import fit as baselines
from mmfeat.baselines import trees
from mmfeat.baselines.basis import Scaler, from_probabilities, log_loss, make_basis
from mmfeat.baselines.fit import BASELINE_FAMILIES, Baseline, TrainingRows, fit, refit, restore
from mmfeat.baselines.neighbours import NeighbourHead
from mmfeat.baselines.trees import (
    BOOSTING,
    FOREST,
    REPEATABLE,
    Components,
    TreeData,
    boosted,
    forest,
)
from mmfeat.errors import HeadError
from mmfeat.evaluation.decisions import plain_choice
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.heads.registry import BASELINES
from mmfeat.samples.labels import Targets, indicator

TRAIN, TEST = np.arange(400), np.arange(400, 700)
PARTS = tuple(np.flatnonzero(np.arange(400) % 3 == number) for number in range(3))
FORMS = ("three classes", "two classes", "multi-label")
LEARNERS = [name for name in BASELINE_FAMILIES if name != "zero-shot"]  # which learns nothing: test_class_names.py


@pytest.fixture(scope="module", autouse=True)
def _small_forests() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "FOREST_TREES", 30)
        yield


class Rows:
    """A matrix in memory."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors, self.width = vectors, vectors.shape[1]

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return self.vectors[rows].astype(np.float32)


@cache
def problem(form: str = FORMS[0], width: int = 24) -> tuple[Rows, Targets]:
    """Classes of shares about .6, .3 and .1 around centres of their own; one encoder is sometimes missing."""
    random = np.random.default_rng(3)
    classes = 2 if form == "two classes" else 3
    if form == "multi-label":
        matrix = random.random((700, classes)) < [0.5, 0.3, 0.2]
    else:
        shares = np.array([0.6, 0.3, 0.1])[:classes]
        matrix = indicator(random.choice(classes, 700, p=shares / shares.sum()), classes)
    vectors = matrix @ random.normal(size=(classes, width)) * 0.9 + random.normal(size=(700, width))
    vectors[random.random(700) < 0.1, : width // 3] = np.nan
    return Rows(vectors.astype(np.float16)), Targets(tuple("abc"[:classes]), matrix, form == "multi-label")


def training(matrix: Rows, targets: Targets) -> TrainingRows:
    return TrainingRows(matrix, targets, TRAIN, np.linspace(0.8, 1.6, len(targets.classes)), 5)


def fitted(name: str, matrix: Rows, targets: Targets) -> Baseline:
    return fit(name, training(matrix, targets), PARTS)


@cache
def usual(name: str, form: str = FORMS[0], width: int = 24) -> Baseline:
    """The baseline of `problem`, for tests that only ask it."""
    return fitted(name, *problem(form, width))


def score(baseline: Baseline, matrix: Rows, targets: Targets, rows: np.ndarray = TEST) -> float:
    logits = baseline.logits(matrix, rows)
    return float(macro_f1(targets.take(rows).matrix, plain_choice(logits, targets.multilabel)))


def test_the_registry_names_every_baseline() -> None:
    assert tuple(BASELINE_FAMILIES) == BASELINES


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("form", FORMS)
def test_it_learns_from_all_rows_with_the_setting_that_is_best_on_those_left_out(name: str, form: str) -> None:
    matrix, targets = problem(form)
    baseline = usual(name, form)
    if name != "prior":
        assert score(baseline, matrix, targets) > score(usual("prior", form), matrix, targets) + 0.2
    chosen = [entry for entry in baseline.curve if baseline.setting.items() <= entry.items()]
    assert len(chosen) == 1
    assert baseline.unseen is not None
    found = macro_f1(targets.matrix[TRAIN], plain_choice(baseline.unseen[TRAIN], targets.multilabel))
    assert found == chosen[0]["validation_macro_f1"]
    assert np.isnan(baseline.unseen[TEST]).all()
    reached = [entry["validation_macro_f1"] - entry["validation_log_loss"] for entry in baseline.curve]
    assert chosen[0]["validation_macro_f1"] - chosen[0]["validation_log_loss"] >= max(reached) - 1e-9
    again = refit(name, training(matrix, targets), baseline.setting)
    assert again.setting == baseline.setting
    assert np.array_equal(again.logits(matrix, TEST), baseline.logits(matrix, TEST))


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_that_are_left_out_train_nothing(name: str, form: str) -> None:
    """The labels of a part, and for the closed form of ridge those of a group of near duplicates, do not count for its
    own logits; those of other rows do."""
    matrix, targets = problem(form)
    part = np.arange(10) if name == "ridge" and form != "multi-label" else PARTS[0]
    labels = targets.matrix.copy()
    labels[part] = np.roll(labels[part], 1, axis=1)
    moved, family = replace(targets, matrix=labels), BASELINE_FAMILIES[name]
    found = []
    for each in (targets, moved):
        groups = np.where(np.isin(np.arange(700), part), 0, np.arange(700))
        rows = TrainingRows(matrix, each, TRAIN, np.ones(len(each.classes)), 5, groups=groups)
        logits = np.full((700, len(each.classes)), np.nan)
        logits[np.concatenate(PARTS)] = next(family.candidates(family.prepare(rows), PARTS))[1]
        found.append(logits)
    scale = np.nanmax(np.abs(found[0]))
    np.testing.assert_allclose(found[1][part], found[0][part], atol=1e-3 * scale)
    others = np.setdiff1d(TRAIN, part)
    assert np.abs(found[1] - found[0])[others].max() > 3e-3 * scale


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("form", FORMS)
def test_it_comes_back_from_json_and_safetensors(name: str, form: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    matrix, _ = problem(form)
    baseline = usual(name, form)
    config, tensors = baseline.state()
    save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, tmp_path / "state.safetensors")
    again = restore(name, json.loads(json.dumps(config)), load_file(tmp_path / "state.safetensors"))
    assert (again.setting, again.curve) == (baseline.setting, baseline.curve)
    assert np.array_equal(again.logits(matrix, TEST), baseline.logits(matrix, TEST))


@pytest.mark.parametrize("name", LEARNERS)
def test_a_shared_basis_and_a_second_run_change_nothing(name: str) -> None:
    matrix, targets = problem()
    weights = np.linspace(0.8, 1.6, 3)
    basis = make_basis(matrix, targets, TRAIN, weights)
    first = usual(name)
    second = fit(name, TrainingRows(matrix, targets, TRAIN[::-1], weights, 5, basis), PARTS)
    assert first.curve == second.curve
    assert np.array_equal(first.logits(matrix, TEST), second.logits(matrix, TEST))


@pytest.mark.parametrize("name", LEARNERS)
def test_logits_are_those_of_the_rows_in_the_order_asked_for(name: str) -> None:
    matrix, _ = problem()
    baseline = usual(name)
    rows = np.array([650, 410, 411])
    assert np.allclose(baseline.logits(matrix, rows), baseline.logits(matrix, TEST)[rows - 400], atol=1e-4)
    assert baseline.logits(matrix, rows[:0]).shape == (0, 3)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("form", ["three classes", "multi-label"])
@pytest.mark.parametrize("present", [[0, 1], [0]])
def test_a_class_without_training_rows_is_never_chosen(name: str, form: str, present: list[int]) -> None:
    matrix, targets = problem(form)
    absent = [number for number in range(3) if number not in present]
    train = TRAIN[~targets.matrix[TRAIN][:, absent].any(axis=1)]
    rows = TrainingRows(matrix, targets, train, np.ones(3), 5)
    baseline = fit(name, rows, [np.intersect1d(part, train) for part in PARTS])
    logits = baseline.logits(matrix, TEST)
    assert np.isfinite(logits).all()
    others = 0 if targets.multilabel else logits[:, present].max(axis=1, keepdims=True)
    assert (logits[:, absent] < others - 10).all()
    again = refit(name, rows, baseline.setting)
    assert np.isfinite(again.logits(matrix, TEST)).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("nothing", [np.nan, 7.0])
def test_columns_that_say_nothing_are_no_trouble(name: str, nothing: float) -> None:
    """Beside others, and alone: then a baseline knows no more than the prior."""
    matrix, targets = problem()
    constant = np.full((len(matrix), 5), nothing)
    beside = Rows(np.concatenate([matrix.vectors, constant], axis=1))
    assert score(fitted(name, beside, targets), beside, targets) >= score(usual("prior"), matrix, targets)
    alone = fitted(name, Rows(constant), targets).logits(Rows(constant), TEST)
    assert np.isfinite(alone).all()
    assert np.allclose(alone, alone[0])


@pytest.mark.parametrize("name", LEARNERS)
def test_more_weight_on_a_rare_class_chooses_it_more_often(name: str) -> None:
    matrix, targets = problem(width=3)
    setting, counts = usual(name, width=3).setting, []
    for weight in (1.0, 20.0):
        baseline = refit(name, TrainingRows(matrix, targets, TRAIN, np.array([1.0, 1.0, weight]), 5), setting)
        counts.append((baseline.logits(matrix, TEST).argmax(axis=1) == 2).sum())
    assert counts[0] < counts[1] or name == "prior"


def test_a_path_ends_early_with_the_head_of_the_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where half of the labels are noise, which the weakest penalties learn by heart."""
    matrix, targets = problem(width=200)
    random = np.random.default_rng(0)
    labels = np.where(random.random((700, 1)) < 0.5, targets.matrix[random.permutation(700)], targets.matrix)
    targets = Targets(targets.classes, labels)
    early = fitted("logistic", matrix, targets)
    monkeypatch.setattr(baselines, "PATHS", ())
    whole = fitted("logistic", matrix, targets)
    assert early.curve == whole.curve[: len(early.curve)]
    assert len(early.curve) < len(whole.curve)
    assert early.setting == whole.setting
    assert np.array_equal(early.logits(matrix, TEST), whole.logits(matrix, TEST))


@pytest.mark.parametrize("name", ["knn", "forest", "boosting"])
@pytest.mark.parametrize("form", FORMS)
def test_beyond_the_most_rows_a_sample_of_each_class_trains(
    name: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, targets = problem(form)
    monkeypatch.setattr(baselines, "MAX_VOTERS" if name == "knn" else "MAX_ROWS", 100)
    baseline = fitted(name, matrix, targets)
    assert baseline.setting["rows"] == 100
    assert {entry["rows"] for entry in baseline.curve} == {100}
    assert score(baseline, matrix, targets) > score(usual("prior", form), matrix, targets)
    again = refit(name, training(matrix, targets), baseline.setting)
    assert again.setting == baseline.setting
    assert np.array_equal(again.logits(matrix, TEST), baseline.logits(matrix, TEST))
    if name == "knn":
        votes = baseline.state()[1]["votes"]
        assert len(votes) == 100
        if not targets.multilabel:
            assert np.abs((votes[..., 0] > 0).mean(0) - targets.take(TRAIN).prior).max() <= 0.01


def test_neighbours_vote_as_in_scikit_learn() -> None:
    from sklearn.neighbors import KNeighborsClassifier

    matrix, targets = problem()
    basis = make_basis(matrix, targets, TRAIN, np.ones(3))
    scaled = basis.scaler.scaled(matrix.rows(np.arange(700)))
    for count in (5, 40):
        setting = {"k": float(count), "by_similarity": 0.0}
        logits = refit("knn", TrainingRows(matrix, targets, TRAIN, np.ones(3), 5, basis), setting).logits(matrix, TEST)
        model = KNeighborsClassifier(count, metric="cosine").fit(scaled[TRAIN], targets.numbers[TRAIN])
        votes = np.exp(logits) * (count + 1) - targets.take(TRAIN).prior  # without the prior's own vote
        expected = model.predict_proba(scaled[TEST]) * count
        assert (np.abs(votes - expected).max(axis=1) < 1e-3).mean() > 0.97  # float16 swaps a few at the edge


@pytest.mark.parametrize("by_similarity", [False, True])
def test_neighbours_of_nothing_are_nobody_and_of_duplicates_the_first(by_similarity: bool) -> None:
    """Whatever the last digits of a product or the order of a sort say: another machine chooses the same."""
    random = np.random.default_rng(0)
    vectors = random.standard_normal((6, 8))
    vectors = np.repeat(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), 30, axis=0).astype(np.float16)
    classes = np.eye(3)[random.integers(0, 3, len(vectors))]
    votes = np.stack([classes, 1 - classes], axis=-1).astype(np.float32)
    prior, scaler = np.array([0.5, 0.3, 0.2]), Scaler(np.zeros(8, np.float32), np.ones(8, np.float32))
    head = NeighbourHead(scaler, vectors, votes, prior, False, 5, by_similarity)
    seen = np.concatenate([vectors[::30].astype(np.float32), np.full((1, 8), np.nan, np.float32)])
    found = head.nearest(Rows(seen), np.arange(7))
    np.testing.assert_array_equal(found[1][:6], np.arange(0, 180, 30)[:, None] + np.arange(5))
    np.testing.assert_allclose(np.exp(head.vote(found)[6]), prior)


def test_the_prior_is_the_share_of_each_class() -> None:
    for form in FORMS:
        matrix, targets = problem(form)
        logits = usual("prior", form).logits(matrix, TEST[:1])
        shares = targets.take(TRAIN).matrix.mean(axis=0)
        assert np.allclose(logits[0], np.log(shares / (1 - shares)) if targets.multilabel else np.log(shares))


def test_probabilities_become_finite_logits() -> None:
    logits = from_probabilities(np.array([[0.0, 1.0], [0.5, 0.5]]), multilabel=True)
    assert np.array_equal(logits, [[-30, 30], [0, 0]])
    wanted = np.array([[False, True], [True, False]])
    assert np.isclose(log_loss(logits, wanted, multilabel=True), np.log(2))
    assert np.isclose(log_loss(np.log([[0.2, 0.8], [0.3, 0.7]]), wanted, False), -np.log([0.8, 0.3]).mean())


def test_an_unknown_name_is_refused() -> None:
    matrix, targets = problem()
    with pytest.raises(HeadError, match="no baseline 'lda'; use prior, knn, ridge"):
        fitted("lda", matrix, targets)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["rf", "gbdt"])
def test_trees_say_what_lightgbm_says(kind: str, form: str) -> None:
    """Its own estimators, fitted on the same components with the same settings, the same on every call."""
    from lightgbm import LGBMClassifier

    matrix, targets = problem(form)
    known = targets.take(TRAIN)
    components = Components.of(make_basis(matrix, targets, TRAIN, np.ones(len(targets.classes))))
    inputs, tested = components.apply(matrix, TRAIN), components.apply(matrix, TEST)
    samples, classes = np.ones(400), np.ones(len(targets.classes))
    data = TreeData(components, inputs, known, samples, classes, known.prior, seed=5)
    settings = {**REPEATABLE, **(FOREST if kind == "rf" else BOOSTING), "min_data_in_leaf": 3 if kind == "rf" else 20}
    labels = known.matrix.T.astype(int) if targets.multilabel else [known.numbers]
    models = [
        LGBMClassifier(n_estimators=trees.FOREST_TREES if kind == "rf" else 60, seed=5, **settings).fit(inputs, each)
        for each in labels
    ]
    each = [model.predict_proba(tested) for model in models]
    shares = np.stack([one[:, 1] for one in each], axis=1) if targets.multilabel else each[0]
    for _ in range(2):
        head = forest(data, leaf=3) if kind == "rf" else boosted(data, rounds=60)
        assert np.allclose(head.logits(matrix, TEST), from_probabilities(shares, targets.multilabel), atol=1e-4)
    first, again = (head.state()[1] for head in (head, boosted(data, 60) if kind == "gbdt" else forest(data, 3)))
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_a_text_that_is_no_model_over_these_components_is_refused() -> None:
    config, tensors = usual("forest").state()
    text = tensors["model.0"].tobytes()
    narrow = re.sub(rb"max_feature_idx=\d+", b"max_feature_idx=900", text)
    for broken in (b"", b"tree of another kind", narrow, text.replace(b"num_class=3", b"num_class=30")):
        with pytest.raises(ValueError, match=r"no model of LightGBM|outputs instead of"):
            restore("forest", config, {**tensors, "model.0": np.frombuffer(broken, np.uint8)})


@pytest.mark.parametrize("boosting", [False, True])
@pytest.mark.parametrize("multilabel", [False, True])
def test_trees_of_older_runs_still_predict(multilabel: bool, boosting: bool) -> None:
    """Two stumps by hand: sums of their leaves, softmax or sigmoid for boosting, shares with the prior for a forest."""
    components = Components(Scaler(np.zeros(2), np.ones(2)), np.zeros(2), np.eye(2, dtype=np.float32))
    values = np.array([[0, 0], [0.9, 0.1], [0.2, 0.8]] * 2) * (3 if boosting else 1)
    arrays = {
        "first": np.array([0, 3]), "feature": np.array([0, 0, 0, 1, 0, 0]), "threshold": np.zeros(6), "values": values,
        "left": np.array([1, 1, 2, 4, 4, 5]), "right": np.array([2, 1, 2, 5, 4, 5]), "start": np.array([0.5, -0.5]),
    }  # fmt: skip
    config = {"setting": {}, "curve": [], "model": {"known": [0, 1], "multilabel": multilabel, "boosting": boosting}}
    prior = np.array([0.25, 0.75])
    tensors = {**components.tensors(), **arrays, "prior": prior}
    found = restore("boosting", config, tensors).logits(Rows(np.array([[-1.0, 1.0]])), np.arange(1))
    total = values[1] + values[5]
    if not boosting:
        shares = (total + prior) / 3
    elif multilabel:
        shares = 1 / (1 + np.exp(-(total + np.array([0.5, -0.5]))))
    else:
        shares = np.exp(total + np.array([0.5, -0.5])) / np.exp(total + np.array([0.5, -0.5])).sum()
    np.testing.assert_allclose(found, from_probabilities(shares[None], multilabel))
    with pytest.raises(ValueError, match="children come before their parents"):
        restore("forest", config, {**tensors, "left": np.zeros(6, int)})
