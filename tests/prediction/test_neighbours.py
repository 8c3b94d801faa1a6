"""Neighbours: exactly the nearest vectors of the cache, of a sample, a text or a photo, in a table and on a page."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import mmfeat
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import describe_encoders
from mmfeat.errors import CacheMissError, ConfigError, DataError
from mmfeat.extraction.embed import Embedder
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.requests import latest_request
from mmfeat.prediction import nearest as module
from mmfeat.samples.dataset import Sample, read_samples
from tests.cli.typed import invoke
from tests.sweep.small_sweeps import FLOAT32


@pytest.fixture(scope="module")
def place(demo_folder: Path, tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("neighbours")
    shutil.copytree(demo_folder, place / "demo")
    first, second, *_ = read_samples(place / "demo").samples
    shutil.copy(place / f"demo/data/{first.id}.txt", place / f"demo/data/{second.id}.txt")  # an equal text
    extract_features(place / "demo", ["hashing", f"clip:{tiny_clip}"], cache=place / "cache", options=FLOAT32)
    return place


def vectors(place: Path, tower: str) -> tuple[np.ndarray, list[str]]:
    """The vectors of length 1 of a tower, in double precision, and the ids of their samples."""
    request, samples = latest_request(place / "cache"), read_samples(place / "demo")
    (spec,) = (t.spec for t in describe_encoders(request.encoders, request.options) if t.spec.tower == tower)
    block = Cache(place / "cache", samples.name).load(samples.samples, [spec]).blocks[0]
    values = block.vectors.astype(np.float64)
    return values / np.linalg.norm(values, axis=1, keepdims=True), [sample.id for sample in samples]


@pytest.mark.parametrize("tower", ["hashing", "clip.text", "clip.image"])
@pytest.mark.parametrize("step", [7, module.STEP])
def test_a_samples_neighbours_are_the_nearest_vectors_but_its_equals(
    place: Path, tower: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STEP", step)
    units, ids = vectors(place, tower)
    found = mmfeat.neighbours(ids[0], encoder=tower, count=5, cache=place / "cache")
    scores = units @ units[0]
    scores[[0, 1] if tower != "clip.image" else [0]] = np.nan  # the second has the same text
    order = np.argsort(-scores, kind="stable")[:5]
    assert [sample.id for sample in found.samples] == [ids[row] for row in order]
    np.testing.assert_allclose(found.similarities, scores[order], atol=1e-12)
    assert found.encoder.startswith(tower)
    equal = () if tower == "clip.image" else ("1 sample with the very same text left out",)
    assert found.notes == equal


def test_a_text_is_compared_with_photos_and_a_photo_with_texts_by_the_towers_of_one_model(
    place: Path, tiny_clip: Path
) -> None:
    cache, words = place / "cache", "a dog in the snow"
    request = latest_request(cache)
    towers = {t.spec.tower: t for t in describe_encoders(request.encoders, request.options)}
    photo = next(str(sample.image) for sample in read_samples(place / "demo") if sample.image)
    embedded = {
        name: Embedder([towers[name]], "cpu").embed([query]).features.blocks[0].vectors[0].astype(np.float64)
        for name, query in (("clip.text", Sample("q", words)), ("clip.image", Sample("q", None, Path(photo))))
    }
    for options, searched, maker in (
        ({"text": words, "encoder": "clip"}, "clip.image", "clip.text"),
        ({"text": words}, "clip.image", "clip.text"),
        ({"text": words, "encoder": "clip.text"}, "clip.text", "clip.text"),
        ({"image": photo, "encoder": "clip.text"}, "clip.text", "clip.image"),
    ):
        units, ids = vectors(place, searched)
        found = mmfeat.neighbours(**options, cache=cache, count=3)
        assert found.encoder.startswith(searched)
        scores = np.nan_to_num(units @ (embedded[maker] / np.linalg.norm(embedded[maker])), nan=-1)
        assert [sample.id for sample in found.samples] == [ids[row] for row in np.argsort(-scores)[:3]]
        np.testing.assert_allclose(found.similarities, np.sort(scores)[::-1][:3], atol=1e-5)
    found = mmfeat.neighbours(image=photo, cache=cache, count=1)
    assert found.notes[0].endswith("with the very same image left out")
    assert mmfeat.neighbours(text=words, encoder="hashing", cache=cache).encoder == "hashing"


def test_what_cannot_be_searched_is_refused_in_one_line(place: Path, tmp_path: Path) -> None:
    cache, id = place / "cache", read_samples(place / "demo").samples[0].id
    for options, kind, reason in (
        ({}, ConfigError, "give one of ID, --text and --image"),
        ({"id": id, "text": "x"}, ConfigError, "give one of ID, --text and --image"),
        ({"id": "no"}, DataError, r"^no: no such sample in .*demo; its ids are like \d+$"),
        (
            {"id": id, "encoder": "bert"},
            ConfigError,
            "--encoder bert: the latest extraction has hashing, clip.image, clip",
        ),
        ({"image": "no.jpg"}, DataError, "--image no.jpg: no such file"),
        ({"text": " "}, DataError, "an empty text"),
    ):
        with pytest.raises(kind, match=reason):
            mmfeat.neighbours(**options, cache=cache)
    with pytest.raises(CacheMissError, match="nothing was extracted; run mmfeat extract"):
        mmfeat.neighbours(id, cache=tmp_path)
    (broken := tmp_path / "broken.jpg").write_bytes(b"no photo")
    with pytest.raises(DataError, match=r"broken.jpg: .*; give another"):
        mmfeat.neighbours(image=str(broken), cache=cache)


def test_the_command_prints_a_table_and_writes_a_page(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    usual = ["neighbours", "--cache", str(place / "cache")]
    id = read_samples(place / "demo").samples[0].id
    answer = invoke(*usual, id, "--encoder", "clip.image", "--count", "4", "--out", "page.html")
    assert answer.exit_code == 0, answer.output
    lines = answer.stdout.splitlines()
    assert lines[0].startswith(f"nearest to {id} by clip.image:")
    assert lines[1].split() == ["cosine", "id", "label", "text"]
    assert all(len(line) <= 120 for line in lines[1:6])
    page = Path("page.html").read_text()
    found = mmfeat.neighbours(id, encoder="clip.image", count=4, cache=place / "cache")
    assert page.count('<img src="data:image/webp;base64,') == 5
    assert re.findall(r'"facts">id (\d+)', page) == [id, *(sample.id for sample in found.samples)]
    assert "src=" not in page.replace('<img src="data:', "")
    assert "http:" not in re.sub(r'"text">[^<]*<', "", page)
    assert lines[-1] == "next: open it in a browser"
    wrong = invoke(*usual, id, "--out", "page.txt")
    assert "--out page.txt: name an HTML file" in wrong.stderr
