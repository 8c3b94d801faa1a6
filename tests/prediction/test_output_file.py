"""The prediction file: every format says what was predicted, or is never written."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfeat.errors import ConfigError, SubmissionError
from mmfeat.prediction.output_file import (
    OutputFormat,
    Predictions,
    checked_target,
    choose_format,
    prediction_text,
    read_back,
    write_prediction_file,
)

CLASSES = ("sun", "rain")
ODD = Predictions(
    ("a", 'with "quotes", and comma', "tab\there", "ümlaut \u2028 line"),
    np.array([[1, 0], [0, 1], [0, 1], [1, 0]], bool),
    np.array([[0.75, 0.25], [1 / 3, 2 / 3], [1e-9, 1 - 1e-9], [0.5000004, 0.4999996]]),
    CLASSES,
)


@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("probabilities", [False, True])
def test_any_reader_gets_the_predictions_again(format: str, probabilities: bool) -> None:
    text = prediction_text(ODD, OutputFormat(format, probabilities=probabilities))
    if format == "jsonl":
        entries = [json.loads(line) for line in text.split("\n") if line]
        ids, labels = [each["guid"] for each in entries], [each["tag"] for each in entries]
        values = [list(each["probabilities"].values()) for each in entries] if probabilities else []
        assert not probabilities or list(entries[0]["probabilities"]) == list(CLASSES)
    else:
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter="," if format == "csv" else "\t")
        assert header == ["guid", "tag", *(["p_sun", "p_rain"] if probabilities else [])]
        ids, labels = [row[0] for row in rows], [row[1] for row in rows]
        values = [[float(cell) for cell in row[2:]] for row in rows] if probabilities else []
    assert (tuple(ids), labels) == (ODD.ids, ODD.labels)
    assert not values or np.abs(np.array(values) - ODD.probabilities).max() < 1e-6


def test_header_and_names_are_the_user_s() -> None:
    assert prediction_text(ODD, OutputFormat(header=False)).startswith("a,sun\n")
    assert prediction_text(ODD, OutputFormat(names=("id", "label"))).startswith("id,label\na,sun\n")
    named = OutputFormat(names=("id", "label", "SUN", "RAIN"), probabilities=True)
    assert prediction_text(ODD, named).startswith("id,label,SUN,RAIN\na,sun,0.750000,0.250000\n")
    lines = prediction_text(ODD, OutputFormat("jsonl", names=("id", "label"))).splitlines()
    assert json.loads(lines[0]) == {"id": "a", "label": "sun"}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"format": "xml"}, "--format xml: use one of csv, tsv, jsonl"),
        ({"format": "jsonl", "header": False}, "--no-header: JSON lines have no header"),
        ({"names": ("id",)}, "name two columns to write"),
        ({"names": ("id", "label", "x")}, "name two columns to write"),
        ({"names": ("id", "id")}, "a name of its own"),
        ({"names": ("id", "label", "x"), "probabilities": True}, "1 names for the probabilities of 2 classes"),
        ({"names": ("p_sun", "label"), "probabilities": True}, "stands for two columns"),
        ({"format": "jsonl", "names": ("id", "probabilities"), "probabilities": True}, "stands for two columns"),
        ({"format": "jsonl", "names": ("a", "b", "c", "d"), "probabilities": True}, "name two"),
    ],
)
def test_layouts_that_contradict_themselves_are_told(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prediction_text(ODD, OutputFormat(**layout))


def test_the_suffix_chooses_the_format() -> None:
    assert [choose_format(out, None) for out in ("a.csv", "a.TSV", "b/a.jsonl", "a.txt", "a", None)] == [
        "csv", "tsv", "jsonl", "csv", "csv", "csv"
    ]  # fmt: skip
    assert choose_format("a.txt", "jsonl") == choose_format("a.jsonl", "jsonl") == choose_format(None, "jsonl")
    with pytest.raises(ConfigError, match=r"--out a\.parquet: \.parquet is not written"):
        choose_format("a.parquet", None)
    with pytest.raises(ConfigError, match=r"--format tsv contradicts --out a\.csv"):
        choose_format("a.csv", "tsv")


@pytest.mark.parametrize(
    "values", [[0.5, 0.6], [-0.1, 1.1], [float("nan"), 1.0], [0.5, 0.499]], ids=["sum", "negative", "nan", "less"]
)
def test_probabilities_that_are_none_are_never_written(values: list[float], tmp_path: Path) -> None:
    wrong = Predictions(("a",), np.array([[True, False]]), np.array([values]), CLASSES)
    with pytest.raises(SubmissionError, match="sample a would get the probabilities"):
        write_prediction_file(tmp_path / "s.csv", wrong, OutputFormat(probabilities=True))
    assert not list(tmp_path.iterdir())
    several = Predictions(("a",), np.array([[True, True]]), np.array([[0.9, 0.8]]), CLASSES, multilabel=True)
    assert "a,sun|rain,0.900000,0.800000" in prediction_text(several, OutputFormat(probabilities=True))


@pytest.mark.parametrize("format", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize(
    ("old", "new"),
    [("sun", "rain"), ("0.75", "0.65"), ("ümlaut", "umlaut"), ("guid", "gu\nid"), ("\n", ""), ("a", "a\r\n")],
)
def test_a_text_that_reads_otherwise_is_refused(format: str, old: str, new: str) -> None:
    """Whatever went wrong in writing it: the text is read again, and compared."""
    layout = OutputFormat(format, probabilities=True)
    text = prediction_text(ODD, layout)
    read_back(text, ODD, layout)
    with pytest.raises(SubmissionError) as refused:
        read_back(text.replace(old, new, 1), ODD, layout)
    assert "\n" not in str(refused.value)


def test_data_and_run_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    table = tmp_path / "table.csv"
    table.write_text("id,text\n")
    assert checked_target(tmp_path / "s.csv", tmp_path / "data", table) == tmp_path / "s.csv"
    for wrong in (table, tmp_path / "data" / "s.csv"):
        with pytest.raises(SubmissionError, match="this would overwrite the data in"):
            checked_target(wrong, tmp_path / "data", table)
    for photo in (b"\xff\xd8\xff\xe0 a photo", b"\x89PNG\r\n", b"RIFF....WEBP"):
        (tmp_path / "photo").write_bytes(photo)  # as a table elsewhere may name it
        with pytest.raises(SubmissionError, match="this would overwrite a photo"):
            checked_target(tmp_path / "photo", table)
    (tmp_path / "link.csv").symlink_to(table)
    with pytest.raises(SubmissionError, match="this would overwrite"):
        checked_target(tmp_path / "link.csv", table)
