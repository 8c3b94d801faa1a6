"""The sweep on real cached vectors: what it writes, what it reuses, and that it never peeks."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmfeat.encoders import EncoderOptions
from mmfeat.errors import CacheMissError, ConfigError, HeadError, RunError
from mmfeat.extract import extract_features
from mmfeat.heads import HeadSettings
from mmfeat.metrics import macro_f1
from mmfeat.runs import best_run, read_run
from mmfeat.sweep import Sweep, train_heads

BUILT_IN = ["hashing", "hog"]
QUICK = HeadSettings(epochs=3)
FLOAT32 = EncoderOptions(dtype="float32")


@pytest.fixture(scope="module")
def place(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with an extracted cache."""
    place = tmp_path_factory.mktemp("work")
    shutil.copytree(demo_folder, place / "demo")
    extract_features(place / "demo", BUILT_IN, cache=place / "cache", options=FLOAT32)
    return place


def sweep(place: Path, **changes) -> Sweep:
    arguments = {"cache": place / "cache", "out": place / "heads", "options": FLOAT32, "settings": QUICK, "folds": 3}
    return train_heads(place / "demo", BUILT_IN, **{**arguments, **changes})


@pytest.fixture(scope="module")
def done(place: Path) -> Sweep:
    return sweep(place)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_every_head_on_every_modality_is_ranked(done: Sweep) -> None:
    board = done.run.leaderboard
    assert {(e["head"], e["modalities"]) for e in board} == {
        (head, on) for head in ("concat", "logistic") for on in ("both", "text", "image")
    }
    values = [entry["macro_f1"]["value"] for entry in board]
    assert values == sorted(values, reverse=True)
    assert board[0]["tie"]
    assert board[0]["behind_best"]["value"] == 0
    assert all(e["macro_f1"]["low"] <= e["macro_f1"]["value"] <= e["macro_f1"]["high"] for e in board)
    assert all(entry["tie"] == (entry["behind_best"]["low"] <= 0) for entry in board)
    written = rows(done.run.leaderboard_file)
    assert [(row["head"], row["modalities"]) for row in written] == [(e["head"], e["modalities"]) for e in board]


def test_scores_are_those_of_the_saved_out_of_fold_predictions(done: Sweep) -> None:
    classes = list(done.run.classes)
    for entry in done.run.leaderboard:
        out_of_fold = rows(done.run.head_folder(entry) / "out_of_fold.csv")
        assert len(out_of_fold) == 108
        labels, predicted = (
            np.array([classes.index(row[name]) for row in out_of_fold]) for name in ("label", "predicted")
        )
        assert macro_f1(labels, predicted, 3) == pytest.approx(entry["macro_f1"]["value"])
        chosen = [max(classes, key=lambda name: float(row[f"p_{name}"])) for row in out_of_fold]
        assert chosen == [row["predicted"] for row in out_of_fold]


def test_an_unchanged_configuration_is_not_trained_again(place: Path, done: Sweep) -> None:
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in done.run.folder.rglob("*.*")}
    os.utime(done.run.folder / "run.json", (1, 1))
    again = sweep(place)
    assert again.reused
    assert again.run.folder == done.run.folder
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in done.run.folder.rglob("*.*")} == before
    assert (done.run.folder / "run.json").stat().st_mtime > 1  # what was asked for last, submit goes on with


def test_two_runs_of_one_configuration_agree(place: Path, done: Sweep) -> None:
    other = sweep(place, out=place / "again")
    assert other.run.folder.name == done.run.folder.name
    for entry in done.run.leaderboard:
        ours, theirs = (run.head_folder(entry) / "out_of_fold.csv" for run in (done.run, other.run))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    "changes",
    [{"folds": 4}, {"settings": HeadSettings(epochs=3, seed=1)}, {"grouped": False}, {"modalities": ["both"]}],
)
def test_another_configuration_is_another_run(place: Path, done: Sweep, changes: dict) -> None:
    assert sweep(place, fusion=["none"], **changes).run.folder != sweep(place, fusion=["none"]).run.folder


def test_test_folds_take_no_part_in_training(place: Path, tmp_path: Path) -> None:
    """Other labels on the test samples of fold0 change its scores and nothing of its head."""
    run = sweep(place, modalities=["both"]).run
    test = {row["id"] for row in rows(run.folder / "folds.csv") if row["fold0"] == "test"}
    shutil.copytree(place / "demo", tmp_path / "demo")
    lines = (tmp_path / "demo" / "train.txt").read_text().splitlines()
    turned = {"positive": "negative", "negative": "neutral", "neutral": "positive"}
    lines = [f"{id},{turned[tag] if id in test else tag}" for id, tag in (line.split(",") for line in lines)]
    (tmp_path / "demo" / "train.txt").write_text("\n".join(lines))
    other = train_heads(
        tmp_path / "demo",
        BUILT_IN,
        cache=place / "cache",
        out=tmp_path / "heads",
        options=FLOAT32,
        settings=QUICK,
        split_dir=run.folder,
        modalities=["both"],
    ).run
    assert other.folder.name != run.folder.name
    for head in ("concat", "logistic"):
        ours, theirs = (
            {
                row["id"]: row["p_neutral"]
                for row in rows(folder / f"{head}-both" / "out_of_fold.csv")
                if row["id"] in test
            }
            for folder in (run.folder, other.folder)
        )
        assert ours == theirs
        assert len(ours) == len(test) > 30


def test_a_run_goes_with_data_that_moved(place: Path, done: Sweep, tmp_path: Path) -> None:
    shutil.copytree(place / "demo", tmp_path / "demo")
    moved = train_heads(
        tmp_path / "demo",
        BUILT_IN,
        cache=place / "cache",
        out=place / "heads",
        options=FLOAT32,
        settings=QUICK,
        folds=3,
    )
    assert moved.reused
    assert moved.run.folder == done.run.folder
    assert read_run(done.run.folder).config["data"] == str(tmp_path / "demo")
    sweep(place)  # and back again


def test_only_comparable_runs_compete(place: Path, done: Sweep, tmp_path: Path) -> None:
    """A better score on other labels or other folds says nothing."""
    heads = tmp_path / "heads"
    for number, changes in enumerate([{"data_hash": "other"}, {"splits_hash": "other"}, {}]):
        copy = Path(shutil.copytree(done.run.folder, heads / str(number)))
        config = {**json.loads((copy / "run.json").read_text()), **changes}
        if changes:
            config["leaderboard"][0]["macro_f1"]["value"] = 0.99
        (copy / "run.json").write_text(json.dumps(config))
        os.utime(copy / "run.json", (number, number))
    (heads / "foreign").mkdir()
    (heads / "foreign" / "run.json").write_text("{}")
    assert best_run(heads).folder.name == "2"


def test_saved_splits_are_reused(place: Path, done: Sweep) -> None:
    other = sweep(place, split_dir=done.run.folder, fusion=["none"], settings=HeadSettings(seed=9))
    assert (other.run.folder / "folds.csv").read_bytes() == (done.run.folder / "folds.csv").read_bytes()


def test_duplicates_share_a_fold(place: Path, done: Sweep) -> None:
    folds = {row["id"]: row["fold0"] for row in rows(done.run.folder / "folds.csv")}
    text = {path.stem: path.read_bytes() for path in (place / "demo" / "data").glob("*.txt")}
    first: dict[bytes, str] = {}
    pairs = [(first.setdefault(text[id], id), id) for id in folds if id in text]
    repeated = [(a, b) for a, b in pairs if a != b]
    assert repeated
    assert all(folds[a] == folds[b] for a, b in repeated)


def test_the_run_records_what_it_is_made_of(done: Sweep) -> None:
    config = json.loads((done.run.folder / "run.json").read_text())
    assert [tower.spec.name for tower in done.run.towers] == BUILT_IN
    assert sum(config["class_counts"].values()) == 108
    assert config["settings"]["seed"] == 42
    assert done.run.options.dtype == FLOAT32.dtype


def test_best_run_is_the_best_on_the_same_data(place: Path, done: Sweep) -> None:
    worse = sweep(place, fusion=["none"], modalities=["text"])
    assert worse.run.leaderboard[0]["macro_f1"]["value"] < done.run.leaderboard[0]["macro_f1"]["value"]
    found = best_run(place / "heads", str(place / "demo"))
    assert found.leaderboard[0]["macro_f1"]["value"] >= done.run.leaderboard[0]["macro_f1"]["value"]
    with pytest.raises(RunError, match="no finished run on"):
        best_run(place / "heads", "elsewhere")
    with pytest.raises(RunError, match="no finished run;"):
        best_run(place / "nowhere")


def test_an_unfinished_run_is_no_run(place: Path, done: Sweep, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(done.run.folder, tmp_path / "run"))
    (copy / "run.json").unlink()
    with pytest.raises(RunError, match="no finished run here"):
        read_run(copy)
    (copy / "run.json").write_text("{}")
    with pytest.raises(RunError, match="not a run of this version"):
        read_run(copy)


def test_one_modality_has_no_both(place: Path) -> None:
    run = train_heads(
        place / "demo",
        ["hashing"],
        cache=place / "cache",
        out=place / "heads",
        options=FLOAT32,
        fusion=["none"],
        folds=3,
    ).run
    assert [entry["modalities"] for entry in run.leaderboard] == ["text"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fusion": ["nope"]}, HeadError, "--fusion nope: use all, none, or some of concat"),
        ({"baselines": ["concat"]}, HeadError, "--baselines concat: use all, none, or some of logistic"),
        ({"fusion": ["none"], "baselines": ["none"]}, HeadError, "no head was asked for"),
        ({"modalities": ["sound"]}, HeadError, "--modalities sound: use some of both, text, image"),
        ({"device": "abacus"}, ConfigError, "--device abacus"),
        ({"settings": HeadSettings(epochs=3, learning_rate=1e30)}, HeadError, "diverged; lower --learning-rate"),
        ({"cache": "nowhere"}, CacheMissError, "not in the cache for hashing.*run mmfeat extract"),
    ],
)
def test_wrong_input_gets_one_line(place: Path, changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        sweep(place, **{"out": place / "wrong", **changes})
    assert "\n" not in str(caught.value)
