"""Data to predict beside the data to train on, as in train.csv and test.csv: read by the same names of columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmfeat.errors import DataError
from mmfeat.samples.column_names import COLUMNS, ROW_NUMBER, columns_in, find_column, find_columns
from mmfeat.samples.dataset import SampleSource
from mmfeat.samples.folders import hash_of
from mmfeat.samples.labels import SPLIT
from mmfeat.samples.objects import OBJECT
from mmfeat.system.files import no_such_data
from mmfeat.system.remote import HUB, absolute, exists


def open_test(test: str | Path, source: SampleSource) -> SampleSource:
    """The test data of `source`, with its names of columns; a label may be missing.

    Raises `DataError` for a table that lacks another of the columns, and for test data that are the data themselves.
    """
    if absolute(test) == absolute(source.data):
        raise DataError(f"--test {test}: the same as --data; leave it out, unlabelled rows are predicted without it")
    if not str(test).startswith((HUB, OBJECT)) and not exists(test):
        raise DataError(f"--test {no_such_data(test)}")
    flags = {name: value for name, value in source.columns.items() if name not in COLUMNS}
    opened = SampleSource(test, flags)
    if opened.rows is None or source.rows is None or source.rows.is_numbered:
        return opened if source.rows is None or opened.rows is None else SampleSource(test, source.columns)
    wanted = {**source.rows.columns, "id": source.rows.id_column}
    names = opened.rows.table.names
    needed = [
        (part, c) for c, name in wanted.items() if c not in ("label", SPLIT) for part in columns_in(c, name, names)
    ]
    lacking = [f"{part} ({column})" for part, column in needed if find_column(part, names) is None]
    if lacking:
        missing = ", ".join(lacking)
        raise DataError(
            f"{test}: no column {missing} as in {source.data}, among {', '.join(names)}; give both the same names"
        )
    columns = {column: name for column, name in wanted.items() if find_columns(column, name, names) is not None}
    if columns["id"] == ROW_NUMBER:
        del columns["id"]  # the table may have a column of ids
    opened = SampleSource(test, flags | columns)
    opened.check()
    return opened


def shared_ids(first: SampleSource, second: SampleSource) -> str:
    """A note on ids that occur in both data sets, "" without any or where they are numbers of rows."""
    if any(source.rows is not None and source.rows.id_column == ROW_NUMBER for source in (first, second)):
        return ""
    hashes = [np.fromiter((hash_of(sample.id) for sample in s.read(look=False)), np.uint64) for s in (first, second)]
    both = frozenset(np.intersect1d(hashes[0], hashes[1]).tolist())
    if not both:
        return ""
    example = next(sample.id for sample in second.read(look=False) if hash_of(sample.id) in both)
    return f"{len(both):,} ids occur in {first.data} too (first: {example}); are these the same samples?"
