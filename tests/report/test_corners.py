"""Reports of runs unlike most: odd class names, absent classes, several labels, changed data, no parent."""

from __future__ import annotations

import csv
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfeat.audit.audit import audit_data
from mmfeat.audit.twins import Twins, find_conflicts
from mmfeat.errors import RunError
from mmfeat.evaluation.metrics import wilson
from mmfeat.extraction.extract import extract_features
from mmfeat.report.facts import cache_section, data_section, run_section
from mmfeat.report.page import latex_table
from mmfeat.report.reliability import surest
from mmfeat.report.report import Papers, write_report
from mmfeat.report.scores import classes_section, confusion_section
from mmfeat.report.section import Subject, Table, interval
from mmfeat.runs.entry import ClassScores, Interval
from mmfeat.runs.record import OutOfFold
from mmfeat.runs.run import Run
from mmfeat.samples.labels import Targets
from tests.cli.typed import invoke
from tests.sweep.small_sweeps import FLOAT32, sweep

NAMES = ("a<b> --><script>alert(1)</script>", "$5 $x^2$", "x|y", "x", "1,2;3", "中文", "L" * 220, "two  spaces")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One baseline on text, of classes with odd names."""
    place = tmp_path_factory.mktemp("corners")
    with (place / "odd (1).csv").open("w", newline="") as table:
        lines = [[f"s{n}", f"word{n % len(NAMES)} z{n}", NAMES[n % len(NAMES)]] for n in range(80)]
        csv.writer(table).writerows([["id", "text", "label"], *lines])
    extract_features(place / "odd (1).csv", ["hashing"], cache=place / "cache", options=FLOAT32)
    asked = {"fusion": ["none"], "baselines": ["knn"], "modalities": ["text"], "ensembles": False}
    return sweep(place, ["hashing"], data=place / "odd (1).csv", **asked).run


def test_class_names_of_any_kind_are_text_and_fit(run: Run, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns where names leave a plot no room
        page = write_report(run.folder, out=tmp_path / "r.html", papers=Papers(True, True, True)).path.read_text()
    assert "alert(1)</script>" not in page
    assert '<option value="two  spaces">' in page  # the text of an option alone would lose a space
    assert "ties with the best" not in page  # there is one entry


def test_cache_and_audit_of_a_data_set_are_found_whatever_its_name(run: Run, tmp_path: Path) -> None:
    assert run.config.dataset == "odd (1)"
    assert cache_section(Subject.of(run)).tables[0].rows[0][5] == "80"
    audit_data(run.config.data, out=tmp_path / "audit", run="none")
    page = write_report(run.folder, out=tmp_path / "r.html", audit=tmp_path / "audit").path.read_text()
    assert "mmfeat audit looks for" not in page


def test_of_many_classes_the_most_frequent_errors_are_listed(run: Run) -> None:
    classes = [f"c{number}" for number in range(50)]
    counts = np.eye(50) * 8
    counts[3, 7], counts[9, 1] = 2, 4
    entry = replace(run.leaderboard[0], confusion=counts.tolist())
    many = replace(run.results, classes=tuple(classes), leaderboard=(entry,))
    results = Subject.of(replace(run, results=many))
    (table,) = confusion_section(results).tables
    assert table.rows == [["c9", "c1", "4 (33%)"], ["c3", "c7", "2 (20%)"]]


def test_a_comparison_takes_no_flags_of_a_page_about_samples(run: Run) -> None:
    two = ["report", "--compare", str(run.folder), str(run.folder)]
    for flags in (["--photos", "3"], ["--data", "x"], ["--columns", "id=x"], ["--audit", "x"]):
        answer = invoke(*two, *flags)
        assert (answer.exit_code, answer.stderr.startswith(f"mmfeat: {flags[0]} goes with one run;")) == (1, True)


def changed(run: Run, **classes: Any) -> Subject:
    """The run with other scores of some classes."""
    entry = run.leaderboard[0]
    other = replace(run.results, leaderboard=(replace(entry, classes=entry.classes | classes),))
    return Subject.of(replace(run, results=other))


def test_a_class_without_samples_is_no_weakness(run: Run) -> None:
    absent = ClassScores(precision=0.0, recall=0.0, f1=Interval(0.0, 0.0, 0.0), auroc=None, support=0)
    section = classes_section(changed(run, x=absent))
    assert "weakest on x:" not in section.words[0]
    assert section.words[1].startswith("No sample out of fold is x: ")
    assert ["x", "0", "", "", ""] in section.tables[0].rows


def test_intervals_above_ten_keep_their_digits() -> None:
    assert interval(Interval(10.6, 10.512, 20.7)) == "10.600 [10.512, 20.700]"
    assert interval(Interval(0.617, 0.598, 0.638)) == "0.617 [.598, .638]"


def test_the_surest_samples_of_several_labels_are_samples() -> None:
    targets = Targets(("a", "b"), np.array([[True, False], [False, False]]), multilabel=True)
    found = OutOfFold(("1", "2"), targets, targets.matrix[None], np.array([[0.9, 0.2], [0.3, 0.6]]))
    confidence, right = surest(found)
    assert confidence == pytest.approx([0.8, 0.6])
    assert right.tolist() == [True, False]


def test_data_that_changed_since_are_told(run: Run, tmp_path: Path) -> None:
    lines = Path(run.config.data).read_text().splitlines()
    assert not any("changed" in words for words in data_section(Subject.of(run)).words)
    (tmp_path / "odd.csv").write_text("\n".join([lines[0], "s0,word0 z0,other", *lines[3:], ""]))
    words = data_section(Subject.of(run, data=str(tmp_path / "odd.csv"))).words
    assert any("changed since the run: 2 samples" in each for each in words)


def test_predictions_of_some_samples_are_no_run(run: Run, tmp_path: Path) -> None:
    broken = replace(run, folder=tmp_path / "run")
    shutil.copytree(run.folder, broken.folder)
    path = broken.head_folder(broken.entry()) / "out_of_fold.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(RunError, match="its content is not what was saved"):
        broken.out_of_fold(broken.entry())


def test_passwords_are_not_in_the_page(run: Run) -> None:
    told = replace(run.record, command="mmfeat extract --data https://me:secret@host/a.csv")
    section = run_section(Subject.of(Run.from_json(run.folder, {**run.to_json(), "record": vars(told)})))
    assert ["command", "mmfeat extract --data https://me:***@host/a.csv"] in section.tables[0].rows


def test_brackets_after_a_line_of_latex_are_text() -> None:
    assert "{[}2em]" in latex_table(Table("t", "", ["", "x"], [["[2em]", "1*"]]))


def test_twins_that_share_samples_do_not_make_labels_surer() -> None:
    """Ten copies of one text are 45 pairs, and still one group."""
    groups = np.repeat([0, 1, 2], [10, 2, 2])
    labels = np.array([0] * 5 + [1] * 5 + [0, 0, 1, 1])
    found = find_conflicts(Twins(groups, groups), labels).counts
    assert (found["pairs"], found["disagreeing_pairs"]) == (47, 25)
    worth = 47**2 / (45**2 + 1 + 1)
    low, _ = wilson(25 / 47, worth)
    assert found["wrong"]["low"] == pytest.approx((1 - np.sqrt(1 - 2 * low)) / 2)
    alone = np.repeat([0, 1, 2, 3], 2)
    pairs = find_conflicts(Twins(alone, alone), np.array([0, 1, 0, 0, 1, 1, 0, 0])).counts["wrong"]
    assert pairs["low"] == pytest.approx((1 - np.sqrt(1 - 2 * wilson(0.25, 4)[0])) / 2)
