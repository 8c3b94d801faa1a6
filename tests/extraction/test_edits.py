"""An edit of an image, a caption or a label re-encodes the modality it touches of that sample, and nothing else."""

from __future__ import annotations

import csv
import dataclasses
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from mmfeat.cache.features import Features
from mmfeat.cache.shard import Rows
from mmfeat.cache.store import Cache
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.errors import CacheMissError
from mmfeat.extraction.extract import Extraction, extract_features
from mmfeat.samples.dataset import Sample, content_key, read_samples

FLOAT32 = EncoderOptions(dtype="float32", cleaning="tweet")
LAYOUTS = ("folder", "table")
OTHER = "a caption that nobody else has"


class Pair(NamedTuple):
    """A sample as its owner sees it: caption, picture and label, each may be missing."""

    text: str | None
    picture: bytes | None
    label: str | None


Data = dict[str, Pair]
Found = dict[tuple[str, str], "bytes | None"]  # by id and modality


def picture(seed: int, form: str = "PNG") -> bytes:
    pixels, buffer = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def originals() -> Data:
    """s6 lacks its caption, s7 its picture, s8 its label; s9 is s0 once more."""
    data = {f"s{n}": Pair(f"caption {n}", picture(n), ("positive", "negative")[n % 2]) for n in range(9)}
    data["s6"] = data["s6"]._replace(text=None)
    data["s7"] = data["s7"]._replace(picture=None)
    data["s8"] = data["s8"]._replace(label=None)
    data["s9"] = data["s0"]
    return data


def write(place: Path, layout: str, data: Data) -> Path:
    """The data set in one of its layouts, written over what was there; untouched photos stay untouched."""
    place = place / "set"
    (place / "data").mkdir(parents=True, exist_ok=True)
    wanted = {f"{id}.png": pair.picture for id, pair in data.items() if pair.picture is not None}
    if layout == "folder":
        wanted |= {f"{id}.txt": pair.text.encode() for id, pair in data.items() if pair.text is not None}
        for name, unlabelled in (("train.txt", False), ("test_without_label.txt", True)):
            rows = [(id, pair.label or "null") for id, pair in data.items() if (pair.label is None) == unlabelled]
            (place / name).write_text("guid,tag\n" + "".join(f"{id},{tag}\n" for id, tag in rows))
    else:
        with (place / "set.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["id", "text", "image", "label"])
            for id, pair in data.items():
                table.writerow([id, pair.text or "", f"data/{id}.png" if pair.picture else "", pair.label or ""])
    for path in (place / "data").iterdir():
        if path.name not in wanted:
            path.unlink()
    for name, content in wanted.items():
        if not (place / "data" / name).exists() or (place / "data" / name).read_bytes() != content:
            (place / "data" / name).write_bytes(content)
    return place if layout == "folder" else place / "set.csv"


def extract(source: Path, cache: Path) -> Extraction:
    return extract_features(source, ["hashing", "hog"], cache=cache, options=FLOAT32)


def counts(found: dict[str, int]) -> tuple[int, int]:
    """(texts, images)."""
    by_family = {folder.split("-")[0]: count for folder, count in found.items()}
    return by_family.get("hashing", 0), by_family.get("hog", 0)


def load(result: Extraction) -> Features:
    cache = Cache(result.folder.parent, result.folder.name)
    return cache.load(read_samples(result.samples.source).samples, [tower.spec for tower in result.towers])


def rows(features: Features) -> Found:
    """The bytes of each vector, by id and modality; None where it is masked."""
    return {
        (id, block.modality): block.vectors[row].tobytes() if block.mask[row] else None
        for block in features.blocks
        for row, id in enumerate(features.ids)
    }


def changed(data: Data, id: str, **parts: object) -> Data:
    return {**data, id: data[id]._replace(**parts)}


# What is done to the data set, how many (texts, images) that encodes, and the (id, modality) whose values change.
EDITS: dict[str, tuple[Callable[[Data], Data], tuple[int, int], set[tuple[str, str]]]] = {
    "nothing": (dict, (0, 0), set()),
    "another caption": (lambda d: changed(d, "s1", text=OTHER), (1, 0), {("s1", "text")}),
    "another picture": (lambda d: changed(d, "s1", picture=picture(99)), (0, 1), {("s1", "image")}),
    "the same pixels, other bytes": (
        lambda d: changed(d, "s1", picture=d["s1"].picture + b"\0"), (0, 1), set()
    ),
    "another label": (lambda d: changed(d, "s1", label="positive"), (0, 0), set()),
    "a label of its own": (lambda d: changed(d, "s1", label="neutral"), (0, 0), set()),
    "a label added": (lambda d: changed(d, "s8", label="negative"), (0, 0), set()),
    "a label removed": (lambda d: changed(d, "s1", label=None), (0, 0), set()),
    "a caption added": (lambda d: changed(d, "s6", text=OTHER), (1, 0), {("s6", "text")}),
    "a caption removed": (lambda d: changed(d, "s1", text=None), (0, 0), {("s1", "text")}),
    "a picture added": (lambda d: changed(d, "s7", picture=picture(7)), (0, 1), {("s7", "image")}),
    "a picture removed": (lambda d: changed(d, "s1", picture=None), (0, 0), {("s1", "image")}),
    "one of two equal captions edited": (lambda d: changed(d, "s0", text=OTHER), (1, 0), {("s0", "text")}),
    "a caption that another sample has": (lambda d: changed(d, "s1", text="caption 2"), (0, 0), {("s1", "text")}),
    "two captions change places": (
        lambda d: {**d, "s1": d["s1"]._replace(text="caption 2"), "s2": d["s2"]._replace(text="caption 1")},
        (0, 0), {("s1", "text"), ("s2", "text")},
    ),
    "two pictures change places": (
        lambda d: {**d, "s1": d["s1"]._replace(picture=picture(2)), "s2": d["s2"]._replace(picture=picture(1))},
        (0, 0), {("s1", "image"), ("s2", "image")},
    ),
    "a caption and a picture": (
        lambda d: changed(d, "s1", text=OTHER, picture=picture(99)), (1, 1), {("s1", "text"), ("s1", "image")}
    ),
    "a sample added": (lambda d: {**d, "t": Pair(OTHER, picture(99), "positive")}, (1, 1), set()),
    "a known sample added under another id": (lambda d: {**d, "t": d["s1"]}, (0, 0), set()),
    "a sample removed": (lambda d: {id: pair for id, pair in d.items() if id != "s1"}, (0, 0), set()),
    "a sample renamed": (lambda d: {"t" if id == "s1" else id: pair for id, pair in d.items()}, (0, 0), set()),
    "samples in another order": (lambda d: dict(reversed(d.items())), (0, 0), set()),
    "a capital letter": (lambda d: changed(d, "s1", text="Caption 1"), (1, 0), set()),  # cleaning takes it away
}  # fmt: skip


@pytest.fixture(scope="module", params=LAYOUTS)
def extracted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Found]:
    """The layout, a place where the original data set is extracted, and what it gave."""
    place = tmp_path_factory.mktemp("extracted")
    first = extract(write(place, request.param, originals()), place / "cache")
    assert counts(first.new) == (8, 8)
    return request.param, place, rows(load(first))


@pytest.fixture
def place(extracted: tuple[str, Path, Found], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(extracted[1], tmp_path / "copy"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What a first extraction gives for the samples after each edit; their ids are EDIT ID."""
    place = tmp_path_factory.mktemp("fresh")
    data = {f"{edit} {id}": pair for edit in EDITS for id, pair in EDITS[edit][0](originals()).items()}
    return rows(load(extract(write(place, "table", data), place / "cache")))


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_encodes_what_it_touches(
    extracted: tuple[str, Path, Found], place: Path, fresh: Found, edit: str
) -> None:
    (layout, _, before), (change, expected, touched) = extracted, EDITS[edit]
    again = extract(write(place, layout, change(originals())), place / "cache")
    assert counts(again.new) == expected
    assert again.nothing_to_do == (expected == (0, 0))
    after = rows(load(again))
    assert {part for part in before.keys() & after.keys() if before[part] != after[part]} == touched
    assert {part: fresh[f"{edit} {part[0]}", part[1]] for part in after} == after
    back = extract(write(place, layout, originals()), place / "cache")
    assert back.nothing_to_do
    assert rows(load(back)) == before


def test_many_edits_at_once_are_counted_once_each(extracted: tuple[str, Path, Found], place: Path) -> None:
    data = originals()
    for number in range(4):
        data = changed(data, f"s{number}", text=f"edited {number}", label="positive")
    for number in range(2, 6):
        data = changed(data, f"s{number}", picture=picture(100 + number // 2))  # two new pictures, each twice
    again = extract(write(place, extracted[0], data), place / "cache")
    assert counts(again.new) == (4, 2)
    assert counts(again.stored) == (5, 4)


def test_both_layouts_share_the_keys(tmp_path: Path) -> None:
    """What a caption or a picture is stored under does not tell where it came from."""
    for layout in LAYOUTS:
        result = extract(write(tmp_path, layout, originals()), tmp_path / "cache")
        assert result.nothing_to_do == (layout == "table")


TOKENS = EncoderSpec("bert", "text", "x", "sha256:0", "float32", "float32", "", "tweet", "mean", 128)
OTHERS: dict[str, object] = {"modality": "image", "storage": "float16", "output": "tokens"}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(EncoderSpec)])
def test_encoders_that_differ_in_one_field_share_no_row(tmp_path: Path, field: str) -> None:
    value = getattr(TOKENS, field)
    other = OTHERS.get(field) or (value + 1 if isinstance(value, int) else value + "x")
    specs = [TOKENS, dataclasses.replace(TOKENS, **{field: other})]
    cache, text = Cache(tmp_path, "set"), "a text that is a picture, too"
    (tmp_path / "picture").write_text(text)
    sample = Sample("s", text, tmp_path / "picture")
    key = content_key(text.encode())
    stored = []
    for number, spec in enumerate(specs):
        with pytest.raises(CacheMissError):
            cache.load([sample], [spec])
        one = np.full((1, 4), number + 1, spec.storage)
        with cache.writer(spec, {}) as writer:
            writer.add(Rows([key], ["s"], [""], one if spec.output == "pooled" else [one]))
        stored.append({path for path in cache.spec_folder(spec).iterdir() if path.suffix == ".h5"})
    assert len({cache.spec_folder(spec) for spec in specs}) == len({spec.fingerprint for spec in specs}) == 2
    assert [len(files) for files in stored] == [1, 1]
    for number, spec in enumerate(specs):
        values = cache.map([sample], spec).batch(np.array([0]))[0]
        np.testing.assert_array_equal(values, np.full((1, 1, 4), number + 1, spec.storage))
