"""Photos of a table: paths as systems and people write them, roots and patterns, bytes, structs, base64 and lists; and
what is said where they are not found.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from PIL import Image

from mmfeat.cache.explain import explain_sample
from mmfeat.cache.parity import check_parity
from mmfeat.cache.store import Cache
from mmfeat.errors import DataError
from mmfeat.extraction.embed import Embedder
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.forecast import forecast_extraction
from mmfeat.extraction.requests import latest_request
from mmfeat.samples import photo_cells
from mmfeat.samples.contents import MemoryFile
from mmfeat.samples.dataset import Sample, read_samples
from mmfeat.samples.photo_cells import Photos, TablePhoto, packed, unpacked
from mmfeat.system.remote import RemoteFile


def photo(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def rows_of(folder: Path, cells: list[object], name: str = "t.jsonl") -> Path:
    table = folder / name
    table.write_text("".join(json.dumps({"id": f"s{n}", "text": "a", "image": c}) + "\n" for n, c in enumerate(cells)))
    return table


@pytest.fixture
def pics(tmp_path: Path) -> Path:
    folder = tmp_path / "img dir"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(photo(number))
    (folder / normalize("NFD", "café.png")).write_bytes(photo(0))
    return folder


@pytest.mark.parametrize(
    "form",
    [
        "img dir/0.png",
        "./img dir/0.png",
        "img dir\\0.png",
        ".\\img dir\\0.png",
        "  img dir/0.png ",
        "img%20dir/0.png",
        "/img dir/0.png",
        "img dir/0.PNG",
        "img dir/0",
        normalize("NFC", "img dir/café.png"),
        "{root}/img dir/0.png",
        "file://{root}/img%20dir/0.png",
        "FILE://{root}/img%20dir/0.png",
    ],
)
def test_a_path_is_read_as_people_write_it(pics: Path, form: str) -> None:
    table = rows_of(pics.parent, [form.replace("{root}", str(pics.parent))])
    (sample,) = read_samples(table)
    assert sample.image is not None
    assert sample.image.read_bytes() == photo(0)


@pytest.mark.parametrize(
    "cell", [None, "", "  ", "nan", "None", "NULL", float("nan"), [], {}, {"bytes": None, "path": None}]
)
def test_a_cell_without_a_photo_is_missing(tmp_path: Path, cell: object) -> None:
    (sample,) = read_samples(rows_of(tmp_path, [cell]))
    assert (sample.image, sample.image_error) == (None, "no image file")


@pytest.mark.parametrize("cell", ["../secret", "{}/secret", "file://{}/secret"])
def test_another_file_is_no_photo_and_is_not_written(tmp_path: Path, cell: str) -> None:
    (tmp_path / "secret").write_text("root:x:0:0")
    (folder := tmp_path / "table").mkdir()
    table = rows_of(folder, [cell.format(tmp_path)])
    with pytest.raises(DataError, match=r"none of 1 photos can be read; .*: not an image"):
        extract_features(table, ["hashing", "hog"], cache=tmp_path / "cache")
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert files
    assert not any(b"root:x" in path.read_bytes() for path in files)


def test_base64_and_data_uris_are_photos(tmp_path: Path) -> None:
    encoded = base64.b64encode(photo(1)).decode()
    wrapped = "\n".join(encoded[start : start + 76] for start in range(0, len(encoded), 76))
    forms = [
        encoded,
        wrapped,
        encoded.rstrip("="),
        encoded.replace("+", "-").replace("/", "_"),
        f"data:image/png;base64,{encoded}",
        f"data:image/png;charset=utf-8;base64,{encoded}",
    ]
    samples = read_samples(rows_of(tmp_path, forms)).samples
    assert [sample.image and sample.image.read_bytes() for sample in samples] == [photo(1)] * len(forms)
    with open(tmp_path / "t.tsv", "w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([["id", "image"], ["a", encoded], ["b", forms[4]]])
    assert {sample.image.read_bytes() for sample in read_samples(tmp_path / "t.tsv") if sample.image} == {photo(1)}
    (cut,) = read_samples(rows_of(tmp_path, [f"data:image/png;base64,{encoded[:40]}"]))
    assert isinstance(cut.image, MemoryFile)  # and no photo, once it is decoded


@pytest.mark.parametrize("suffix", [".parquet", ".parquet.gz", ".arrow", ".feather"])
def test_bytes_and_structs_of_binary_tables(pics: Path, suffix: str) -> None:
    rows = [
        {"id": "a", "raw": photo(0), "image": {"bytes": photo(0), "path": "0.png"}},
        {"id": "b", "raw": photo(1), "image": {"bytes": None, "path": "img dir/1.png"}},
        {"id": "c", "raw": b"img dir/2.png", "image": {"bytes": photo(2), "path": None}},
        {"id": "d", "raw": None, "image": None},
    ]
    table, file = pyarrow.Table.from_pylist(rows), pics.parent / f"t{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=1)
    elif suffix == ".parquet.gz":
        import gzip

        whole = io.BytesIO()
        pyarrow.parquet.write_table(table, whole)
        file.write_bytes(gzip.compress(whole.getvalue()))
    else:
        pyarrow.feather.write_feather(table, file)
    wanted = [photo(0), photo(1), photo(2), None]
    for column in ("raw", "image"):
        samples = read_samples(file, {"image": column}).samples
        assert [sample.image and sample.image.read_bytes() for sample in samples] == wanted, column
        assert isinstance(samples[0].image, TablePhoto if suffix == ".parquet" else MemoryFile)
        assert samples[3].image_error == "no image file"
        kept = pickle.loads(pickle.dumps(samples[0].image))  # noqa: S301  reading processes get them so
        assert kept == samples[0].image


def test_photos_in_a_table_are_not_kept_in_memory_and_the_run_is_that_of_files(pics: Path, tmp_path: Path) -> None:
    rows = [{"id": f"s{n}", "text": "a", "image": {"bytes": photo(n), "path": f"{n}.png"}} for n in range(4)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=2)
    held = extract_features(tmp_path / "t.parquet", ["hog"], cache=tmp_path / "cache")
    named = extract_features(
        rows_of(tmp_path, [f"img dir/{n}.png" for n in range(4)]), ["hog"], cache=tmp_path / "cache"
    )
    assert (held.new.total(), named.new.total(), named.stored.total()) == (4, 0, 4)
    photos = [sample.image for sample in read_samples(tmp_path / "t.parquet")]
    photo_cells._copied_group.cache_clear()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[:1]), tmp_path / "t.parquet")
    with pytest.raises(OSError, match="changed"):
        photos[3].read_bytes()  # type: ignore[union-attr]


@pytest.mark.parametrize("part", ["train", "test"])
def test_the_root_that_is_proposed_is_of_the_part_of_the_table(part: str, tmp_path: Path) -> None:
    for folder in ("train", "test", "images"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").write_bytes(photo(0))
    (tmp_path / f"{part}.csv").write_text("id,text,image\n1,a,0.png\n")
    proposed = read_samples(tmp_path / f"{part}.csv").notes[-1].rpartition("say --image-root ")[2]
    assert Path(proposed).resolve() == (tmp_path / part).resolve()


def test_a_row_group_of_photos_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    rows = [{"id": str(n), "image": np.random.default_rng(n).bytes(1 << 19)} for n in range(160)]
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet", compression="none", use_dictionary=False)
    program = (
        "import sys; from mmfeat.samples.dataset import SampleSource; from mmfeat.samples.keys import content_keys\n"
        "def most(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) >> 10\n"
        "first = SampleSource(sys.argv[1]); next(first.blocks(1)); before = most()\n"
        "for block in first.blocks(1000): keys = content_keys(block[::-1], 'image')\n"
        "print(keys.present.sum(), most() - before)"
    )
    answer = subprocess.run([sys.executable, "-c", program, tmp_path / "t.parquet"], stdout=subprocess.PIPE, check=True)
    count, grown = map(int, answer.stdout.split())
    assert count == 160
    assert grown < 50  # of 80 MB


@pytest.fixture
def several(pics: Path) -> Path:
    (pics / "bad.png").write_text("no photo")
    cells = [
        ["img dir/0.png", "img dir/1.png"],
        "img dir/0.png",
        "img dir/1.png;img dir/bad.png;img dir/gone.png",
        None,
        "['img dir/2.png', 'img dir/0.png', \"img dir/1.png\"]",
        "img dir/2.png|img dir/3.png",
        ["img dir/3.png"],
    ]
    return rows_of(pics.parent, cells)


def test_several_photos_count_as_the_mean_of_their_vectors(several: Path, tmp_path: Path) -> None:
    result = extract_features(several, ["hog"], cache=tmp_path / "cache")
    assert (result.new.total(), result.failures) == (4, [("s2", "not an image")])
    samples, specs = read_samples(several).samples, [tower.spec for tower in result.towers]
    store = Cache(tmp_path / "cache", "t")
    (block,) = store.load(samples, specs).blocks
    vectors, one = block.vectors, {0: block.vectors[1], 1: block.vectors[2], 3: block.vectors[6]}
    assert block.mask.tolist() == [True, True, True, False, True, True, True]
    np.testing.assert_allclose(vectors[0], (one[0] + one[1]) / 2, atol=1e-6)
    two = 2 * vectors[5] - one[3]
    np.testing.assert_allclose(vectors[4], (two + one[0] + one[1]) / 3, atol=1e-5)
    (mapped,) = store.load(samples, specs, memory=0).mapped
    values, there = mapped.batch(np.array([4, 3, 0]))
    np.testing.assert_allclose(values[[0, 2], 0], vectors[[4, 0]], atol=1e-6)
    assert there.tolist() == [[True], [False], [True]]
    embedded = Embedder(result.towers, "cpu").embed(samples)
    np.testing.assert_array_equal(embedded.features.blocks[0].vectors, vectors)
    assert embedded.reasons["image"] == ("", "", "", "no image file", "", "", "")
    assert all(parity.holds for parity in check_parity(read_samples(several), result.towers, store, 9))
    assert [e.outcome for e in explain_sample(tmp_path / "cache", read_samples(several), "s0", specs)] == ["hit"] * 2
    assert extract_features(several, ["hog"], cache=tmp_path / "cache").nothing_to_do


def test_tokens_of_several_photos_stand_side_by_side(several: Path, tiny_clip: Path, tmp_path: Path) -> None:
    from mmfeat.encoders.spec import EncoderOptions

    options = EncoderOptions(dtype="float32", outputs=("image=tokens", "text=pooled"))
    result = extract_features(several, [f"clip:{tiny_clip}"], cache=tmp_path / "cache", options=options)
    samples, towers = read_samples(several).samples, [t for t in result.towers if t.spec.modality == "image"]
    (block,) = Cache(tmp_path / "cache", "t").load(samples, [towers[0].spec]).mapped
    count = block.lengths[1]
    assert block.lengths.tolist() == [2 * count, count, count, 0, 3 * count, 2 * count, count]
    values, _ = block.batch(np.arange(7))
    np.testing.assert_array_equal(values[0, :count], values[1, :count])
    np.testing.assert_array_equal(values[0, count : 2 * count], values[2, :count])
    embedded = Embedder(towers, "cpu").embed(samples).features.mapped[0]
    np.testing.assert_allclose(embedded.batch(np.arange(7))[0], values, atol=1e-5)


def test_the_first_of_several_photos_is_taken_where_it_is_asked_for(several: Path) -> None:
    samples = read_samples(several, {"images": "first"}).samples
    assert [sample.image.name if sample.image else "" for sample in samples] == [
        *("0.png", "0.png", "1.png", "", "2.png", "2.png", "3.png")
    ]
    with pytest.raises(DataError, match="--images all: use first or mean"):
        read_samples(several, {"images": "all"})


def test_the_key_of_several_photos_changes_with_each(several: Path, pics: Path) -> None:
    def keys() -> list[bytes | None]:
        return [sample.key("image")[0] for sample in read_samples(several)]

    before = keys()
    assert len({before[0], before[1], before[4], before[5], before[6]}) == 5
    (pics / "1.png").write_bytes(photo(9))
    assert [row for row, (one, other) in enumerate(zip(before, keys(), strict=True)) if one != other] == [0, 2, 4]


def test_photos_survive_the_way_to_another_machine(tmp_path: Path) -> None:
    photos = [
        None,
        Path("a.png"),
        RemoteFile("memory://a.png"),
        MemoryFile(b"\xff\x00", "t:1"),
        TablePhoto("t.parquet", "image", 3, 1),
        Photos((Path("a.png"), RemoteFile("memory://b.png"))),
    ]
    assert [unpacked(json.loads(json.dumps(packed(photo)))) for photo in photos] == photos


def test_urls_with_commas_and_lists_of_urls(tmp_path: Path) -> None:
    urls = [
        "http://a.b/x.jpg?w=1&h=2,3",
        "https://a.b/1.jpg,https://a.b/2.jpg",
        "https://a.b/1.jpg | https://a.b/2.jpg",
    ]
    one, two, three = (sample.image for sample in read_samples(rows_of(tmp_path, urls)))
    assert one == RemoteFile(urls[0])
    assert two == three == Photos((RemoteFile("https://a.b/1.jpg"), RemoteFile("https://a.b/2.jpg")))


def test_a_root_is_that_of_paths_and_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "splits").mkdir(parents=True)
    (tmp_path / "data" / "pics").mkdir()
    (tmp_path / "data" / "pics" / "0.png").write_bytes(photo(0))
    table = rows_of(tmp_path / "data" / "splits", ["pics/0.png", "C:\\Users\\me\\pics\\0.png"])
    monkeypatch.chdir(tmp_path)
    result = extract_features(table, ["hog"], cache="cache", columns={"image-root": "data"})
    assert result.new.total() == 1
    kept = latest_request("cache").columns
    assert kept["image-root"] == str(tmp_path / "data")
    monkeypatch.chdir(tmp_path / "data")
    assert [sample.image_error for sample in read_samples(table, kept)] == ["", "image file not found"]
    flat = read_samples(table, {"image-root": "pics"})
    assert [sample.image and sample.image.name for sample in flat] == ["0.png", "0.png"]
    assert read_samples(table, {"image-root": "memory://bucket"}).samples[0].image == RemoteFile(
        "memory://bucket/pics/0.png"
    )
    with pytest.raises(DataError, match="--image-root gone: no such folder"):
        read_samples(table, {"image-root": "gone"})


def test_a_pattern_makes_paths_of_columns(tmp_path: Path) -> None:
    for name in ("a1.png", "shop/b2.png"):
        (tmp_path / "pics" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pics" / name).write_bytes(photo(0))
    table = tmp_path / "t.csv"
    table.write_text("id,text,shop,label\na1,x,,p\nshop/b2,y,shop,q\n../pics/a1,z,,p\n")
    found = read_samples(table, {"image-pattern": "pics/{id}.png"}).samples
    assert [sample.image and sample.image.name for sample in found] == ["a1.png", "b2.png", None]
    within = read_samples(table, {"image-pattern": "{id}.png", "image-root": str(tmp_path / "pics")}).samples
    assert [sample.image and sample.image.name for sample in within] == ["a1.png", "b2.png", None]
    by_shop = read_samples(table, {"image-pattern": "pics/{shop}/b2.png"}).samples
    assert [sample.image_error for sample in by_shop] == ["no image file", "", "no image file"]
    for wrong in ("pics", "{brand}.jpg"):
        with pytest.raises(DataError, match=r"write \{id\} or a column in braces, of id, text, shop, label"):
            read_samples(table, {"image-pattern": wrong})


def test_a_missing_modality_is_an_error_before_anything_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("data/lists").mkdir(parents=True)
    Path("data/pics").mkdir()
    Path("data/pics/0.png").write_bytes(photo(0))
    table = rows_of(Path("data/lists"), ["pics/0.png", "pics/1.png", None])
    tried = tmp_path / "data/lists/pics/0.png"
    message = f"none of 2 photos is found; the first path tried is {tried}; say --image-root data"
    for call in (extract_features, forecast_extraction):
        with pytest.raises(DataError) as error:
            call(table, ["hashing", "hog"], cache="cache")
        assert str(error.value) == f"{table}: {message}"
        assert not Path("cache").exists()
    assert extract_features(table, ["hashing"], cache="cache").new.total() == 1  # texts need no photos
    assert extract_features(table, ["hog"], cache="cache", columns={"image-root": "data"}).new.total() == 1


def test_a_folder_of_photos_nowhere_near_is_named_by_the_user(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"say --image-root FOLDER, where FOLDER/photos/7\.jpg is the photo"):
        extract_features(rows_of(tmp_path, ["photos/7.jpg"]), ["hog"], cache=tmp_path / "cache")


@pytest.mark.parametrize("cell", ["IMG Dir/0.png", "img dir/0.jpeg", "img dir\\0.gif"])
def test_a_photo_of_nearly_the_name_is_named(pics: Path, cell: str) -> None:
    (lost,) = read_samples(rows_of(pics.parent, [cell])).notes[-1:]
    assert lost.endswith(f"; {pics}/0.png is there: write its name so in the table")


def test_a_folder_in_place_of_a_photo_is_told(pics: Path) -> None:
    (lost,) = read_samples(rows_of(pics.parent, ["img dir"])).notes[-1:]
    assert lost.endswith("img dir, a folder; name photos, or say --image-pattern 'img dir/{id}.jpg'")


def test_of_folders_beside_the_table_that_of_the_cell_is_proposed(pics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pics.parent)
    shutil.copytree(pics, "a copy")
    (lost,) = read_samples(rows_of(pics.parent, ["/home/me/img dir/0.png"])).notes[-1:]
    assert lost.endswith("; say --image-root 'img dir'")


def test_more_than_half_missing_is_said_with_the_first_path(pics: Path, tmp_path: Path) -> None:
    few = rows_of(pics.parent, ["img dir/0.png", "gone/1.png", "gone/2.png"])
    notes = extract_features(few, ["hog"], cache=tmp_path / "cache").samples.notes
    first = pics.parent / "gone/1.png"
    assert f"2 of 3 photos are not found; the first path tried is {first}; say --image-root" in "".join(notes)
    half = rows_of(pics.parent, ["img dir/0.png", "gone/1.png"])
    assert extract_features(half, ["hog"], cache=tmp_path / "cache").samples.notes == ()


def test_a_column_without_any_text_or_no_column_at_all(pics: Path, tmp_path: Path) -> None:
    table = pics.parent / "t.csv"
    table.write_text("id,text,caption,photo\na,,one,img dir/0.png\nb, ,two,img dir/1.png\n")
    with pytest.raises(DataError, match=r"the column text is empty; --columns text=caption names another$"):
        extract_features(table, ["hashing"], cache=tmp_path / "cache", columns={"text": "text"})
    with pytest.raises(DataError, match=r"among .*; --columns text=caption,image=photo names one, or leave hog out"):
        extract_features(table, ["hog"], cache=tmp_path / "cache", columns={"text": "caption"})


def test_a_sample_of_several_is_a_sample() -> None:
    missing = Sample("a", image=Photos((Path("gone.png"), Path("away.png"))))
    assert missing.key("image") == (None, f"unreadable: {os.strerror(2)}")
