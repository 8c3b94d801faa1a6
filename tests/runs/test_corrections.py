"""Corrected labels: another run on the same folds and the same cache, compared by one set of labels."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from mmfeat.errors import RunError
from mmfeat.evaluation.metrics import evaluate
from mmfeat.evaluation.significance import paired_difference
from mmfeat.report.facts import data_notes
from mmfeat.report.section import Subject
from mmfeat.reproduce import reproduce_run
from mmfeat.runs.compare import compare_runs, flat_settings
from mmfeat.runs.run import Run
from mmfeat.samples.dataset import read_samples
from mmfeat.sweep.arguments import heads_arguments
from tests.cli.typed import invoke
from tests.finetune.small_finetunes import ONCE, tune
from tests.sweep.small_sweeps import NO_HEADS, make_place, sweep

ONE = {**NO_HEADS, "ensembles": False}


@dataclass(frozen=True)
class Runs:
    """A run on the data's own labels and one on corrected labels."""

    place: Path
    labels: Path
    own: Run
    corrected: Run


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """The shards and requests of a cache, but not its index of files, which is renewed by itself."""
    paths = [path for path in folder.rglob("*") if path.suffix in (".h5", ".json")]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in paths}


@pytest.fixture(scope="module")
def runs(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    place = make_place(demo_folder, tmp_path_factory.mktemp("corrections"))
    own = sweep(place, **ONE).run
    labelled = read_samples(place / "demo").labelled
    classes = sorted({str(sample.label) for sample in labelled})
    turned = {sample.id: classes[classes.index(str(sample.label)) - 1] for sample in labelled[:9]}
    labels = place / "fixed.csv"
    labels.write_text("id,label\n" + "".join(f"{id},{label}\n" for id, label in turned.items()))
    before = files(place / "cache")
    done = sweep(place, **ONE, columns={"labels": str(labels)})
    assert files(place / "cache") == before  # nothing is extracted, nor remembered of labels
    assert any(note.startswith("9 labels of ") for note in done.notes)
    assert not done.reused
    return Runs(place, labels, own, done.run)


def test_it_is_another_run_on_the_same_folds_that_says_whose_labels(runs: Runs) -> None:
    own, config = runs.own.config, runs.corrected.config
    assert config.splits_hash == own.splits_hash
    assert config.data_hash != own.data_hash
    assert config.given_hash == own.data_hash
    assert config.corrections is not None
    assert (config.corrections.count, config.corrections.file) == (9, str(runs.labels))
    assert "labels" not in config.columns
    assert own.corrections is None
    assert sweep(runs.place, **ONE).reused
    again = sweep(runs.place, **ONE, columns={"labels": str(runs.labels)})
    assert again.reused
    empty = runs.place / "empty.csv"
    empty.write_text("id,label\n")
    assert sweep(runs.place, **ONE, columns={"labels": str(empty)}).run.folder == runs.own.folder


def test_a_comparison_scores_both_by_the_corrected_labels_and_tells_the_difference_by_the_others(runs: Runs) -> None:
    for pair in ([runs.own, runs.corrected], [runs.corrected, runs.own]):
        found = compare_runs(pair)
        read = [run.out_of_fold(run.entry()) for run in pair]
        scored = pair.index(runs.corrected)
        assert (found.scored, found.otherwise) == (scored, 1 - scored)
        assert 0 < found.relabelled <= 9
        groups = read[0].groups
        targets, others = read[scored].targets, read[1 - scored].targets
        assert [one.ids for one in read] == [read[0].ids] * 2
        for entry, one in zip(found.entries, read, strict=True):
            scores = evaluate(targets, one.chosen, one.probabilities[None], groups=one.groups)
            assert entry.macro_f1.value == scores["macro_f1"]["value"]
            assert entry.accuracy.value == scores["accuracy"]["value"]
        assert found.tests[1] is not None
        assert found.tests[1].difference == paired_difference(targets, read[1].chosen, read[0].chosen, groups=groups)
        assert found.tests[1].otherwise == paired_difference(others, read[1].chosen, read[0].chosen, groups=groups)
        assert found.settings["labels"][scored].startswith("9 by fixed.csv, hash ")
        assert found.settings["labels"][1 - scored] == "-"
    assert "labels" not in flat_settings(runs.own.config)


def test_the_commands_say_which_labels_score(runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pair = [str(runs.own.folder), str(runs.corrected.folder)]
    told = invoke("runs", "compare", *pair).stdout
    assert "labels differ; the scores above are against the labels of [2]" in told
    assert "against the labels of [1]: [2] is " in told
    page = invoke("report", "--compare", *pair, "--out", "c.html")
    assert page.exit_code == 0, page.output
    assert "labels differ; all scores and tests here are against those of" in Path("c.html").read_text()
    assert "9 corrected by " in " ".join(invoke("runs", "show", pair[1]).stdout.split())


def test_reproduction_and_stage_two_read_the_corrections_and_predictions_do_without(runs: Runs, tmp_path: Path) -> None:
    assert heads_arguments(runs.corrected)["columns"]["labels"] == str(runs.labels)
    assert reproduce_run(runs.corrected, tmp_path / "again").identical
    assert data_notes(Subject.of(runs.corrected)) == ()
    answer = invoke("submit", "--run", runs.corrected.folder, "--out", tmp_path / "out.csv", catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    assert "changed" not in answer.output
    before = runs.labels.read_text()
    try:
        other = next(
            sample.id for sample in read_samples(runs.place / "demo").labelled[20:] if sample.label != "neutral"
        )
        runs.labels.write_text(f"{before}{other},neutral\n")
        with pytest.raises(RunError, match="changed since; restore them first"):
            reproduce_run(runs.corrected, tmp_path / "later")
    finally:
        runs.labels.write_text(before)


def test_audit_writes_the_labels_in_doubt_to_be_filled(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = ["audit", "--data", str(runs.place / "demo"), "--cache", str(runs.place / "cache")]
    command = [*usual, "--run", str(runs.own.folder), "--export", "doubts.csv"]
    told = invoke(*command, catch_exceptions=False)
    assert "next: fill in its column label where a label is wrong; mmfeat heads --labels doubts.csv" in told.stdout
    with open("doubts.csv", newline="", encoding="utf-8") as file:
        doubts = list(csv.DictReader(file))
    assert list(doubts[0]) == ["id", "text", "image", "given", "proposed", "probability", "label"]
    labels = {sample.id: sample.label for sample in read_samples(runs.place / "demo")}
    assert all(doubt["given"] == labels[doubt["id"]] != doubt["proposed"] for doubt in doubts)
    assert {doubt["label"] for doubt in doubts} == {""}
    assert (np.diff([float(doubt["probability"]) for doubt in doubts[:3]]) < 1).all()
    again = invoke(*command)
    assert again.exit_code == 1
    assert "this file exists, and may have labels filled in; name another file" in again.stderr
    judged = invoke(*usual, "--labels", runs.labels, "--heads", runs.place / "heads")
    assert runs.corrected.folder.name in judged.stdout.replace("\n", "")
    nobody = invoke(*usual, "--run", "none", "--export", "other.csv")
    assert "--export other.csv: no run judges these labels; name one with --run" in nobody.stderr


def test_stage_two_keeps_the_labels_of_its_run(
    demo_folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path
) -> None:
    place = make_place(demo_folder, tmp_path_factory.mktemp("tuned"), encoders := [f"bert:{tiny_bert}", "hog"])
    id = read_samples(place / "demo").labelled[0].id
    (place / "fixed.csv").write_text(f"id,label\n{id},neutral\n")
    parent = sweep(
        place,
        encoders,
        fusion=["concat"],
        baselines=["none"],
        ensembles=False,
        columns={"labels": str(place / "fixed.csv")},
    ).run
    tuned = tune(place, settings=ONCE).run
    assert tuned.config.corrections == parent.config.corrections
