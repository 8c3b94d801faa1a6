import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfeat.errors import DataError
from mmfeat.samples.dataset import SampleSource, read_samples


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("header", "proposal"),
    [
        ("sku,title,photo,category", "id=sku,text=title,image=photo,label=category"),
        ("guid,caption,img,target", "id=guid,text=caption,image=img,label=target"),
        ("#1 Label,#2 ImageID,#3 String,url", "image=url,label='#1 Label'"),
        ("tweet_id,tweet_text,image_path,label", "id=tweet_id,text=tweet_text,image=image_path"),
        ("id,sentence,sentiment", "text=sentence,label=sentiment"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_plain_names_are_proposed_before_anything_is_read(
    tmp_path: Path, kind: str, header: str, proposal: str
) -> None:
    names, path = header.split(","), tmp_path / f"t.{kind}"
    row = dict.fromkeys(names, "x")
    path.write_text(f"{header}\n{','.join(row.values())}\n" if kind == "csv" else json.dumps([row]))
    with pytest.raises(DataError, match="no column text or image among") as caught:
        SampleSource(path).check()
    assert proposal.replace("'", "") in str(caught.value).replace("'", "")


def test_a_named_column_that_is_not_there(tmp_path: Path) -> None:
    path = table(tmp_path / "t.jsonl", '{"id": "1", "text": "a"}', '{"id": "2", "body": "b"}')
    assert [sample.text for sample in read_samples(path, {"text": "body"})] == [None, "b"]
    with pytest.raises(DataError, match="no column nope among id, text, body; leave --columns out, or name others"):
        SampleSource(path, {"text": "nope"}).check()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("title+boddy", "no column boddy among id, title, body, label; did you mean --columns text=title+body[?]"),
        ("titel+bodi", "no column titel, bodi among .*; did you mean --columns text=title[+]body[?]"),
        ("titel", "no column titel among .*; did you mean --columns text=title[?]"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_slip_in_one_of_several_columns_is_corrected(tmp_path: Path, kind: str, name: str, message: str) -> None:
    lines = (
        ["id,title,body,label", "1,a,b,x"] if kind == "csv" else ['{"id": 1, "title": "a", "body": "b", "label": 0}']
    )
    with pytest.raises(DataError, match=message.replace("title+", "title[+]")):
        SampleSource(table(tmp_path / f"t.{kind}", *lines), {"text": name}).check()


def test_a_misspelled_part_of_a_sample_is_corrected(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "title,tag", "a,x")
    with pytest.raises(DataError, match=r"lable, txt is none of id, .*; did you mean label=, text=\?"):
        SampleSource(path, {"txt": "title", "lable": "tag"}).check()


@pytest.mark.parametrize("named", ["title+body", " Title + BODY", "1+2"])
def test_the_columns_of_a_text_stand_one_below_the_other(tmp_path: Path, named: str) -> None:
    header = [] if named == "1+2" else ["title,body,label"]
    path = table(tmp_path / "t.csv", *header, 'red shoe,"of leather\nand felt",x', "blue hat,,x", " ,warm,y", ",,y")
    samples = read_samples(path, {"text": named} | ({} if header else {"label": "3"}))
    texts = ["red shoe\nof leather\nand felt", "blue hat", "warm", None]
    assert [sample.text for sample in samples] == texts
    assert samples.samples[3].text_error == "no text"
    assert samples.unused_columns == ()
    plain = table(tmp_path / "plain.csv", "text,label", '"red shoe\nof leather\nand felt",x')
    assert samples.samples[0].key("text") == read_samples(plain).samples[0].key("text")


def test_a_column_whose_name_has_a_plus_is_one(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "c++,a+b,a,b", "w,x,y,z")
    texts = {name: read_samples(path, {"text": name}).samples[0].text for name in ("a+b", "c++", "b+a", "a+b+a")}
    assert texts == {"a+b": "x", "c++": "w", "b+a": "z\ny", "a+b+a": "y\nz\ny"}


@pytest.mark.parametrize("header", ["Id,Text,LABEL", " id , text ,label", "ID,text,Label"])
def test_capitals_and_blanks_do_not_matter(tmp_path: Path, header: str) -> None:
    sample = read_samples(table(tmp_path / "t.csv", header, "7,a,x")).samples[0]
    assert (sample.id, sample.text, sample.label) == ("7", "a", "x")


def test_two_columns_that_differ_in_capitals_are_not_guessed(tmp_path: Path) -> None:
    samples = read_samples(table(tmp_path / "t.csv", "id,text,Label,LABEL", "7,a,x,y"))
    assert samples.samples[0].label is None
    assert samples.notes == ("no label is read; --columns label=Label names columns",)


def test_columns_that_are_not_read_are_proposed_with_those_that_are(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "id,title,img,category,other", "7,a,b,c,d")
    (note,) = read_samples(path, {"text": "title"}).notes
    assert note == "no image, label is read; --columns text=title,image=img,label=category names columns"


def test_ids_are_photos_where_each_row_names_another(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "text,image,label", "a,train/1.jpg,x", "b,train/2.jpg,y")
    source = SampleSource(path)
    source.check()
    assert source.columns == {"id": "image"}
    assert [sample.id for sample in read_samples(path)] == ["train/1.jpg", "train/2.jpg"]
    assert read_samples(path).notes[0] == "no column of ids: ids are the names of photos in image"


@pytest.mark.parametrize("second", ["1.jpg", ""])
def test_ids_are_rows_where_photos_repeat_or_lack(tmp_path: Path, second: str) -> None:
    path = table(tmp_path / "t.csv", "sku,text,image", "p,a,1.jpg", f"q,b,{second}")
    source = SampleSource(path)
    source.check()
    assert source.columns == {"id": "#"}
    samples = read_samples(path, source.columns)
    assert [sample.id for sample in samples] == ["1", "2"]
    assert "no column of ids: ids are the numbers of rows; --columns id=sku names one" in read_samples(path).notes


def test_ids_of_a_table_may_hold_slashes(tmp_path: Path) -> None:
    ids = ["train/1.jpg", "../x", "C:\\x", "wait..."]
    assert [sample.id for sample in read_samples(table(tmp_path / "t.csv", "id,text", *(f"{i},a" for i in ids)))] == ids


def test_whole_floats_are_numbers_where_all_are_whole(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "id,text,label", "1.0,a,0.0", "2.0,b,1.0", "3.0,c,")
    samples = read_samples(path)
    assert [(sample.id, sample.label) for sample in samples] == [("1", "0"), ("2", "1"), ("3", None)]
    assert samples.notes == (
        "ids 1.0, 2.0, ... are whole numbers and read as 1, 2, ...",
        "labels 1.0, 2.0, ... are whole numbers and read as 1, 2, ...",
    )
    rows = {"id": [1, 2], "text": ["a", "b"], "label": [1.0, None]}
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    assert [sample.label for sample in read_samples(tmp_path / "t.parquet")] == ["1", None]


@pytest.mark.parametrize("labels", [("1.0", "1.5"), ("007", "1.0"), ("1.0", "x"), ("00", "01")])
def test_other_numbers_stay_as_they_are(tmp_path: Path, labels: tuple[str, str]) -> None:
    path = table(tmp_path / "t.csv", "id,text,label", *(f"0{n},a,{label}" for n, label in enumerate(labels)))
    assert [(sample.id, sample.label) for sample in read_samples(path)] == [("00", labels[0]), ("01", labels[1])]
    assert read_samples(path).notes == ()


SPELLINGS = ("null", "NULL", "nan", "NaN", "NA", "na", "N/A", "#N/A", "<NA>", "None", "none", " None ")


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_of_a_missing_label_are_one(tmp_path: Path, spelling: str) -> None:
    path = table(tmp_path / "t.csv", "id,text,label", "1,a,x", f"2,{spelling},{spelling}", "3,b,y")
    samples = read_samples(path)
    assert [sample.label for sample in samples] == ["x", None, "y"]
    assert samples.samples[1].text == spelling
    assert samples.notes == (
        f"read as no label: '{spelling.strip()}' 1 (if such a word is a class, say --no-label null)",
    )
    word = spelling.strip() if spelling != "null" and spelling != "NULL" else None
    assert read_samples(path, {"no-label": "null"}).samples[1].label == word
    assert read_samples(path, {"no-label": ""}).samples[1].label == spelling.strip()


def test_lists_of_a_folder_have_the_same_rule(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    table(tmp_path / "train.txt", "1,x", "2,None")
    table(tmp_path / "test_without_label.txt", "3,null", "4,NA")
    with pytest.raises(
        DataError, match=r"train.txt:2: '2' has no label; .*; if 'None' is a class, say --no-label null"
    ):
        read_samples(tmp_path)
    table(tmp_path / "train.txt", "1,x", "2,y")
    samples = read_samples(tmp_path)
    assert [sample.label for sample in samples] == ["x", "y", None, None]
    assert samples.notes == ("read as no label: 'NA' 1 (if such a word is a class, say --no-label null)",)
    table(tmp_path / "train.txt", "1,x", "2,None", "4,NA")
    table(tmp_path / "test_without_label.txt", "3,null")
    assert read_samples(tmp_path, {"no-label": "null"}).classes == ("NA", "None", "x")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_with_accents_are_found_in_both_forms(tmp_path: Path, form: str) -> None:
    from unicodedata import normalize

    other = "NFD" if form == "NFC" else "NFC"
    (tmp_path / "data").mkdir()
    for folder in (tmp_path, tmp_path / "data"):
        (folder / normalize(form, "café が.jpg")).write_bytes(b"x")
    name = normalize(other, "café が")
    assert read_samples(table(tmp_path / "t.csv", "id,text,image", f"1,a,{name}.jpg")).samples[0].image is not None
    table(tmp_path / "train.txt", f"{name},x")
    sample = read_samples(tmp_path).samples[0]
    assert sample.image is not None
    assert sample.id == name


def test_a_column_of_another_name_is_the_split_and_other_words_in_it_an_error(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", "text,label,usage", "a,x,Training", "b,y, dev", "c,x,TEST")
    assert [sample.split for sample in read_samples(path, {"split": "usage"})] == ["train", "validation", "test"]
    assert [sample.split for sample in read_samples(path)] == ["", "", ""]
    with pytest.raises(DataError, match=r"t.csv:2: 'x' in the column label is no part of a split: train, val or test"):
        read_samples(path, {"split": "label"})
    with pytest.raises(DataError, match=r"no column part among text, label, usage"):
        read_samples(path, {"split": "part"})
    bare = table(tmp_path / "bare.csv", "a,x,train", "b,y,test")
    numbers = {"text": "1", "label": "2", "split": "3"}
    assert [sample.split for sample in read_samples(bare, numbers)] == ["train", "test"]


def test_files_named_by_parts_are_a_split(tmp_path: Path) -> None:
    for name in ("train-00", "train-01", "validation-00"):
        table(tmp_path / f"{name}.csv", "id,text,label", f"{name},a,x")
    samples = read_samples(f"{tmp_path}/*.csv")
    assert [sample.split for sample in samples] == ["train", "train", "validation"]
    assert [sample.split for sample in read_samples(f"{tmp_path}/train*.csv")] == ["", ""]
