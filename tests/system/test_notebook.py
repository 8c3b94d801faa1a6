"""Frames, short forms and progress: what a Python session shows of results."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from IPython.display import DisplayHandle

import mmfeat
from mmfeat.errors import ConfigError, DataError
from mmfeat.extraction.extract import extract_features
from mmfeat.prediction.model import load
from mmfeat.runs.run import Run
from mmfeat.samples.dataset import read_samples
from mmfeat.sweep.train import Sweep
from mmfeat.system import notebook
from mmfeat.system.notebook import CsvFrame, NotebookProgress, Shown, usual_progress
from mmfeat.system.wording import Silent
from tests.sweep.small_sweeps import BUILT_IN, FLOAT32, sweep


@pytest.fixture(scope="module")
def trained(place: Path) -> Sweep:
    return sweep(place, BUILT_IN, fusion=["none"], baselines=["ridge", "prior"], modalities=["both", "text"])


@pytest.fixture(scope="module")
def run(trained: Sweep) -> Run:
    return trained.run


def results(place: Path, trained: Sweep) -> list[Shown]:
    audit = mmfeat.audit_data(place / "demo", run=trained.run.folder, out=place / "audit")
    extraction = extract_features(place / "demo", BUILT_IN, cache=place / "cache", options=FLOAT32)
    model = load(trained.run.folder, device="cpu")
    samples = read_samples(place / "demo")
    return [samples, extraction, trained, trained.run, trained.run.leaderboard, model, audit]


def test_results_are_shown_by_a_line_and_a_table(place: Path, trained: Sweep) -> None:
    for result in results(place, trained):
        assert repr(result).startswith(f"<{type(result).__name__}: ")
        assert len(repr(result)) < 400
        assert "\n" not in repr(result)
        page = result._repr_html_()
        assert len(page) < 6000
        assert page.count("<tr>") <= notebook.SHOWN_ROWS + 1
    assert "120 samples, 108 labelled, " in repr(read_samples(place / "demo"))


def test_texts_of_others_are_no_html(tmp_path: Path) -> None:
    samples = read_samples(pd.DataFrame({"text": ["<script>alert(1)</script>"], "label": ["<b>x"]}))
    assert "<script>" not in samples._repr_html_()
    assert "<b>x" not in samples._repr_html_()


def test_the_leaderboard_is_a_frame_of_numbers(run: Run) -> None:
    frame = run.leaderboard.to_pandas()
    assert len(frame) == len(run.leaderboard)
    assert isinstance(run.leaderboard, tuple)
    assert frame["head"].tolist() == [entry.head for entry in run.leaderboard]
    np.testing.assert_allclose(frame["macro_f1"], [entry.macro_f1.value for entry in run.leaderboard], atol=5e-5)
    assert frame.columns.tolist() == pd.read_csv(run.leaderboard_file).columns.tolist()


def test_predictions_out_of_fold_are_a_frame(run: Run) -> None:
    predictions = run.out_of_fold()
    frame = predictions.to_pandas()
    assert frame["id"].tolist() == list(predictions.ids)
    assert frame["right"].mean() == predictions.right.mean()
    assert (frame["predicted"] == frame["label"]).equals(frame["right"])
    np.testing.assert_allclose(frame[[f"p_{name}" for name in run.classes]], predictions.probabilities)
    assert pa.table(predictions).num_rows == len(frame)
    assert len(repr(predictions)) < 100


def test_vectors_of_an_extraction_are_a_frame(place: Path) -> None:
    extraction = extract_features(place / "demo", BUILT_IN, cache=place / "cache", options=FLOAT32)
    frame, (samples, features) = extraction.to_pandas(), extraction.load()
    assert frame["id"].tolist() == [sample.id for sample in samples]
    assert frame["text"][0] == samples.samples[0].text
    for block, name in zip(features.blocks, BUILT_IN, strict=True):
        np.testing.assert_array_equal(np.stack(frame[name]), block.vectors)
    again = read_samples(extraction.to_arrow())
    assert [sample.text for sample in again] == [sample.text for sample in samples]


def test_tables_of_an_audit_are_frames(place: Path, run: Run) -> None:
    audit = mmfeat.audit_data(place / "demo", run=run.folder, out=place / "audit")
    errors = audit.table("label_errors").to_pandas()
    assert {"id", "label", "suggested", "probability"} <= set(errors)
    assert all(isinstance(id, str) for id in errors["id"])
    assert audit.table("duplicates").to_arrow().num_rows > 0
    with pytest.raises(DataError, match="no table x; the tables are duplicates, conflicts"):
        audit.table("x")


def test_ids_keep_their_zeros_and_streams_are_taken() -> None:
    frame = CsvFrame(b'id,n,text\n007,1,"a\nb"\n,2,""\n', ["id", "text"])
    assert frame.to_pandas()["id"].tolist()[0] == "007"
    assert pa.table(frame).column("text").to_pylist() == ["a\nb", ""]
    polars = pytest.importorskip("polars")
    assert polars.DataFrame(frame).equals(frame.to_polars())


def test_a_missing_library_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("pandas", "polars"):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(ConfigError, match=f"{library} is not installed; pip install {library}, or take to_arrow"):
            getattr(run.leaderboard, f"to_{library}")()


@pytest.mark.parametrize("name", ["leaderboard", "confusion", "calibration"])
def test_plots_are_shown_and_saved(run: Run, name: str, tmp_path: Path) -> None:
    plot = getattr(run.plot, name)()
    data, size = plot._repr_png_()
    assert data.startswith(b"\x89PNG")
    assert 300 < size["width"] < 1000
    assert plot.save(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert plot.save(str(tmp_path / "a.pdf")).read_bytes().startswith(b"%PDF")
    assert b"<svg" in plot.save(tmp_path / "a.svg").read_bytes()
    with pytest.raises(ConfigError, match="no format of plots"):
        plot.save(tmp_path / "a.xyz")
    assert not (tmp_path / "a.xyz").exists()


def test_a_plain_script_is_silent(capfd: pytest.CaptureFixture[str]) -> None:
    assert isinstance(usual_progress(), Silent)
    importlib.import_module("IPython")  # imported, but no notebook
    assert isinstance(usual_progress(), Silent)


def test_slow_steps_have_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """One display for each step, changed in place; a quick step has none."""
    shown: list[str] = []

    def display(bundle: dict[str, str], **options: object) -> DisplayHandle:
        assert options == {"raw": True, "display_id": True}
        shown.append(bundle["text/plain"])
        return handle

    handle = DisplayHandle()
    monkeypatch.setattr(handle, "update", lambda bundle, raw: shown.append(bundle["text/html"]))
    monkeypatch.setattr("IPython.display.display", display)
    clock: Sequence[float] = [0.0, 0.1, 0.1, 10.0, 10.6, 11.2, 12.0]
    times = iter(clock)
    monkeypatch.setattr("mmfeat.system.notebook.time.monotonic", lambda: next(times))
    with NotebookProgress().step("hash texts", 2) as advance:
        advance(2)
    assert next(times) == 0.1
    with NotebookProgress().step("encode <texts>", 4) as advance:
        advance(1)
        advance(2, "a note\nand more")
    assert shown[0] == "encode <texts>: 1 of 4, 1.7/s, 2 s left"
    assert "<progress value='3' max='4'></progress> encode &lt;texts&gt;: 3 of 4" in shown[1]
    assert shown[1].endswith("a note")
    assert shown[2].endswith("3 of 4 in 2.0 s (1.5/s)")
    assert len(shown) == 3


def test_steps_of_unknown_length_are_shown_once_they_last(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    handle = DisplayHandle()
    monkeypatch.setattr(handle, "update", lambda bundle, raw: shown.append(bundle["text/plain"]))

    def display(bundle: dict[str, str], **options: object) -> DisplayHandle:
        shown.append(bundle["text/plain"])
        return handle

    monkeypatch.setattr("IPython.display.display", display)
    with NotebookProgress().step("look", None):
        pass
    assert not shown
    monkeypatch.setattr("mmfeat.system.notebook.SECONDS", 0.0)
    with NotebookProgress().step("loading model", None):
        while not shown:
            time.sleep(0.001)
    assert shown[0] == "loading model ..."
    assert shown[1].startswith("loading model: ")
    assert len(shown) == 2
