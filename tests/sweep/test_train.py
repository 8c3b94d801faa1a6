"""The sweep on real cached vectors: what it writes, what it reuses, and that it never peeks."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmfeat.cli.runs import show_run
from mmfeat.errors import CacheMissError, ConfigError, DataError, HeadError, RunError
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.evaluation.protocol import Protocol
from mmfeat.extraction.extract import extract_features
from mmfeat.heads.registry import HeadSettings
from mmfeat.reproduce import reproduce_run
from mmfeat.runs.compare import PARTITIONS, read_partitions
from mmfeat.runs.run import Run, best_run, comparable_runs, overlooked_run, read_run
from mmfeat.samples.dataset import read_samples
from mmfeat.samples.demo import write_demo
from mmfeat.samples.labels import indicator
from mmfeat.sweep.forecast import forecast_heads
from mmfeat.sweep.search import Plan
from mmfeat.sweep.search_space import Range
from mmfeat.sweep.train import Sweep
from tests.sweep.small_sweeps import BUILT_IN, FLOAT32, NO_HEADS, results, rows, stamps, sweep


@pytest.fixture(scope="module")
def done(place: Path) -> Sweep:
    return sweep(place, modalities=["both", "text", "image"])


@pytest.fixture(scope="module")
def plain(place: Path) -> Run:
    """A run on both modalities, by one worker."""
    return sweep(place, workers=1).run


def test_every_head_on_every_modality_is_ranked(done: Sweep) -> None:
    board = done.run.leaderboard
    assert {(e.head, e.modalities) for e in board} == {
        *((head, on) for head in ("concat", "knn", "logistic") for on in ("both", "text", "image")),
        *((kind, "ensemble") for kind in ("mean", "greedy", "stacking", "product")),
    }
    values = [entry.macro_f1.value for entry in board]
    assert values == sorted(values, reverse=True)
    assert board[0].tie
    assert board[0].behind_best.value == 0
    assert all(e.macro_f1.low <= e.macro_f1.value <= e.macro_f1.high for e in board)
    assert all(entry.tie == (entry.behind_best.p_holm >= 0.05) for entry in board)
    written = rows(done.run.leaderboard_file)
    assert [(row["head"], row["modalities"]) for row in written] == [(e.head, e.modalities) for e in board]


def test_scores_are_those_of_the_saved_out_of_fold_predictions(done: Sweep) -> None:
    classes = list(done.run.classes)
    for entry in done.run.leaderboard:
        out_of_fold = rows(done.run.head_folder(entry) / "out_of_fold.csv")
        assert len(out_of_fold) == 108
        labels, predicted = (
            indicator([classes.index(row[name]) for row in out_of_fold], 3) for name in ("label", "predicted_1")
        )
        assert macro_f1(labels, predicted) == pytest.approx(entry.macro_f1.value)
        if len(entry.seeds["macro_f1"].values) == 1:
            assert entry.seeds["macro_f1"].mean == pytest.approx(entry.macro_f1.value)
        assert all(abs(sum(float(row[f"p_{name}"]) for name in classes) - 1) < 1e-5 for row in out_of_fold)
    assert {len(entry.seeds["macro_f1"].values) for entry in done.run.leaderboard} == {1, 2}


def test_an_unchanged_configuration_is_not_trained_again(place: Path, done: Sweep) -> None:
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in done.run.folder.rglob("*.*")}
    os.utime(done.run.folder / "run.json", (1, 1))
    again = sweep(place, modalities=["both", "text", "image"])
    assert again.reused
    assert again.run.folder == done.run.folder
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in done.run.folder.rglob("*.*")} == before
    assert (done.run.folder / "run.json").stat().st_mtime > 1  # what was asked for last, submit goes on with
    assert not sweep(place, modalities=["both", "text", "image"], function=forecast_heads).heads


def test_further_partitions_are_runs_of_their_own_whose_spread_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {**NO_HEADS, "out": tmp_path, "ensembles": False, "protocol": Protocol(folds=2, seeds=1)}
    assert sum(count for _, count, _ in sweep(place, **asked, fold_seeds=2, function=forecast_heads).by_head) == 6
    alone = sweep(place, **asked).run
    assert read_partitions(alone) is None
    before = stamps(alone.folder)
    several = sweep(place, **asked, fold_seeds=2)
    kept = stamps(alone.folder)
    assert (several.run.folder, several.reused) == (alone.folder, False)
    assert before.keys() ^ kept.keys() == {PARTITIONS}
    runs = [read_run(tmp_path / name) for name in several.partitions.runs]
    assert [run.config.protocol.seed for run in runs] == [42, 43]
    assert runs[0].config.splits_hash != runs[1].config.splits_hash
    scores = [run.leaderboard[0].headline.value for run in runs]
    (spread,) = several.partitions.entries
    assert (spread.mean, spread.span) == (pytest.approx(sum(scores) / 2), f"{min(scores):.3f} to {max(scores):.3f}")
    second = sweep(place, **{**asked, "protocol": Protocol(folds=2, seeds=1, seed=43)})
    assert (second.run.folder, second.reused) == (runs[1].folder, True)
    trained = stamps(tmp_path)
    again = sweep(place, **asked, fold_seeds=2)
    assert (again.reused, again.partitions) == (True, several.partitions)
    inodes = {name: inode for name, (inode, _) in trained.items()}
    assert {name: inode for name, (inode, _) in stamps(tmp_path).items()} == inodes
    assert not sweep(place, **asked, fold_seeds=2, function=forecast_heads).heads
    assert comparable_runs(tmp_path)[-1].folder == alone.folder  # the one that other commands take
    assert [overlooked_run(run) for run in runs] == [None, None], "the better score is luck"
    show_run(again.run, {})
    assert f"{spread.span} over 2" in " ".join(capsys.readouterr().out.split())
    (tmp_path / runs[0].name / PARTITIONS).write_text("{}")
    with pytest.raises(RunError, match="not what was saved"):
        read_partitions(again.run)
    for changes, words in (
        ({"protocol": Protocol(split_dir=str(tmp_path / "splits"))}, "--split-dir"),
        ({"protocol": Protocol("given")}, "given"),
        ({"fold_seeds": 0}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            sweep(place, **{**asked, "fold_seeds": 2, **changes})
    assert not (tmp_path / "splits").exists()


def test_a_forecast_counts_every_training_and_writes_no_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the further seeds in a race a third; files of splits are left to the sweep. Of many rows, parts are tried."""
    before = sorted((place / "heads").rglob("*"))
    space = {"learning_rate": (1e-3, 1e-4)}
    splits = Protocol(folds=2, seeds=4, split_dir=str(place / "splits"))
    asked = {"function": forecast_heads, "protocol": splits, "modalities": ["both"]}
    searched = sweep(place, **asked, plan=Plan(HeadSettings(epochs=2), space))
    assert [(part.head, part.trainings) for part in searched.heads] == [("concat", 20), ("knn", 3), ("logistic", 3)]
    monkeypatch.setattr("mmfeat.sweep.forecast.ROWS", (40, 80))
    raced = sweep(place, **asked, plan=Plan(HeadSettings(epochs=2), race=True, refit=False))
    assert [part.trainings for part in raced.heads] == [4, 2, 2]
    assert 0 < raced.seconds < searched.seconds
    assert raced.bytes > 0
    assert sorted((place / "heads").rglob("*")) == before
    assert not (place / "splits").exists()


def test_two_runs_of_one_configuration_agree_whatever_the_workers(place: Path, plain: Run, tmp_path: Path) -> None:
    other = sweep(place, out=tmp_path, workers=3).run
    assert plain.folder.name == other.folder.name
    assert results(plain) == results(other)
    assert len(results(plain)) >= 19


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": Protocol(folds=3, seeds=2)},
        {"protocol": Protocol(folds=2, seeds=1)},
        {"protocol": Protocol(folds=2, seeds=2, seed=1)},
        {"protocol": Protocol(folds=2, seeds=2, grouped=False)},
        {"protocol": Protocol("holdout", seeds=2)},
        {"plan": Plan(HeadSettings(epochs=3))},
        {"plan": Plan(HeadSettings(epochs=2), adjustment=0.0)},
        {"plan": Plan(HeadSettings(epochs=2), refit=False)},
        {"modalities": ["image"]},
        {"baselines": ["ridge"]},
        {"ensembles": False},
    ],
)
def test_another_configuration_is_another_run(place: Path, changes: dict) -> None:
    first = sweep(place, **NO_HEADS)
    other = sweep(place, **{**NO_HEADS, **changes})
    assert other.run.folder != first.run.folder
    assert not other.reused


def test_the_rows_of_a_fold_take_no_part_in_its_training(place: Path, plain: Run, tmp_path: Path) -> None:
    """Other labels on the test samples of fold0 change nothing of what its heads say about them."""
    run = plain
    folds = rows(run.folder / "folds.csv")
    test = {row["id"] for row in folds if row["fold0"] == "test"}
    turn_labels(shutil.copytree(place / "demo", tmp_path / "demo"), test)
    protocol = Protocol(folds=2, seeds=2, split_dir=str(run.folder))
    other = sweep(place, data=tmp_path / "demo", out=tmp_path / "heads", protocol=protocol).run
    assert other.folder.name != run.folder.name
    tested = [number for number, row in enumerate(folds) if row["id"] in test]
    rest = [number for number in range(len(folds)) if number not in tested]
    for head in ("concat", "knn", "logistic"):
        ours, theirs = (
            load_file(each.folder / f"{head}-both" / "trials" / "0000.safetensors")["logits"] for each in (run, other)
        )
        np.testing.assert_array_equal(ours[:, tested], theirs[:, tested])
        assert not np.array_equal(ours[:, rest], theirs[:, rest])
    assert len(tested) > 30


def turn_labels(data: Path, ids: set[str]) -> None:
    """Other labels for these samples."""
    turned = {"positive": "negative", "negative": "neutral", "neutral": "positive"}
    lines = [line.split(",") for line in (data / "train.txt").read_text().splitlines()]
    (data / "train.txt").write_text("".join(f"{id},{turned[tag] if id in ids else tag}\n" for id, tag in lines))


def test_a_run_goes_with_data_that_moved(place: Path, done: Sweep, tmp_path: Path) -> None:
    shutil.copytree(place / "demo", tmp_path / "demo")
    moved = sweep(place, data=tmp_path / "demo", modalities=["both", "text", "image"])
    assert moved.reused
    assert moved.run.folder == done.run.folder
    assert read_run(done.run.folder).config.data == str(tmp_path / "demo")
    sweep(place, modalities=["both", "text", "image"])  # and back again


def test_only_comparable_runs_compete(place: Path, done: Sweep, tmp_path: Path) -> None:
    """A better score on other labels or other folds says nothing."""
    heads = tmp_path / "heads"
    for number, changes in enumerate([{"data_hash": "other"}, {"splits_hash": "other"}, {}]):
        copy = Path(shutil.copytree(done.run.folder, heads / str(number)))
        config = {**done.run.to_json(), **changes}
        if changes:
            config["leaderboard"][0]["macro_f1"]["value"] = 0.99
        (copy / "run.json").write_text(json.dumps(config))
        os.utime(copy / "run.json", (number, number))
    (heads / "foreign").mkdir()
    (heads / "foreign" / "run.json").write_text("{}")
    assert best_run(heads).folder.name == "2"
    overlooked = overlooked_run(best_run(heads))
    assert overlooked is not None
    assert overlooked.folder.name in ("0", "1")
    assert overlooked_run(overlooked) is None, "no other scored higher"
    assert overlooked_run(best_run(heads), head="nobody") is None


def test_duplicates_share_a_fold(place: Path, done: Sweep) -> None:
    folds = {row["id"]: row["fold0"] for row in rows(done.run.folder / "folds.csv")}
    photo = {path.stem: path.read_bytes() for path in (place / "demo" / "data").glob("*.[jJpP]*")}
    first: dict[bytes, str] = {}
    pairs = [(first.setdefault(photo[id], id), id) for id in folds if id in photo]
    repeated = [(a, b) for a, b in pairs if a != b]
    assert repeated
    assert all(folds[a] == folds[b] for a, b in repeated)


def test_the_run_records_what_it_is_made_of(done: Sweep) -> None:
    config = json.loads((done.run.folder / "run.json").read_text())
    assert [tower.spec.name for tower in done.run.towers] == BUILT_IN
    assert sum(config["class_counts"].values()) == 108
    assert config["protocol"]["seed"] == 42
    assert config["plan"]["settings"]["epochs"] == 2
    assert done.run.options.dtype == FLOAT32.dtype


def test_best_run_is_the_best_on_the_same_data(place: Path, done: Sweep) -> None:
    worse = sweep(place, **NO_HEADS)
    assert worse.run.leaderboard[0].macro_f1.value < done.run.leaderboard[0].macro_f1.value
    found = best_run(place / "heads", str(place / "demo"))
    assert found.leaderboard[0].macro_f1.value >= done.run.leaderboard[0].macro_f1.value
    with pytest.raises(RunError, match="no finished run on"):
        best_run(place / "heads", "elsewhere")
    with pytest.raises(RunError, match="no finished run;"):
        best_run(place / "nowhere")


def test_an_unfinished_run_is_no_run(done: Sweep, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(done.run.folder, tmp_path / "run"))
    (copy / "run.json").unlink()
    with pytest.raises(RunError, match="no finished run here"):
        read_run(copy)
    (copy / "run.json").write_text("{}")
    with pytest.raises(RunError, match="not a run of this version"):
        read_run(copy)


def test_one_modality_alone_is_trained_where_that_matters_unless_it_is_named(tmp_path: Path) -> None:
    """Far behind `both`, text and photos are seen by ridge alone; a reproduction repeats that, a spared head is named."""
    write_demo(tmp_path / "demo", pairs=240)
    extract_features(tmp_path / "demo", BUILT_IN, cache=tmp_path / "cache", options=FLOAT32)
    wanted = {"fusion": "none", "baselines": "prior,ridge", "ensembles": False}
    run = sweep(tmp_path, **wanted, modalities="auto").run
    assert {entry.name for entry in run.leaderboard} == {"prior-both", "ridge-both", "ridge-text", "ridge-image"}
    assert reproduce_run(run, tmp_path / "again").identical
    with pytest.raises(
        RunError, match=r"no prior on text; .*; mmfeat heads --modalities both,text trains all heads on"
    ):
        run.entry("prior", "text")
    with pytest.raises(RunError, match=r"no knn on text; the run has [a-z ,]*$"):
        run.entry("knn", "text")
    named = sweep(tmp_path, **wanted, modalities="both,text").run
    assert {entry.name for entry in named.leaderboard} == {"prior-both", "ridge-both", "prior-text", "ridge-text"}


def test_one_modality_has_no_both(place: Path) -> None:
    run = sweep(place, ["hashing"], fusion=["none"], modalities=["both", "text", "image"], ensembles=False).run
    assert {entry.modalities for entry in run.leaderboard} == {"text"}


def test_views_are_trained_with_and_listed(place: Path) -> None:
    """Augmented photos are vectors of their own; a run with them is another run, and names them."""
    options = replace(FLOAT32, views=1)
    extract_features(place / "demo", BUILT_IN, cache=place / "cache", options=options)
    few = {"baselines": ["none"], "protocol": Protocol("holdout", seeds=1)}
    plain, viewed = (sweep(place, options=each, **few).run for each in (FLOAT32, options))
    assert plain.folder != viewed.folder
    assert sorted(tower.spec.view for tower in viewed.towers) == ["none", "none", "train:1"]
    assert plain.entry("concat").log_loss != viewed.entry("concat").log_loss


def test_cross_attention_is_left_out_of_all_without_tokens_and_missed_by_name(place: Path, tmp_path: Path) -> None:
    quick = {"modalities": ["both"], "ensembles": False, "plan": Plan(HeadSettings(epochs=1))}
    once = {**quick, "protocol": Protocol("holdout", seeds=1), "out": tmp_path / "heads"}
    heads = {entry.head for entry in sweep(place, fusion=["all"], baselines=["none"], **once).run.leaderboard}
    assert heads == {"late", "concat", "gated", "film", "film-concat"}
    with pytest.raises(HeadError, match="--fusion cross-attention on both needs token states; run") as error:
        sweep(place, fusion=["cross-attention"], **once)
    remedy = shlex.split(re.findall("run (mmfeat extract .*) first", str(error.value))[0])[1:]
    assert remedy[1:5] == ["--data", str(place / "demo"), "--encoders", "hashing,hog"]
    assert (remedy[5:7], remedy[-2:]) == (["--cache", str(place / "cache")], ["--outputs", "pooled,tokens"])
    pooled = sweep(place, fusion=["cross-attention"], baselines=["none"], attend="pooled", **once).run
    assert [entry.head for entry in pooled.leaderboard] == ["cross-attention"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"fusion": ["nope"]}, HeadError, "--fusion nope: use all, none, or some of late, concat"),
        ({"baselines": ["concat"]}, HeadError, "--baselines concat: use all, none, or some of prior, knn"),
        ({"fusion": ["none"], "baselines": ["none"]}, HeadError, "no head was asked for"),
        ({"modalities": ["sound"]}, HeadError, "--modalities sound: use auto, or some of both, text, image"),
        ({"device": "abacus"}, ConfigError, "--device abacus"),
        ({"engine": "abacus"}, ConfigError, "--engine abacus: use one of local, ray"),
        ({"task": "abacus"}, ConfigError, "--task abacus: use one of multiclass, multilabel, ordinal, regression"),
        ({"task": "regression"}, ConfigError, "--baselines logistic: chooses among classes"),
        ({"attend": "everything"}, ConfigError, "--attend everything: use one of tokens, pooled"),
        ({"protocol": Protocol(folds=60)}, DataError, "--folds 60"),
        ({"cache": "nowhere"}, CacheMissError, "not in the cache for hashing.*run mmfeat extract"),
    ],
)
def test_wrong_input_gets_one_line_and_no_run(place: Path, changes: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        sweep(place, **{"out": place / "wrong", **changes})
    assert "\n" not in str(caught.value)
    assert not (place / "wrong").exists()


def test_lightgbm_that_is_missing_is_named_before_anything_is_trained(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(HeadError, match=r"--baselines forest needs LightGBM; pip install -e .*\[boosting\]"):
        sweep(place, fusion=("none",), baselines=("knn", "forest"))


def test_a_device_that_is_not_there_is_told_although_nothing_is_to_do(place: Path, done: Sweep) -> None:
    with pytest.raises(ConfigError, match="--device cuda:99: torch sees"):
        sweep(place, device="cuda:99")


def test_a_class_that_no_tested_sample_has_is_told(place: Path, tmp_path: Path) -> None:
    labels = {sample.id: sample.label for sample in read_samples(place / "demo").labelled}
    rare = sorted(set(labels.values()))[0]
    parts = {"train": ["guid,tag"], "val": ["guid,tag"], "test": ["guid,tag"]}
    for number, (id, label) in enumerate(labels.items()):
        part = "train" if number % 3 == 0 or (label == rare and number % 3 == 2) else ("val", "test")[number % 3 - 1]
        parts[part].append(f"{id},{label}")
    for part, lines in parts.items():
        (tmp_path / f"{part}_split.csv").write_text("\n".join(lines))
    found = sweep(
        place, protocol=Protocol("holdout", seeds=1, split_dir=str(tmp_path)), **{**NO_HEADS, "out": tmp_path}
    )
    assert f"no scored sample is {rare}, which counts as an F1 of 0 in macro-F1" in found.notes


def test_wrong_plans_and_protocols_say_so_at_once() -> None:
    rising = {"learning_rate": Range(1e-4, 1e-2)}
    with pytest.raises(ConfigError, match="--learning-rate: a grid has no ranges; list values, or use --search random"):
        Plan(HeadSettings(), rising)
    with pytest.raises(ConfigError, match=r"--learning-rate: a range has no end of settings to try; .* --trials"):
        Plan(HeadSettings(), rising, "random")
    Plan(HeadSettings(), rising, "random", trials=1)
    with pytest.raises(ConfigError, match="--protocol luck: use one of auto, kfold, holdout"):
        Protocol("luck")
    for shares in ((8,), (8, 0, 1), (8, float("nan"))):
        with pytest.raises(ConfigError, match=r"--split 8.*: write train:validation:test, as 8:1:1, or train:test"):
            Protocol("holdout", shares=shares)


def test_a_head_that_diverges_is_one_line_and_the_others_are_kept(place: Path, tmp_path: Path) -> None:
    wild = {"plan": Plan(HeadSettings(epochs=2, learning_rate=1e30)), "out": tmp_path / "heads"}
    with pytest.raises(HeadError, match="lower --learning-rate") as caught:
        sweep(place, workers=1, **wild)
    assert "\n" not in str(caught.value)
    (folder,) = (tmp_path / "heads").iterdir()
    with pytest.raises(RunError, match="no finished run here"):
        read_run(folder)


def test_what_was_finished_stays_as_it_is(place: Path, plain: Run, tmp_path: Path) -> None:
    """A run that lost its end is finished from its entries, of which nothing is written again."""
    run = read_run(shutil.copytree(plain.folder, tmp_path / "heads" / plain.folder.name))
    before, told = stamps(run.folder), results(run)
    for name in ("run.json", "leaderboard.json", "leaderboard.csv", "ablation.csv"):
        (run.folder / name).unlink()
    again = sweep(place, out=tmp_path / "heads")
    assert not again.reused
    assert results(again.run) == told
    heads = [name for name in before if name.split("/")[0] in ("concat-both", "knn-both", "logistic-both")]
    assert len(heads) > 10
    assert {name: stamps(run.folder)[name] for name in heads} == {name: before[name] for name in heads}
