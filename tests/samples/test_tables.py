import bz2
import gzip
import json
import lzma
import os
import zipfile
from pathlib import Path

import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from mmfeat.errors import DataError
from mmfeat.samples.dataset import read_samples
from mmfeat.samples.tables import Table

ROWS = [{"id": "1", "text": 'a, "b"\nc', "label": "x"}, {"id": "2", "text": None, "label": None}]
MARKS = {".csv": ",", ".tsv": "\t", ".psv": "|", ".txt": "\t"}
SUFFIXES = (*MARKS, ".jsonl", ".ndjson", ".json", ".parquet", ".feather", ".arrow", ".xlsx")
COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": None}


def write(path: Path, rows: list[dict[str, str | None]] = ROWS) -> Path:
    """Write rows in the format of the suffix, really."""
    table = pa.Table.from_pylist(rows)
    if path.suffix in (".jsonl", ".ndjson"):
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".feather":
        pyarrow.feather.write_feather(table, path)
    elif path.suffix == ".arrow":
        with pa.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)
    elif path.suffix == ".xlsx":
        book = openpyxl.Workbook()
        for row in (list(rows[0]), *(list(row.values()) for row in rows)):
            book.active.append(row)
        book.save(path)
    else:
        mark = MARKS[path.suffix]
        cells = [['"' + (cell or "").replace('"', '""') + '"' for cell in row.values()] for row in rows]
        path.write_text("\n".join(mark.join(row) for row in [list(rows[0]), *cells]) + "\n")
    return path


def compress(path: Path, suffix: str) -> Path:
    target = path.with_name(path.name + suffix)
    if suffix == ".zst":
        with pa.CompressedOutputStream(str(target), "zstd") as stream:
            stream.write(path.read_bytes())
    elif suffix:
        target.write_bytes(COMPRESSIONS[suffix](path.read_bytes()))
    return target


def texts(path: str | Path, **columns: str) -> list[str | None]:
    return [sample.text for sample in read_samples(path, columns)]


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str, compression: str) -> None:
    path = compress(write(tmp_path / f"t{suffix}"), compression)
    assert [row for _, row in Table(path).rows()] == ROWS
    assert read_samples(path).name == "t"
    assert texts(path, text="text+label+id", label="id") == ['a, "b"\nc\nx\n1', "2"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet", ".xlsx"])
def test_a_compression_shows_by_the_first_bytes_whatever_the_suffix(tmp_path: Path, suffix: str) -> None:
    plain = write(tmp_path / f"t{suffix}")
    named = plain.rename(tmp_path / f"t{suffix}.gz")
    assert [row for _, row in Table(named).rows()] == ROWS
    for other in (".gz", ".bz2", ".xz", ".zst"):
        hidden = compress(named, other).rename(tmp_path / f"u{suffix}")
        assert [row for _, row in Table(hidden).rows()] == ROWS


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shards_and_patterns_and_lists_are_one_table(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for number in range(3):
        write(folder / f"part-{number}{suffix}", [{"id": str(number), "text": f"text {number}", "label": "x"}])
    (folder / "_SUCCESS").touch()
    listed = f"{folder}/part-2{suffix},{folder}/part-0{suffix}"
    assert texts(f"{folder}/*{suffix}") == ["text 0", "text 1", "text 2"]
    assert texts(listed) == ["text 2", "text 0"]
    assert read_samples(f"{folder}/*{suffix}").name == "set"
    assert read_samples(f"{folder}/part-*{suffix}").name == "part"
    if suffix != ".txt":  # such a file may be anything
        assert texts(folder) == ["text 0", "text 1", "text 2"]
        assert read_samples(folder).name == "set"


def test_a_folder_of_other_tables_is_no_table(tmp_path: Path) -> None:
    for name in ("products", "sales"):
        write(tmp_path / f"{name}.csv")
    with pytest.raises(DataError, match=r"several tables, products.csv, sales.csv; name one: --data .*/products.csv"):
        read_samples(tmp_path)


@pytest.mark.parametrize("folder", ["", "data"])
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_of_a_folder_named_by_parts_are_its_split(tmp_path: Path, suffix: str, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    for name in ("train-0", "train-1", "validation-0", "test-0", "test-1", "sample_submission"):
        write(tmp_path / folder / f"{name}{suffix}", [{"id": name, "text": "a", "label": "x"}])
    samples = read_samples(tmp_path)
    assert [(sample.id, sample.split) for sample in samples] == [
        ("train-0", "train"), ("train-1", "train"), ("validation-0", "validation")
    ]  # fmt: skip
    start = f"{tmp_path}/{folder}".rstrip("/")
    assert any(note.endswith(f"is left out, --test '{start}/test-*{suffix}' predicts it") for note in samples.notes)
    assert any(f"sample_submission{suffix} not read beside" in note for note in samples.notes)
    assert [sample.id for sample in read_samples(f"{start}/test-*{suffix}")] == ["test-0", "test-1"]


def test_one_table_of_a_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path / "products.csv")
    (tmp_path / "README.md").write_text("about")
    assert len(read_samples(tmp_path)) == 2


def test_lists_of_a_folder_come_before_its_tables(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "train.txt").write_text("1,up\n2,down\n")
    for number in range(2):
        write(tmp_path / f"folds{number}.csv")
    assert read_samples(tmp_path).classes == ("down", "up")


@pytest.mark.parametrize("suffix", ["csv", "parquet", "xlsx"])
def test_a_shard_without_a_column_is_told(tmp_path: Path, suffix: str) -> None:
    for number, name in enumerate(("text", "body")):
        write(tmp_path / f"p{number}.{suffix}", [{"id": str(number), name: "a", "label": "x"}])
    with pytest.raises(DataError, match=rf"p1.{suffix}: no column text, which .*p0.{suffix} has; name other files"):
        read_samples(tmp_path)


def test_ids_of_shards_without_ids_name_the_file(tmp_path: Path) -> None:
    for number in range(2):
        write(tmp_path / f"p{number}.parquet", [{"text": f"text {number}"}])
    assert [sample.id for sample in read_samples(f"{tmp_path}/*.parquet")] == ["p0.parquet:1", "p1.parquet:1"]


def test_blank_rows_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("\nid,text,label\n\n1,a,x\n,,\n2,b,y\n  \n,,\n")
    assert [where for where, _ in Table(tmp_path / "t.csv").rows()] == [f"{tmp_path}/t.csv:{n}" for n in (4, 6)]


def test_lines_are_counted_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('id,text,label\n1,"a, ""b""\nc",x\n2,,\n')
    assert [where for where, _ in Table(path).rows()] == [f"{path}:2", f"{path}:4"]


def test_the_error_on_repeated_ids_names_the_lines_where_their_rows_begin(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('id,text\n1,"a\nb\nc"\n2,"d\ne"\n1,"f\ng"\n')
    with pytest.raises(DataError, match=r"t.csv:7: the id '1' is already at .*t.csv:2; remove or rename"):
        read_samples(path)


def test_what_is_wrong_in_a_list_of_tables_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv")
    (tmp_path / "part").mkdir()
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "link.csv").symlink_to("gone.csv")
    for data, message in {
        f"{path},{tmp_path}/u.csv": "u.csv: no such folder or table; did you mean .*/t.csv",
        f"{path},{path}": "t.csv is there twice; name each file once",
        f"{tmp_path}/pipe.csv": "pipe.csv: a pipe or a device, which cannot be read twice",
        f"{tmp_path}/link.csv": "link.csv: a link to gone.csv, which is not there",
        f"{path},{tmp_path}/part": "part: a folder; of several names each is a table",
    }.items():
        with pytest.raises(DataError, match=message):
            read_samples(data)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1),
        json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        json.dumps({"dataset": "d", "info": {}, "images": ROWS}),
        json.dumps({"images": ROWS}, indent=1),
        json.dumps({"data": {"dataset": "d", "items": ROWS}}),
        json.dumps({"columns": list(ROWS[0]), "index": [0, 1], "data": [list(row.values()) for row in ROWS]}),
        json.dumps({row["id"]: {"text": row["text"], "label": row["label"]} for row in ROWS}),
        json.dumps({name: {str(n): row[name] for n, row in enumerate(ROWS)} for name in ROWS[0]}),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_in_any_arrangement(tmp_path: Path, suffix: str, content: str) -> None:
    (tmp_path / f"t{suffix}").write_text(content)
    assert [row for _, row in Table(tmp_path / f"t{suffix}").rows()] == ROWS


def test_several_lists_in_one_object_are_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"train": ROWS[:1], "val": ROWS[1:]}))
    assert [sample.split for sample in read_samples(tmp_path / "t.json")] == ["train", "validation"]
    (tmp_path / "t.json").write_text(json.dumps({"tweets": ROWS, "posts": ROWS}))
    with pytest.raises(DataError, match=r"t.json: tweets and posts are lists of objects; write the one that is meant"):
        read_samples(tmp_path / "t.json")


def test_one_object_with_cells_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"id": "1", "text": "a", "entities": [{"name": "b"}]}\n')
    assert texts(tmp_path / "t.jsonl") == ["a"]


def test_a_long_array_on_one_line_is_read_in_pieces(tmp_path: Path) -> None:
    rows = [{"id": str(n), "text": f"ü {n} " + "x" * 500} for n in range(5000)]
    (tmp_path / "t.json").write_text(json.dumps(rows, ensure_ascii=False))
    assert texts(tmp_path / "t.json") == [row["text"] for row in rows]
    whole = (tmp_path / "t.json").read_bytes()
    (tmp_path / "cut.json").write_bytes(whole[: whole.rindex(b"{") - 2])
    with pytest.raises(DataError, match=r"cut.json:1: the array does not end; the file is cut short"):
        read_samples(tmp_path / "cut.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json"])
def test_wide_characters_are_read_without_a_word(tmp_path: Path, suffix: str, encoding: str) -> None:
    path = write(tmp_path / f"t{suffix}", [{"id": "1", "text": "déjà vu 天", "label": "x"}] * 1)
    path.write_text(path.read_text(), encoding=encoding)
    assert texts(path) == ["déjà vu 天"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "id,text\n1,a,b\n", "t.csv:2: 3 cells under a header of 2"),
        ("t.csv", "id,text\n1\n", "t.csv:2: 1 cell under a header of 2"),
        ("t.csv", "", "t.csv: the file is empty; it begins with a line of column names"),
        ("t.csv", ",,\n1,a,b\n", "t.csv:1: no column names in the first line"),
        ("t.csv", "PK\x03\x04 and so on\0,\n", "t.csv: binary, not text"),
        ("t.csv", "PK\x03\x04 and so on", "t.csv: binary, not text"),
        ("t.csv", "# by me\nid,text\n1,a\n", "t.csv:2: 2 cells under a header of 1; .*remove what stands above"),
        ("t.csv", "<!DOCTYPE html>\n<html>", "t.csv: a page of the web, not a table; download the file itself"),
        ("t.parquet", "version https://git-lfs.github.com/spec/v1\n", "t.parquet: a pointer of Git LFS, not the data"),
        ("t.jsonl", '{"id": 1}\nnope\n', "t.jsonl:2: not JSON"),
        ("t.jsonl", "[1]\n", "t.jsonl:1: a number; one object a line is expected"),
        ("t.jsonl", '{"id": 1}\nnull\n', "t.jsonl:2: null; one object a line is expected"),
        ("t.json", '[{"id": 1}, {"id":]', "t.json:1: not JSON .*; an array of objects is expected"),
        ("t.jsonl", "{'id': 1}\n{'id': 2}\n", "t.jsonl:1: not JSON .*; one object a line is expected"),
        ("t.parquet", "nope", "t.parquet: not a Parquet file"),
        ("t.arrow", "nope", "t.arrow: not a file of Arrow or Feather"),
        ("t.xlsx", "PK000", "t.xlsx: not an Excel file"),
        ("t.ods", "nope", "must end in .csv, .tsv, .psv, .txt, .jsonl"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        list(Table(tmp_path / name).rows())
    assert "\n" not in str(caught.value)


def test_an_excel_file_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "t.xlsx")
    monkeypatch.setattr("mmfeat.samples.table_files.LARGEST_BOOK", 1000)
    with pytest.raises(DataError, match=r"t.xlsx: [\d,]+ bytes unpacked would be in memory at once; save it as .csv"):
        read_samples(path)


def test_a_table_that_unpacks_to_much_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.csv.bz2").write_bytes(bz2.compress(bytes(1 << 24)))
    monkeypatch.setattr("mmfeat.system.remote.LARGEST", 1 << 20)
    with pytest.raises(DataError, match=r"t.csv.bz2: [\d,]+ bytes unpack to [\d,]+ and more; nothing of it is read"):
        read_samples(tmp_path / "t.csv.bz2")


def test_a_flipped_byte_in_an_archive_or_an_arrow_file_is_one_line(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("t.csv", "id,text,label\n1,marked,a\n")
    table = pa.table({"id": ["1"], "text": ["marked"]})
    pa.feather.write_feather(table, str(tmp_path / "t.arrow"), "uncompressed")
    for name, message in (("t.zip", r"t.csv: broken or cut short \(Bad CRC-32"), ("t.arrow", "not a file of Arrow")):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes().replace(b"marked", b"mark\xff\xfe"))
        with pytest.raises(DataError, match=message):
            read_samples(tmp_path / name)


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_table_that_is_cut_short_is_named(tmp_path: Path, compression: str) -> None:
    path = compress(write(tmp_path / "t.csv", ROWS * 50), compression)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=f"t.csv{compression}: broken or cut short"):
        list(Table(path).rows())


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [("text", ["a", "b"], "a list"), ("text", {"en": "a"}, "an object"), ("label", {"en": "a"}, "an object")],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_what_is_nested_is_neither_text_nor_label(
    tmp_path: Path, column: str, suffix: str, value: object, kind: str
) -> None:
    path, row = tmp_path / f"t.{suffix}", {"id": "1", "text": "fine", column: value}
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([row]), path)
    with pytest.raises(DataError, match=f"t.{suffix}:1: column {column} holds {kind}; .* --columns"):
        read_samples(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "csv"])
def test_lists_of_labels_are_several_classes(tmp_path: Path, suffix: str) -> None:
    path, labels = tmp_path / f"t.{suffix}", [["Drama"], ["Drama", "Comedy"], [], None]
    rows = [{"id": str(number), "text": "a", "label": label} for number, label in enumerate(labels)]
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        pd.DataFrame(rows).to_csv(path, index=False)
    samples = read_samples(path)
    assert [sample.label for sample in samples] == ["Drama", "Drama|Comedy", "|", None]
    assert "labels such as Drama|Comedy: with heads --task multilabel each of them is a class" in samples.notes


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([0, 1, 0], "has '0' twice; write the names of a sample's classes, not a number for each class"),
        ([{"name": "x"}], "holds lists or objects; write the names of classes"),
        (["a|b"], r"the class 'a\|b' in a list of labels holds a \|"),
    ],
)
def test_lists_that_are_no_labels(tmp_path: Path, label: list[object], message: str) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": 1, "text": "a", "label": label}) + "\n")
    with pytest.raises(DataError, match=f"t.jsonl:1: column label: .*{message}"):
        read_samples(tmp_path / "t.jsonl")


def test_what_is_nested_where_nothing_is_read_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "1", "text": "fine", "user": {"name": "a"}}) + "\n")
    assert read_samples(tmp_path / "t.jsonl").samples[0].text == "fine"
