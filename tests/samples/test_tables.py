import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfeat.errors import DataError
from mmfeat.samples.dataset import read_samples
from mmfeat.samples.tables import TableRows

ROWS = [{"id": "1", "text": 'a, "b"\nc', "label": "x"}, {"id": "2", "text": None, "label": None}]


def write(path: Path) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        path.write_text(f'id{mark}text{mark}label\n1{mark}"a, ""b""\nc"{mark}x\n2{mark}{mark}\n')
    return path


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    assert [row for _, row in TableRows(write(tmp_path / f"t.{suffix}"))] == ROWS


def test_lines_are_counted_in_the_file(tmp_path: Path) -> None:
    assert [line for line, _ in TableRows(write(tmp_path / "t.csv"))] == [3, 4]


def test_encoding_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"id,text\n" + "1,太好了\n".encode("gb18030") + "2,太好了\n".encode())
    rows = TableRows(path)
    assert [row["text"] for _, row in rows] == ["太好了", "太好了"]  # each line by itself
    assert rows.encodings["gb18030"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "id,text\n1,a,b\n", "t.csv:2: 3 cells under a header of 2"),
        ("t.csv", "id,text\n1\n", "t.csv:2: 1 cell under a header of 2"),
        ("t.csv", "", "t.csv: the file is empty; it begins with a line of column names"),
        ("t.csv", "id,text,text\n1,a,b\n", "t.csv:1: a column name stands twice"),
        ("t.csv", "id;text;label\n1;a;b\n", "t.csv:1: cells are parted by ';'; save the table with commas"),
        ("t.tsv", "id,text,label\n1,a,b\n", "t.tsv:1: cells are parted by ','; save the table with tabs"),
        ("t.csv", "\n1,a\n", "t.csv:1: no column names in the first line"),
        ("t.csv", "PK\x03\x04 and so on\0,\n", "t.csv: binary, not text"),
        ("t.csv", "i\0d\0,\0t\0e\0x\0t\0\n\0", "t.csv: UTF-16, as some spreadsheets write; save the table as UTF-8"),
        ("t.tsv", 'id\ttext\n1\t"so happy\n2\tfine\n3\t"bad\n', "t.tsv:4: .*a quote is missing or too many"),
        ("t.csv", 'id,text\n1,"open\n', "a quote is missing or too many"),
        ("t.jsonl", '{"id": 1}\nnope\n', "t.jsonl:2: not JSON"),
        ("t.jsonl", "[1]\n", "t.jsonl:1: a list; one object a line is expected"),
        ("t.jsonl", '{"id": 1}\nnull\n', "t.jsonl:2: null; one object a line is expected"),
        ("t.parquet", "nope", "t.parquet: not a Parquet file"),
        ("t.xlsx", "nope", "must end in .csv, .tsv, .jsonl, .parquet"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        list(TableRows(tmp_path / name))


@pytest.mark.parametrize(("value", "kind"), [(["a", "b"], "a list"), ({"en": "a"}, "an object")])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("column", ["text", "label"])
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


def test_what_is_nested_where_nothing_is_read_is_no_matter(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": "1", "text": "fine", "user": {"name": "a"}}) + "\n")
    assert read_samples(tmp_path / "t.jsonl").samples[0].text == "fine"
