"""The leaderboard: best first, ties told by paired tests, and the same numbers in every file and on the screen."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfeat.cli.heads import show_sweep
from mmfeat.evaluation.significance import compare_with_best, paired_difference
from mmfeat.runs.entry import Entry
from mmfeat.runs.leaderboard import ablation, ablation_csv, leaderboard_csv
from mmfeat.samples.labels import Targets
from mmfeat.sweep.entries import TrainedEntry
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.train import Sweep
from mmfeat.sweep.train_all import rank
from mmfeat.sweep.trials import decide
from tests.heads.toy_features import MULTILABEL, TARGETS
from tests.sweep.small_sweeps import made_up_entry, run_of, toy_task

ENTRIES = {("cross-attention", "both"): 2.0, ("film-concat", "both"): 1.9, ("film-concat", "text"): 1.0}
ENSEMBLES = {("mean", "ensemble"): 2.2}


def scored(task: Problem, more: dict[tuple[str, str], float]) -> list[TrainedEntry]:
    found = []
    for (head, modality), skill in {**ENTRIES, **more}.items():
        entry = made_up_entry(task, head + modality, skill)
        costs: dict[str, Any] = {"trials": 1, "optimism": 0.01, "parameters": 7, "seconds": 1.5}
        named = replace(entry.entry, head=head, modalities=modality, **(costs if modality != "ensemble" else {}))
        found.append(replace(entry, entry=named))
    return found


@pytest.fixture(scope="module")
def board() -> Sequence[Entry]:
    task = toy_task()
    return rank(task, scored(task, ENSEMBLES))


def test_best_first_with_the_paired_tests_against_it(board: Sequence[Entry]) -> None:
    task = toy_task()
    entries = scored(task, ENSEMBLES)
    values = [entry.macro_f1.value for entry in board]
    assert values == sorted(values, reverse=True)
    by_name = {(entry.entry.head, entry.entry.modalities): entry for entry in entries}
    chosen = [decide(task, (entry := by_name[each.head, each.modalities]).logits, entry.decisions)[0] for each in board]
    wanted, first = compare_with_best(TARGETS, chosen, 0, task.seed)
    earlier = {name: value for name, value in board[0].to_json().items() if not name.endswith("_excess")}
    assert len(earlier) == len(board[0].to_json()) - 2
    old = Entry.from_json(earlier)
    assert (old.to_json(), old.score("calibration_excess").value) == (earlier, None)
    for mixed in ([old, *board[1:]], [*board[1:], old]):  # an older version has trained some heads
        assert len({len(line) for line in csv.reader(io.StringIO(leaderboard_csv(mixed, TARGETS.classes)))}) == 1
    assert [entry.to_json().get("picked") for entry in board] == [vars(first), *[None] * (len(board) - 1)]
    assert [entry.to_json()["behind_best"] for entry in board] == wanted
    assert [entry.tie for entry in board] == [each["tie"] for each in wanted]
    assert board[0].tie
    assert not board[-1].tie  # the one that is far behind
    assert board[-1].behind_best.p_holm >= board[-1].behind_best.p
    alone = paired_difference(TARGETS, chosen[0], chosen[-1], task.seed)
    assert alone.value == pytest.approx(values[0] - values[-1])


def test_the_csv_says_what_the_json_says(board: Sequence[Entry]) -> None:
    lines = list(csv.DictReader(io.StringIO(leaderboard_csv(board, TARGETS.classes))))
    assert len(lines) == len(board)
    for number, (line, entry) in enumerate(zip(lines, board, strict=True), 1):
        assert (int(line["rank"]), line["head"], line["modalities"]) == (number, entry.head, entry.modalities)
        for name in entry.score_names:
            for part, key in (("", "value"), ("_low", "low"), ("_high", "high")):
                assert float(line[name + part]) == pytest.approx(getattr(entry.score(name), key), abs=5e-5)
        for name, each in entry.classes.items():
            assert float(line[f"f1_{name}"]) == pytest.approx(each.f1.value, abs=5e-5)
            assert float(line[f"precision_{name}"]) == pytest.approx(each.precision, abs=5e-5)
            assert float(line[f"recall_{name}"]) == pytest.approx(each.recall, abs=5e-5)
        assert float(line["seeds_std"]) == pytest.approx(entry.seeds["macro_f1"].std, abs=5e-5)
        assert int(line["seeds"]) == len(entry.seeds["macro_f1"].values)
        assert float(line["behind_best"]) == pytest.approx(entry.behind_best.value, abs=5e-5)
        assert float(line["behind_best_p_holm"]) == pytest.approx(entry.behind_best.p_holm, abs=5e-5)
        assert line["tie"] == str(entry.tie)
        assert line["optimism"] == ("" if entry.optimism is None else f"{entry.optimism:.4f}")
        assert line["parameters"] == ("7" if entry.parameters else "")


def test_the_ablation_tells_where_the_samples_of_each_class_went(board: Sequence[Entry]) -> None:
    assert {head: set(entries) for head, entries in ablation(board).items()} == {"film-concat": {"both", "text"}}
    lines = list(csv.DictReader(io.StringIO(ablation_csv(board, TARGETS.classes))))
    assert [(line["modalities"], line["label"]) for line in lines] == [
        (modality, name) for modality in ("both", "text") for name in TARGETS.classes
    ]
    by_modality = {entry.modalities: entry for entry in board if entry.head == "film-concat"}
    for line in lines:
        entry, number = by_modality[line["modalities"]], TARGETS.classes.index(line["label"])
        went = [float(line[f"predicted_{name}"]) for name in TARGETS.classes]
        assert went == pytest.approx(entry.confusion[number], abs=0.05)
        assert sum(went) == pytest.approx(TARGETS.matrix[:, number].sum(), abs=0.2)
        assert float(line["f1"]) == pytest.approx(entry.classes[line["label"]].f1.value, abs=5e-5)
        assert float(line["macro_f1"]) == pytest.approx(entry.macro_f1.value, abs=5e-5)
    gained = by_modality["both"].macro_f1.value - by_modality["text"].macro_f1.value
    assert {line["gain"] for line in lines} == {f"{gained:.4f}", ""}


def shown(
    capsys: pytest.CaptureFixture[str],
    targets: Targets,
    board: Sequence[Entry],
    classes: tuple[str, ...],
    folds: tuple[str, ...] = ("fold0", "fold1"),
    verbose: bool = True,
) -> list[str]:
    """The lines that a person sees of a run with this leaderboard."""
    names = dict(zip(targets.classes, classes, strict=True))
    board = [replace(e, classes={names[name]: each for name, each in e.classes.items()}) for e in board]
    run = run_of(Path("heads/run"), replace(targets, classes=classes), board, folds=folds)
    show_sweep(Sweep(run, False, 1.0), verbose)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [3, 4, 5])
@pytest.mark.parametrize("long", [False, True], ids=["short names", "long names"])
def test_what_is_shown_fits_80_columns_and_no_cell_is_wrapped(
    capsys: pytest.CaptureFixture[str], width: int, long: bool
) -> None:
    matrix = np.random.default_rng(3).integers(0, width, len(TARGETS))[:, None] == np.arange(width)
    task = toy_task(Targets(tuple("abcde"[:width]), matrix))
    names = tuple(f"{'a rather long name of class ' * long}{letter}" for letter in "abcde"[:width])
    board = rank(task, scored(task, ENSEMBLES))
    lines = shown(capsys, task.targets, board, names)
    table = lines[: len(board) + 1]
    for line, entry in zip(table[1:], board, strict=True):
        assert line.startswith(f"{'=' if entry.tie else ' '} {entry.head} ")
        assert f" {entry.modalities} " in line
        assert f"{entry.macro_f1.value:.3f} [" in line
        assert f" {entry.accuracy.value:.3f}" in line
    assert max(map(len, table)) <= 80
    assert lines[len(table)].startswith("300 samples out of fold, 95 % bootstrap intervals")
    confusion = [line for line in lines if " -> " in line or ("(" in line and "%)" in line)]
    assert len(confusion) == width + 1
    assert long or max(map(len, confusion)) <= 80


def test_without_verbose_ten_rows_and_the_verdict_fit_a_small_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    task = toy_task()
    many = {(f"head-{number}", "text"): 0.1 * number for number in range(12)}
    board = rank(task, scored(task, ENSEMBLES | many))
    lines = shown(capsys, TARGETS, board, TARGETS.classes, verbose=False)
    assert len(lines) <= 22
    assert max(map(len, lines)) <= 80
    assert lines[11] == f"and {len(board) - 10} more with --verbose and in leaderboard.csv"
    assert not [line for line in lines if line.startswith(("ablation", "parameters", "time", "Had we tuned"))]
    best = board[0]
    ties = sum(bool(entry.tie) for entry in board[1:])
    text = " ".join(lines)
    assert f"Best: {best.label}, macro-F1 {best.macro_f1.value:.3f} [." in text
    assert f", accuracy {best.accuracy.value:.3f}; {ties} tie." in text
    assert "together beat the text alone by 0." in text


def test_a_multilabel_leaderboard_is_shown_and_written(capsys: pytest.CaptureFixture[str]) -> None:
    task = toy_task(MULTILABEL)
    board = rank(task, scored(task, {}))
    lines = shown(capsys, MULTILABEL, board, ("sun", "rain", "snow"))
    assert len([line for line in lines[:4] if "film-concat" in line and "[." in line]) == 2
    assert not [line for line in lines if "->" in line]
    assert board[0].main_names == ("macro_f1", "micro_f1", "log_loss")
    assert board[0].titles["accuracy"] == Entry.from_json(board[0].to_json()).titles["accuracy"] == "exact match"
    assert "predicted_c" in ablation_csv(board, MULTILABEL.classes).splitlines()[0]
    assert len(leaderboard_csv(board, MULTILABEL.classes).splitlines()) == 4


def test_a_holdout_and_what_peeking_would_have_gained_are_told(
    capsys: pytest.CaptureFixture[str], board: Sequence[Entry]
) -> None:
    lines = shown(capsys, TARGETS, board, TARGETS.classes, ("holdout",))
    assert [line for line in lines if line.startswith("300 samples of the holdout's test part, 95 % bootstrap")]
    told = {"both": 0.1, "text": 0.2}
    peeked = [replace(entry, optimism=told[entry.modalities]) for entry in board if entry.modalities in told]
    (line,) = [line for line in shown(capsys, TARGETS, peeked, TARGETS.classes) if line.startswith("Had we tuned")]
    assert line.startswith("Had we tuned on the test rows, scores would look up to 0.200 too good (film-concat")
    honest = [replace(entry, optimism=0.0) for entry in peeked]
    assert not [line for line in shown(capsys, TARGETS, honest, TARGETS.classes) if line.startswith("Had we tuned")]
