"""Tables: CSV, TSV, JSONL and Parquet files as rows of named cells."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path

from mmfeat.errors import DataError
from mmfeat.samples.texts import decode_text, without_surrogates
from mmfeat.system.remote import exists, is_remote, open_file
from mmfeat.system.wording import counted

DELIMITERS = (";", "\t", "|", ",")  # with which others part cells
PIECE = 1 << 20  # bytes of a text file at a time

JSON_KINDS = {
    **dict.fromkeys((int, float), "a number"),
    list: "a list",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}

Row = dict[str, str | None]


def read_table(path: str | Path, encodings: Counter[str], columns: Collection[str] = ()) -> Iterator[tuple[int, Row]]:
    """Yield (line number, row) for each row of a file or URL; cells are text, an empty or null cell is None.

    In `columns`, those that are read, a list or an object is no cell.

    It is read as it is used, so a table may be larger than memory. The encodings of its lines are counted in
    `encodings`.
    """
    path = str(path)
    suffix = table_suffix(path)
    if suffix not in READERS:
        raise DataError(f"{path}: a table must end in {', '.join(READERS)}; rename or convert the file")
    if not exists(path):
        raise DataError(f"{path}: no such table; check --data")
    for line, row in READERS[suffix](path, encodings):
        if any(isinstance(row.get(name), (dict, list)) for name in columns):
            raise _nested(f"{path}:{line}", columns, row)
        # A cell of plain text, as most are, is taken as it is: there are millions.
        yield line, {n: v if v.__class__ is str and v.isascii() and v else _cell(v) for n, v in row.items()}


def _nested(where: str, columns: Collection[str], row: Mapping[str, object]) -> DataError:
    name = next(name for name in columns if isinstance(row.get(name), (dict, list)))
    kind = "a list" if isinstance(row[name], list) else "an object"
    return DataError(f"{where}: column {name} holds {kind}; write plain text there, or name another with --columns")


def table_suffix(path: str) -> str:
    """`.csv` and so on, in lower case; a URL may go on with a query."""
    return os.path.splitext(path.partition("?")[0] if is_remote(path) else path)[1].lower()


def _read_delimited(path: str, encodings: Counter[str], delimiter: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Rows of a file with a header line; a row of another width is an error."""
    csv.field_size_limit(1 << 30)  # a long text is no error
    reader = csv.reader(_lines(path, encodings), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if header is None:
            raise DataError(f"{path}: the file is empty; it begins with a line of column names, id,text,image,label")
        _check_header(path, header, delimiter)
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: {counted(len(cells), 'cell')} under a header of {len(header)}; "
                    "quote cells that contain the delimiter, and write one for each column"
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}; a quote is missing or too many up to this line") from error


def _check_header(path: str, header: list[str], delimiter: str) -> None:
    """Raise `DataError` where the first line names no columns."""
    line = delimiter.join(header)
    if line.count("\0") * 3 > len(line):
        raise DataError(f"{path}: UTF-16, as some spreadsheets write; save the table as UTF-8")
    if "\0" in line:
        raise DataError(f"{path}: binary, not text; name a table of text, or give the file the suffix of what it is")
    if not line.replace(delimiter, "").strip():
        raise DataError(f"{path}:1: no column names in the first line; it reads id,text,image,label or as your columns")
    if len(header) == 1 and (other := next((each for each in DELIMITERS if each in line), None)):
        kind = "commas, or tabs in a .tsv" if delimiter == "," else "tabs, or commas in a .csv"
        raise DataError(f"{path}:1: cells are parted by {other!r}; save the table with {kind}")
    if len(set(header)) < len(header):
        raise DataError(f"{path}:1: a column name stands twice in {', '.join(header)}; rename one")


def _read_jsonl(path: str, encodings: Counter[str]) -> Iterator[tuple[int, dict[str, object]]]:
    whole = (line for text in _decoded(path, encodings) for line in text.removesuffix("\n").split("\n"))
    for number, line in enumerate(whole, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); one object a line is expected") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: {JSON_KINDS[type(row)]}; one object a line is expected, {{...}}")
        yield number, row


def _read_parquet(path: str, encodings: Counter[str]) -> Iterator[tuple[int, dict[str, object]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_file(path) as file, pyarrow.parquet.ParquetFile(file) as table:
            rows = (row for batch in table.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except pyarrow.ArrowException as error:
        message = str(error).splitlines()[0]
        raise DataError(f"{path}: not a Parquet file ({message}); write it again") from error


def _lines(path: str, encodings: Counter[str]) -> Iterator[str]:
    """Lines as `csv` wants them, their ends untouched."""
    for text in _decoded(path, encodings):
        yield from io.StringIO(text, newline="")


def _decoded(path: str, encodings: Counter[str]) -> Iterator[str]:
    """Some whole lines at a time, each in its own encoding: a newline is no part of a character in any of them."""
    with open_file(path) as file:
        while lines := file.readlines(PIECE):
            if (text := _all_utf8(b"".join(lines))) is not None:
                encodings["utf-8"] += len(lines)
                yield text
                continue
            decoded = [decode_text(line) for line in lines]
            encodings.update(encoding for _, encoding in decoded)
            yield "".join(line for line, _ in decoded)


def _all_utf8(data: bytes) -> str | None:
    """The text if every line is UTF-8, which is told at once; a mark at the start of a line is for the slow way."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\ufeff" in text else text


def _cell(value: object) -> str | None:
    """Text; None for what means nothing."""
    if value is None or value == "" or value != value:
        return None
    return without_surrogates(decode_text(value)[0] if isinstance(value, bytes) else str(value))


READERS: dict[str, Callable[[str, Counter[str]], Iterator[tuple[int, dict[str, object]]]]] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
