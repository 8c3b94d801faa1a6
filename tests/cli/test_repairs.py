"""What a user meets after something went wrong: a damaged run, a wrong place, flags that contradict files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmfeat.cli.console import out
from mmfeat.encoders.registry import describe_encoders
from mmfeat.errors import RunError, SubmissionError
from mmfeat.evaluation.protocol import Protocol
from mmfeat.extraction.extract import extract_features
from mmfeat.heads.jobs import LocalEngine
from mmfeat.heads.registry import FUSIONS, HeadSettings
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.leaderboard import ablation
from mmfeat.runs.run import best_run, read_run
from mmfeat.sweep.train import choose_pairs
from mmfeat.sweep.trials import HeadTrainer
from mmfeat.system.wording import ignore
from tests.heads.toy_features import features
from tests.sweep.small_sweeps import FEW, FLOAT32, NO_HEADS, made_up_entry, stamps, sweep, toy_task


def flip(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))


@pytest.mark.parametrize("damage", [Path.unlink, flip], ids=["deleted", "flipped"])
def test_the_same_sweep_trains_a_damaged_head_again(
    place: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    run = sweep(place, out=tmp_path).run
    broken, others = run.folder / "concat-both" / "final-1.safetensors", run.folder / "knn-both"
    whole, before = broken.read_bytes(), stamps(others)
    damage(broken)
    again = sweep(place, out=tmp_path)
    assert not again.reused
    assert broken.read_bytes() == whole
    assert stamps(others) == before
    assert sweep(place, out=tmp_path).reused


def test_a_deleted_leaderboard_and_changed_folds_are_written_again(place: Path, tmp_path: Path) -> None:
    run = sweep(place, **NO_HEADS, out=tmp_path).run
    folds = run.folder / "folds.csv"
    before = run.leaderboard_file.read_bytes(), folds.read_bytes()
    for damage in (run.leaderboard_file.unlink, folds.unlink, lambda: folds.write_bytes(before[1] + b"new,train,test")):
        damage()
        if not folds.exists() or folds.read_bytes() != before[1]:
            with pytest.raises(RunError, match="its splits are not those that were saved; run mmfeat heads again"):
                read_run(run.folder).out_of_fold()
        sweep(place, **NO_HEADS, out=tmp_path)
        assert (run.leaderboard_file.read_bytes(), folds.read_bytes()) == before


@pytest.mark.parametrize("name", ["train.txt", "data/new.txt", "submission.csv"])
def test_a_submission_never_lands_in_the_data(place: Path, name: str) -> None:
    sweep(place)
    before = stamps(place / "demo")
    with pytest.raises(SubmissionError, match=r"this would overwrite the data in .*; name a file elsewhere"):
        write_submission(heads=place / "heads", out=place / "demo" / name)
    assert stamps(place / "demo") == before


def test_a_head_that_is_named_is_looked_for_in_all_runs_on_the_data(place: Path, tmp_path: Path) -> None:
    other = sweep(place, **{**FEW, "fusion": ["film"], "baselines": []}, out=tmp_path).run
    sweep(place, out=tmp_path)
    assert best_run(tmp_path, head="film").folder == other.folder


def test_reused_splits_and_labels_with_bars_are_told(place: Path, tmp_path: Path) -> None:
    splits = Protocol(folds=2, seeds=2, split_dir=str(tmp_path / "splits"))
    assert not sweep(place, **NO_HEADS, protocol=splits, out=tmp_path / "a").notes
    (note,) = sweep(place, **NO_HEADS, protocol=splits, out=tmp_path / "a").notes
    assert "are used again (2 folds); --folds, --split and --seed have no effect" in note
    table = tmp_path / "labels.csv"
    texts = [f"{number},some words {number} of text,{'a|b' if number % 2 else 'a'}" for number in range(40)]
    table.write_text("\n".join(["id,text,label", *texts]))
    extract_features(table, ["hashing"], cache=place / "cache", options=FLOAT32)
    (note,) = sweep(place, ["hashing"], data=table, **NO_HEADS, out=tmp_path).notes
    assert "(for several labels a sample: --task multilabel)" in note


def test_no_batch_is_larger_than_a_training_fold() -> None:
    task = toy_task()
    engine = LocalEngine(features(), task.targets, "cpu", "", 1)
    try:
        small, large = (
            HeadTrainer(task, engine, "concat", "both").run([HeadSettings(epochs=1, batch_size=size)], ignore)
            for size in (min(len(rows.train) for _, _, rows in task.cells("concat")), 10**9)
        )
    finally:
        engine.close()
    np.testing.assert_array_equal(small[0].logits, large[0].logits)


def test_a_head_that_is_another_one_alone_is_trained_once(place: Path) -> None:
    towers = describe_encoders(["hashing", "hog"], FLOAT32)
    pairs = choose_pairs(["film", "film-concat"], [], ["both", "text"], towers, "tokens", str)
    assert pairs == [("film", "both"), ("film-concat", "both"), ("film", "text")]
    alone = choose_pairs(["film-concat"], [], ["both", "text"], towers, "tokens", str)
    assert alone == [("film-concat", "both"), ("film-concat", "text")]
    scored = made_up_entry(toy_task(), "any", 1.0).entry
    board = [replace(scored, head=head, modalities=modality) for head, modality in pairs]
    assert ablation(board)["film-concat"].keys() == {"both", "text"}
    assert set(FUSIONS) >= {"film", "film-concat"}


def test_codes_of_emoji_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    with out.capture() as captured:
        out.print("a:b: :smile: [bold]x")
    assert captured.get().strip() == "a:b: :smile: [bold]x"
