"""Layouts of folders and archives: each is written as its users write it, and read right."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from mmfeat.errors import DataError
from mmfeat.extraction.extract import extract_features
from mmfeat.samples.dataset import SampleSet, read_samples
from mmfeat.samples.folders import open_tree
from mmfeat.system.remote import TEMPORARY, temporary_folder

WORDS = ["green cloud", "so happy", "paper stone", "quiet lamp"]


def picture(number: int, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 40), (60 * number, 90, 200 - 40 * number)).save(file, kind)
    return file.getvalue()


def put(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def zipped(path: Path, files: dict[str, bytes | str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tarred(path: Path, files: dict[str, bytes | str]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def packed(path: Path, compress: Callable[[bytes], bytes]) -> Path:
    path.write_bytes(compress(path.read_bytes() if path.exists() else b""))
    return path


def summary(samples: SampleSet) -> list[tuple[str, str | None, str | None, bytes | None]]:
    return [(s.id, s.text, s.label, s.image and s.image.read_bytes()) for s in samples]  # type: ignore[union-attr]


LISTS: dict[str, bytes | str] = {
    "train.txt": "guid,tag\n0,up\n1,down\n",
    "test_without_label.txt": "guid,tag\n2,null\n",
    "data/0.bmp": picture(0, "BMP"),
    "data/deep/1.tiff": picture(1, "TIFF"),
    "data/2.gif": picture(2, "GIF"),
    **{f"data/{number}.txt": WORDS[number] for number in range(3)},
}
CLASSES: dict[str, bytes | str] = {
    f"{name}/{number}.png": picture(2 * (name == "dog") + number) for name in ("cat", "dog") for number in range(2)
}
SPLITS = {f"{part}/{name}": content for part in ("train", "val", "test") for name, content in CLASSES.items()}
METADATA: dict[str, bytes | str] = {
    "metadata.csv": "file_name,text,label\n" + "".join(f"pics/{n}.png,{WORDS[n]},{n % 2}\n" for n in range(4)),
    **{f"pics/{number}.png": picture(number) for number in range(4)},
}
SHARD: dict[str, bytes | str] = {
    f"{number:04d}.{kind}": content
    for number in range(4)
    for kind, content in (("png", picture(number)), ("txt", WORDS[number]), ("cls", str(number % 2)))
}
JSON_SHARD: dict[str, bytes | str] = {
    f"{number:04d}.{kind}": content
    for number in range(4)
    for kind, content in (
        ("jpg", picture(number, "JPEG")),
        ("json", json.dumps({"text": WORDS[number], "label": ["a", "b"][: 1 + number % 2]})),
    )
}
WRITERS = [put, lambda path, files: zipped(path.with_suffix(".zip"), files)]
BOTH = pytest.mark.parametrize("write", WRITERS, ids=["folder", "zip"])
Write = Callable[[Path, dict[str, bytes | str]], Path]


@BOTH
@pytest.mark.parametrize("depth", ["", "outer/MVSA/"])
def test_lists_in_any_depth_with_any_suffix_of_a_photo(write: Write, depth: str, tmp_path: Path) -> None:
    samples = read_samples(write(tmp_path / "set", {depth + name: content for name, content in LISTS.items()}))
    assert [(s.id, s.text, s.label) for s in samples] == [
        ("0", WORDS[0], "up"),
        ("1", WORDS[1], "down"),
        ("2", WORDS[2], None),
    ]
    photos = [LISTS[name] for name in ("data/0.bmp", "data/deep/1.tiff", "data/2.gif")]
    assert [entry[3] for entry in summary(samples)] == photos


@BOTH
@pytest.mark.parametrize("annotators", [1, 3])
def test_the_list_of_mvsa_as_published(write: Write, annotators: int, tmp_path: Path) -> None:
    pairs = [
        ("positive,neutral", "positive,positive", "neutral,neutral"),
        ("neutral,negative", "neutral,negative", "positive,positive"),
        ("positive,negative", "positive,negative", "neutral,negative"),
        ("neutral,neutral", "neutral,positive", "neutral,negative"),  # three opinions on the photo
    ]
    lines = ["\t".join((str(number), *pair[:annotators])) for number, pair in enumerate(pairs)]
    files = {f"data/{n}.{kind}": picture(n) if kind == "jpg" else "text" for n in range(4) for kind in ("jpg", "txt")}
    header = "\t".join(["ID", *["text,image"] * annotators])
    data = write(tmp_path / "MVSA", {"labelResultAll.txt": "\n".join([header, *lines]) + "\n", **files})
    samples = read_samples(data)
    assert [sample.label for sample in samples] == [
        "positive", "negative", None, "neutral" if annotators == 1 else None
    ]  # fmt: skip
    assert all(sample.text and sample.image for sample in samples)
    assert f"labelResultAll.txt: {2 - (annotators == 1)} of 4 samples have no label" in " ".join(samples.notes)
    with pytest.raises(DataError, match=r"a list of labels; name its folder: --data .*MVSA"):
        read_samples(f"{data}/labelResultAll.txt")


@BOTH
def test_class_folders(write: Write, tmp_path: Path) -> None:
    samples = read_samples(write(tmp_path / "set", CLASSES))
    assert summary(samples) == [(name, None, name.split("/")[0], CLASSES[name]) for name in CLASSES]
    assert "labels are the names of folders" in samples.notes


@BOTH
def test_split_folders_are_parts_of_a_split_and_test_data_left_for_test(write: Write, tmp_path: Path) -> None:
    data = write(tmp_path / "set", SPLITS)
    samples = read_samples(data)
    assert [sample.id for sample in samples] == [name for name in SPLITS if not name.startswith("test")]
    assert samples.classes == ("cat", "dog")
    assert [sample.split for sample in samples] == ["train"] * 4 + ["validation"] * 4
    assert samples.notes[0] == (
        "split of the data: train 4, validation 4; heads learn from train and are scored on validation (--protocol "
        "kfold draws folds over all)"
    )
    assert f"test (4) is left out, --test {data}/test predicts it" in samples.notes
    test = read_samples(f"{data}/test")
    assert [(sample.id, sample.label) for sample in test] == [(name, name.split("/")[0]) for name in CLASSES]


def test_folders_called_sets_are_parts_too(tmp_path: Path) -> None:
    names = {"train": "training_set", "val": "validation-set", "test": "Test Set"}
    files = {name.replace(part := name.split("/")[0], names[part], 1): content for name, content in SPLITS.items()}
    samples = read_samples(put(tmp_path / "set", files))
    assert samples.classes == ("cat", "dog")
    assert [sample.split for sample in samples] == ["train"] * 4 + ["validation"] * 4


@pytest.mark.parametrize("place", ["", "imgs/"])
@pytest.mark.parametrize("lines", [["{} a", "{} b"], ["photo\tkind", "{}\ta", "{}\tb"], ["x,{},a", "y,{},b"]])
def test_a_list_of_labels_of_another_name_is_read_by_what_the_note_says(
    tmp_path: Path, place: str, lines: list[str]
) -> None:
    photos = {f"{place}{number}.png": picture(number) for number in range(2)}
    named = [line.format(f"{number}.png") for number, line in enumerate(lines, 2 - len(lines))]
    data = put(tmp_path / "set", {**photos, "lab.txt": "\n".join(named)})
    (note,) = read_samples(data).notes
    command = re.search("it names the photos: --data (.*) reads their labels", note)
    assert command is not None
    path, *flags = shlex.split(command[1])
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    columns = dict(pair.split("=") for pair in values.pop("--columns").split(","))
    samples = read_samples(path, {**columns, **{flag[2:]: value for flag, value in values.items()}})
    assert [(Path(str(sample.image)).name, sample.label) for sample in samples] == [("0.png", "a"), ("1.png", "b")]


def test_a_list_without_its_folder_that_names_photos_is_read_by_what_the_error_says(tmp_path: Path) -> None:
    data = put(tmp_path / "set", {"images/0.png": picture(0), "train.txt": "images/0.png 0\nimages/1.png 1\n"})
    flags = f"--data {data}/train.txt --columns image=1,label=2 --delimiter space"
    with pytest.raises(DataError, match=f"is missing; put it there, or say {flags}$"):
        read_samples(data)
    assert read_samples(data / "train.txt", {"image": "1", "label": "2", "delimiter": "space"}).classes == ("0", "1")


def test_a_folder_of_train_and_test_is_extracted_by_what_the_note_says(tmp_path: Path) -> None:
    data = put(tmp_path / "set", SPLITS)
    result = extract_features(data, ["hog"], cache=tmp_path / "cache", test=data / "test")
    assert result.test is not None
    assert (len(result.samples), len(result.test.samples)) == (8, 4)


@BOTH
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_of_the_hub(write: Write, kind: str, tmp_path: Path) -> None:
    import pandas as pd

    files = dict(METADATA)
    frame = pd.read_csv(io.StringIO(str(files.pop("metadata.csv"))))
    kinds = {
        "csv": lambda: frame.to_csv(index=False),
        "jsonl": lambda: frame.to_json(orient="records", lines=True),
        "parquet": lambda: frame.to_parquet(),
    }
    data = write(tmp_path / "set", {f"metadata.{kind}": kinds[kind](), **files})
    samples = read_samples(data)
    assert summary(samples) == [(f"pics/{n}.png", WORDS[n], str(n % 2), METADATA[f"pics/{n}.png"]) for n in range(4)]
    assert [entry[3] for entry in summary(samples)] == [picture(number) for number in range(4)]


def test_metadata_in_each_split_folder(tmp_path: Path) -> None:
    files = {f"{part}/{name}": content for part in ("train", "val", "test") for name, content in METADATA.items()}
    data = put(tmp_path / "set", files)
    samples = read_samples(data)
    assert len(samples) == 8
    assert all(sample.image for sample in samples)
    assert [sample.split for sample in samples] == ["train"] * 4 + ["validation"] * 4
    assert f"test/metadata.csv is left out, --test {data}/test predicts it" in samples.notes
    result = extract_features(data, ["hog"], cache=tmp_path / "cache", test=data / "test")
    assert result.test is not None
    assert (len(result.samples), len(result.test.samples)) == (8, 4)
    assert len(read_samples(data, {"id": "#", "image": "file_name"})) == 8  # as the request records it


@pytest.mark.parametrize("write", [put, WRITERS[1], lambda path, files: tarred(path.with_suffix(".tar"), files)])
@pytest.mark.parametrize("files", [SHARD, JSON_SHARD])
def test_photos_with_texts_json_and_classes_beside_them(
    write: Write, files: dict[str, bytes | str], tmp_path: Path
) -> None:
    samples = read_samples(write(tmp_path / "set", files))
    labels = ["0", "1", "0", "1"] if files is SHARD else ["a", "a|b", "a", "a|b"]
    photos = [files[f"000{n}.png" if files is SHARD else f"000{n}.jpg"] for n in range(4)]
    assert summary(samples) == [(f"000{n}", WORDS[n], labels[n], photos[n]) for n in range(4)]


def test_fields_of_json_are_named_by_columns(tmp_path: Path) -> None:
    files = {"data/7.jpeg": picture(0, "JPEG"), "data/7.json": json.dumps({"plot": ["a", "b"], "genres": ["x", "y"]})}
    data = put(tmp_path / "set", {**files, "split.json": "{}"})
    (sample,) = read_samples(data, {"text": "plot", "label": "genres"})
    assert (sample.text, sample.label) == ("a\nb", "x|y")
    several = read_samples(data, {"text": "genres+plot+titel", "label": "genres"})
    assert several.samples[0].text == "x\ny\na\nb"
    assert "no titel is read from JSON with plot, genres; --columns text=... names fields" in several.notes
    plain = read_samples(data)
    assert "no text or label is read from JSON with plot, genres" in plain.notes[0]
    assert extract_features(data, ["hog"], cache=tmp_path / "cache").new.total() == 1
    with pytest.raises(DataError, match=r"set: no text or label is read from JSON with plot, genres; --columns text="):
        extract_features(data, ["hashing", "hog"], cache=tmp_path / "cache")
    assert "1 file not read (first: split.json)" in plain.notes


def test_shards_by_pattern_and_in_a_folder_are_one_data_set(tmp_path: Path) -> None:
    for shard in range(2):
        names = {f"{shard}{name}": content for name, content in SHARD.items()}
        tarred(tmp_path / f"train-{shard:03d}.tar", names)
    whole = read_samples(tmp_path)
    assert [sample.id for sample in whole] == [f"{shard}000{n}" for shard in range(2) for n in range(4)]
    pattern = read_samples(str(tmp_path / "train-*.tar"))
    assert summary(pattern) == summary(whole)
    assert pattern.name == "train"
    assert whole.classes == ("0", "1")


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".tgz", gzip.compress),
        (".tar.gz", gzip.compress),
        (".tar.bz2", bz2.compress),
        (".tar.xz", lzma.compress),
        (".tar.zst", lambda data: pa.compress(data, "zstd", asbytes=True)),
        (".tar", gzip.compress),  # as a browser saves a file that is said to be a .tar
        (".tar.gz", bytes),
    ],
)
def test_compressed_shards_are_read_as_plain_ones(
    suffix: str, compress: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    for shard in range(2):
        names = {f"{shard}{name}": content for name, content in SHARD.items()}
        packed(tarred(tmp_path / f"train-{shard}{suffix}", names), compress)
    whole = read_samples(tmp_path)
    assert [sample.id for sample in whole] == [f"{shard}000{n}" for shard in range(2) for n in range(4)]
    assert [entry[1:] for entry in summary(whole)[:4]] == [(WORDS[n], str(n % 2), picture(n)) for n in range(4)]
    pattern = read_samples(str(tmp_path / f"train-*{suffix}"))
    assert (pattern.name, summary(pattern)) == ("train", summary(whole))
    assert len(read_samples(f"{tmp_path}/train-0{suffix}/")) == 4


def test_a_compressed_archive_is_unpacked_once_for_all_processes_of_a_command(tmp_path: Path) -> None:
    path = packed(tarred(tmp_path / "set.tgz", SHARD), gzip.compress)
    photo = read_samples(path).samples[0].image
    before = {file: file.stat().st_mtime_ns for file in Path(temporary_folder()).glob("*.tar")}
    read = "import sys; from mmfeat.system.remote import RemoteFile; print(len(RemoteFile(sys.argv[1]).read_bytes()))"
    answer = subprocess.run([sys.executable, "-c", read, str(photo)], stdout=subprocess.PIPE, check=True)
    assert int(answer.stdout) == len(picture(0))
    assert {file: file.stat().st_mtime_ns for file in Path(temporary_folder()).glob("*.tar")} == before


def test_what_a_killed_process_unpacked_goes_with_the_next(tmp_path: Path) -> None:
    path, place = packed(tarred(tmp_path / "set.tgz", SHARD), gzip.compress), tmp_path / "tmp"
    place.mkdir()
    environment = {**{name: os.environ[name] for name in os.environ if name != TEMPORARY}, "TMPDIR": str(place)}
    read = "import os, sys; from mmfeat.system.remote import open_archive; open_archive(sys.argv[1]); "
    for end in ("os.kill(os.getpid(), 9)", "print(os.listdir(os.environ['TMPDIR']))"):
        before = os.listdir(place)
        answer = subprocess.run([sys.executable, "-c", read + end, str(path)], env=environment, capture_output=True)
    assert len(before) == 1
    assert before[0] not in answer.stdout.decode()  # swept while the next one works
    assert not os.listdir(place)


def test_a_table_in_an_archive_with_its_photos(tmp_path: Path) -> None:
    table = "id,text,image,label\n" + "".join(f"{n},{WORDS[n]},img/{n}.png,up\n" for n in range(4))
    files: dict[str, bytes | str] = {"shop/train.csv": table, **{f"shop/img/{n}.png": picture(n) for n in range(4)}}
    samples = read_samples(zipped(tmp_path / "shop.zip", files))
    assert summary(samples) == [(str(n), WORDS[n], "up", picture(n)) for n in range(4)]
    files["shop/test.csv"] = table.replace(",label", ",other")
    two = zipped(tmp_path / "two.zip", files)
    assert summary(read_samples(two)) == summary(samples)
    assert f"shop/test.csv is left out, --test {two}/shop/test.csv predicts it" in read_samples(two).notes
    files["shop/train.jsonl"] = "{}"
    with pytest.raises(DataError, match=r"several tables, shop/test\.csv, shop/train\.csv, .*; name one: --data "):
        read_samples(zipped(tmp_path / "three.zip", files))
    assert summary(read_samples(f"{two}/shop/train.csv")) == summary(samples)
    tar = packed(tarred(tmp_path / "shop.tar.gz", files), gzip.compress)
    assert summary(read_samples(f"{tar}/shop/train.csv")) == summary(samples)
    with pytest.raises(DataError, match=r"has no shop/none\.csv; it has shop"):
        read_samples(f"{two}/shop/none.csv")


def test_photos_of_an_archive_are_cached_by_content_and_not_read_again(tmp_path: Path) -> None:
    folder, archive = put(tmp_path / "set", SHARD), zipped(tmp_path / "set.zip", SHARD)
    first = extract_features(archive, ["hashing", "hog"], cache=tmp_path / "cache")
    assert list(first.new.values()) == [4, 4]
    assert extract_features(archive, ["hashing", "hog"], cache=tmp_path / "cache").nothing_to_do
    assert extract_features(folder, ["hashing", "hog"], cache=tmp_path / "cache").nothing_to_do


def link(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("0.png")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    return path


def zip_link(path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        info = zipfile.ZipInfo("0.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "/etc/passwd")
    return path


def bomb(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("0.png", "w") as member:
        for _ in range(300):
            member.write(bytes(1 << 20))
    return path


def cut(path: Path, write: Callable[[Path, dict[str, bytes | str]], Path]) -> Path:
    data = write(path, SHARD).read_bytes()
    path.write_bytes(data[: len(data) // 3])
    return path


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.zip", lambda path: zipped(path, {"../0.png": picture(0)}), "'../0.png' lies outside the archive"),
        ("a.zip", lambda path: zipped(path, {"a\\..\\..\\0.png": picture(0)}), "lies outside the archive"),
        ("a.zip", lambda path: zipped(path, {"/etc/0.png": picture(0)}), "'/etc/0.png' lies outside the archive"),
        ("a.zip", lambda path: zipped(path, {"C:\\0.png": picture(0)}), "lies outside the archive"),
        ("a.tar", lambda path: tarred(path, {"../0.png": picture(0)}), "'../0.png' lies outside the archive"),
        ("a.tar", lambda path: tarred(path, {"/0.png": picture(0)}), "'/0.png' lies outside the archive"),
        ("a.tar", link, "'0.png' is a link or no file"),
        ("a.zip", zip_link, "'0.png' is a link or no file"),
        ("a.zip", bomb, "'0.png' unpacks to 314,572,800 bytes from"),
        ("a.zip", lambda path: cut(path, zipped), "broken or cut short"),
        ("a.tar", lambda path: cut(path, tarred), "broken or cut short"),
        ("a.zip", lambda path: path.write_bytes(b"no archive") and path, "broken or cut short"),
        ("a.7z", lambda path: path.write_bytes(b"x") and path, "archives are .zip, .tar or .tar.gz and its like"),
        ("a.tgz", lambda path: packed(link(path), gzip.compress), "'0.png' is a link or no file"),
        (
            "a.tgz",
            lambda path: packed(path, lambda _: gzip.compress(bytes(1 << 22))),
            "unpack to 2,097,152 and",
        ),
        ("a.tgz", lambda path: cut(path, lambda path, files: packed(tarred(path, files), gzip.compress)), "cut short"),
        ("a.zip", lambda path: zipped(path, {}), "no samples|no photos|neither"),
    ],
)
def test_archives_that_no_one_should_trust(
    name: str, write: Callable[[Path], Path], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "a.tgz":
        monkeypatch.setattr("mmfeat.system.remote.LARGEST", 1 << 20)
    with pytest.raises(DataError, match=message) as refusal:
        read_samples(write(tmp_path / name))
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_broken_member_costs_one_photo(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", SHARD)
    data = bytearray(path.read_bytes())
    start = data.index(b"0001.png") + 20
    data[start : start + 8] = bytes(8)
    path.write_bytes(data)
    result = extract_features(path, ["hog"], cache=tmp_path / "cache")
    assert sum(result.new.values()) == 3


def test_hidden_files_and_those_of_a_mac_are_left_out(tmp_path: Path) -> None:
    extra: dict[str, bytes | str] = {"__MACOSX/._0000.png": "x", ".DS_Store": "x", "._0000.png": "x"}
    assert len(read_samples(zipped(tmp_path / "set.zip", {**SHARD, **extra}))) == 4
    assert len(read_samples(put(tmp_path / "set", {**SHARD, ".DS_Store": "x", "._0000.png": "x"}))) == 4


def test_links_to_folders_are_entered_but_not_in_circles(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere", CLASSES)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "photos").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "cat" / "up").symlink_to(tmp_path / "elsewhere")
    tree = open_tree(str(tmp_path / "set"))
    assert tree is not None
    assert sorted(tree.files) == sorted(f"photos/{name}" for name in CLASSES)


def test_a_readme_is_no_sample_and_a_text_without_a_photo_is_one(tmp_path: Path) -> None:
    files = {f"pairs/{name}": content for name, content in SHARD.items()}
    samples = read_samples(put(tmp_path / "set", {**files, "README.txt": "hello", "pairs/9.txt": "alone"}))
    assert [sample.id for sample in samples] == [f"pairs/000{n}" for n in range(4)] + ["pairs/9"]
    assert samples.samples[-1].image is None
    assert "1 file not read (first: README.txt)" in samples.notes


def test_an_archive_that_changes_is_read_anew(tmp_path: Path) -> None:
    path = zipped(tmp_path / "set.zip", SHARD)
    assert len(read_samples(path)) == 4
    shutil.copy(zipped(tmp_path / "other.zip", {**SHARD, "0009.png": picture(1), "0009.txt": "new"}), path)
    assert len(read_samples(path)) == 5


def test_metadata_of_test_data_in_a_folder_of_the_archive_is_left_out(tmp_path: Path) -> None:
    files = {f"set/{part}/{name}": content for part in ("train", "test") for name, content in METADATA.items()}
    data = zipped(tmp_path / "set.zip", files)
    samples = read_samples(data)
    assert len(samples) == 4
    assert f"set/test/metadata.csv is left out, --test {data}/set/test predicts it" in samples.notes
    assert len(read_samples(f"{data}/set/test")) == 4
