"""The submission: every unlabelled sample once, in order, by exactly the run's encoders."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmfeat.cache.store import Cache
from mmfeat.errors import CacheError, RunError, SubmissionError
from mmfeat.extraction.extract import extract_features
from mmfeat.prediction.output_file import check_rows
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.run import Run, best_run, overlooked_run, read_run
from mmfeat.runs.verdict import verdict
from mmfeat.sweep.train import train_heads
from tests.cli.typed import invoke
from tests.sweep.small_sweeps import FEW, FLOAT32, QUICK, SMALL, sweep


@pytest.fixture(scope="module")
def trained(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_timm: Path) -> Path:
    """A finished run on a copy of the demo data with a local timm model."""
    tmp_path = tmp_path_factory.mktemp("trained")
    shutil.copytree(demo_folder, tmp_path / "demo")
    shutil.copytree(tiny_timm, tmp_path / "model")
    encoders = ["hashing", f"timm:{tmp_path / 'model'}"]
    extract_features(tmp_path / "demo", encoders, cache=tmp_path / "cache", options=FLOAT32)
    train_heads(
        tmp_path / "demo",
        encoders,
        cache=tmp_path / "cache",
        out=tmp_path / "heads",
        options=FLOAT32,
        protocol=SMALL,
        plan=QUICK,
        **FEW,
    )
    return tmp_path


@pytest.fixture
def place(trained: Path) -> Iterator[Path]:
    """The run as it was trained, whatever a test does to it or to its data."""
    copy = trained.with_name("copy")
    shutil.copytree(trained, copy)
    yield trained
    shutil.rmtree(trained)
    copy.rename(trained)


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as handle:
        return list(csv.reader(handle))


def test_every_unlabelled_sample_once_in_the_order_of_its_list(place: Path) -> None:
    result = write_submission(heads=place / "heads", out=place / "submission.csv")
    header, *body = rows(place / "submission.csv")
    listed = [line.split(",")[0] for line in (place / "demo" / "test_without_label.txt").read_text().splitlines()[1:]]
    assert header == ["guid", "tag"]
    assert [id for id, _ in body] == listed
    assert {tag for _, tag in body} <= {"positive", "neutral", "negative"}
    assert result.rows == 12
    assert sum(result.predicted.values()) == pytest.approx(1)
    assert result.trained["positive"] == pytest.approx(result.run.results.class_counts["positive"] / 108)
    assert result.extraction.nothing_to_do


@pytest.mark.parametrize("head", ["concat", "logistic", "greedy", "stacking", "mean"])
def test_a_head_can_be_named(place: Path, head: str) -> None:
    assert write_submission(heads=place / "heads", out=place / "s.csv", head=head).head == head
    with pytest.raises(RunError, match="no film; the run has"):
        write_submission(heads=place / "heads", out=place / "s.csv", head="film")


def test_missing_features_are_extracted_first_with_the_run_s_own_encoders(place: Path) -> None:
    data = place / "demo"
    (data / "test_without_label.txt").write_text("guid,tag\nnew,null\n")
    (data / "data" / "new.txt").write_text("a text nobody has seen")
    shutil.copy(next((data / "data").glob("1000.[jJpP]*")), data / "data" / "new.png")
    result = write_submission(heads=place / "heads", data=data, out=place / "s.csv")
    assert list(result.extraction.new.values()) == [1]
    assert [id for id, _ in rows(place / "s.csv")[1:]] == ["new"]
    again = write_submission(heads=place / "heads", data=data, out=place / "s2.csv", cache=place / "fresh")
    assert sum(again.extraction.new.values()) == 2
    assert (place / "s.csv").read_bytes() == (place / "s2.csv").read_bytes()


def test_a_table_of_new_samples_through_a_named_run(place: Path) -> None:
    (run,) = (place / "heads").iterdir()
    (place / "new.csv").write_text("id,text,image\nx,so tired of this,\ny,,\n")
    result = write_submission(run, data=place / "new.csv", out=place / "s.csv")
    assert [id for id, _ in rows(place / "s.csv")[1:]] == ["x", "y"]
    assert result.without_features == ["y"]


def test_a_table_with_its_own_column_names(place: Path) -> None:
    (run,) = (place / "heads").iterdir()
    (place / "new.csv").write_text("guid,caption\nx,so tired of this\n")
    columns = {"id": "guid", "text": "caption"}
    write_submission(run, data=place / "new.csv", out=place / "s.csv", columns=columns)
    assert [id for id, _ in rows(place / "s.csv")[1:]] == ["x"]


def test_data_that_changed_since_is_noticed(place: Path) -> None:
    assert not write_submission(heads=place / "heads", out=place / "s.csv").data_changed
    labels = place / "demo" / "train.txt"
    labels.write_text(labels.read_text().replace("positive", "neutral", 1))
    assert write_submission(heads=place / "heads", out=place / "s.csv").data_changed


def test_it_works_from_any_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "sub").mkdir()
    monkeypatch.chdir(place / "sub")
    (run,) = Path("../heads").iterdir()
    assert write_submission(run, out="s.csv").rows == 12


def test_out_is_a_plain_file_or_a_link_to_one(place: Path) -> None:
    (place / "real.csv").write_text("old")
    (place / "link.csv").symlink_to(place / "real.csv")
    write_submission(heads=place / "heads", out=place / "link.csv")
    assert (place / "link.csv").is_symlink()
    assert len(rows(place / "real.csv")) == 13
    os.mkfifo(place / "pipe")
    for wrong in (place, place / "pipe", ""):
        with pytest.raises(SubmissionError, match="not a file that can be written; name a file"):
            write_submission(heads=place / "heads", out=wrong)


def test_weights_that_changed_since_are_refused(place: Path) -> None:
    weights = place / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RunError, match=r"not the encoder that .* was trained on \(weights changed\); restore"):
        write_submission(heads=place / "heads", out=place / "s.csv")
    assert not (place / "s.csv").exists()


def test_a_cache_that_does_not_match_is_refused(place: Path) -> None:
    hashing = next((place / "cache" / "demo").glob("hashing-*"))
    other = next((place / "cache" / "demo").glob("timm-*"))
    shutil.copy(other / "spec.json", hashing / "spec.json")
    with pytest.raises(CacheError, match="describes another encoder than its folder name"):
        write_submission(heads=place / "heads", out=place / "s.csv")


def test_unknown_labels_and_nothing_to_predict(place: Path) -> None:
    (run,) = (place / "heads").iterdir()
    (place / "new.csv").write_text("id,text,label\nx,hello,joyful\n")
    with pytest.raises(SubmissionError, match="label joyful is unknown to"):
        write_submission(run, data=place / "new.csv", out=place / "s.csv")
    (place / "new.csv").write_text("id,text,label\nx,hello,positive\n")
    with pytest.raises(SubmissionError, match="every sample has a label; there is nothing to predict"):
        write_submission(run, data=place / "new.csv", out=place / "s.csv")
    assert not (place / "s.csv").exists()


def by_hand(run: Run, entry: dict[str, Any], cache: Path, ids: list[str]) -> np.ndarray:
    """(N, C) calibrated probabilities of a head of the run, from its files."""
    from mmfeat.heads.data import HeadData
    from mmfeat.heads.jobs import restore_heads
    from mmfeat.heads.registry import NEEDS_TOKENS
    from mmfeat.samples.dataset import read_samples

    samples = read_samples(run.config.data)
    features = Cache(cache, samples.name).load(samples.unlabelled, [tower.spec for tower in run.towers])
    assert list(features.ids) == ids
    assert entry.head != NEEDS_TOKENS
    tensors = [load_file(run.head_folder(entry) / each.file) for each in entry.final]
    data = HeadData(features.widened(run.results.widths), entry.modalities, "cpu", "")
    logits = restore_heads(entry.head, entry.final[0].config, tensors, 3, data)(data)
    scaled = np.stack(logits) / entry.decision.temperature + np.array(entry.decision.biases)
    shares = np.exp(scaled - scaled.max(-1, keepdims=True))
    return (shares / shares.sum(-1, keepdims=True)).mean(0)


@pytest.mark.parametrize("head", ["concat", "knn"])
def test_a_head_predicts_the_mean_of_its_seeds_shifted_by_its_decision(place: Path, head: str) -> None:
    run = best_run(place / "heads")
    write_submission(run.folder, out=place / "s.csv", head=head)
    ids, tags = zip(*rows(place / "s.csv")[1:], strict=True)
    entry = run.entry(head)
    assert len(entry.final) == (2 if head == "concat" else 1)
    decision = entry.decision
    scores = np.log(by_hand(run, entry, place / "cache", list(ids))) - np.array(decision.offsets)
    assert [run.classes[column] for column in scores.argmax(1)] == list(tags)


def test_an_ensemble_predicts_the_weighted_mean_of_its_members(place: Path) -> None:
    run = best_run(place / "heads")
    result = write_submission(run.folder, out=place / "s.csv", head="greedy", modalities="ensemble")
    assert (result.head, result.modalities) == ("greedy", "ensemble")
    ids, tags = zip(*rows(place / "s.csv")[1:], strict=True)
    entry = run.entry("greedy", "ensemble")
    by_name = {each.name: each for each in run.leaderboard}
    members = [by_name[name] for name in entry.members]
    mean = np.zeros((12, 3))
    for weight, member in zip(entry.rule.weights, members, strict=True):
        shares, floor = by_hand(run, member, place / "cache", list(ids)), member.decision.floor
        mean += weight * ((1 - floor) * shares + floor / 3)
    decision = entry.decision
    scores = np.log(mean / sum(entry.rule.weights)) / decision.temperature + np.array(decision.biases)
    scores -= np.array(decision.offsets)
    assert [run.classes[column] for column in scores.argmax(1)] == list(tags)


def test_the_best_may_be_an_ensemble(place: Path) -> None:
    """What is first on the leaderboard predicts, whatever it is."""
    run = best_run(place / "heads")
    best = run.leaderboard[0]
    for kind in ("stacking", best.head):
        changed = sorted(run.leaderboard, key=lambda entry, kind=kind: entry.head != kind)
        named = {"leaderboard": [entry.to_json() for entry in changed], "recommended": changed[0].name}
        config = {**run.to_json(), **named}
        (run.folder / "run.json").write_text(json.dumps(config))
        result = write_submission(heads=place / "heads", out=place / "s.csv")
        assert result.head == kind
        assert result.rows == 12


@pytest.mark.parametrize("head", ["concat", "knn", "greedy"])
def test_a_damaged_head_is_refused(place: Path, head: str) -> None:
    (run,) = (place / "heads").iterdir()
    damaged = "concat" if head == "greedy" else head
    path = run / f"{damaged}-both" / "final-0.safetensors"
    data = bytearray(path.read_bytes())
    for broken in (bytes([*data[:-9], data[-9] ^ 1, *data[-8:]]), bytes(data[:-1]), b""):
        path.write_bytes(broken)
        with pytest.raises(RunError, match=r"not a whole head \(final-0.*; the same mmfeat heads trains it again") as e:
            write_submission(run, out=place / "s.csv", head=head)
        assert "\n" not in str(e.value)
    path.unlink()
    with pytest.raises(RunError, match="not a whole head"):
        write_submission(run, out=place / "s.csv", head=head)
    assert not (place / "s.csv").exists()


def test_without_a_refit_the_heads_of_the_folds_predict_together(place: Path) -> None:
    run = sweep(place, ["hashing"], plan=replace(QUICK, refit=False), modalities=["text"], out=place / "folds").run
    entry = run.entry("concat")
    assert len(entry.final) == 4  # two folds of two seeds
    write_submission(run.folder, out=place / "s.csv", head="concat")
    ids, tags = zip(*rows(place / "s.csv")[1:], strict=True)
    scores = np.log(by_hand(run, entry, place / "cache", list(ids))) - np.array(entry.decision.offsets)
    assert [run.classes[column] for column in scores.argmax(1)] == list(tags)


def test_a_run_with_views_predicts_with_their_mean(place: Path) -> None:
    options = replace(FLOAT32, views=1)
    extract_features(place / "demo", ["hog"], cache=place / "cache", options=options)
    quick = {"options": options, "fusion": ["none"], "modalities": ["image"], "out": place / "views"}
    run = sweep(place, ["hog"], **quick).run
    result = write_submission(run.folder, out=place / "s.csv", head="logistic")
    assert result.rows == 12
    assert result.extraction.nothing_to_do
    again = write_submission(run.folder, out=place / "s2.csv", head="logistic", cache=place / "fresh")
    assert len(again.extraction.new) == 2  # the photos, and another view of them
    assert (place / "s.csv").read_bytes() == (place / "s2.csv").read_bytes()


def table(folder: Path, labels: list[str]) -> Path:
    """A data set whose texts name their classes, four unlabelled samples at the end."""
    path = folder / "table.csv"
    texts = [f"{label.replace('|', ' ')} number {row}" for row, label in enumerate(labels)]
    lines = [f"{row},{text},{label}" for row, (text, label) in enumerate(zip(texts, labels, strict=True))]
    unknown = [f"new{row},{text} number 7," for row, text in enumerate(("sun", "rain", "sun rain", ""))]
    path.write_text("\n".join(["id,text,label", *lines, *unknown]))
    return path


def submitted(folder: Path, data: Path, head: str, **changes: Any) -> tuple[Run, list[list[str]]]:
    extract_features(data, ["hashing"], cache=folder / "cache", options=FLOAT32)
    changes = {"fusion": ["concat"], "baselines": ["logistic", "knn"], "modalities": ["text"], **changes}
    run = train_heads(
        data, ["hashing"], cache=folder / "cache", out=folder / "heads", options=FLOAT32, protocol=SMALL, **changes
    ).run
    write_submission(run.folder, out=folder / "s.csv", head=head)
    return run, rows(folder / "s.csv")[1:]


@pytest.mark.parametrize("head", ["logistic", "greedy", "stacking"])
def test_samples_of_several_labels_or_none_go_the_whole_way(tmp_path: Path, head: str) -> None:
    data = table(tmp_path, ["sun", "rain", "sun|rain", "|"] * 20)
    run, written = submitted(tmp_path, data, head, task="multilabel", plan=QUICK)
    assert run.classes == ("rain", "sun")
    assert {label for _, label in written} <= {"sun", "rain", "rain|sun", "|"}
    assert [label for _, label in written] == ["sun", "rain", "rain|sun", "|"]
    entry = run.entry("logistic")
    assert entry.macro_f1.value > 0.9
    out_of_fold = rows(run.head_folder(entry) / "out_of_fold.csv")
    assert {row[1] for row in out_of_fold[1:]} == {"sun", "rain", "rain|sun", "|"}
    (tmp_path / "new.csv").write_text("id,text,label\nx,hello,sun|snow\n")
    with pytest.raises(SubmissionError, match="label snow is unknown to"):
        write_submission(run.folder, data=tmp_path / "new.csv", out=tmp_path / "s.csv")


def test_two_classes_go_the_whole_way(tmp_path: Path) -> None:
    run, written = submitted(tmp_path, table(tmp_path, ["sun", "rain"] * 30), "logistic", plan=QUICK)
    assert run.classes == ("rain", "sun")
    assert [id for id, _ in written] == ["new0", "new1", "new2", "new3"]
    assert [label for _, label in written][:2] == ["sun", "rain"]
    assert {label for _, label in written} <= {"sun", "rain"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([("a", "x")], "1 rows do not name the 2 samples"),
        ([("b", "x"), ("a", "x")], "once each and in order"),
        ([("a", "x"), ("a", "x")], "once each and in order"),
        ([("a", "x"), ("b", "")], "sample b would get the label ''"),
        ([("a", "x"), ("b", "z")], "none of x, y"),
        ([("a", "x"), ("b", "x|y")], "sample b would get the label 'x|y'"),
        ([("a", "x"), ("b", "|")], "none of x, y"),
    ],
)
def test_a_file_that_breaks_its_rules_is_never_written(wrong: list[tuple[str, str]], message: str) -> None:
    check_rows([("a", "x"), ("b", "y")], ["a", "b"], ["x", "y"])
    with pytest.raises(SubmissionError, match=message.replace("|", r"\|")):
        check_rows(wrong, ["a", "b"], ["x", "y"])


def test_cells_of_several_labels_are_checked_label_by_label() -> None:
    check_rows([("a", "x|y"), ("b", "|"), ("c", "y")], ["a", "b", "c"], ["x", "y"], True)
    for label in ("", "x|", "x|z", "||"):
        with pytest.raises(SubmissionError, match="sample a would get the label"):
            check_rows([("a", label)], ["a"], ["x", "y"], True)


def test_the_default_file_ends_as_its_format(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert write_submission(heads=place / "heads", format="jsonl").path == Path("submission.jsonl")


def test_a_run_that_scored_higher_on_other_folds_is_named_and_not_taken(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    latest = best_run(place / "heads")
    older = Path(shutil.copytree(latest.folder, place / "heads" / "older"))
    config = {**latest.to_json(), "splits_hash": "other"}
    config["leaderboard"][0]["macro_f1"]["value"] = 0.99
    (older / "run.json").write_text(json.dumps(config))
    os.utime(older / "run.json", (1, 1))
    for command in ("submit", "predict --text hello", "report --photos 0"):
        answer = invoke(*command.split())
        assert answer.exit_code == 0, answer.output
        assert "note: heads/older scored higher, 0.990 [" in answer.stderr
        assert latest.name in answer.output
        named = invoke(*command.split(), "--run", latest.folder)
        assert "scored higher" not in named.stderr


def test_the_data_of_the_run_are_not_overwritten_by_predictions_for_others(place: Path, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("id,text\n1,hello\n")
    with pytest.raises(SubmissionError, match=r"this would overwrite the data in .*demo"):
        write_submission(heads=place / "heads", data=tmp_path / "new.csv", out=place / "demo" / "new.txt")


def test_new_samples_need_no_column_of_labels(place: Path, tmp_path: Path) -> None:
    run = best_run(place / "heads")
    table = Path(shutil.copytree(run.folder, tmp_path / "heads" / "run")) / "run.json"
    table.write_text(json.dumps({**run.to_json(), "columns": {"label": "tag"}}))
    (tmp_path / "new.csv").write_text("id,text\n1,hello\n")
    cache = Path(shutil.copytree(run.config.cache, tmp_path / "cache"))
    result = write_submission(heads=tmp_path / "heads", data=tmp_path / "new.csv", out=tmp_path / "s.csv", cache=cache)
    assert (result.run.folder, result.rows) == (table.parent, 1)


def test_runs_of_another_task_are_not_compared(place: Path, tmp_path: Path) -> None:
    run = best_run(place / "heads")
    for number, task in enumerate(("multilabel", "multiclass")):
        copy = Path(shutil.copytree(run.folder, tmp_path / task))
        config = {**run.to_json(), "task": task}
        config["leaderboard"][0]["macro_f1"]["value"] = 0.9 - number / 10
        (copy / "run.json").write_text(json.dumps(config))
        os.utime(copy / "run.json", (number, number))
    assert best_run(tmp_path).folder.name == "multiclass"
    assert overlooked_run(best_run(tmp_path)) is None


def test_of_equally_good_runs_the_newest_predicts_and_another_says_its_name(place: Path, tmp_path: Path) -> None:
    run = best_run(place / "heads")
    for number, name in enumerate(("first", "second")):
        os.utime(shutil.copytree(run.folder, tmp_path / name) / "run.json", (number, number))
    assert best_run(tmp_path).folder.name == "second"
    os.utime(tmp_path / "first" / "run.json", (2, 2))
    first, second = (read_run(tmp_path / name) for name in ("first", "second"))
    assert best_run(tmp_path) == first
    assert any(line.endswith("submit uses it.") for line in verdict(first))
    assert any(line.endswith(f"submit --run {second.folder} uses it.") for line in verdict(second))


def test_a_head_whose_name_is_a_path_is_no_head(place: Path, tmp_path: Path) -> None:
    run = best_run(place / "heads")
    copy = Path(shutil.copytree(run.folder, tmp_path / "run"))
    config = json.loads((copy / "run.json").read_text())
    config["leaderboard"][0]["head"] = "../../elsewhere"
    (copy / "run.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="no head is called"):
        read_run(copy)
