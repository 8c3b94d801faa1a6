"""Only what is missing, each content once, and nothing lost by an interrupt or a kill."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from mmfeat.cache.store import Cache
from mmfeat.cache.survey import survey
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import EncoderError
from mmfeat.extraction.extract import Extraction, ExtractSettings, extract_features
from mmfeat.extraction.requests import latest_request
from mmfeat.samples.dataset import read_samples
from tests.processes import Command

FLOAT32 = EncoderOptions(dtype="float32", cleaning="tweet")
BUILT_IN = ["hashing", "hog"]


@pytest.fixture
def data(demo_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_folder, tmp_path / "demo"))


def short(counts: dict[str, int]) -> dict[str, int]:
    """Counts by family, without the fingerprint."""
    return {folder.split("-")[0]: count for folder, count in counts.items()}


def vectors(result: Extraction) -> dict[str, np.ndarray]:
    cache = Cache(result.folder.parent, result.folder.name)
    return {
        b.name: b.vectors
        for b in cache.load(read_samples(result.samples.source).samples, [t.spec for t in result.towers]).blocks
    }


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_ino, path.read_bytes()) for path in folder.rglob("*.h5")}


def test_each_content_once_and_a_rerun_does_nothing(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = extract_features(data, BUILT_IN, cache=cache)
    texts = {sample.text for sample in read_samples(first.samples.source) if sample.text is not None}
    photos = {sample.image.read_bytes() for sample in read_samples(first.samples.source) if sample.image}
    assert short(first.new) == {"hashing": len(texts), "hog": len(photos) - 1}  # one photo is broken
    assert len(texts) < 120 > len(photos)
    assert first.missing["text"] == {"no text file": 1}
    assert [id for id, _ in first.failures] == ["1003"]
    before = files(cache)
    again = extract_features(data, BUILT_IN, cache=cache)
    assert again.nothing_to_do
    assert list(short(again.unreadable).values()) == [0, 1]
    assert again.failures == []  # a broken photo is remembered, not tried on every run
    assert files(cache) == before


def test_a_runtime_fills_the_same_folder_with_the_same_numbers(data: Path, tmp_path: Path, tiny_timm: Path) -> None:
    pytest.importorskip("onnxruntime")
    plain, other = (
        extract_features(
            data, [f"timm:{tiny_timm}"], cache=tmp_path / name, options=FLOAT32, settings=ExtractSettings(runtime=name)
        )
        for name in ("auto", "onnxruntime")
    )
    assert plain.runtimes == {}  # a small job
    ((folder, note),) = other.runtimes.items()
    assert folder == plain.towers[0].spec.folder_name
    assert note.startswith("ONNX Runtime, ")
    np.testing.assert_allclose(vectors(other)[folder], vectors(plain)[folder], atol=1e-5)
    assert len(survey(tmp_path / "onnxruntime")) == 1  # the exported tower is no data set
    stored = {path.name for path in (tmp_path / "onnxruntime").rglob(".runtimes/*/*")}
    assert stored == {"model.onnx"}


def test_a_new_encoder_leaves_the_others_alone(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    extract_features(data, ["hashing"], cache=cache)
    assert list(short(extract_features(data, BUILT_IN, cache=cache).new)) == ["hog"]


def test_values_beyond_the_storage_dtype_are_never_written(data: Path, tmp_path: Path, tiny_timm: Path) -> None:
    loud = Path(shutil.copytree(tiny_timm, tmp_path / "loud"))
    state = load_file(loud / "model.safetensors")
    last = next(name for name in reversed(state) if name.endswith(("bn2.weight", "bn3.weight")))
    state = {
        name: value * 1e7
        if name.rpartition(".")[0] == last.rpartition(".")[0] and "running" not in name and value.is_floating_point()
        else value
        for name, value in state.items()
    }
    save_file(
        {name: value + 1e7 if name == last.replace("weight", "bias") else value for name, value in state.items()},
        loud / "model.safetensors",
    )
    with pytest.raises(EncoderError, match="gives values beyond float16; extract with --dtype float32"):
        extract_features(
            data, [f"timm:{loud}"], cache=tmp_path / "cache", options=EncoderOptions(dtype="bfloat16", cleaning="tweet")
        )


def test_the_latest_request_is_remembered(data: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    extract_features(data, ["hashing"], cache=cache, options=EncoderOptions(dtype="float32", cleaning="none"))
    request = latest_request(cache, data)
    assert (request.data, request.encoders, request.options.cleaning) == (str(data), ["hashing"], "none")
    other = Path(shutil.copytree(data, tmp_path / "elsewhere" / "demo"))  # another folder of the same name
    extract_features(other, ["hog"], cache=cache)
    assert latest_request(cache, data) == request
    assert latest_request(cache).data == str(other)
    next((cache / "requests").iterdir()).write_text("{}")  # a damaged note only means naming the flags again
    assert latest_request(cache).encoders in (["hashing"], ["hog"])


SLOW = """
import mmfeat.cache.store as writer, mmfeat.cli.console as console
writer.SHARD_BYTES = {shard_bytes}
console.PLAIN_SECONDS = 0.0
"""


def start(data: Path, cache: Path, shard_bytes: int) -> Command:
    """A real extraction in a process of its own."""
    flags = ("--data", data, "--cache", cache, "--encoders", "hashing,hog", "--batch-size", 4)
    return Command(["extract", *flags], data.parent, SLOW.format(shard_bytes=shard_bytes))


def start_and_reach_photos(data: Path, cache: Path, shard_bytes: int) -> Command:
    """Up to the third batch of photos."""
    process = start(data, cache, shard_bytes)
    process.wait_for_line("image: hog: 12")
    return process


def test_a_kill_loses_nothing_that_was_committed(data: Path, tmp_path: Path) -> None:
    process = start_and_reach_photos(data, tmp_path / "cache", shard_bytes=1)
    while len(list((tmp_path / "cache").glob("*/hog-*/*.h5"))) < 3:  # the writer is behind
        assert process.returncode is None
    process.kill()
    committed = files(tmp_path / "cache")
    rest = extract_features(data, BUILT_IN, cache=tmp_path / "cache")
    assert short(rest.stored)["hog"] >= 11  # of three batches of four, one photo is broken
    assert 0 < short(rest.new)["hog"] <= 120 - 12
    assert {path: files(tmp_path / "cache")[path] for path in committed} == committed
    whole = extract_features(data, BUILT_IN, cache=tmp_path / "whole")
    for name, expected in vectors(whole).items():
        np.testing.assert_array_equal(vectors(rest)[name], expected)


@pytest.mark.parametrize("polite", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_commits_what_was_computed(data: Path, tmp_path: Path, polite: signal.Signals) -> None:
    process = start_and_reach_photos(data, tmp_path / "cache", shard_bytes=1 << 30)
    process.send_signal(polite)
    _, errors = process.wait()
    assert process.returncode == 130, errors
    assert "interrupted; every vector that was computed is kept" in errors
    assert "Traceback" not in errors
    rest = extract_features(data, BUILT_IN, cache=tmp_path / "cache")
    assert short(rest.stored)["hog"] >= 11  # of three batches of four, one photo is broken
    assert short(rest.stored)["hog"] + short(rest.new)["hog"] + 1 == len(
        {s.image.read_bytes() for s in read_samples(rest.samples.source) if s.image}
    )


def test_two_at_once_leave_one_whole_cache(data: Path, tmp_path: Path) -> None:
    processes = [start(data, tmp_path / "cache", shard_bytes=1) for _ in range(2)]
    assert [process.wait() and process.returncode for process in processes] == [0, 0]
    both = extract_features(data, BUILT_IN, cache=tmp_path / "cache")
    assert both.nothing_to_do
    whole = extract_features(data, BUILT_IN, cache=tmp_path / "whole")
    for name, expected in vectors(whole).items():
        np.testing.assert_array_equal(vectors(both)[name], expected)


def test_a_turned_photo_has_the_vector_of_the_upright_one(tmp_path: Path, tiny_timm: Path) -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "upright.png")
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "t.csv").write_text("id,image\na,upright.png\nb,turned.png\n")
    encoders, cache = ["hog", f"timm:{tiny_timm}"], tmp_path / "cache"
    for options, alike in ((FLOAT32, True), (replace(FLOAT32, exif="stored"), False)):
        result = extract_features(tmp_path / "t.csv", encoders, cache=cache, options=options)
        features = Cache(cache, "t").load(
            read_samples(tmp_path / "t.csv").samples, [tower.spec for tower in result.towers]
        )
        assert [np.array_equal(*block.vectors) for block in features.blocks] == [alike, alike]
    again = extract_features(tmp_path / "t.csv", encoders, cache=cache, options=FLOAT32)
    assert again.nothing_to_do  # auto is what it was before
    assert {tower.spec.decoding.exif for tower in again.towers} == {"stored"}
