"""Corrections of labels: laid over the data by id, checked line by line, and never written to the data."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmfeat.errors import DataError
from mmfeat.samples.corrections import read_corrected

SHOP = "id,text,label\na,one,bad\nb,two,good\nc,three,so|so\n7,four,\nd,five,bad\n"


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.csv").write_text(SHOP)
    return tmp_path / "shop.csv"


def corrected(shop: Path, labels: str | Path) -> dict[str, str | None]:
    return {sample.id: sample.label for sample in read_corrected(shop, {"labels": str(labels)})[0]}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "id,text,given,label\na,x,bad,good\nb,x,good,\nd,x,bad,bad\n"),
        ("a.tsv", "Label\tID\n good \ta\n"),
        ("a.csv", "\ufeffid;label\r\na;good\r\n"),  # as Excel saves it
        ("a.jsonl", '{"id": "a", "label": "good"}\n'),
    ],
)
def test_labels_are_those_of_the_table_and_the_data_stay(shop: Path, name: str, text: str) -> None:
    labels = shop.with_name(name)
    labels.write_text(text, encoding="utf-8")
    assert corrected(shop, labels) == {"a": "good", "b": "good", "c": "so|so", "7": None, "d": "bad"}
    samples, given = read_corrected(shop, {"labels": str(labels)})
    assert given == {"a": "bad"}
    assert samples.notes[-1] == f"1 label of {labels} replace those of the data; the folds stay the same"
    assert shop.read_text() == SHOP


def test_of_several_tables_the_last_one_counts(shop: Path) -> None:
    for name, label in (("1.csv", "good"), ("2.csv", "so")):
        shop.with_name(name).write_text(f"id,label\na,{label}|good\nd,good\n")
    both = f"{shop.with_name('1.csv')},{shop.with_name('2.csv')}"
    assert corrected(shop, both) == {"a": "so|good", "b": "good", "c": "so|so", "7": None, "d": "good"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("id,label\nz,good\n", r"c\.csv:2: the data have no sample 'z'; take this line out"),
        ("id,label\n7,good\n", r"c\.csv:2: sample '7' has no label to correct; take this line out"),
        ("id,label\na,good\nb,Good\n", r"c\.csv:3: no sample is 'Good'; use one of bad, good, so$"),
        ("id,label\na,good|worse\nb,so\n", r"c\.csv:2: no sample is 'good\|worse'"),
        ("id,label\na,good\na,bad\n", r"c\.csv:3: sample 'a' has another label above; leave one of them"),
        ("id,tag\na,good\n", r"c\.csv: no column label among id, tag; name its columns so"),
    ],
)
def test_what_cannot_be_a_correction_is_refused_by_its_line(shop: Path, text: str, reason: str) -> None:
    (path := shop.with_name("c.csv")).write_text(text)
    with pytest.raises(DataError, match=f"^--labels .*{reason}"):
        corrected(shop, path)
    with pytest.raises(DataError, match=r"^--labels \S+x.csv: no such table; check its name$"):
        corrected(shop, shop.with_name("x.csv"))


def test_of_several_classes_a_sample_may_have_others_or_none(shop: Path) -> None:
    (path := shop.with_name("c.csv")).write_text("id,label\na,so\nb,|\nc,bad|good\n")
    assert corrected(shop, path) == {"a": "so", "b": "|", "c": "bad|good", "7": None, "d": "bad"}
    shop.write_text(SHOP.replace("so|so", "so"))
    for text in ("a,good|bad", "a,|"):
        path.write_text(f"id,label\n{text}\n")
        with pytest.raises(DataError, match=r"use one of bad, good, so$"):
            corrected(shop, path)
