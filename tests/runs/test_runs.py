"""Run folders: what a run records, which there are, what differs, what is deleted, and that one comes out the same."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfeat.errors import RunError
from mmfeat.evaluation.protocol import Protocol, read_groups
from mmfeat.evaluation.significance import paired_difference
from mmfeat.finetune.settings import finetune_arguments
from mmfeat.heads.registry import HeadSettings
from mmfeat.reproduce import reproduce_run
from mmfeat.runs.compare import compare_runs
from mmfeat.runs.folders import GRAVE, delete_runs, list_runs
from mmfeat.runs.record import BEGUN
from mmfeat.runs.run import Run, find_run
from mmfeat.samples.labels import Targets, indicator
from mmfeat.sweep.search import Plan
from mmfeat.sweep.search_space import Range
from mmfeat.system.locks import writing_in
from tests.cli.typed import invoke
from tests.finetune.small_finetunes import ONCE, tune
from tests.sweep.small_sweeps import FLOAT32, NO_HEADS, make_place, sweep

ONE = {**NO_HEADS, "ensembles": False}


@pytest.fixture(scope="module")
def place(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that can be compared and one on other folds."""
    place = make_place(demo_folder, tmp_path_factory.mktemp("runs"))
    sweep(place, fusion=["concat"], baselines=["knn"], modalities=["text"], ensembles=False, command="mmfeat heads x")
    sweep(place, **ONE)
    sweep(place, **ONE, protocol=Protocol(folds=3, seeds=2))
    return place


@pytest.fixture(scope="module")
def runs(place: Path) -> list[Run]:
    """In the order in which they were made."""
    found = list_runs(place / "heads")
    return sorted((each.run for each in found if each.run), key=lambda run: run.record.started)


@pytest.fixture(scope="module")
def tuned(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Run:
    """A second stage and its parent, beside each other."""
    encoders = [f"bert:{tiny_bert}", "hog"]
    place = make_place(demo_folder, tmp_path_factory.mktemp("tuned"), encoders)
    holdout = Protocol("holdout", seeds=1)
    sweep(place, encoders, baselines=["none"], ensembles=False, protocol=holdout, plan=Plan(HeadSettings(epochs=1)))
    return tune(place, out="heads", settings=ONCE).run


def by_heads(runs: list[Run], *heads: str) -> Run:
    """The run of these heads on 2 folds."""
    alike = (run for run in runs if {entry.head for entry in run.leaderboard} == set(heads))
    return next(run for run in alike if run.config.protocol.folds == 2)


def test_a_run_records_how_it_came_about(place: Path, runs: list[Run]) -> None:
    run = by_heads(runs, "concat", "knn")
    record = run.record
    assert record.command == "mmfeat heads x"
    assert {"mmfeat", "python", "torch", "scikit-learn", "numpy"} <= set(record.versions)
    assert record.machine["device"] == "cpu"
    assert record.machine["threads"] >= 1
    assert record.seeds == {"seed": 42, "trainings": 2}
    assert record.data_hash == run.config.data_hash
    assert set(record.fingerprints.values()) == run.fingerprints
    assert record.parent is None
    assert record.seconds > 0
    text = json.dumps(record.machine)
    assert os.uname().nodename not in text
    assert not (run.folder / BEGUN).exists()


def test_without_a_command_the_call_is_recorded(place: Path, runs: list[Run]) -> None:
    command = by_heads(runs, "knn").record.command
    assert command.startswith("mmfeat.train_heads(data=")
    assert "fusion=['none']" in command
    assert "progress" not in command


def test_a_record_changes_no_name_and_a_reused_run_keeps_its_first(place: Path, runs: list[Run]) -> None:
    before = by_heads(runs, "knn")
    again = sweep(place, **ONE, command="another")
    assert again.reused
    assert again.run.folder == before.folder
    assert again.run.record == before.record


def test_passwords_are_not_recorded(place: Path, tmp_path: Path) -> None:
    run = sweep(place, **ONE, out=tmp_path, command="mmfeat heads --mlflow http://me:secret@host:5000").run
    assert run.record.command.endswith("http://me:***@host:5000")


def test_the_list_has_every_run_and_says_what_is_wrong_with_the_rest(place: Path, tmp_path: Path) -> None:
    heads = Path(shutil.copytree(place / "heads", tmp_path / "heads"))
    newest, second, third = (each.folder for each in list_runs(heads))
    (second / "run.json").write_text("{")
    (third / "run.json").rename(third / BEGUN)
    (heads / "splits").mkdir()
    (heads / "splits" / "folds.csv").write_text("id,fold0\n")
    (heads / "link").symlink_to(newest)
    found = {each.folder: each for each in list_runs(heads)}
    assert set(found) == {newest, second, third}
    assert found[newest].run is not None
    assert found[newest].bytes > 1000
    assert "not a run of this version" in found[second].reason
    assert found[third].reason.startswith("not finished")
    assert found[third].recorded["record"]["command"]
    assert {each.folder for each in list_runs(heads, place / "demo")} == set(found)
    assert {each.folder for each in list_runs(heads, tmp_path / "other")} == {second}  # it cannot tell
    with pytest.raises(RunError, match="no such folder"):
        list_runs(tmp_path / "nowhere")


def test_a_run_is_found_by_path_name_and_a_part_that_only_it_has(place: Path, runs: list[Run]) -> None:
    run = by_heads(runs, "concat", "knn")
    name = run.folder.name
    for asked in (run.folder, name, name[-8:], "demo-concat"):
        assert find_run(asked, place / "heads").folder.name == name
    with pytest.raises(RunError, match="2 runs are called like that"):
        find_run("demo-knn", place / "heads")
    with pytest.raises(RunError, match="no such run in"):
        find_run("nothing", place / "heads")


def test_a_killed_training_leaves_a_note_of_what_was_asked(place: Path, tmp_path: Path) -> None:
    code = (
        "import sys, os, mmfeat.sweep.train as s, mmfeat.sweep.train_all as r\n"
        "r._train_all = lambda *a: os._exit(9)\n"
        f"s.train_heads({str(place / 'demo')!r}, ['hashing', 'hog'], cache={str(place / 'cache')!r}, "
        f"out={str(tmp_path)!r}, baselines=['knn'], fusion=['none'], command='mmfeat heads killed')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9
    (found,) = list_runs(tmp_path)
    assert (found.run, found.kind) == (None, "heads")
    assert found.recorded["record"]["command"] == "mmfeat heads killed"
    delete_runs([found.name], tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_are_deleted_whole_and_nothing_else_is(place: Path, tmp_path: Path) -> None:
    heads = Path(shutil.copytree(place / "heads", tmp_path / "heads"))
    first, second, third = (each.folder for each in list_runs(heads))
    (heads / "mine").mkdir()
    (heads / "mine" / "folds.csv").write_text("id,fold0\n")
    (heads / "alien").mkdir()
    (heads / "alien" / "run.json").write_text("{}")
    (heads / "alien" / BEGUN).write_text('{"of": "somebody else"}')
    (heads / ".deleted" / "photos.2026").mkdir(parents=True)  # somebody's own
    outside = Path(shutil.copytree(first, tmp_path / "outside"))
    (heads / "link").symlink_to(outside)
    for name, message in {
        "mine": "not a run folder directly in",
        "alien": "not a run folder directly in",
        "link": "a link",
        "..": "not a run folder",
        ".": "not a run folder",
        "nothing": "no such run",
        str(outside): "not a run folder directly in",
        f"{first}/knn-text/..": "not a run folder",
    }.items():
        with pytest.raises(RunError, match=message) as caught:
            delete_runs([second.name, name], heads)
        assert "\n" not in str(caught.value)
    assert second.exists()
    assert delete_runs([second.name, str(third)], heads) > 1000
    assert sorted(path.name for path in heads.iterdir()) == sorted([".deleted", first.name, "alien", "link", "mine"])
    assert (heads / ".deleted" / "photos.2026").exists()
    assert (outside / "run.json").exists()


def test_a_run_that_is_being_written_is_not_deleted(place: Path, tmp_path: Path) -> None:
    heads = Path(shutil.copytree(place / "heads", tmp_path / "heads"))
    folder = list_runs(heads)[0].folder
    with writing_in(folder), writing_in(folder), pytest.raises(RunError, match="being written by another process"):
        delete_runs([folder.name], heads)
    delete_runs([folder.name], heads)
    assert not folder.exists()


def test_what_a_killed_deletion_left_is_no_run_and_goes_with_the_next(place: Path, tmp_path: Path) -> None:
    heads = Path(shutil.copytree(place / "heads", tmp_path / "heads"))
    first, second, third = (each.folder for each in list_runs(heads))
    (heads / GRAVE).mkdir()
    first.rename(heads / GRAVE / f"{first.name}.1")
    assert {each.folder for each in list_runs(heads)} == {second, third}
    with pytest.raises(RunError, match="no such run"):  # the same command
        delete_runs([first.name], heads)
    assert not (heads / GRAVE).exists()
    delete_runs([second.name], heads)
    assert sorted(path.name for path in heads.iterdir()) == [third.name]


def test_a_parent_stays_unless_its_children_go_too(tuned: Run, tmp_path: Path) -> None:
    heads = Path(shutil.copytree(tuned.folder.parent, tmp_path / "heads"))
    parent = tuned.config.parent
    with pytest.raises(RunError, match=f"{tuned.folder.name} was fine-tuned from it"):
        delete_runs([parent], heads)
    delete_runs([parent, tuned.folder.name], heads)
    assert not list(heads.iterdir())


def test_a_comparison_tells_what_differs_and_tests_on_the_same_samples(runs: list[Run]) -> None:
    one, other = by_heads(runs, "knn"), by_heads(runs, "concat", "knn")
    found = compare_runs([one, other])
    assert found.settings == {"heads": ("knn on text", "concat on text, knn on text")}
    assert found.fair
    test = found.tests[1]
    assert found.tests[0] is None
    assert test is not None
    assert test.samples == 108
    values = [entry.macro_f1.value for entry in found.entries]
    assert test.difference.value == pytest.approx(values[1] - values[0])
    labels, chosen = read_by_hand(one, found.entries[0])
    _, theirs = read_by_hand(other, found.entries[1])
    groups = read_groups(one.folder, one.out_of_fold(found.entries[0]).ids)
    assert test.difference == paired_difference(Targets(one.classes, labels), theirs, chosen, groups=groups)
    same = compare_runs([one, other], head="knn").tests[1]
    assert same is not None
    assert (same.difference.value, same.tie, same.mcnemar) == (0, True, 1)


def read_by_hand(run: Run, entry: Any) -> tuple[np.ndarray, np.ndarray]:
    lines = (run.head_folder(entry) / "out_of_fold.csv").read_text().splitlines()
    header, rows = lines[0].split(","), [line.split(",") for line in lines[1:]]
    seeds = [place for place, name in enumerate(header) if name.startswith("predicted_")]
    matrix = [indicator([run.classes.index(row[place]) for row in rows], 3) for place in (1, *seeds)]
    return matrix[0], np.stack(matrix[1:])


def test_runs_on_other_folds_or_data_are_shown_and_not_tested(runs: list[Run]) -> None:
    alike = [run for run in runs if len(run.config.folds) == 2]
    other = next(run for run in runs if len(run.config.folds) == 3)
    found = compare_runs([alike[0], other, alike[1]])
    assert found.reasons[1].startswith("other folds")
    assert [test is None for test in found.tests] == [True, True, False]
    assert found.settings["protocol.folds"] == ("2", "3", "2")
    elsewhere = Run.from_json(other.folder, {**other.to_json(), "data_hash": "x"})
    assert compare_runs([alike[0], elsewhere]).reasons[1].startswith("other data")
    with pytest.raises(RunError, match="name two or more"):
        compare_runs([other])


def test_a_run_reproduces_bit_for_bit_from_its_own_file(runs: list[Run], tmp_path: Path) -> None:
    run = by_heads(runs, "concat", "knn")
    found = reproduce_run(run, tmp_path, workers=1)
    assert found.identical, found.different
    assert found.run.folder.name == run.folder.name
    assert found.files >= 10
    assert not found.changed
    (found.run.folder / "concat-text" / "out_of_fold.csv").write_text("id\n")
    again = reproduce_run(run, tmp_path)
    assert (again.reused, again.identical) == (False, True), "a damaged file is made again"
    (found.run.folder / "concat-text" / "curves.csv").write_text("id\n")
    again = reproduce_run(run, tmp_path)
    assert (again.reused, again.identical, again.different) == (True, False, ("concat-text/curves.csv",))
    with pytest.raises(RunError, match="the run itself lies there"):
        reproduce_run(run, run.folder.parent)


def test_a_second_stage_reproduces_bit_for_bit(tuned: Run, tmp_path: Path) -> None:
    found = reproduce_run(tuned.folder, tmp_path)
    assert found.identical, found.different
    assert any("bert" in path.name for path in found.run.folder.rglob("*.safetensors"))
    assert found.run.record.parent == tuned.config.parent
    assert finetune_arguments(found.run)["run"] == finetune_arguments(tuned)["run"]  # which lies elsewhere


def test_a_search_with_splits_from_elsewhere_reproduces(place: Path, runs: list[Run], tmp_path: Path) -> None:
    plan = Plan(HeadSettings(epochs=1), {"dropout": Range(0.1, 0.5)}, "random", 2, adjustment=0.5, refit=False)
    protocol = Protocol(seeds=1, folds=2, split_dir=str(by_heads(runs, "knn").folder))
    few = {"baselines": ["none"], "modalities": ["text"], "ensembles": False}
    run = sweep(place, **few, plan=plan, protocol=protocol, out=tmp_path / "one").run
    found = reproduce_run(run, tmp_path / "two")
    assert found.identical, found.different
    assert found.run.folder.name == run.folder.name


def test_data_that_changed_since_cannot_be_reproduced(place: Path, runs: list[Run], tmp_path: Path) -> None:
    run = by_heads(runs, "knn")
    data = Path(shutil.copytree(place / "demo", tmp_path / "demo"))
    lines = (data / "train.txt").read_text().splitlines()
    (data / "train.txt").write_text("\n".join([*lines[:-1], lines[-1].split(",")[0] + ",other", ""]))
    moved = Run.from_json(run.folder, {**run.to_json(), "data": str(data)})
    with pytest.raises(RunError, match="changed since"):
        reproduce_run(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def typed(command: str) -> Any:
    """What the command line does with a line that somebody copied."""
    words = shlex.split(command)[1:]
    return invoke(*words, obj=command)


def test_the_commands_for_runs(place: Path, runs: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    one, other = by_heads(runs, "knn").folder.name, by_heads(runs, "concat", "knn").folder.name
    listed = typed("mmfeat runs ls").stdout
    assert all(run.folder.name in listed for run in runs)
    shown = typed(f"mmfeat runs show {other}").stdout
    assert "command   mmfeat heads x" in shown
    assert f"next: mmfeat runs reproduce heads/{other}" in shown
    compared = typed(f"mmfeat runs compare {one} {other}").stdout
    assert "concat on text, knn on text" in compared
    settings = compared.partition("setting")[2].partition("macro-F1")[0]
    assert "." not in re.sub(r"\d\.\d|\.\.\.", "", settings)  # names of flags, not of fields in a file
    kept = typed(f"mmfeat runs rm {one}")
    assert (kept.exit_code, kept.stderr) == (
        1,
        "mmfeat: nothing was deleted; the same command with --yes deletes what is listed\n",
    )
    gone = typed(f"mmfeat runs rm {one} --yes")
    assert gone.exit_code == 0
    assert "deleted 1 run" in gone.stdout
    assert one not in typed("mmfeat runs ls").stdout
    latest = typed("mmfeat runs ls").stdout.splitlines()[1].split()[0]
    assert typed("mmfeat runs show").stdout.splitlines()[0].endswith(latest)


def test_the_command_line_is_recorded_as_it_was_typed(place: Path, tmp_path: Path) -> None:
    command = f"mmfeat heads --data {place}/demo --encoders hashing,hog --dtype float32 --cache {place}/cache"
    command += f" --out {tmp_path} --fusion concat --baselines prior --modalities text --protocol holdout --split 7:3"
    command += " --no-group --seed 5 --seeds 1 --no-ensembles --epochs 1 --dropout 0.1,0.3 --logit-adjustment 0.5"
    assert typed(command).exit_code == 0
    (found,) = list_runs(tmp_path)
    assert found.recorded["record"]["command"] == command
    assert found.run is not None
    assert found.run.options.dtype == FLOAT32.dtype
    assert "nothing to do: these heads were trained" in typed(found.run.record.command).stdout
