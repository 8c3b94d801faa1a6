"""MLflow: a run is told once with its settings, scores, tags and tables; a failure loses nothing."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mmfeat.runs.mlflow_log import log_run, metrics_of
from mmfeat.runs.run import Run
from tests.cli.typed import invoke
from tests.sweep.small_sweeps import NO_HEADS, make_place, sweep

pytestmark = pytest.mark.skipif(find_spec("mlflow") is None, reason="needs the extra mlflow")


@pytest.fixture(scope="module")
def run(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    place = make_place(demo_folder, tmp_path_factory.mktemp("mlflow"))
    return sweep(place, **{**NO_HEADS, "baselines": ["knn", "prior"]}, ensembles=False, command="mmfeat heads").run


def told(uri: str) -> list[Any]:
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=uri)
    return list(client.search_runs([each.experiment_id for each in client.search_experiments()]))


def test_a_run_is_told_once_with_everything(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    uri = f"sqlite:///{tmp_path}/store/mlflow.db"
    assert log_run(run, uri) == log_run(run, uri)
    (found,) = told(uri)
    assert (found.info.run_name, found.info.status) == (run.folder.name, "FINISHED")
    best = run.leaderboard[0]
    metrics, params, tags = found.data.metrics, found.data.params, found.data.tags
    assert metrics["macro_f1"] == pytest.approx(best.macro_f1.value)
    assert metrics["macro_f1_low"] == pytest.approx(best.macro_f1.low)
    assert metrics["prior-text.log_loss"] == pytest.approx(run.entry("prior").log_loss.value)
    assert (params["protocol.folds"], params["best.head"]) == ("2", "knn")
    assert tags["mmfeat.command"] == "mmfeat heads"
    assert tags["mmfeat.data_hash"] == run.config.data_hash
    assert set(tags["mmfeat.fingerprints"].split(", ")) == run.fingerprints
    names = {path.name for path in (tmp_path / "store").rglob("*") if path.is_file()}
    assert names == {"mlflow.db", "leaderboard.csv", "leaderboard.json", "ablation.csv", "run.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


def test_classes_of_any_name_are_told_apart(run: Run) -> None:
    from mlflow.utils.validation import _validate_metric_name

    best, names = run.leaderboard[0], ("a/../b", "a$", "a#", "中文", "n/")
    one = next(iter(best.classes.values()))
    classes = {name: replace(one, f1=replace(one.f1, value=place / 10)) for place, name in enumerate(names)}
    odd = replace(run.results, leaderboard=(replace(best, classes=classes),))
    found = metrics_of(replace(run, results=odd))
    f1 = {name: value for name, value in found.items() if name.startswith("f1_")}
    assert sorted(f1.values()) == [0.0, 0.1, 0.2, 0.3, 0.4]
    for name in f1:
        _validate_metric_name(name)


def test_a_failure_is_one_warning_and_the_run_is_whole(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.folder.parent.parent)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    command = ["heads", "--data", "demo", "--encoders", "hashing,hog", "--dtype", "float32", "--fusion", "none"]
    command += ["--baselines", "knn,prior", "--modalities", "text", "--folds", "2", "--seeds", "2", "--no-ensembles"]
    answer = invoke(*command, "--epochs", "2", "--mlflow", "http://127.0.0.1:9")
    assert answer.exit_code == 0, answer.stderr
    (line,) = [line for line in answer.stderr.splitlines() if line.startswith("warning")]
    assert line.startswith("warning: the run is whole but was not logged to MLflow: ")
    assert line.endswith(": http://127.0.0.1:9: Connection refused")
    assert answer.stdout.splitlines()[-1].startswith("next: mmfeat report")
