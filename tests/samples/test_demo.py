"""The generated data set has the ugliness of real data, and needs both modalities."""

from pathlib import Path

import pytest

from mmfeat.errors import DataError
from mmfeat.evaluation.protocol import Protocol
from mmfeat.extraction.extract import extract_features
from mmfeat.samples.dataset import read_samples
from mmfeat.samples.demo import write_demo
from mmfeat.samples.photos import decode_image
from mmfeat.sweep.train import train_heads


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    one, two = (write_demo(tmp_path / name, pairs=80) for name in ("one", "two"))
    files = {path.relative_to(one): path.read_bytes() for path in one.rglob("*") if path.is_file()}
    assert files == {path.relative_to(two): path.read_bytes() for path in two.rglob("*") if path.is_file()}
    other = write_demo(tmp_path / "three", pairs=80, seed=8)
    assert (other / "train.txt").read_bytes() != (one / "train.txt").read_bytes()


def test_it_is_as_ugly_as_real_data(tmp_path: Path) -> None:
    samples = read_samples(write_demo(tmp_path / "demo"))
    assert (len(samples), len(samples.unlabelled)) == (600, 60)
    assert samples.classes == ("negative", "neutral", "positive")
    assert samples.encodings["gb18030"] > 10
    assert {sample.image.suffix for sample in samples if sample.image} >= {".jpg", ".JPG", ".png"}
    assert [sample.text_error for sample in samples if sample.text is None] == ["no text file"]
    errors = [decode_image(sample.image.read_bytes())[1] for sample in samples if sample.image]
    assert [error for error in errors if error] == ["broken image: image file is truncated"]
    assert len({sample.key("image")[0] for sample in samples}) < 600


def test_neither_modality_alone_decides_the_label(tmp_path: Path) -> None:
    data, encoders = write_demo(tmp_path / "demo", pairs=300), ["hashing", "hog"]
    extract_features(data, encoders, cache=tmp_path / "cache")
    few = {"fusion": ["none"], "baselines": ["logistic"], "protocol": Protocol(folds=3), "ensembles": False}
    run = train_heads(data, encoders, cache=tmp_path / "cache", out=tmp_path / "heads", **few).run
    score = {entry.modalities: entry.macro_f1 for entry in run.leaderboard}
    assert score["both"].low > max(score["text"].high, score["image"].high)
    assert min(score["text"].low, score["image"].low) > 1 / 3  # yet each says something


def test_an_interrupted_one_is_finished(tmp_path: Path) -> None:
    whole = write_demo(tmp_path / "whole", pairs=80)
    half = tmp_path / "half"
    half.mkdir()
    (half / "demo.json").write_text((whole / "demo.json").read_text().replace("true", "false"))
    write_demo(half, pairs=80)
    assert (half / "train.txt").read_bytes() == (whole / "train.txt").read_bytes()


def test_a_finished_one_is_kept_and_anything_else_is_left_alone(tmp_path: Path) -> None:
    folder = write_demo(tmp_path / "demo", pairs=80)
    before = (folder / "train.txt").stat().st_mtime_ns
    assert write_demo(folder, pairs=80) == folder
    assert (folder / "train.txt").stat().st_mtime_ns == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train.txt").write_text("precious")
    with pytest.raises(DataError, match="not empty and not this demo; name another folder"):
        write_demo(mine)
    assert (mine / "train.txt").read_text() == "precious"
