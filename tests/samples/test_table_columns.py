"""Columns of numbers and of categories: what they hold, their vectors, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmfeat.errors import DataError
from mmfeat.samples.dataset import Sample, SampleSource, read_samples
from mmfeat.samples.table_columns import MOST, TableColumn, TableCounts, table_vectors

ROWS = [("10", "acme"), ("12.5", "bolt"), (None, "acme"), ("-1e1", None), ("7", "cork"), ("NA", "bolt")]


def samples_of(rows: Sequence[tuple[str | None, ...]]) -> list[Sample]:
    return [Sample(str(number), label="x", table=row) for number, row in enumerate(rows)]


def columns_of(rows: Sequence[tuple[str | None, ...]], names: Sequence[str] = ("price", "brand")) -> list[TableColumn]:
    counts = TableCounts(names)
    for sample in samples_of(rows):
        counts.add(sample)
    return list(counts.columns())


def test_numbers_and_categories_are_told_apart_with_what_is_missing() -> None:
    price, brand = columns_of(ROWS)
    assert (price.label, brand.label) == ("price (numbers)", "brand (2 categories)")
    assert (price.values, price.has_missing, price.width) == ((), True, 2)
    assert (brand.values, brand.has_missing, brand.width) == (("acme", "bolt"), True, 3)
    vectors, mask = table_vectors([price, brand], samples_of(ROWS))
    numbers = vectors[:, 0] * price.scale + price.centre
    np.testing.assert_allclose(numbers, [10, 12.5, np.nan, -10, 7, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(vectors[:, 1], [0, 0, 1, 0, 0, 1])
    one_hot = [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]  # cork, once, has no place
    np.testing.assert_array_equal(vectors[:, 2:], one_hot)
    assert mask.all()


def test_what_is_new_is_no_category_and_a_sample_without_a_table_is_masked() -> None:
    columns = columns_of(ROWS)
    vectors, mask = table_vectors(columns, [Sample("a", table=("10", "dune")), Sample("b")])
    np.testing.assert_array_equal(vectors[0, 1:], [0, 0, 0, 0])
    assert np.isnan(vectors[1]).all()
    assert mask.tolist() == [True, False]


def test_large_numbers_keep_their_differences() -> None:
    (when,) = columns_of([(str(1_700_000_000 + second),) for second in range(50)], ["when"])
    vectors, _ = table_vectors([when], samples_of([("1700000001",), ("1700000002",)]))
    assert vectors[1, 0] - vectors[0, 0] == pytest.approx(1 / when.scale, rel=1e-4)


def test_the_most_frequent_categories_have_places() -> None:
    rows = [(f"c{number:04}",) for number in range(MOST + 50) for _ in range(3 if number >= 50 else 2)]
    (column,) = columns_of(rows, ["brand"])
    assert column.values == tuple(f"c{number:04}" for number in range(50, MOST + 50))


def test_only_labelled_samples_count() -> None:
    counts = TableCounts(["brand"])
    counts.add(Sample("1", label=None, table=("acme",)))
    assert counts.columns() == ()


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([f"sku {n}" for n in range(20)], r"table=c: 20 values in 20 labelled rows, most of them once \('sku 0'\)"),
        (["1,299", "$12", "$14", "free"], r"'1,299'\): no numbers and no categories; .* text=...\+c"),
        ([None] * 5, "no labelled row has a value there; leave it out"),
        (["NA", "nan", None], "no labelled row has a value there; leave it out"),
    ],
)
def test_ids_texts_and_empty_columns_are_refused(cells: list[str | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        columns_of([(cell,) for cell in cells], ["c"])


@pytest.mark.parametrize("cell", ["inf", "1_000", "1e39", "12 cm"])
def test_a_word_among_numbers_makes_categories_in_training_and_an_error_later(cell: str) -> None:
    (column,) = columns_of([("1",), ("1",), ("2",), (cell,), (cell,)], ["size"])
    assert cell in column.values
    (numbers,) = columns_of([("1",), ("2",)], ["size"])
    with pytest.raises(DataError, match=f"sample 1: size is '{cell}', and a number in each sample that trained"):
        table_vectors([numbers], samples_of([("1",), (cell,)]))


def test_a_table_of_other_columns_is_told() -> None:
    with pytest.raises(DataError, match=r"1 columns; the run needs 2, as price[+]brand"):
        table_vectors(columns_of(ROWS), [Sample("1", table=("10",))])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet", "arrow", "frame", "dicts"])
def test_every_form_of_a_table_has_the_same_cells(tmp_path: Path, kind: str) -> None:
    frame = pd.DataFrame(
        {"text": ["a", "b", "c"], "price": [1.5, None, 20.0], "size": [4, 5, 6], "brand": ["x", None, " y "]}
    )
    data: object = frame if kind == "frame" else frame.astype(object).where(frame.notna(), None).to_dict("records")
    if kind not in ("frame", "dicts"):
        data = tmp_path / f"t.{kind}"
        write = {"csv": frame.to_csv, "tsv": frame.to_csv, "jsonl": frame.to_json, "parquet": frame.to_parquet}
        options = {"csv": {"index": False}, "tsv": {"index": False, "sep": "\t"}}
        options |= {"jsonl": {"orient": "records", "lines": True}, "parquet": {}}
        frame.to_feather(data) if kind == "arrow" else write[kind](data, **options[kind])
    samples = read_samples(data, {"table": "price+Size+brand"})
    assert samples.table == ("price", "size", "brand")
    numbers = [tuple(cell and float(cell) for cell in sample.table[:2]) for sample in samples]
    assert numbers == [(1.5, 4), (None, 5), (20, 6)]
    assert [sample.table[2] for sample in samples] == ["x", None, "y"]
    assert samples.unused_columns == ()


def test_slips_the_label_and_folders_are_told(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("text,price,label\na,1,x\nb,2,y\n")
    with pytest.raises(
        DataError, match=r"no column prise among text, price, label; did you mean --columns table=price\?"
    ):
        SampleSource(path, {"table": "prise"}).check()
    with pytest.raises(DataError, match=r"--columns table=price[+]label: label is the label; leave it out there"):
        SampleSource(path, {"table": "price+label"}).check()
    (tmp_path / "set/data").mkdir(parents=True)
    (tmp_path / "set/train.txt").write_text("guid,tag\n1,x\n")
    with pytest.raises(DataError, match=r"--columns table=price: .*set is no table; leave it out"):
        SampleSource(tmp_path / "set", {"table": "price"})


def test_the_columns_stay_when_nothing_else_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("id,price,label\n1,1,x\n2,2,y\n")
    assert [sample.table for sample in read_samples(path, {"table": "price"})] == [("1",), ("2",)]
    overview = SampleSource(path, {"table": "price"}).overview()
    assert overview.table == (replace(columns_of([("1",), ("2",)], ["price"])[0]),)
