"""The model: what submit writes for a sample, from Python, in memory, as often as one asks."""

from __future__ import annotations

import csv
import io
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

import mmfeat
from mmfeat.errors import ConfigError, DataError, RunError
from mmfeat.evaluation.protocol import Protocol
from mmfeat.extraction.extract import extract_features
from mmfeat.heads.registry import HeadSettings
from mmfeat.prediction.model import Model
from mmfeat.prediction.predict import predict_data
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.run import Run
from mmfeat.samples import objects
from mmfeat.samples.dataset import Sample, read_samples
from mmfeat.samples.photos import decode_image, picture_bytes
from mmfeat.sweep.search import Plan
from mmfeat.sweep.train import train_heads
from tests.cli.typed import invoke
from tests.finetune.small_finetunes import ONCE, tune
from tests.sweep.small_sweeps import FLOAT32, QUICK, SMALL, stamps, sweep

HEADS = {
    "fusion": ["concat", "cross-attention"],
    "baselines": ["knn"],
    "plan": Plan(HeadSettings(epochs=1)),
    "protocol": Protocol(folds=2, seeds=1),
}


@pytest.fixture(scope="module")
def place(demo_folder: Path, tiny_bert: Path, tiny_timm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Demo data with token states and an augmented view, and heads on them."""
    place, options = tmp_path_factory.mktemp("model"), replace(FLOAT32, outputs=("pooled", "tokens"), views=1)
    shutil.copytree(demo_folder, place / "demo")
    shutil.copytree(tiny_timm, place / "tiny-timm")
    encoders = [f"bert:{tiny_bert}", f"timm:{place / 'tiny-timm'}"]
    extract_features(place / "demo", encoders, cache=place / "cache", options=options)
    sweep(place, encoders, options=options, **HEADS)
    return place


@pytest.fixture(scope="module")
def model(place: Path) -> Model:
    return mmfeat.load(heads=place / "heads", head="concat")


def unlabelled(place: Path) -> Sequence[Sample]:
    return read_samples(place / "demo").unlabelled


def pairs(samples: Sequence[Sample]) -> tuple[list[str | None], list[Path | None]]:
    return [sample.text for sample in samples], [sample.image for sample in samples]  # type: ignore[misc]


def submitted(run: Run, head: str, out: Path) -> tuple[list[str], np.ndarray]:
    """(labels, (N, C) probabilities) as a submission has them."""
    write_submission(run.folder, head=head, out=out, proba=True)
    with out.open(newline="") as handle:
        rows = list(csv.reader(handle))[1:]
    return [row[1] for row in rows], np.array([row[2:] for row in rows], float)


def assert_as_submitted(run: Run, head: str, samples: Sequence[Sample], out: Path) -> None:
    labels, probabilities = submitted(run, head, out)
    model = mmfeat.load(run.folder, head=head)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.predict_proba(*pairs(samples))
        assert model.predict(*pairs(samples)) == labels
        alone = [model.predict_proba([s.text], [s.image]) for s in samples[:3]]  # type: ignore[list-item]
    assert np.abs(found - probabilities).max() < 2e-6  # six digits are written
    assert np.abs(np.concatenate(alone) - probabilities[:3]).max() < 1e-5


@pytest.mark.parametrize("head", ["concat", "cross-attention", "knn", "stacking", "greedy"])
def test_it_predicts_what_submit_writes(place: Path, head: str, tmp_path: Path) -> None:
    """Tokens, views, baselines and ensembles too; one sample alone as among others."""
    run = mmfeat.load(heads=place / "heads").run
    assert_as_submitted(run, head, unlabelled(place), tmp_path / "s.csv")


def test_fine_tuned_runs_predict_too(place: Path, tmp_path: Path) -> None:
    settings = replace(ONCE, unfreeze=(("text", 1), ("image", 1)), batch_size=32)
    run = tune(place, str(tmp_path), settings=settings, head="concat", views=0).run
    assert_as_submitted(run, "stage-2", unlabelled(place), tmp_path / "s.csv")


def test_samples_of_several_labels(tmp_path: Path) -> None:
    labels = ["sun", "rain", "sun|rain", "|"] * 20
    lines = [f"{row},{label.replace('|', ' ')} number {row},{label}" for row, label in enumerate(labels)]
    (tmp_path / "table.csv").write_text("\n".join(["id,text,label", *lines, "new,sun rain number 7,"]))
    extract_features(tmp_path / "table.csv", ["hashing"], cache=tmp_path / "cache", options=FLOAT32)
    run = train_heads(
        tmp_path / "table.csv", ["hashing"], cache=tmp_path / "cache", out=tmp_path / "heads", options=FLOAT32,
        protocol=SMALL, plan=QUICK, fusion=["none"], baselines=["logistic"], modalities=["text"], task="multilabel",
    ).run  # fmt: skip
    model = mmfeat.load(run.folder)
    assert model.predict(["sun number 7", "rain sun number 3", "number 3"]) == ["sun", "rain|sun", "|"]
    with pytest.warns(UserWarning, match=r"1 of 1 photos cannot be read \(0: no-such.jpg: .*this head uses no photos"):
        probabilities = model.predict_proba("rain sun number 3", "no-such.jpg")
    assert model.classes == ("rain", "sun")
    assert probabilities.shape == (1, 2)
    assert probabilities.sum() > 1.1


def test_a_photo_may_come_in_any_form(model: Model, place: Path) -> None:
    path = next(sample.image for sample in unlabelled(place) if sample.image)
    assert isinstance(path, Path)
    picture = Image.open(io.BytesIO(path.read_bytes()))
    found = model.predict_proba(["what a day"] * 3, [path, str(path), path.read_bytes()])
    assert np.abs(found - found[0]).max() < 1e-6
    assert np.abs(model.predict_proba("what a day", path) - found[0]).max() < 1e-5
    pixels = decode_image(picture_bytes(picture))[0]  # a run with views augments it by other draws: it is another file
    assert pixels is not None
    assert pixels.tobytes() == picture.convert("RGB").tobytes()
    assert model.predict(images=picture)[0] in model.classes


def test_what_is_missing_is_masked_and_what_was_given_is_told(model: Model, place: Path) -> None:
    path = next(sample.image for sample in unlabelled(place) if sample.image)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without = model.predict_proba("what a day")
        nan = model.predict_proba(["what a day"], [float("nan")])  # type: ignore[list-item]
        seen = model.predict_proba("what a day", path)  # type: ignore[arg-type]
    assert (without == nan).all()
    assert np.abs(seen - without).max() > 1e-6
    for broken in ("no-such.jpg", b"not a photo", b""):
        with pytest.warns(UserWarning, match=r"1 of 1 samples predicted without photo \(0: "):
            assert (model.predict_proba("what a day", broken) == without).all()
    with pytest.warns(UserWarning, match="have no text nor photo, which is what this head sees"):
        model.predict_proba([None], [None])


def test_lists_that_do_not_fit_are_refused(model: Model) -> None:
    with pytest.raises(DataError, match="2 texts but 1 images"):
        model.predict(["a", "b"], ["c.jpg"])
    with pytest.raises(DataError, match="neither texts nor images"):
        model.predict()
    with pytest.raises(DataError, match=r"texts\[1\]: int is no text"):
        model.predict(["a", 3])  # type: ignore[list-item]
    with pytest.raises(DataError, match=r"images\[0\]: float is no image"):
        model.predict(["a"], [3.5])  # type: ignore[list-item]
    assert model.predict([]) == []
    assert model.predict_proba([], []).shape == (0, 3)


def test_everything_stays_loaded_and_nothing_is_written(place: Path, tmp_path: Path) -> None:
    """After the first call neither heads nor weights are read again, and a cache is never touched."""
    shutil.copytree(place / "heads", tmp_path / "heads")
    model = mmfeat.load(heads=tmp_path / "heads", head="greedy", modalities="ensemble")
    pair = "what a day", next(sample.image for sample in unlabelled(place) if sample.image)
    before = stamps(place)
    first = model.predict_proba(*pair)  # type: ignore[arg-type]
    shutil.rmtree(tmp_path / "heads")
    (place / "tiny-timm").rename(tmp_path / "elsewhere")
    try:
        assert (model.predict_proba(*pair) == first).all()  # type: ignore[arg-type]
    finally:
        (tmp_path / "elsewhere").rename(place / "tiny-timm")
    assert stamps(place) == before


def test_threads_may_share_a_model(model: Model, place: Path) -> None:
    samples = [sample for sample in unlabelled(place) if sample.text and sample.image]
    alone = [model.predict_proba([each.text], [each.image]) for each in samples]  # type: ignore[list-item]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda each: model.predict_proba([each.text], [each.image]), samples))
    assert (np.array(alone) == np.array(together)).all()


def test_weights_that_changed_since_are_refused(place: Path) -> None:
    weights = place / "tiny-timm" / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(bytes([*before[:-1], before[-1] ^ 1]))
    try:
        with pytest.raises(RunError, match="not the encoder that"):
            mmfeat.load(heads=place / "heads")
    finally:
        weights.write_bytes(before)
    with pytest.raises(RunError, match="no finished run"):
        mmfeat.load(heads=place / "nowhere")


def test_weights_that_moved_are_named_where_they_lie_now(place: Path, model: Model, tmp_path: Path) -> None:
    sample = next(sample for sample in unlabelled(place) if sample.text and sample.image)
    before = model.predict_proba([sample.text], [sample.image])  # type: ignore[list-item]
    moved = tmp_path / "another-name"
    (place / "tiny-timm").rename(moved)
    try:
        with pytest.raises(RunError, match=r"tiny-timm.*; where it lies elsewhere now, name it with --encoders"):
            mmfeat.load(heads=place / "heads", head="concat")
        found = mmfeat.load(heads=place / "heads", head="concat", encoders=[f"timm:{moved}"])
        assert (found.predict_proba([sample.text], [sample.image]) == before).all()  # type: ignore[list-item]
        flags = ["--heads", place / "heads", "--out", tmp_path / "s.csv", "--encoders", f"timm:{moved}"]
        answer = invoke("submit", *flags)
        assert answer.exit_code == 0, answer.output
        assert predict_data(place / "demo", heads=place / "heads", encoders=[f"timm:{moved}"]).predictions.ids
        wrong = Path(shutil.copytree(moved, tmp_path / "wrong"))
        weights = (wrong / "model.safetensors").read_bytes()
        (wrong / "model.safetensors").write_bytes(bytes([*weights[:-1], weights[-1] ^ 1]))
        with pytest.raises(ConfigError, match=r"--encoders timm:.*/wrong: not the weights of an encoder of"):
            mmfeat.load(heads=place / "heads", encoders=[f"timm:{wrong}"])
    finally:
        moved.rename(place / "tiny-timm")


ROWS = [{"caption": text, "photo": name} for text, name in (("what a day", "a.png"), ("so tired", "b.png"))]


@pytest.fixture(scope="module")
def of_a_frame(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """What `fit` makes of a frame whose columns have other names, in one call."""
    folder = tmp_path_factory.mktemp("fit")
    values = np.random.default_rng(0).integers(0, 255, (40, 24, 24, 3), np.uint8)
    frame = pd.DataFrame(
        {
            "caption": [f"{'so happy' if row % 2 else 'so tired'} of number {row}" for row in range(40)],
            "photo": [Image.fromarray(pixels) for pixels in values],
            "mood": ["up" if row % 2 else "down" for row in range(40)],
        }
    )
    return mmfeat.fit(
        frame, "hashing,hog", cache=folder / "cache", out=folder / "heads", device="cpu", fusion=["none"],
        baselines=["ridge"], modalities=["both"], protocol=Protocol(folds=2, seeds=1),
        columns={"text": "caption", "image": "photo", "label": "mood"},
    )  # fmt: skip


def test_fit_is_extract_heads_and_load(of_a_frame: Model) -> None:
    assert of_a_frame.classes == ("down", "up")
    assert of_a_frame.predict(["so happy", "so tired"], [None, None]) == ["up", "down"]
    assert of_a_frame.run.folder.parent.name == "heads"


@pytest.mark.parametrize("kind", [pd.DataFrame, pa.Table.from_pylist, list])
def test_rows_are_predicted_by_the_columns_of_the_run(
    of_a_frame: Model, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for row, colour in zip(ROWS, ("red", "blue"), strict=True):
        Image.new("RGB", (30, 20), colour).save(row["photo"])
    known = set(objects._files)
    rows = of_a_frame.predict_proba(kind(ROWS))
    arrays = [np.asarray(Image.open(row["photo"])) for row in ROWS]
    captions = pd.Series([row["caption"] for row in ROWS])
    np.testing.assert_array_equal(rows, of_a_frame.predict_proba(captions, arrays))
    assert of_a_frame.predict(kind([])) == []
    assert set(objects._files) == known  # a service that predicts frames for months fills no disk


def test_rows_come_alone(of_a_frame: Model) -> None:
    with pytest.raises(DataError, match="give the rows alone"):
        of_a_frame.predict(ROWS, ["a.png"])
    with pytest.raises(DataError, match="no column caption, photo among mood"):
        of_a_frame.predict(pd.DataFrame({"mood": ["up"]}))
