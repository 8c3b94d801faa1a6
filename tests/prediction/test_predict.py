"""`mmfeat predict` and the flags of `mmfeat submit`: what is typed, what is printed, what is written."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from mmfeat.cli import predict as console_predict
from mmfeat.errors import ConfigError, DataError
from mmfeat.evaluation.metrics import evaluate
from mmfeat.prediction.inputs import samples_of_files
from mmfeat.prediction.predict import predict_data, targets_of
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.entry import Scores, convert
from tests.cli.typed import invoke
from tests.sweep.small_sweeps import make_place, stamps, sweep


@pytest.fixture(scope="module")
def place(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo data, its cache, and one run."""
    place = make_place(demo_folder, tmp_path_factory.mktemp("predict"))
    sweep(place, fusion=["concat"], baselines=["knn"], ensembles=False)
    return place


def mmfeat(place: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Result:
    monkeypatch.chdir(place)
    return invoke(*arguments)


def cells(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def photo(place: Path, id: str) -> Path:
    return next((place / "demo" / "data").glob(f"{id}.[jJpPwW]*"))


def listed(place: Path) -> list[str]:
    return [line.split(",")[0] for line in (place / "demo" / "test_without_label.txt").read_text().split()[1:]]


def test_one_pair_from_the_command_line(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the same pair is submitted; the user's cache stays as it is."""
    id = next(id for id in listed(place) if (place / "demo" / "data" / f"{id}.txt").exists())
    text, image = (place / "demo" / "data" / f"{id}.txt").read_text(), photo(place, id)
    write_submission(heads=place / "heads", out=tmp_path / "s.csv", proba=True)
    before = stamps(place)
    answer = mmfeat(place, monkeypatch, "predict", "--text", text, "--image", image)
    assert answer.exit_code == 0, answer.output
    header, row = cells(answer.stdout)
    assert header == ["guid", "tag", "p_negative", "p_neutral", "p_positive"]
    submitted = {line[0]: line[1:] for line in cells((tmp_path / "s.csv").read_text())[1:]}[id]
    assert row[1] == submitted[0]
    assert np.abs(np.array(row[2:], float) - np.array(submitted[1:], float)).max() < 1e-5
    assert stamps(place) == before


def test_a_terminal_shows_a_table(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_predict.out, "_force_terminal", True)
    answer = mmfeat(place, monkeypatch, "predict", "--text", "so tired of this")
    assert answer.stdout.splitlines()[0].split()[-3:] == ["negative", "neutral", "positive"]
    assert "," not in answer.stdout
    plain = mmfeat(place, monkeypatch, "predict", "--text", "so tired of this", "--format", "tsv")
    assert plain.stdout.startswith("guid\ttag\tp_negative")


def test_files_with_the_texts_beside_them(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = [id for id in listed(place) if (place / "demo" / "data" / f"{id}.txt").exists()][:2]
    for id in (first, second):
        shutil.copy(photo(place, id), tmp_path / f"{id}.JPG")
        shutil.copy(place / "demo" / "data" / f"{id}.txt", tmp_path)
    shutil.copy(tmp_path / f"{first}.txt", tmp_path / "alone.txt")
    files = [tmp_path / f"{first}.JPG", tmp_path / f"{first}.txt", tmp_path / f"{second}.JPG", tmp_path / "alone.txt"]
    samples = samples_of_files(files)
    assert [sample.id for sample in samples] == [str(files[0]), str(files[2]), str(files[3])]
    assert [sample.image for sample in samples] == [files[0], files[2], None]
    assert samples.samples[0].text == samples.samples[2].text == (tmp_path / "alone.txt").read_text()
    folder = samples_of_files([tmp_path])  # stands for what is in it, by name
    assert sorted(folder, key=lambda each: each.id) == sorted(samples, key=lambda each: each.id)
    answer = mmfeat(place, monkeypatch, "predict", *files, "--out", tmp_path / "p.jsonl")
    assert answer.exit_code == 0, answer.output
    assert answer.stdout.splitlines()[-1] == f"predictions {tmp_path / 'p.jsonl'}"
    entries = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    write_submission(heads=place / "heads", out=tmp_path / "s.csv", proba=True)
    submitted = {row[0]: row[1] for row in cells((tmp_path / "s.csv").read_text())}
    assert [entry["tag"] for entry in entries[:2]] == [submitted[first], submitted[second]]


def test_the_text_beside_a_photo_is_not_overwritten(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copy(photo(place, listed(place)[0]), tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("a text")
    answer = mmfeat(place, monkeypatch, "predict", tmp_path / "a.jpg", "--out", tmp_path / "a.txt")
    assert answer.exit_code == 1
    assert "this would overwrite the data" in answer.stderr
    assert (tmp_path / "a.txt").read_text() == "a text"


def test_odd_texts_names_and_links(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A text that is no UTF-8, a file named so, and a link to itself."""
    odd = mmfeat(place, monkeypatch, "predict", "--text", "so tired \udcff")
    assert odd.exit_code == 0, odd.output
    shutil.copy(photo(place, listed(place)[0]), tmp_path / "x\udcff.jpg")
    named = mmfeat(place, monkeypatch, "predict", tmp_path / "x\udcff.jpg")
    assert b"x\xff.jpg," in named.stdout_bytes
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    loop = mmfeat(place, monkeypatch, "predict", "--text", "hello", "--out", tmp_path / "loop.csv")
    assert "a link to itself" in loop.stderr


def test_flags_of_a_data_set_are_not_taken_for_files(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag, value in (("--cache", "cache"), ("--columns", "id=guid"), ("--workers", "2")):
        answer = mmfeat(place, monkeypatch, "predict", "--text", "hello", flag, value)
        assert answer.exit_code == 1
        assert f"{flag} goes with --data" in answer.stderr


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id\n")
    (tmp_path / "a.pdf").write_text("")
    listed, empty = tmp_path / "listed", tmp_path / "empty"
    for folder in (listed, empty):
        folder.mkdir()
    (listed / "train.txt").write_text("1,up\n")
    for wrong, message in (
        (listed, "a folder with a list of samples is named with --data"),
        (empty, "neither photos .* in this folder"),
        (tmp_path / "a.csv", "is named with --data"),
        (tmp_path / "a.pdf", "neither a photo"),
        (tmp_path / "b.jpg", "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            samples_of_files([wrong])


def test_a_broken_photo_and_one_that_is_not_there_are_told(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "x.jpg").write_bytes(b"no photo")
    plain = mmfeat(place, monkeypatch, "predict", "--text", "hello")
    answer = mmfeat(place, monkeypatch, "predict", "--text", "hello", "--image", tmp_path / "x.jpg")
    assert answer.exit_code == 0
    assert "note: 1 of 1 samples predicted without photo" in answer.stderr
    assert cells(answer.stdout)[1][1:] == cells(plain.stdout)[1][1:]
    gone = mmfeat(place, monkeypatch, "predict", "--text", "hello", "--image", tmp_path / "none.jpg")
    assert (gone.exit_code, gone.stdout) == (1, "")
    assert f"--image {tmp_path / 'none.jpg'}: no such file" in gone.stderr


def test_a_data_set_is_predicted_whole_and_scored_where_labels_tell(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = [f"{n},so {word} of this {n},,{label}" for n, (word, label) in enumerate([("tired", "negative")] * 30)]
    (tmp_path / "new.csv").write_text("\n".join(["id,text,image,label", *rows, "u,what a wonderful day,,"]))
    answer = mmfeat(place, monkeypatch, "predict", "--data", tmp_path / "new.csv", "--cache", tmp_path / "cache")
    assert answer.exit_code == 0, answer.output
    body = cells(answer.stdout)[1:]
    assert [row[0] for row in body] == [*map(str, range(30)), "u"]
    accuracy = np.mean([row[1] == "negative" for row in body[:30]])
    assert f"30 labelled samples: accuracy {accuracy:.3f} [" in answer.stderr
    assert "31 of 31 samples predicted without photo" in answer.stderr
    assert "100.0% of these samples have no photo" in answer.stderr  # drift
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["new"]


def test_a_photo_of_a_data_set_that_cannot_be_read_is_named_with_its_reason(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    (tmp_path / "new.csv").write_text("id,text,image\na,hello,broken.jpg\n")
    answer = mmfeat(place, monkeypatch, "predict", "--data", tmp_path / "new.csv", "--cache", tmp_path / "cache")
    assert re.search(r"1 of 1 samples have a photo that cannot be read .*\(first: a, [a-z].*\)", answer.stderr)
    (tmp_path / "new.csv").write_text("id,text,image\na,hello,memory://nowhere/photo.jpg\n")
    answer = mmfeat(place, monkeypatch, "predict", "--data", tmp_path / "new.csv", "--cache", tmp_path / "cache")
    assert re.search(r"1 of 1 samples have a photo that cannot be read .*\(first: a, unreadable: .*\)", answer.stderr)


def test_samples_that_trained_the_run_do_not_flatter_its_score(place: Path, tmp_path: Path) -> None:
    found = predict_data(place / "demo", heads=place / "heads")
    assert found.scores is None
    assert any("108 of 108 labelled samples trained this run" in line for line in found.notes)
    assert not any("predictions differ" in line for line in found.notes)  # the same samples are no drift
    copy = tmp_path / "renamed"
    shutil.copytree(place / "demo", copy)
    lines = (copy / "train.txt").read_text().splitlines()
    (copy / "data" / "fresh.txt").write_text("words that nobody wrote before")
    (copy / "train.txt").write_text("\n".join([*lines, "fresh,neutral"]))
    found = predict_data(copy, heads=place / "heads", cache=tmp_path / "cache")
    assert found.scores is not None
    assert found.scores.samples == 1


def test_a_text_that_trained_a_head_on_texts_counts_as_seen_whatever_the_photo(place: Path, tmp_path: Path) -> None:
    id = next(line.split(",")[0] for line in (place / "demo" / "train.txt").read_text().splitlines()[1:])
    table = [["id", "text", "label"], [id, (place / "demo" / "data" / f"{id}.txt").read_text(), "neutral"]]
    with (tmp_path / "new.csv").open("w", newline="") as file:
        csv.writer(file).writerows(table)
    both = predict_data(tmp_path / "new.csv", heads=place / "heads", cache=tmp_path / "cache")
    sweep(place, ["hashing"], fusion=["none"], baselines=["knn"], modalities=["text"], out=tmp_path / "heads")
    text = predict_data(tmp_path / "new.csv", heads=tmp_path / "heads", cache=tmp_path / "cache")
    assert both.scores is not None
    assert text.scores is None


def test_a_run_predicts_with_the_version_of_an_encoder_that_trained_it(demo_folder: Path, tmp_path: Path) -> None:
    place = make_place(demo_folder, tmp_path, ["hashing:1"])
    run = sweep(place, ["hashing:1"], fusion=["none"], baselines=["knn"], modalities=["text"]).run
    before = predict_data(place / "demo", heads=place / "heads", cache=place / "cache").predictions
    file = run.folder / "run.json"  # an earlier version had no name for its only version
    file.write_text(file.read_text().replace('"hashing:1"', '"hashing"'))
    for cache in ("cache", "empty"):
        now = predict_data(place / "demo", heads=place / "heads", cache=place / cache).predictions
        np.testing.assert_array_equal(now.probabilities, before.probabilities)


def test_scores_are_those_of_the_metrics(place: Path, tmp_path: Path) -> None:
    labels = ["negative", "positive", "neutral"] * 10
    lines = [f"{n},words number {n} of a {label} text,{label}" for n, label in enumerate(labels)]
    (tmp_path / "new.csv").write_text("\n".join(["id,text,label", *lines]))
    found = predict_data(tmp_path / "new.csv", heads=place / "heads", cache=tmp_path / "cache")
    predictions = found.predictions
    targets = targets_of(labels, predictions.classes, "multiclass")
    assert found.scores == convert(evaluate(targets, predictions.chosen[None], predictions.probabilities[None]), Scores)
    (tmp_path / "new.csv").write_text("id,text,label\n1,words,joyful\n")
    found = predict_data(tmp_path / "new.csv", heads=place / "heads", cache=tmp_path / "cache")
    assert found.scores is None
    assert any("label joyful is unknown to the run" in line for line in found.notes)


def test_one_way_to_say_what_to_predict(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in ([], ["a.jpg", "--text", "x"], ["--data", "demo", "--image", "a.jpg"]):
        answer = mmfeat(place, monkeypatch, "predict", *arguments)
        assert answer.exit_code == 1
        assert "given to predict; name photos and .txt files, or --data, or --text and --image" in answer.stderr


def test_predictions_never_take_the_place_of_their_sources(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo(place, listed(place)[0])
    before = image.read_bytes()
    run = next((place / "heads").iterdir())
    for out in (image, run / "leaderboard.csv"):
        answer = mmfeat(place, monkeypatch, "predict", image, "--out", out)
        assert answer.exit_code == 1
        assert "this would overwrite" in answer.stderr
    assert image.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "name", "first"),
    [
        ([], "s.csv", "guid,tag"),
        (["--no-header", "--format", "tsv"], "s.txt", None),
        (["--columns", "id,label", "--proba"], "s.tsv", "id\tlabel\tp_negative\tp_neutral\tp_positive"),
        (["--columns", "id,label,NEG,NEU,POS", "--proba"], "s.csv", "id,label,NEG,NEU,POS"),
    ],
)
def test_submit_writes_what_is_asked_for(
    place: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], name: str, first: str | None, tmp_path: Path
) -> None:
    answer = mmfeat(place, monkeypatch, "submit", *flags, "--out", tmp_path / name)
    assert answer.exit_code == 0, answer.output
    assert "out of fold" in answer.stdout
    lines = (tmp_path / name).read_text().splitlines()
    assert len(lines) == (13 if first else 12)
    assert lines[0] == first if first else lines[0].split("\t")[0] == listed(place)[0]


def test_submit_names_columns_of_both_tables(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "new.csv").write_text("number,caption\nx,so tired of this\n")
    (run,) = (place / "heads").iterdir()
    arguments = ["submit", "--run", run, "--data", tmp_path / "new.csv", "--cache", tmp_path / "cache"]
    columns = "id=number,text=caption,who,what"
    answer = mmfeat(place, monkeypatch, *arguments, "--columns", columns, "--out", tmp_path / "s.jsonl")
    assert answer.exit_code == 0, answer.output
    assert set(json.loads((tmp_path / "s.jsonl").read_text())) == {"who", "what"}
    with pytest.raises(ConfigError, match="is a folder and has no columns; to name those of the file written, list"):
        write_submission(run, columns={"id": "number"}, out=tmp_path / "s.csv")


def test_drift_is_told_with_the_submission(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usual = write_submission(heads=place / "heads", out=tmp_path / "s.csv", head="knn")
    assert sum(usual.out_of_fold.values()) == pytest.approx(1)
    assert not any("the predictions differ from" in line for line in usual.notes)
    lines = [f"{n},so tired of the bus {n}" for n in range(100)]
    (tmp_path / "new.csv").write_text("\n".join(["id,text", *lines]))
    (run,) = (place / "heads").iterdir()
    arguments: dict[str, Any] = {"data": tmp_path / "new.csv", "cache": tmp_path / "cache", "head": "knn"}
    shifted = write_submission(run, out=tmp_path / "s.csv", **arguments)
    assert any("the predictions differ from" in line for line in shifted.notes)
    assert any("100.0% of these samples have no photo" in line for line in shifted.notes)
    answer = mmfeat(place, monkeypatch, "submit", "--run", run, "--data", tmp_path / "new.csv",
                    "--cache", tmp_path / "cache", "--head", "knn", "--out", tmp_path / "s.csv")  # fmt: skip
    assert "note: the predictions differ from those for the labelled samples" in answer.stdout


def test_a_run_without_its_predictions_out_of_fold_still_submits(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "heads", tmp_path / "heads")
    for path in (tmp_path / "heads").rglob("out_of_fold.csv"):
        path.unlink()
    result = write_submission(heads=tmp_path / "heads", out=tmp_path / "s.csv")
    assert result.out_of_fold == {}
    assert result.rows == 12
