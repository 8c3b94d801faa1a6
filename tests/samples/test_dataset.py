import hashlib
from pathlib import Path

import pytest

from mmfeat.errors import DataError
from mmfeat.samples.dataset import Sample, content_key, read_samples


def folder(root: Path, train: str = "guid,tag\n1,up\n2,down\n", test: str | None = "guid,tag\n3,null\n") -> Path:
    (root / "data").mkdir(parents=True)
    (root / "train.txt").write_text(train)
    if test is not None:
        (root / "test_without_label.txt").write_text(test)
    for id in "123":
        (root / "data" / f"{id}.txt").write_text(f"text {id}")
        (root / "data" / f"{id}.jpg").write_bytes(b"picture " + id.encode())
    return root


def test_folder_in_the_order_of_its_lists(tmp_path: Path) -> None:
    samples = read_samples(folder(tmp_path / "set"))
    assert [sample.id for sample in samples] == ["1", "2", "3"]
    assert samples.classes == ("down", "up")
    assert [sample.label for sample in samples] == ["up", "down", None]
    assert [sample.id for sample in samples.unlabelled] == ["3"]
    assert samples.name == "set"
    assert samples.samples[0].text == "text 1"


def test_suffixes_in_any_case_and_a_fixed_choice(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    (root / "data" / "1.jpg").rename(root / "data" / "1.WebP")
    (root / "data" / "2.png").write_bytes(b"later suffix")
    samples = read_samples(root).samples
    assert samples[0].image == root / "data" / "1.WebP"
    assert samples[1].image == root / "data" / "2.jpg"


def test_missing_parts_are_data(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    (root / "data" / "1.txt").unlink()
    (root / "data" / "2.txt").write_text(" \n")
    (root / "data" / "3.jpg").unlink()
    first, second, third = read_samples(root).samples
    assert (first.text, first.text_error) == (None, "no text file")
    assert (second.text, second.text_error) == (None, "empty text")
    assert (third.image, third.image_error) == (None, "no image file")
    assert third.key("image") == (None, "no image file")


def test_encodings_are_counted(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    (root / "data" / "2.txt").write_bytes("太好了".encode("gb18030"))
    samples = read_samples(root)
    assert samples.samples[1].text == "太好了"
    assert samples.encodings == {"utf-8": 2, "gb18030": 1}


def test_quotes_and_blank_lines_in_a_list_join_nothing(tmp_path: Path) -> None:
    samples = read_samples(folder(tmp_path / "set", '\nguid,tag\r\n1,"up\r\n\r\n2,down\r\n'))
    assert [(sample.id, sample.label) for sample in samples.labelled] == [("1", '"up'), ("2", "down")]


@pytest.mark.parametrize("header", ["", "guid,tag\n", "id, label\n"])
def test_header_is_optional(tmp_path: Path, header: str) -> None:
    assert [s.label for s in read_samples(folder(tmp_path / "set", f"{header}1,up\n2, down\n")).labelled] == [
        "up",
        "down",
    ]


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        ("1,up\n1,down\n", None, r"train.txt:2: the id '1' is already at .*train.txt:1; remove"),
        ("1,up\n2,down\n", "2,null\n", r"test_without_label.txt:1: the id '2' is already at .*train.txt:2"),
        ("../1,up\n", None, r"train.txt:1: the id '../1' looks like a path; use a plain id"),
        ("a\\b,up\n", None, r"train.txt:1: .* looks like a path"),
        ("..,up\n", None, r"train.txt:1: .* looks like a path"),
        (",up\n", None, r"train.txt:1: an id must be printable text"),
        ("1,up\n", "3,upp\n", r"test_without_label.txt:1: unknown label 'upp'; train.txt has up; correct"),
        ("1,null\n", None, r"train.txt:1: '1' has no label; label it or move"),
        ("1\n", None, r"train.txt:1: '1' is not `guid,tag`; one comma parts the two"),
        ("guid,tag\n", None, r"no samples; it needs at least one"),
        ("", None, r"no samples"),
    ],
)
def test_one_line_names_file_line_and_remedy(tmp_path: Path, train: str, test: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read_samples(folder(tmp_path / "set", train, test))
    assert "\n" not in str(caught.value)


def test_label_file_without_image_folder(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("1,up\n")
    with pytest.raises(DataError, match=r"train.txt: the folder .*data with its images and texts is missing"):
        read_samples(tmp_path)


def test_wrong_places(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data is empty"):
        read_samples("")
    with pytest.raises(DataError, match="no such folder or table; check the path"):
        read_samples(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"neither train.txt nor test_without_label.txt"):
        read_samples(tmp_path)
    (tmp_path / "deeper").mkdir()
    (tmp_path / "deeper" / "train.txt").write_text("1,up\n")
    with pytest.raises(DataError, match=r"name the folder that holds them: --data .*/deeper$"):
        read_samples(tmp_path)
    (tmp_path / "tweets.csv").write_text("id,text\n1,a\n")
    assert [sample.text for sample in read_samples(tmp_path)] == ["a"]


def test_table_with_its_own_column_names(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "a.png").write_bytes(b"x")
    table = tmp_path / "tweets.csv"
    table.write_text("guid,caption,photo,tag\n7,hello,img/a.png,up\n8,,img/b.png,\n")
    columns = {"id": "guid", "text": "caption", "image": "photo", "label": "tag"}
    samples = read_samples(table, columns)
    first, second = samples.samples
    assert samples.name == "tweets"
    assert samples.unused_columns == ()
    assert read_samples(table, {**columns, "label": "photo"}).unused_columns == ("tag",)
    assert first == Sample("7", "hello", tmp_path / "img" / "a.png", "up")
    assert second == Sample("8", None, None, None, "no text", "image file not found")
    line = "say --columns id=guid,text=caption,image=photo,label=tag, or name others"
    with pytest.raises(DataError, match=f"no column text or image among guid, caption, photo, tag; {line}"):
        read_samples(table)
    with pytest.raises(DataError, match="no column oops"):
        read_samples(table, {**columns, "label": "oops"})
    with pytest.raises(DataError, match="--columns: colour is none of"):
        read_samples(table, {"colour": "x"})


def test_odd_cells_are_data(tmp_path: Path) -> None:
    table = tmp_path / "t.jsonl"
    long = "x" * 300 + ".jpg"
    table.write_text(f'{{"id": "1", "text": "\\ud83d lone"}}\n{{"id": "2", "image": "{long}", "label": NaN}}\n')
    first, second = read_samples(table).samples
    assert first.text == "\ufffd lone"
    assert first.key("text")[0]
    assert (second.image, second.label) == (None, None)
    table.write_text('{"id": "1", "text": "a"}\n{"text": "no id"}\n')
    with pytest.raises(DataError, match=r"t.jsonl:2: an id must be printable text"):
        read_samples(table)


def test_keys_follow_content_alone(tmp_path: Path) -> None:
    root = folder(tmp_path / "set")
    (root / "data" / "2.jpg").write_bytes(b"picture 1")
    first, second, third = read_samples(root).samples
    assert first.key("image") == second.key("image") != third.key("image")
    assert first.key("text") != second.key("text")
    assert content_key(b"picture 1").decode() == hashlib.sha256(b"picture 1").hexdigest()[:32]
