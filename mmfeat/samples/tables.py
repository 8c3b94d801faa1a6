"""Tables: CSV, TSV, JSONL and Parquet files as rows of named cells."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path

from mmfeat.errors import DataError
from mmfeat.samples.contents import decode_text, without_surrogates
from mmfeat.system.remote import exists, is_remote, open_file
from mmfeat.system.wording import counted

DELIMITERS = (";", "\t", "|", ",")  # delimiters of tables by other programs
PIECE = 1 << 20  # bytes of a text file that are read at a time

JSON_KINDS = {
    **dict.fromkeys((int, float), "a number"),
    list: "a list",
    str: "a text",
    bool: "true or false",
    type(None): "null",
}

Row = dict[str, str | None]


class TableRows:
    """(line number, row) of each row of a table, a file or URL; cells are text, an empty or null cell is None.

    Rows are read as they are used, so a table may be larger than memory, and `encodings` counts the encodings of the
    lines that were read so far. A list or an object in one of `columns`, the columns in use, raises `DataError`.
    """

    def __init__(self, path: str | Path, columns: Collection[str] = ()) -> None:
        self.path, self._columns = str(path), columns
        self.encodings: Counter[str] = Counter()

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        path, suffix = self.path, table_suffix(self.path)
        if suffix not in READERS:
            raise DataError(f"{path}: a table must end in {', '.join(READERS)}; rename or convert the file")
        if not exists(path):
            raise DataError(f"{path}: no such table; check --data")
        for line, row in READERS[suffix](self):
            for name in self._columns:
                if isinstance(value := row.get(name), (dict, list)):
                    kind = "a list" if isinstance(value, list) else "an object"
                    where = f"{path}:{line}: column {name}"
                    raise DataError(f"{where} holds {kind}; write plain text there, or name another with --columns")
            # Most of the cells, which may be millions, are plain text and stay as they are.
            yield line, {n: v if v.__class__ is str and v.isascii() and v else _cell(v) for n, v in row.items()}

    def decoded(self) -> Iterator[str]:
        """Yield the text of the file, some whole lines at a time.

        Each line has its own encoding: in no encoding is a newline a part of another character.
        """
        with open_file(self.path) as file:
            while lines := file.readlines(PIECE):
                if (text := _all_utf8(b"".join(lines))) is not None:
                    self.encodings["utf-8"] += len(lines)
                    yield text
                    continue
                decoded = [decode_text(line) for line in lines]
                self.encodings.update(encoding for _, encoding in decoded)
                yield "".join(line for line, _ in decoded)


def table_suffix(path: str) -> str:
    """The suffix of a table, such as `.csv`, in lower case and without the query of a URL."""
    return os.path.splitext(path.partition("?")[0] if is_remote(path) else path)[1].lower()


def _read_delimited(table: TableRows, delimiter: str) -> Iterator[tuple[int, dict[str, object]]]:
    """Rows of a file with a header line; a row of another width is an error."""
    path = table.path
    csv.field_size_limit(1 << 30)  # a long text is no error
    lines = (line for text in table.decoded() for line in io.StringIO(text, newline=""))  # with the ends of lines
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
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
    """Raise `DataError` for a first line that does not name the columns."""
    line = delimiter.join(header)
    if line.count("\0") * 3 > len(line):
        raise DataError(f"{path}: UTF-16, as some spreadsheets write; save the table as UTF-8")
    if "\0" in line:
        raise DataError(f"{path}: binary, not text; name a table of text, or give the file the suffix of what it is")
    if not line.replace(delimiter, "").strip():
        raise DataError(f"{path}:1: no column names in the first line; it reads id,text,image,label or as your columns")
    if len(header) == 1 and (other := next((mark for mark in DELIMITERS if mark in line), None)):
        kind = "commas, or tabs in a .tsv" if delimiter == "," else "tabs, or commas in a .csv"
        raise DataError(f"{path}:1: cells are parted by {other!r}; save the table with {kind}")
    if len(set(header)) < len(header):
        raise DataError(f"{path}:1: a column name stands twice in {', '.join(header)}; rename one")


def _read_jsonl(table: TableRows) -> Iterator[tuple[int, dict[str, object]]]:
    path = table.path
    lines = (line for text in table.decoded() for line in text.removesuffix("\n").split("\n"))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); one object a line is expected") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: {JSON_KINDS[type(row)]}; one object a line is expected, {{...}}")
        yield number, row


def _read_parquet(table: TableRows) -> Iterator[tuple[int, dict[str, object]]]:
    import pyarrow
    import pyarrow.parquet

    path = table.path
    try:
        with open_file(path) as binary, pyarrow.parquet.ParquetFile(binary) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from enumerate(rows, 1)
    except pyarrow.ArrowException as error:
        message = str(error).splitlines()[0]
        raise DataError(f"{path}: not a Parquet file ({message}); write it again") from error


def _all_utf8(data: bytes) -> str | None:
    """The text of lines that are all UTF-8 with no byte-order mark but at the start; None for other lines."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    return None if "\ufeff" in text else text


def _cell(value: object) -> str | None:
    """The text of a cell; None for an empty cell, null and NaN."""
    if value is None or value == "" or value != value:
        return None
    return without_surrogates(decode_text(value)[0] if isinstance(value, bytes) else str(value))


READERS: dict[str, Callable[[TableRows], Iterator[tuple[int, dict[str, object]]]]] = {
    ".csv": partial(_read_delimited, delimiter=","),
    ".tsv": partial(_read_delimited, delimiter="\t"),
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
