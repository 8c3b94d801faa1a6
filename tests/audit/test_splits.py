"""Leaks across given splits of both kinds, and labels that a run's predictions doubt."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mmfeat.audit.audit import DRAWS, audit_data, class_balance
from mmfeat.audit.label_errors import find_label_errors, read_opinions
from mmfeat.audit.result import Audit
from mmfeat.errors import RunError
from mmfeat.evaluation.protocol import Protocol
from mmfeat.extraction.extract import extract_features
from mmfeat.runs.run import RUN_FILE, Run
from mmfeat.sweep.train import train_heads
from tests.audit.audited import FAULTY, rows, write_folder
from tests.sweep.small_sweeps import FLOAT32, QUICK, SMALL, make_place, sweep

LABELLED = [sample[0] for sample in FAULTY if sample[3]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "tweets", FAULTY)


def write_folds(folder: Path, roles: dict[str, list[str]]) -> Path:
    folder.mkdir()
    lines = [["id", "one", "two"], *([id, *each] for id, each in roles.items())]
    (folder / "folds.csv").write_text("\n".join(map(",".join, lines)) + "\n")
    return folder


def write_holdout(folder: Path, **parts: list[str]) -> Path:
    folder.mkdir()
    for name, ids in parts.items():
        (folder / f"{name}_split.csv").write_text("\n".join(["guid,tag", *(f"{id},pos" for id in ids)]) + "\n")
    return folder


def leaks(audit: Audit) -> set[tuple[str, ...]]:
    columns = ("fold", "part", "id", "twin_id", "twin_part", "modality", "kind")
    found = rows(audit.folder / "leaks.csv")
    return {tuple(row[name] for name in columns) for row in found if row["part"] != "unlabelled"}


def test_twins_across_folds_leak(data: Path, tmp_path: Path) -> None:
    roles = {id: ["train", "test"] if id.endswith("1") else ["test", "train"] for id in LABELLED}
    audit = audit_data(data, split_dir=write_folds(tmp_path / "s", roles), out=tmp_path / "audit")
    assert leaks(audit) == {
        ("one", "test", "a2", "a1", "train", "text", "exact"),
        ("one", "test", "a2", "a1", "train", "image", "near"),
        ("one", "test", "a2", "a1", "train", "pair", "near"),
        ("one", "test", "b2", "b1", "train", "text", "near"),
        ("one", "test", "c2", "c1", "train", "image", "exact"),
        ("two", "test", "a1", "a2", "train", "text", "exact"),
        ("two", "test", "a1", "a2", "train", "image", "near"),
        ("two", "test", "a1", "a2", "train", "pair", "near"),
        ("two", "test", "b1", "b2", "train", "text", "near"),
        ("two", "test", "c1", "c2", "train", "image", "exact"),
    }
    assert audit.leaks["samples"] == 6
    assert audit.leaks["tested"] == {"one": 4, "two": 5}
    assert set(audit.balance["parts"]) == {"all", "one", "two"}


def test_twins_on_one_side_do_not_leak(data: Path, tmp_path: Path) -> None:
    roles = {id: ["test", "train"] if id[0] in "ab" else ["train", "test"] for id in LABELLED}
    audit = audit_data(data, split_dir=write_folds(tmp_path / "s", roles), out=tmp_path / "audit")
    assert leaks(audit) == set()
    assert audit.leaks["samples"] == 0
    assert audit.shared["text"] == 1  # those of the unlabelled sample are told all the same


def test_a_holdout_whose_parts_share_a_sample(data: Path, tmp_path: Path) -> None:
    """What `mmfeat heads` would refuse; the audit says which sample it is."""
    parts = {"train": ["a1", "b1", "c1", "d1", "e1"], "val": ["b2", "d2"], "test": ["c2", "e1", "gone"]}
    audit = audit_data(data, split_dir=write_holdout(tmp_path / "s", **parts), out=tmp_path / "audit")
    assert leaks(audit) == {
        ("holdout", "test", "c2", "c1", "train", "image", "exact"),
        ("holdout", "test", "e1", "e1", "train", "sample", "exact"),
        ("holdout", "validation", "b2", "b1", "train", "text", "near"),
    }
    assert audit.leaks["samples"] == 2  # a validation part is no score
    counts = {name: audit.leaks[name] for name in ("unknown", "unsplit", "doubled")}
    assert counts == {"unknown": 1, "unsplit": 1, "doubled": 1}
    assert len([note for note in audit.notes if note.startswith("splits in ")]) == 3
    assert {name: part["samples"] for name, part in audit.balance["parts"].items()} == {
        "all": 9,
        "train": 5,
        "validation": 2,
        "test": 2,
    }


def test_nobody_is_near_another_through_a_sample_that_is_not_split(tmp_path: Path) -> None:
    """Folds keep groups of labelled samples whole; a chain through an unlabelled one is no leak."""
    words = [f"word{number}" for number in range(40)]
    texts = [" ".join(words[start : start + 34]) for start in (0, 3, 6)]
    samples = [("x", texts[0], None, "a"), ("y", texts[2], None, "b"), ("u", texts[1], None, "")]
    folder = write_folder(tmp_path / "d", samples)
    splits = write_folds(tmp_path / "s", {"x": ["train", "test"], "y": ["test", "train"]})
    audit = audit_data(folder, split_dir=splits, out=tmp_path / "audit")
    assert audit.duplicates["text"]["samples"] == 3
    assert leaks(audit) == set()


def test_splits_that_differ_in_their_classes(tmp_path: Path) -> None:
    samples = [(str(n), f"text number {n} of many", None, "a" if n < 40 else "b") for n in range(80)]
    folder = write_folder(tmp_path / "d", samples)
    by_class = {str(n): ["test", "train"] if n < 40 else ["train", "test"] for n in range(80)}
    even = {str(n): ["test", "train"] if n % 2 else ["train", "test"] for n in range(80)}
    uneven = audit_data(folder, split_dir=write_folds(tmp_path / "s", by_class), out=tmp_path / "audit")
    assert uneven.balance["p"] == 1 / (1 + DRAWS)
    fair = audit_data(folder, split_dir=write_folds(tmp_path / "t", even), out=tmp_path / "audit")
    assert fair.balance["p"] > 0.9


def test_splits_that_are_none_are_one_line(data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no saved splits"):
        audit_data(data, split_dir=tmp_path / "nowhere", out=tmp_path / "audit")
    with pytest.raises(RunError, match="none of these samples"):
        audit_data(data, split_dir=write_folds(tmp_path / "s", {"zz": ["train", "test"]}), out=tmp_path / "audit")
    with pytest.raises(RunError, match="'trial' is no role"):
        audit_data(data, split_dir=write_folds(tmp_path / "t", {"a1": ["trial", "test"]}), out=tmp_path / "audit")
    assert not (tmp_path / "audit").exists()


@pytest.fixture(scope="module")
def place(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo data with a finished run."""
    place = make_place(demo_folder, tmp_path_factory.mktemp("judged"))
    sweep(place)
    return place


def only_run(place: Path) -> Path:
    (run,) = (place / "heads").iterdir()
    return run


def test_the_best_run_on_the_data_judges_the_labels(place: Path, tmp_path: Path) -> None:
    audit = audit_data(place / "demo", heads=place / "heads", out=tmp_path)
    run = Run.from_json(only_run(place), json.loads((only_run(place) / RUN_FILE).read_text()))
    found = audit.label_errors
    assert (found["run"], found["head"], found["data_hash"]) == (str(run.folder), run.recommended.head, audit.data_hash)
    opinions = read_opinions(run)
    assert found["samples"] == len(opinions.ids) == 108
    expected = find_label_errors(opinions.targets.numbers, opinions.probabilities)
    written = rows(audit.folder / "label_errors.csv")
    assert [row["id"] for row in written] == [opinions.ids[row] for row in expected.rows]
    assert [row["suggested"] for row in written] == [run.classes[number] for number in expected.suggested]
    assert found["errors"] == len(written) == sum(way["count"] for way in found["ways"])
    assert [each["id"] for each in found["examples"]] == [row["id"] for row in written[:10]]
    noise = found["noise"]
    assert noise["planted"]["found"] > 2 * noise["planted"]["share"]
    if noise["claimed"]:
        assert noise["macro_f1"]["low"] <= noise["macro_f1"]["value"] <= noise["macro_f1"]["high"] <= 1
        assert set(noise["classes"]) == set(run.classes)
    else:
        assert set(noise) == {"claimed", "planted"}


def test_the_splits_of_the_run_are_looked_at(place: Path, tmp_path: Path) -> None:
    audit = audit_data(place / "demo", heads=place / "heads", out=tmp_path)
    assert audit.leaks["splits"] == str(only_run(place))
    assert audit.leaks["samples"] == 0  # near duplicates were kept together
    assert audit.leaks["unknown"] == audit.leaks["unsplit"] == audit.leaks["doubled"] == 0


def test_a_run_on_other_labels_does_not_judge(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "demo", tmp_path / "demo")
    lines = (tmp_path / "demo" / "train.txt").read_text().splitlines()
    id, label = lines[1].split(",")
    lines[1] = f"{id},{'neutral' if label != 'neutral' else 'positive'}"
    (tmp_path / "demo" / "train.txt").write_text("\n".join(lines) + "\n")
    audit = audit_data(tmp_path / "demo", heads=place / "heads", out=tmp_path / "audit")
    assert audit.label_errors is None
    assert any("no run in" in note for note in audit.notes)
    assert rows(audit.folder / "label_errors.csv") == []
    with pytest.raises(RunError, match="trained on other labels, texts or photos"):
        audit_data(tmp_path / "demo", run=only_run(place), out=tmp_path / "audit")
    moved = tmp_path / "elsewhere"
    shutil.copytree(place / "demo", moved)
    assert audit_data(moved, run=only_run(place), out=tmp_path / "audit").label_errors is not None


def test_no_run_is_asked_for(place: Path, tmp_path: Path) -> None:
    audit = audit_data(place / "demo", heads=place / "heads", run="none", out=tmp_path)
    assert audit.label_errors is None
    assert not any("label errors" in note for note in audit.notes)


@pytest.mark.parametrize("damage", ["id,label\n", "id,label,p_x\n1,a,1\n", None])
def test_damaged_predictions_are_one_line(place: Path, tmp_path: Path, damage: str | None) -> None:
    shutil.copytree(place / "heads", tmp_path / "heads")
    for path in (tmp_path / "heads").glob("*/*/out_of_fold.csv"):
        if damage is None:
            path.unlink()
        else:
            path.write_text(damage)
    with pytest.raises(RunError, match=r"out_of_fold\.csv.*(train|name)"):
        audit_data(place / "demo", heads=tmp_path / "heads", out=tmp_path / "audit")


def test_a_holdout_judges_only_its_test_part(place: Path, tmp_path: Path) -> None:
    sweep(place, out=tmp_path / "heads", protocol=Protocol("holdout", seeds=1, shares=(6, 2, 2)))
    audit = audit_data(place / "demo", heads=tmp_path / "heads", out=tmp_path / "audit")
    assert 10 < audit.label_errors["samples"] < 40
    assert set(audit.leaks["tested"]) == {"holdout"}


def test_several_classes_a_sample_are_judged_each_alone(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    lines = [["id", "text", "label"]]
    for number in range(160):
        sad, tired = (random.random(2) < 0.5).tolist()
        words = ["sad"] * 4 * sad + ["tired"] * 4 * tired + [f"w{word}" for word in random.integers(0, 999, 5)]
        truth = [name for name, there in (("sad", sad), ("tired", tired)) if there]
        lines.append([str(number), " ".join(words), "|".join(truth) or "|"])
    lines[1][2] = {"|": "sad", "sad": "|", "tired": "sad|tired", "sad|tired": "tired"}[lines[1][2]]  # one wrong label
    with (tmp_path / "t.csv").open("w", newline="") as handle:
        csv.writer(handle).writerows(lines)
    place = {"cache": tmp_path / "cache", "options": FLOAT32}
    extract_features(tmp_path / "t.csv", ["hashing"], **place)
    heads = {"fusion": ["none"], "baselines": ["logistic"], "modalities": ["text"], "task": "multilabel"}
    sweep = {"out": tmp_path / "heads", "protocol": SMALL, "plan": QUICK}
    train_heads(tmp_path / "t.csv", ["hashing"], **place, **heads, **sweep)
    audit = audit_data(tmp_path / "t.csv", heads=tmp_path / "heads", out=tmp_path / "audit")
    assert audit.balance["classes"] == ["sad", "tired"]
    assert audit.label_errors["multilabel"]
    assert set(audit.label_errors["noise"]) == {"claimed", "classes"}
    first = rows(audit.folder / "label_errors.csv")[0]
    assert first["id"] == "0"
    assert {first["label"], first["suggested"]} == {"sad", "not sad"}


def test_rare_classes_raise_no_false_alarm() -> None:
    """Of random splits no more than about one in twenty is told to differ; the books' chi-squared says one in eight."""
    random = np.random.default_rng(0)
    labels = np.array(["a"] * 200 + ["b"] * 80 + [f"c{n}" for n in range(10)] * 2)
    alarms = 0
    for _ in range(60):
        order = random.permutation(len(labels))
        parts = dict(zip(("train", "validation", "test"), np.split(order, [240, 270]), strict=True))
        alarms += class_balance(labels.tolist(), parts, multilabel=False)["p"] < 0.05
    assert alarms <= 6
