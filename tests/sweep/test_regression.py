"""Regression: numbers are learnt in their unit, scored as scikit-learn and SciPy score them, and predicted back."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.linear_model import Ridge
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from mmfeat import audit_data, compare_runs, load, reproduce_run, write_report
from mmfeat.baselines.fit import TrainingRows, refit
from mmfeat.cli.main import app
from mmfeat.errors import ConfigError, DataError, MmfeatError, RunError
from mmfeat.evaluation.blending import greedy_weights
from mmfeat.evaluation.metrics import evaluate
from mmfeat.evaluation.significance import compare_with_best, paired_difference
from mmfeat.evaluation.splits import make_folds
from mmfeat.export.export import export_run
from mmfeat.extraction.extract import extract_features
from mmfeat.finetune.finetune import finetune_heads
from mmfeat.heads.registry import HeadSettings, Plan
from mmfeat.prediction.predict import predict_data
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.run import Run
from mmfeat.samples.labels import Targets, read_targets
from mmfeat.sweep.train import Sweep, train_heads
from tests.baselines.test_fit import Rows
from tests.sweep.small_sweeps import SMALL, results

COLUMNS = {"id": "sku", "text": "title", "label": "price", "table": "length+weight+width"}
LONG = Plan(HeadSettings(epochs=40, patience=5, dropout=0.1, learning_rate=3e-3))


def priced(rows: int, seed: int = 0) -> pd.DataFrame:
    """Wares whose price is linear in three columns, with some noise, in a unit of its own."""
    random = np.random.default_rng(seed)
    columns = random.standard_normal((rows, 3))
    price = 1200 + 80 * (columns @ [1.0, -0.7, 0.4] + 0.1 * random.standard_normal(rows))
    frame = pd.DataFrame(columns, columns=["length", "weight", "width"]).assign(price=price.round(2))
    return frame.assign(sku=[f"{seed}-{n}" for n in range(rows)], title=[f"a thing of {seed} {n}" for n in range(rows)])


def value(place: Path, **given: object) -> Sweep:
    asked = {"fusion": ["concat"], "modalities": ["table"], "task": "regression", "columns": COLUMNS, "plan": LONG}
    asked |= {"cache": place / "cache", "out": place / "heads", "protocol": SMALL}
    return train_heads(place / "train.csv", ["hashing"], **{**asked, **given})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("priced")
    priced(400).to_csv(folder / "train.csv", index=False)
    priced(80, 1).to_csv(folder / "more.csv", index=False)
    priced(80, 2).drop(columns="price").to_csv(folder / "test.csv", index=False)
    extract_features(folder / "train.csv", ["hashing"], cache=folder / "cache", columns=COLUMNS)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Run:
    return value(place).run


def numbers(rows: int = 300, seeds: int = 2) -> tuple[Targets, np.ndarray]:
    """Numbers, and what heads of some skill predict."""
    random = np.random.default_rng(rows)
    values = random.gamma(2, 50, rows)[:, None]
    return Targets(("value",), values), values + random.normal(3, 40, (seeds, rows, 1))


def test_labels_are_numbers_or_an_error_names_one_that_is_not() -> None:
    targets = read_targets(["1", "-2.5", "1e3"], "regression")
    assert targets.matrix.tolist() == [[1.0], [-2.5], [1000.0]]
    assert (targets.task, targets.take([0]).numeric) == ("regression", True)
    with pytest.raises(DataError, match="--task regression: 2 of 3 labels are no numbers, as 'cheap'"):
        read_targets(["1", "cheap", "inf"], "regression")
    with pytest.raises(DataError, match="all labels are 1, nothing to predict"):
        read_targets(["1", "1"], "regression")


def test_scores_are_those_of_scikit_learn_and_intervals_those_of_resampling() -> None:
    targets, predicted = numbers()
    scores, values = evaluate(targets, predicted, predicted), targets.matrix[:, 0]
    theirs = {"r2": r2_score, "mae": mean_absolute_error, "rmse": root_mean_squared_error}
    theirs["spearman"] = lambda one, other: spearmanr(one, other).statistic
    random = np.random.default_rng(0)
    drawn = [random.integers(0, len(values), len(values)) for _ in range(500)]
    for name, score in theirs.items():
        resampled = [np.mean([score(values[rows], row[rows, 0]) for row in predicted]) for rows in drawn]
        assert scores[name]["value"] == pytest.approx(np.mean([score(values, row[:, 0]) for row in predicted]))
        ends = np.percentile(resampled, [2.5, 97.5])
        found = scores[name]["low"], scores[name]["high"]
        np.testing.assert_allclose(found, ends, atol=0.3 * (ends[1] - ends[0]))
    assert scores["seeds"]["r2"]["values"] == pytest.approx([r2_score(values, row[:, 0]) for row in predicted])
    twins = evaluate(
        Targets(("value",), np.tile(targets.matrix, (2, 1))), *[np.tile(predicted, (1, 2, 1))] * 2,
        groups=np.tile(np.arange(300), 2),
    )  # fmt: skip
    assert twins["r2"]["high"] - twins["r2"]["low"] == pytest.approx(
        scores["r2"]["high"] - scores["r2"]["low"], rel=0.1
    )


def test_a_better_head_is_told_from_a_worse_one_and_from_itself() -> None:
    targets, predicted = numbers()
    worse = predicted + np.random.default_rng(1).normal(0, 40, predicted.shape)
    assert paired_difference(targets, predicted, worse).p < 0.01
    tests, _ = compare_with_best(targets, [predicted, worse, predicted], 0)
    assert [test["tie"] for test in tests] == [True, False, True]
    assert "mcnemar" not in tests[1]


def test_folds_are_alike_in_their_numbers_and_keep_groups() -> None:
    targets, _ = numbers(500)
    groups = np.arange(500) // 2
    splits = make_folds(targets, list(map(str, range(500))), groups, 5, 3, 2)
    means = [targets.matrix[splits.fold(fold, 0).test].mean() for fold in range(5)]
    assert np.ptp(means) < 0.1 * targets.matrix.mean()
    for fold in range(5):
        assert not np.intersect1d(groups[splits.fold(fold, 0).test], groups[splits.fold(fold, 0).train]).size


def test_an_ensemble_weighs_numbers_for_the_least_squared_error() -> None:
    targets, heads = numbers(200, 3)
    heads[2] *= 0.5
    weights = greedy_weights(heads, targets)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()

    def error(tried: np.ndarray) -> float:
        return float(((np.tensordot(tried, heads, axes=1) - targets.matrix) ** 2).mean())

    tried = np.random.default_rng(0).dirichlet(np.ones(3), 2000)
    assert error(weights) <= min(map(error, tried)) * (1 + 1e-6)


@pytest.mark.parametrize("name", ["ridge", "knn", "prior"])
def test_a_baseline_equals_its_definition(name: str) -> None:
    random = np.random.default_rng(2)
    vectors = random.standard_normal((200, 12)).astype(np.float16)
    values = 1e4 + 300 * vectors[:, :3].sum(1, keepdims=True) + random.normal(0, 50, (200, 1))
    targets, train, test = Targets(("value",), values.astype(float)), np.arange(150), np.arange(150, 200)
    settings = {"ridge": {"alpha": 30.0}, "knn": {"k": 5.0, "by_similarity": 0.0}, "prior": {}}
    rows = TrainingRows(Rows(vectors), targets, train, np.ones(1), 0)
    found = refit(name, rows, settings[name]).logits(Rows(vectors), test)[:, 0]
    scaled = StandardScaler().fit(vectors[train].astype(float)).transform(vectors.astype(float))
    if name == "ridge":
        expected = Ridge(30.0).fit(scaled[train], values[train, 0]).predict(scaled[test])
    elif name == "prior":
        expected = np.full(50, values[train].mean())
    else:
        unit = scaled / np.linalg.norm(scaled, axis=1, keepdims=True)
        nearest = np.argsort(-(unit[test] @ unit[train].T), axis=1)[:, :5]
        expected = (values[train, 0][nearest].sum(1) + values[train].mean()) / 6
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_linear_target_is_learnt_in_its_unit_and_the_best_comes_first(run: Run) -> None:
    by_name = {entry.name: entry for entry in run.leaderboard}
    assert by_name["kernel-table"].headline.value > 0.7  # which sees only directions
    for name in ("concat-table", "ridge-table", "greedy-ensemble"):
        assert by_name[name].headline.value > 0.9
    assert {"prior-table", "knn-table"} <= set(by_name)
    assert not {"logistic-table", "svm-table", "stacking-ensemble"} & set(by_name)
    assert [entry.headline.value for entry in run.leaderboard] == sorted(
        (entry.headline.value for entry in run.leaderboard), reverse=True
    )
    best = run.leaderboard[0]
    out = run.out_of_fold(best)
    assert best.mae is not None
    assert best.mae.value == pytest.approx(np.abs(out.chosen[0] - out.targets.matrix).mean(), rel=1e-4)
    assert best.mae.value < 20
    assert out.to_pandas().predicted.to_numpy() == pytest.approx(out.chosen[0, :, 0])
    prior = by_name["prior-table"]
    assert prior.r2 is not None
    assert prior.r2.value == pytest.approx(0, abs=0.01)
    assert prior.spearman is not None


def test_the_same_seed_gives_the_same_bytes(run: Run, place: Path) -> None:
    assert results(value(place, out=place / "again").run) == results(run)
    assert reproduce_run(run.folder, out=place / "reproduced").identical


def test_predictions_are_numbers_in_the_users_column(run: Run, place: Path) -> None:
    submitted = write_submission(run.folder, data=place / "test.csv", out=place / "out.csv", cache=place / "cache")
    rows = list(csv.DictReader((place / "out.csv").open()))
    assert list(rows[0]) == ["sku", "price"]
    assert [row["sku"] for row in rows] == [f"2-{number}" for number in range(80)]
    truth = priced(80, 2).price.to_numpy()
    predicted = np.array([float(row["price"]) for row in rows])
    assert r2_score(truth, predicted) > 0.9
    write_submission(run.folder, data=place / "test.csv", out=place / "out.jsonl", cache=place / "cache")
    first = json.loads((place / "out.jsonl").read_text().split("\n")[0])
    assert first == {"sku": "2-0", "price": pytest.approx(predicted[0])}
    answer = CliRunner().invoke(app, ["predict", "--data", str(place / "test.csv"), "--run", str(run.folder)])
    assert answer.stdout.split("\n")[1] == f"2-0,{rows[0]['price']}"
    assert submitted.predicted["mean"] == pytest.approx(predicted.mean())
    assert submitted.trained["highest"] == priced(400).price.max()
    scored = predict_data(place / "more.csv", run.folder, cache=place / "cache").scores
    assert scored is not None
    assert scored.r2 is not None
    assert scored.r2.value > 0.9
    model = load(run.folder)
    row = {name: str(truth) for name, truth in priced(80, 2).iloc[0].items() if name in ("length", "weight", "width")}
    assert model.predict(["a thing of 2 0"], table=[row]) == pytest.approx([predicted[0]], rel=1e-4)
    with pytest.raises(ConfigError, match="a regression has no probabilities of classes; use predict"):
        model.predict_proba("a thing")


def test_runs_are_compared_and_shown(run: Run, place: Path) -> None:
    worse = value(place, fusion=["none"], baselines=["knn"]).run
    comparison = compare_runs([run, worse])
    assert comparison.fair
    (test,) = filter(None, comparison.tests)
    assert test.difference.value < 0 and test.p_holm < 0.05  # noqa: PT018
    for command in (["show", str(run.folder)], ["compare", str(run.folder), str(worse.folder)], ["ls", "--heads"]):
        arguments = [*command, str(place / "heads")] if command[0] == "ls" else command
        answer = CliRunner().invoke(app, ["runs", *arguments])
        assert answer.exit_code == 0, answer.output
        assert "R2" in answer.output


def test_the_report_shows_errors_instead_of_confusions(run: Run, place: Path) -> None:
    page = write_report(run.folder, out=place / "report.html").path.read_text(encoding="utf-8")
    for said in ("R2 with 95 % intervals", "Predicted against true numbers", "off by", "validation R2"):
        assert said in page
    assert "Confusion" not in page
    assert "changed since the run" not in page
    assert run.plot.residuals().save(place / "residuals.png").stat().st_size > 5000
    with pytest.raises(ConfigError, match="a regression has no classes"):
        run.plot.confusion()
    audited = audit_data(
        place / "train.csv", run=run.folder, columns=COLUMNS, out=place / "audit", cache=place / "cache"
    )
    assert any("no label errors" in note for note in audited.notes)


def test_a_label_is_corrected_by_another_number(place: Path) -> None:
    (place / "fix.csv").write_text("id,label\n0-1,1234.5\n")
    given = {"fusion": ["none"], "baselines": ["ridge"], "columns": {**COLUMNS, "labels": str(place / "fix.csv")}}
    run = value(place, **given).run
    assert 1234.5 in run.out_of_fold(run.leaderboard[0]).targets.matrix
    (place / "fix.csv").write_text("id,label\n0-1,cheap\n")
    with pytest.raises(DataError, match="'cheap' is no number, as all labels are"):
        value(place, **given)


def test_what_numbers_do_not_have_is_refused_in_one_line(run: Run, place: Path) -> None:
    for given, message in (
        ({"baselines": ["svm"]}, "--baselines svm: chooses among classes; for numbers there are prior, knn, ridge"),
        ({"plan": Plan(HeadSettings(loss="focal"))}, "--loss: a setting for classes; leave it out"),
        ({"plan": Plan(adjustment=1.0, settings=HeadSettings())}, "--logit-adjustment: chooses among classes"),
        ({"order": ["1", "2"]}, "--order 1,2: only classes of --task ordinal"),
    ):
        with pytest.raises(ConfigError, match=message):
            value(place, **given)
    with pytest.raises(ConfigError, match="--proba: a predicted number has no probabilities"):
        write_submission(run.folder, data=place / "test.csv", out=place / "p.csv", cache=place / "cache", proba=True)
    with pytest.raises(RunError, match="a regression, of which no graph can be made"):
        export_run(run.folder, out=place / "export", cache=place / "cache")
    with pytest.raises(ConfigError, match="a run of --task regression, whose encoders cannot be fine-tuned"):
        finetune_heads(run.folder)


def test_many_numbers_as_classes_hint_at_the_task(place: Path) -> None:
    with pytest.raises(MmfeatError, match=r"or are the labels numbers to predict\? --task regression"):
        value(place, task="multiclass", columns=COLUMNS, baselines=["prior"], fusion=["none"])
