import csv
import random
from pathlib import Path

import pytest

from mmfeat.errors import DataError
from mmfeat.samples.dataset import read_samples

WORDS = ["river", "stone", "lamp", "green", "quiet", "market", "train", "cloud", "paper", "winter"]
ROWS = [(f"s{n}", " ".join(random.Random(n).choices(WORDS, k=6)), f"pics/{n}.jpg", "ab"[n % 2]) for n in range(12)]


def write(path: Path, texts: dict[int, str], mark: str) -> Path:
    """Write the rows without quoting, some with another text."""
    rows = [(id, texts.get(n, text), image, label) for n, (id, text, image, label) in enumerate(ROWS)]
    lines = [mark.join(row) for row in [("id", "text", "image", "label"), *rows]]
    path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path, **named: str) -> list[tuple[str, str | None, str | None]]:
    return [(sample.id, sample.text, sample.label) for sample in read_samples(path, named)]


@pytest.mark.parametrize(("suffix", "mark"), [("tsv", "\t"), ("csv", ","), ("psv", "|"), ("txt", "\t")])
@pytest.mark.parametrize(
    "texts",
    [
        {2: '"so happy', 6: 'and sad"'},  # the quote opens in one row and closes in another
        {2: '"so happy'},
        {2: '"so" happy', 5: 'a 5" disk'},
        {2: '"so happy', 3: '"very', 6: 'sad"', 7: '"whole text"'},
    ],
)
def test_a_table_without_quoting_keeps_its_rows(tmp_path: Path, suffix: str, mark: str, texts: dict[int, str]) -> None:
    path = write(tmp_path / f"t.{suffix}", texts, mark)
    assert read(path) == [(id, texts.get(n, text), label) for n, (id, text, _, label) in enumerate(ROWS)]
    note = read_samples(path).notes[0]
    assert note.startswith(f"{path}:4: a quote begins a cell and does not enclose it")


@pytest.mark.parametrize(("suffix", "mark"), [("tsv", "\t"), ("csv", ",")])
def test_quotes_round_whole_cells_enclose_them(tmp_path: Path, suffix: str, mark: str) -> None:
    path = write(tmp_path / f"t.{suffix}", {2: '"quoted, twice ""so"""'.replace(",", "" if mark == "," else ",")}, mark)
    assert 'twice "so"' in read(path)[2][1]
    assert not any("quotes are letters" in note for note in read_samples(path).notes)


@pytest.mark.parametrize("mark", [",", "\t", "|", ";"])
@pytest.mark.parametrize("seed", range(5))
def test_what_csv_writes_is_read_as_written(tmp_path: Path, mark: str, seed: int) -> None:
    """Cells with quotes, delimiters and ends of lines in any place; most of the lines are no rows by themselves."""
    draw = random.Random(seed)
    parts = ["so", '"', ",", "\t", "|", ";", "\n", "\r\n", "happy day", '""', " ", "a,b,c,d"]
    path = tmp_path / "t.csv"
    for count in (2, 5, 12, 200):
        rows = [(str(n), "x" + "".join(draw.choices(parts, k=8)), "ab"[n % 2]) for n in range(count)]
        with path.open("w", newline="") as file:
            writer = csv.writer(file, delimiter=mark, quoting=draw.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
            writer.writerows([("id", "text", "label"), *rows])
        assert read(path) == rows


@pytest.mark.parametrize("mark", [",", "\t", "|", ";"])
def test_what_is_written_without_quoting_keeps_its_rows(tmp_path: Path, mark: str) -> None:
    """Texts with quotes in any place; a text that is quoted as a whole may lose its quotes."""
    path = tmp_path / "t.csv"
    for seed in range(100):
        draw = random.Random(seed)
        texts = [
            draw.choice(("", '"')) + "x" + "".join(draw.choices(["so", '"', "happy day", '""', " ", "'"], k=5)).rstrip()
            for _ in range(draw.choice((2, 3, 5, 40)))
        ]
        rows = [(f"s{n}", text, "ab"[n % 2]) for n, text in enumerate(texts)]
        path.write_text("\n".join(map(mark.join, [("id", "text", "label"), *rows])) + "\n")
        found = read(path)
        assert [(id, label) for id, _, label in found] == [(id, label) for id, _, label in rows]
        assert all(
            text in (row[1], row[1][1:-1].replace('""', '"')) for (_, text, _), row in zip(found, rows, strict=True)
        )


def test_quotes_behind_a_backslash(tmp_path: Path) -> None:
    """As Spark and MySQL write them."""
    path = tmp_path / "t.csv"
    path.write_text('id,text,label\n1,"he said \\"hi\\", so",x\n2,"C:\\\\new\n\\"b\\"",y\n3,"a, b",x\n')
    expected = ['he said "hi", so', 'C:\\new\n"b"', "a, b"]
    assert [text for _, text, _ in read(path)] == expected
    assert [text for _, text, _ in read(path, quoting="backslash")] == expected


def test_quotes_behind_a_backslash_count_where_lines_without_quotes_would_be_rows_too(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('id,text,label\n1,"he said \\"hi\\" twice",x\n2,plain,y\n')
    assert [text for _, text, _ in read(path)] == ['he said "hi" twice', "plain"]
    path.write_text('id,text,label\n1,"a \\"b\\",x\n2,plain,y\n')
    assert [text for _, text, _ in read(path)] == ['"a \\"b\\"', "plain"]


def test_a_cell_with_lines_like_rows_is_told(tmp_path: Path) -> None:
    """The file needs its quotes, and one quote swallows rows."""
    lines = ["id,text,label", *(f'{n},"a, b {n}",x' for n in range(5)), '5,"so happy,x', "6,fine,x", '7,sad",x']
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"t.csv:7: a quote opens here and makes one cell of 3 lines that are rows by"):
        read_samples(path)
    assert read(path, quoting="csv")[5] == ("5", "so happy,x\n6,fine,x\n7,sad", "x")
    with pytest.raises(DataError, match=r"t.csv:2: 4 cells under a header of 3"):
        read(path, quoting="none")


def test_a_text_of_lines_with_delimiters_is_one_cell(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('id,text\n1,"hello\nworld, x"\n2,fine\n3,good\n')
    assert [text for _, text, _ in read(path)] == ["hello\nworld, x", "fine", "good"]


def test_a_broken_quote_names_the_line_where_it_opens(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('id,text,label\n1,"a, b",x\n2,"open,x\n3,"a, b",x\n')
    with pytest.raises(DataError, match=r"t.csv:3: a quote opens here and does not close .* --quoting none"):
        read_samples(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", "id;text;label\n1;a, b;x\n"),
        ("t.csv", "id\ttext\tlabel\n1\ta, b\tx\n"),
        ("t.csv", "sep=;\nid;text;label\n1;a, b;x\n"),
        ("t.tsv", 'id,text,label\n1,"a, b",x\n'),
        ("t.txt", "id|text|label\n1|a, b|x\n"),
        ("t.csv", "id| text| label\n1| a, b| x\n"),
        ("t.csv", 'id, text, label\n1, "a, b", x\n'),
        ("t.csv", "id;text, or so;label\n1;a, b;x\n"),
        ("t.csv", '\n\nid,text,label,,\r\n1,"a, b",x,,\r\n'),
        ("t.csv", ',id,text,label\n0,1,"a, b",x\n'),
        ("t.csv", 'id,text,label\n1,"a, b",x,,\n'),
        ("t.csv", 'id,text,label,text\n1,"a, b",x,other\n'),
    ],
)
def test_other_delimiters_blanks_and_nameless_columns(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, newline="")
    columns = {"text": "text, or so"} if "or so" in content else {}
    assert read(tmp_path / name, **columns) == [("1", "a, b", "x")]


def test_named_delimiter_and_quoting(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id;text,x\n1;a,b;c\n")
    assert read(path, delimiter=",", id="id;text", text="x") == [("1;a", "b;c", None)]
    path.write_text("id text\n1 a\n")
    assert read(path, delimiter="space") == [("1", "a", None)]
    path.write_text("id\x01text\n1\x01a\n")  # as Hive writes
    assert read(path, delimiter=r"\x01") == [("1", "a", None)]
    write(path, {2: '"whole"'}, ",")
    assert read(path, quoting="none")[2][1] == '"whole"'
    for named, message in (
        ({"delimiter": "ab"}, r"--delimiter ab: one character, its code as \\x01, or one of tab, "),
        ({"quoting": "x"}, "auto, csv, backslash, none"),
    ):
        with pytest.raises(DataError, match=message):
            read(path, **named)


def test_a_table_without_header_has_numbered_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("pie_1.jpg,green cloud,pie\npie_2.jpg,paper stone,cake\n")
    with pytest.raises(DataError, match=r"the first line is a row, .*, --columns text=2,image=1,label=3, or write"):
        read_samples(path)
    columns = {"text": "2", "image": "1", "label": "3"}
    assert read(path, **columns) == [("pie_1.jpg", "green cloud", "pie"), ("pie_2.jpg", "paper stone", "cake")]
    with pytest.raises(DataError, match="no column 4; a row has 3 cells"):
        read(path, text="4")
