"""Data to predict beside the data to train on: encoded, remembered and written in the columns of the user's table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from mmfeat.errors import DataError
from mmfeat.extraction.extract import Extraction, extract_features
from mmfeat.extraction.forecast import forecast_extraction
from mmfeat.extraction.requests import latest_request, remember_request
from mmfeat.prediction.submit import Submission, write_submission
from mmfeat.sweep.train import train_heads
from tests.cli.typed import invoke
from tests.sweep.small_sweeps import BUILT_IN, NO_HEADS, SMALL

COLUMNS = {"id": "sku", "text": "title", "image": "photo", "label": "category"}
WORDS = ["river", "stone", "lamp", "green", "quiet", "market", "train", "cloud", "paper", "winter"]


def shop(folder: Path, rows: range) -> pd.DataFrame:
    for row in rows:
        Image.new("RGB", (48, 48), (row * 3, 90, 250 - row * 3)).save(folder / f"{row}.png")
    titles = [f"{WORDS[row % 10]} {WORDS[row * 7 % 9]} {row} {['good', 'bad'][row % 2]}" for row in rows]
    frame = {"sku": [f"A{row}" for row in rows], "title": titles, "photo": [f"{row}.png" for row in rows]}
    return pd.DataFrame({**frame, "category": [["cat", "dog"][row % 2] for row in rows]})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on train.csv, whose extraction remembers test.csv; labelled.csv repeats ten rows of train.csv."""
    folder = tmp_path_factory.mktemp("shop")
    frame = shop(folder, range(60))
    frame[:40].to_csv(folder / "train.csv", index=False)
    frame[40:].drop(columns="category").to_csv(folder / "test.csv", index=False)
    frame[30:].to_csv(folder / "labelled.csv", index=False)
    extract(folder, "test.csv")
    train_heads(
        folder / "train.csv", BUILT_IN, columns=COLUMNS, cache=folder / "cache", out=folder / "heads", protocol=SMALL,
        **NO_HEADS,
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def _remembers_the_test_data(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Each test begins with test.csv remembered, whatever another test has named."""
    if "trained" in request.fixturenames:
        folder = request.getfixturevalue("trained")
        before = latest_request(folder / "cache", folder / "train.csv")
        remember_request(folder / "cache", replace(before, test=str(folder / "test.csv")))


def extract(folder: Path, test: str | None) -> Extraction:
    test = str(folder / test) if test else test
    return extract_features(folder / "train.csv", BUILT_IN, columns=COLUMNS, cache=folder / "cache", test=test)


def submit(folder: Path, **options: object) -> tuple[Submission, pd.DataFrame]:
    result = write_submission(heads=folder / "heads", out=folder / "s.csv", cache=folder / "cache", **options)
    return result, pd.read_csv(result.path)


def test_submit_predicts_the_test_data_in_the_columns_of_the_table(trained: Path) -> None:
    result, written = submit(trained)
    assert list(written) == ["sku", "category"]
    assert list(written.sku) == [f"A{row}" for row in range(40, 60)]
    assert set(written.category) <= {"cat", "dog"}
    assert result.extraction.nothing_to_do
    assert result.scores is None


def test_columns_of_the_file_can_be_named_still(trained: Path) -> None:
    _, written = submit(trained, names=("guid", "tag"))
    assert list(written) == ["guid", "tag"]


def test_test_data_with_labels_are_predicted_whole_and_scored_without_what_was_trained_on(trained: Path) -> None:
    result = extract(trained, "labelled.csv")
    assert result.test is not None
    assert "10 ids occur in" in " ".join(result.test.samples.notes)
    assert "(first: A30)" in " ".join(result.test.samples.notes)
    result, written = submit(trained)
    assert len(written) == 30
    assert result.scores is not None
    assert result.scores.samples == 20
    assert any("10 of 30 labelled samples trained this run" in note for note in result.notes)


def test_test_samples_that_equal_one_of_the_training_are_told(trained: Path) -> None:
    frame = pd.read_csv(trained / "train.csv").drop(columns="category")[:3]
    frame.assign(sku=["x", "y", "z"]).to_csv(trained / "leak.csv", index=False)
    extract(trained, "leak.csv")
    result, _ = submit(trained)
    assert "3 of 3 samples equal one that trained the run (first: x)" in result.notes


def test_test_data_are_remembered_until_they_are_forgotten(trained: Path) -> None:
    extract(trained, None)
    assert submit(trained)[0].data == str(trained / "test.csv")
    extract_features(trained / "train.csv", BUILT_IN, columns=COLUMNS, cache=trained / "cache", test="")
    assert latest_request(trained / "cache", trained / "train.csv").test == ""


def test_a_named_table_comes_before_the_test_data(trained: Path) -> None:
    pd.read_csv(trained / "test.csv")[:2].to_csv(trained / "two.csv", index=False)
    result, written = submit(trained, data=trained / "two.csv")
    assert len(written) == 2
    assert result.data == str(trained / "two.csv")


def test_a_forecast_counts_the_test_data(trained: Path, tmp_path: Path) -> None:
    found = forecast_extraction(
        trained / "train.csv", BUILT_IN, columns=COLUMNS, cache=tmp_path / "new", test=trained / "test.csv"
    )
    assert found.test is not None
    assert (len(found.samples), len(found.test.samples)) == (40, 20)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"sku": ["a"], "name": ["b"], "photo": ["c"]}), r"no column title \(text\) as in .*train.csv"),
        (None, "^--test .*other.csv: no such folder or table"),
    ],
)
def test_test_data_that_differ_are_refused_before_anything_is_encoded(
    trained: Path, tmp_path: Path, frame: pd.DataFrame | None, message: str
) -> None:
    if frame is not None:
        frame.to_csv(tmp_path / "other.csv", index=False)
    with pytest.raises(DataError, match=message):
        extract_features(
            trained / "train.csv", BUILT_IN, columns=COLUMNS, cache=tmp_path / "new", test=tmp_path / "other.csv"
        )
    assert not (tmp_path / "new").exists()


def test_the_data_themselves_are_no_test_data(trained: Path) -> None:
    with pytest.raises(DataError, match="the same as --data"):
        extract(trained, "train.csv")


def test_the_three_lines_of_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frame = shop(tmp_path, range(40)).rename(columns={"sku": "id", "title": "text", "photo": "image"})
    frame.rename(columns={"category": "label"})[:30].to_csv("train.csv", index=False)
    frame.drop(columns="category")[30:].to_csv("test.csv", index=False)
    lines = (
        "extract --data train.csv --test test.csv --encoders hashing,hog",
        "heads --fusion none --baselines knn --modalities text --folds 2 --seeds 1",
        "submit",
    )
    for line in lines:
        answer = invoke(*line.split(" "))
        assert answer.exit_code == 0, answer.output
    assert list(pd.read_csv("submission.csv")) == ["id", "label"]
    assert "10 predictions for test.csv" in answer.output
