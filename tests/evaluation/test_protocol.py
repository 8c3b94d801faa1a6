"""Protocols: the files of a holdout, splits that are reused, and test rows that nothing but scores depends on."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmfeat.errors import ConfigError
from mmfeat.evaluation.protocol import Protocol
from mmfeat.extraction.extract import extract_features
from mmfeat.heads.registry import HeadSettings
from mmfeat.samples.dataset import read_samples
from mmfeat.sweep.search import Plan
from tests.sweep.small_sweeps import FLOAT32, NO_HEADS, rows, sweep

SEARCHED = Plan(HeadSettings(epochs=2), {"learning_rate": [1e-4, 1e-2]})


def turned(place: Path, to: Path, ids: set[str]) -> Path:
    """The demo data with other labels for these samples."""
    data = Path(shutil.copytree(place / "demo", to))
    other = {"positive": "negative", "negative": "neutral", "neutral": "positive"}
    lines = [line.split(",") for line in (data / "train.txt").read_text().splitlines()]
    (data / "train.txt").write_text("".join(f"{id},{other[tag] if id in ids else tag}\n" for id, tag in lines))
    return data


@pytest.mark.parametrize("shares", [(8, 1, 1), (8, 2)], ids=["8:1:1", "8:2"])
def test_labels_of_test_rows_change_scores_and_nothing_else(
    place: Path, tmp_path: Path, shares: tuple[float, ...]
) -> None:
    protocol = Protocol("holdout", seeds=2, shares=shares, split_dir=str(tmp_path / "splits"))
    arguments: dict[str, Any] = {"protocol": protocol, "plan": SEARCHED, "out": tmp_path / "heads"}
    run = sweep(place, **arguments).run
    test = {row["guid"] for row in rows(tmp_path / "splits" / "test_split.csv")}
    other = sweep(place, data=turned(place, tmp_path / "demo", test), **arguments).run
    assert other.folder.name != run.folder.name
    board = {(entry.head, entry.modalities): entry for entry in other.leaderboard}
    assert len(board) == len(run.leaderboard) == 6
    for entry in run.leaderboard:
        theirs = board[entry.head, entry.modalities]
        assert entry.macro_f1 != theirs.macro_f1
        assert entry.settings == theirs.settings
        ours, others = (rows(each.head_folder(entry) / "out_of_fold.csv") for each in (run, other))
        assert [{**row, "label": ""} for row in ours] == [{**row, "label": ""} for row in others]
        assert {row["id"] for row in ours} == test
        assert all(row["label"] != row_of_theirs["label"] for row, row_of_theirs in zip(ours, others, strict=True))
        for path in (run.head_folder(entry) / "trials").glob("*.safetensors"):
            mine, yours = load_file(path), load_file(other.head_folder(entry) / "trials" / path.name)
            for name, values in mine.items():
                np.testing.assert_array_equal(values, yours[name])


def test_a_holdout_is_three_files_and_its_test_part_alone_is_scored(place: Path, tmp_path: Path) -> None:
    result = sweep(place, **NO_HEADS, protocol=Protocol("holdout", seeds=2), out=tmp_path)
    parts = {name: rows(result.run.folder / f"{name}_split.csv") for name in ("train", "val", "test")}
    ids = [row["guid"] for part in parts.values() for row in part]
    assert len(ids) == len(set(ids)) == 108
    assert {name: round(len(part) / 108, 1) for name, part in parts.items()} == {"train": 0.8, "val": 0.1, "test": 0.1}
    labels = dict(line.split(",") for line in (place / "demo" / "train.txt").read_text().splitlines())
    assert all(row["tag"] == labels[row["guid"]] for part in parts.values() for row in part)
    (entry,) = result.run.leaderboard
    assert entry.samples == len(parts["test"])
    scored = [row["id"] for row in rows(result.run.head_folder(entry) / "out_of_fold.csv")]
    assert sorted(scored) == sorted(row["guid"] for row in parts["test"])
    assert not (result.run.folder / "folds.csv").exists()


def test_eight_to_two_validates_within_the_training_part(place: Path, tmp_path: Path) -> None:
    run = sweep(place, **NO_HEADS, protocol=Protocol("holdout", seeds=2, shares=(8, 2)), out=tmp_path).run
    train, validation, test = (rows(run.folder / f"{name}_split.csv") for name in ("train", "val", "test"))
    assert validation == []
    assert round(len(test) / 108, 1) == 0.2
    roles = Counter(row["role"] for row in train)
    assert set(roles) == {"train", "validation-1", "validation-2"}
    assert len(train) + len(test) == 108


@pytest.mark.parametrize(("kind", "file"), [("kfold", "folds.csv"), ("holdout", "test_split.csv")])
def test_splits_are_written_where_there_are_none_and_then_reused(
    place: Path, tmp_path: Path, kind: str, file: str
) -> None:
    folder = tmp_path / "splits"
    first = sweep(place, **NO_HEADS, protocol=Protocol(kind, 2, 2, split_dir=str(folder)), out=tmp_path / "a")
    assert first.new_splits == folder
    before = (folder / file).read_bytes()
    again = sweep(place, **NO_HEADS, protocol=Protocol(kind, 5, 2, seed=9, split_dir=str(folder)), out=tmp_path / "b")
    assert again.new_splits is None
    assert (folder / file).read_bytes() == before
    assert (again.run.folder / file).read_bytes() == (first.run.folder / file).read_bytes()
    assert again.run.config.splits_hash == first.run.config.splits_hash
    from_a_run = Protocol(kind, 2, 2, seed=5, split_dir=str(first.run.folder))
    assert (sweep(place, **NO_HEADS, protocol=from_a_run, out=tmp_path / "c").run.folder / file).read_bytes() == before


def test_the_same_splits_are_the_same_run_wherever_they_lie(place: Path, tmp_path: Path) -> None:
    first = sweep(place, **NO_HEADS, protocol=Protocol(folds=2, seeds=2), out=tmp_path)
    protocol = Protocol(folds=2, seeds=2, split_dir=str(first.run.folder))
    assert sweep(place, **NO_HEADS, protocol=protocol, out=tmp_path).reused


def test_splits_of_the_other_protocol_are_refused(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "splits"
    sweep(place, **NO_HEADS, protocol=Protocol("holdout", seeds=2, split_dir=str(folder)), out=tmp_path)
    with pytest.raises(ConfigError, match=r"--protocol kfold: .*splits holds a holdout; name another --split-dir"):
        sweep(place, **NO_HEADS, protocol=Protocol("kfold", 2, split_dir=str(folder)), out=tmp_path)
    reused = sweep(place, **NO_HEADS, protocol=Protocol(seeds=2, split_dir=str(folder)), out=tmp_path).run
    assert reused.config.protocol.kind == "holdout"


def with_split(path: Path, *parts: str) -> dict[str, Any]:
    """Arguments of a sweep over a table whose column `split` has these parts in turns."""
    lines = [f"s{n},{['good sun', 'bad rain'][n // 7 % 2]} {n},{n // 7 % 2},{parts[n % len(parts)]}" for n in range(84)]
    path.write_text("\n".join(["id,text,label,split", *lines]) + "\n")
    extract_features(path, ["hashing"], cache=path.parent / "cache", options=FLOAT32)
    return {"data": path, "encoders": ["hashing"], "cache": path.parent / "cache", "out": path.parent / "heads"}


def test_the_split_of_the_data_is_taken_unless_another_is_asked_for(place: Path, tmp_path: Path) -> None:
    given = with_split(tmp_path / "t.csv", "train", "Train", "dev", "test")
    result = sweep(place, **NO_HEADS, **given, protocol=Protocol(seeds=2))
    assert any("heads learn from train, choose on validation and are scored on test" in note for note in result.notes)
    assert result.run.config.protocol.kind == "given"
    parts = {name: {row["guid"] for row in rows(result.run.folder / f"{name}_split.csv")} for name in ("val", "test")}
    assert parts == {"val": {f"s{n}" for n in range(2, 84, 4)}, "test": {f"s{n}" for n in range(3, 84, 4)}}
    (entry,) = result.run.leaderboard
    assert {row["id"] for row in rows(result.run.head_folder(entry) / "out_of_fold.csv")} == parts["test"]
    folds = sweep(place, **NO_HEADS, **given, protocol=Protocol("kfold", 2, 2)).run
    assert folds.config.folds == ("fold0", "fold1")
    again = Protocol(seeds=2, split_dir=str(result.run.folder))
    assert sweep(place, **NO_HEADS, **given, protocol=again).reused


def test_validation_data_alone_are_scored_and_training_data_chosen_on(place: Path, tmp_path: Path) -> None:
    given = with_split(tmp_path / "t.csv", "train", "train", "valid")
    run = sweep(place, **NO_HEADS, **given, protocol=Protocol(seeds=2)).run
    assert {row["guid"] for row in rows(run.folder / "test_split.csv")} == {f"s{n}" for n in range(2, 84, 3)}
    roles = Counter(row["role"] for row in rows(run.folder / "train_split.csv"))
    assert set(roles) == {"train", "validation-1", "validation-2"}


def test_a_split_that_not_every_sample_has_is_none(place: Path, tmp_path: Path) -> None:
    given = with_split(tmp_path / "t.csv", "train", "test", "other")
    assert "the column split is no split: 'other' is none of train, val, test" in read_samples(given["data"]).notes
    assert sweep(place, **NO_HEADS, **given, protocol=Protocol(folds=2)).run.config.protocol.kind == "kfold"
    with pytest.raises(ConfigError, match="--protocol given: not every labelled sample is of train, val or test"):
        sweep(place, **NO_HEADS, **given, protocol=Protocol("given"))


def test_near_duplicates_across_the_split_of_the_data_are_told(place: Path, tmp_path: Path) -> None:
    given = with_split(tmp_path / "t.csv", "train", "train", "test")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    text = "a long and specific text about the green lamp of our neighbours in the quiet market street"
    lines[1], lines[3] = f"s0,{text},0,train", f"s2,{text},0,test"
    (tmp_path / "t.csv").write_text("\n".join(lines))
    extract_features(tmp_path / "t.csv", ["hashing"], cache=tmp_path / "cache", options=FLOAT32)
    notes = sweep(place, **NO_HEADS, **given, protocol=Protocol(seeds=1)).notes
    assert any("1 scored sample of the data's own split have near duplicates elsewhere" in note for note in notes)
