"""The submission: every unlabelled sample once, in order, by exactly the run's encoders."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import pytest

from mmfeat.encoders import EncoderOptions
from mmfeat.errors import CacheError, RunError, SubmissionError
from mmfeat.extract import extract_features
from mmfeat.heads import HeadSettings
from mmfeat.submit import check_rows, write_submission
from mmfeat.sweep import train_heads

FLOAT32 = EncoderOptions(dtype="float32")


@pytest.fixture
def place(demo_folder: Path, tmp_path: Path, tiny_timm: Path) -> Path:
    """A finished run on a copy of the demo data with a local timm model."""
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
        folds=2,
        settings=HeadSettings(epochs=2),
        modalities=["both"],
    )
    return tmp_path


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
    assert result.trained["positive"] == pytest.approx(result.run.config["class_counts"]["positive"] / 108)
    assert result.extraction.nothing_to_do


@pytest.mark.parametrize("head", ["concat", "logistic"])
def test_a_head_can_be_named(place: Path, head: str) -> None:
    assert write_submission(heads=place / "heads", out=place / "s.csv", head=head).head == head
    with pytest.raises(RunError, match="no such head; the run has"):
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


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([("a", "x")], "1 rows do not name the 2 samples"),
        ([("b", "x"), ("a", "x")], "once each and in order"),
        ([("a", "x"), ("a", "x")], "once each and in order"),
        ([("a", "x"), ("b", "")], "sample b would get the label ''"),
        ([("a", "x"), ("b", "z")], "none of x, y"),
    ],
)
def test_a_file_that_breaks_its_rules_is_never_written(wrong: list[tuple[str, str]], message: str) -> None:
    check_rows([("a", "x"), ("b", "y")], ["a", "b"], ["x", "y"])
    with pytest.raises(SubmissionError, match=message):
        check_rows(wrong, ["a", "b"], ["x", "y"])
