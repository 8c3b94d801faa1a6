"""Tables: delimited text, JSON, Arrow and Excel files, plain or compressed, as rows of named cells.

JSON is an object a line, an array of objects, objects one after the other, or one object that holds rows.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from mmfeat.errors import DataError
from mmfeat.samples.contents import without_surrogates
from mmfeat.samples.delimited import Dialect, find_dialect, read_delimited
from mmfeat.samples.encodings import Decoder, decode_text, marked_encoding
from mmfeat.samples.labels import SPLIT, label_of, part_named
from mmfeat.samples.table_files import (
    BINARY,
    DELIMITED,
    JSON,
    SUFFIXES,
    Rows,
    copy_sheet,
    open_table,
    read_arrow,
    read_parquet,
    read_sheet,
    table_files,
    table_suffix,
)  # fmt: skip
from mmfeat.system.remote import PIECE

_SEPARATOR = re.compile(r'"?sep=(.)"?\s*$')  # Excel's line before the header
PEEKED = 1000  # rows that show the columns of a table whose rows may lack some
READING = ("encoding", "delimiter", "quoting")  # what a user may say of a table beside the names of its columns
JSON_KINDS = {int: "a number", float: "a number", list: "a list", str: "a text", bool: "true or false"}
_BLANK = " \t\r\n"
_CELLS = ("text", "image", "label")  # names that tell a row or a column from a container of rows

Row = dict[str, Any]  # a text or None, but in columns that are read as they are


class Table:
    """The rows of one table, in one file or in several with the same columns; cells are text, empty or null is None.

    Rows are read as they are used, so a table may be larger than memory. `decoder` counts the encodings of the lines
    of the latest pass. `reading` holds the encoding, delimiter and quoting that the user names, `files` the files where
    `data` is no name of theirs.
    """

    def __init__(self, data: str | Path, reading: Mapping[str, str] | None = None, files: Sequence[str] = ()) -> None:
        self.data, self.reading = str(data), dict(reading or {})
        self.files = files or table_files(self.data)
        if odd := next((file for file in self.files if table_suffix(file) not in SUFFIXES), None):
            raise DataError(f"{odd}: a table must end in {', '.join(SUFFIXES)}; rename or convert the file")
        self.decoder = Decoder(self.reading.get("encoding", ""), "line")
        self.sheets: dict[str, BinaryIO] = {}  # copies of Excel files

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the columns. The objects of JSON may lack some, so many are looked at."""
        count = PEEKED if table_suffix(self.files[0]) in JSON else 1
        return tuple(dict.fromkeys(name for _, row in islice(self.rows(), count) for name in row))

    @property
    def notes(self) -> list[str]:
        """Decisions on how the files are read that the user should hear of."""
        return [dialect.note for dialect in self.dialects.values() if dialect.note]

    def rows(
        self, columns: Collection[str] = (), plain: str = "", label: str | None = None
    ) -> Iterator[tuple[str, Row]]:
        """("FILE:LINE", row) of each row; of a binary file with the cells of `columns` only, if there are any.

        The cells of the column `plain` stay as they are in the file, and those of `label` may be lists. Raises
        `DataError` for a list or an object in another one of `columns`.
        """
        self.dialects  # noqa: B018  found before a pass, since to find them is to read lines
        self.decoder.counts.clear()
        for file in self.files:
            for number, (line, row) in enumerate(self._read(file, columns)):
                if number == 0 and file != self.files[0] and table_suffix(file) not in JSON:
                    self._check_shard(file, row, columns)
                for name in columns:
                    if name != plain and isinstance(value := row.get(name), (dict, list)):
                        row[name] = self._of_list(f"{file}:{line}: column {name}", value, name == label)
                # Most of the cells, which may be millions, are plain text and stay as they are.
                kept = {plain: row.pop(plain)} if plain in row else {}
                cells = {n: v if v.__class__ is str and v.isascii() and v else _cell(v) for n, v in row.items()}
                yield f"{file}:{line}", cells | kept

    def _read(self, path: str, columns: Collection[str]) -> Rows:
        suffix = table_suffix(path)
        if suffix in DELIMITED:
            return read_delimited(path, self.lines(path), self.dialects[path], columns)
        if suffix in JSON:
            return read_json(path, self.pieces(path), columns)
        if suffix != ".xlsx":
            return (read_parquet if suffix == ".parquet" else read_arrow)(path, columns)
        if path not in self.sheets:
            self.sheets[path] = copy_sheet(path)
        self.sheets[path].seek(0)
        return read_sheet(self.sheets[path], columns)

    @staticmethod
    def _of_list(where: str, value: list[object] | dict[str, object], is_label: bool) -> str:
        if isinstance(value, list) and is_label:
            return label_of(value, where)
        kind = "a list" if isinstance(value, list) else "an object"
        raise DataError(f"{where} holds {kind}; write plain text there, or name another with --columns")

    def _check_shard(self, file: str, row: Mapping[str, object], columns: Collection[str]) -> None:
        if missing := [name for name in columns or self.names if name not in row]:
            raise DataError(f"{file}: no column {', '.join(missing)}, which {self.files[0]} has; name other files")

    @cached_property
    def dialects(self) -> dict[str, Dialect]:
        """The dialect of each delimited file. All files are scanned first, for what is not UTF-8."""
        quotes = {file: self._scan(file) for file in self.files if table_suffix(file) not in BINARY}
        return {
            file: find_dialect(file, partial(self.lines, file), table_suffix(file), self.reading, has_quotes)
            for file, has_quotes in quotes.items()
            if table_suffix(file) in DELIMITED
        }

    def _scan(self, file: str) -> bool:
        """Whether there are quotes in a file of text; the decoder learns of the lines that are not UTF-8."""
        quotes = False
        with open_table(file) as binary:
            for piece in _cut_pieces(binary, table_suffix(file)):
                quotes = quotes or b'"' in piece
                if _all_utf8(piece) is None and not marked_encoding(piece):
                    self.decoder.learn(line for line in piece.split(b"\n") if _all_utf8(line) is None)
        return quotes

    def pieces(self, file: str) -> Iterator[str]:
        """Yield the text of a file, some lines at a time, each of which has its own encoding."""
        number = 1
        with open_table(file) as binary:
            encoding, pieces = self.decoder.whole, _cut_pieces(binary, table_suffix(file))
            for piece in pieces:
                if encoding := encoding or (marked_encoding(piece) if number == 1 else ""):
                    yield from _wide_pieces(chain([piece], pieces), encoding, file)
                    self.decoder.counts[encoding] += 1
                    return
                newlines = piece.count(b"\n")
                if (text := _all_utf8(piece)) is not None:
                    self.decoder.counts["utf-8"] += newlines + (not piece.endswith(b"\n"))
                    yield text
                else:
                    yield self.decoder.decode_lines(piece, file, number)
                number += newlines

    def lines(self, file: str) -> Iterator[str]:
        """Yield the lines of a file with their ends, of which there are three kinds."""
        lines = (line for text in self.pieces(file) for line in io.StringIO(text, newline=""))
        first = next(lines, "")
        return chain(["\n" if _SEPARATOR.match(first) else first], lines)  # Excel's line is not a row


def _cut_pieces(binary: BinaryIO, suffix: str) -> Iterator[bytes]:
    """Yield the bytes of a file in pieces that end with a line; JSON, which may be one line, also at a comma.

    In no encoding but UTF-16 and its like is a newline or a comma a part of another character.
    """
    parts: list[bytes] = []  # of a line that has not ended, which may be the whole file
    while block := binary.read(PIECE):
        end = max(block.rfind(b"\n"), block.rfind(b",") if suffix in JSON else -1) + 1
        if end:
            yield b"".join([*parts, block[:end]])
            parts.clear()
        parts.append(block[end:])
    if rest := b"".join(parts):
        yield rest


def _wide_pieces(pieces: Iterator[bytes], encoding: str, file: str) -> Iterator[str]:
    """Yield the text of pieces of a file that are all in one encoding, cut at the ends of lines."""
    decode, rest = codecs.getincrementaldecoder(encoding)().decode, ""
    try:
        for piece in pieces:
            text, newline, rest = (rest + decode(piece)).removeprefix("\ufeff").rpartition("\n")
            if newline:
                yield text + newline
        yield rest + decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not {encoding} ({error.reason}); say --encoding NAME, or save it as UTF-8") from error


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


def read_json(
    path: str, pieces: Iterator[str], columns: Collection[str] = ()
) -> Iterator[tuple[int, dict[str, object]]]:
    """(line number, row) of a file whose text comes in `pieces`.

    One object that is alone in a file may hold the rows: as a list of objects beside other values, by id, or by column
    or as lists of cells, as pandas writes them. `columns` tells ids from names of columns.
    """
    first = next((piece for piece in pieces if piece.strip(_BLANK)), "")
    pieces = chain([first], pieces)
    is_lines = _is_whole(first.lstrip(_BLANK).partition("\n")[0])
    values = _read_lines(path, pieces) if is_lines else _read_values(path, pieces)
    alone = list(islice(values, 2)) if first.lstrip(_BLANK).startswith("{") else []
    rows = _unwrapped(path, alone[0], columns) if len(alone) == 1 else chain(alone, values)
    for line, row in rows:
        if not isinstance(row, dict):
            raise DataError(
                f"{path}:{line}: {JSON_KINDS.get(type(row), 'null')}; one object a line is expected, {{...}}"
            )
        yield line, row


def _is_whole(line: str) -> bool:
    """Whether the first line of a file is all of an object, so that each line is one, or no JSON at all."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return not line.startswith(("[", "{"))


def _read_lines(path: str, pieces: Iterator[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_lines(pieces), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error}); one object a line is expected") from error
        yield number, row


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    rest = ""
    for text in pieces:
        *lines, rest = (rest + text).split("\n")
        yield from lines
    yield rest


def _read_values(path: str, pieces: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """(line number, value) of the values in an array, or of values one after the other."""
    decode = json.JSONDecoder().raw_decode
    text, place, line, wanted = next(pieces, ""), 0, 1, 1
    brackets = 0  # that are open
    while True:
        begin = place
        while place < len(text) and text[place] in _BLANK + ",[]":
            place += 1
        line += text.count("\n", begin, place)
        brackets += text.count("[", begin, place) - text.count("]", begin, place)
        try:
            value, end = decode(text, place)
        except ValueError as error:
            more = "".join(piece for _, piece in zip(range(wanted), pieces, strict=False))
            if not more and place < len(text):
                kind = "an array of objects" if brackets else "one object a line"
                raise DataError(f"{path}:{line}: not JSON ({error}); {kind} is expected") from error
            if not more and brackets:
                raise DataError(f"{path}:{line}: the array does not end; the file is cut short") from None
            if not more:
                return
            text, place, wanted = text[place:] + more, 0, wanted * 2  # a long value takes few attempts
            continue
        yield line, value
        line, place, wanted = line + text.count("\n", place, end), end, 1


def _unwrapped(path: str, only: tuple[int, Any], columns: Collection[str]) -> Iterator[tuple[int, Any]]:
    """The rows in an object that is alone in a file; the object itself where it is a row or holds none."""
    value = only[1]
    if _is_row(value, columns):
        return iter([only])
    if len(value) == 1 and not _is_row(inner := next(iter(value.values())), columns) and _lists_in(inner):
        value = inner
    lists = _lists_in(value)
    if len(lists) > 1 and all(map(part_named, lists)):
        lists = {SPLIT: [{SPLIT: part, **row} for part, rows in lists.items() for row in rows]}
    if len(lists) > 1:
        raise DataError(f"{path}: {' and '.join(lists)} are lists of objects; write the one that is meant to a file")
    cells, names = value.get("data"), value.get("columns")
    if isinstance(names, list) and isinstance(cells, list) and cells and isinstance(cells[0], list):
        rows: list[Any] = [dict(zip(map(str, names), row, strict=False)) for row in cells]
    elif lists:
        rows = next(iter(lists.values()))
    elif set(value) & {*columns, *_CELLS} and _are_columns(value):
        rows = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    elif value and all(isinstance(item, dict) for item in value.values()):
        is_by_column = set(value) & {*columns, *_CELLS}
        rows = _by_column(value) if is_by_column else [{"id": id, **row} for id, row in value.items()]
    else:
        return iter([only])
    return ((number, row) for number, row in enumerate(rows, 1))


def _is_row(value: Any, columns: Collection[str]) -> bool:
    """Whether a value is a row, or no object at all."""
    return not isinstance(value, dict) or any(isinstance(value.get(name), str) for name in (*columns, *_CELLS))


def _lists_in(value: dict[str, Any]) -> dict[str, list[Any]]:
    """The lists of objects in an object."""
    return {name: item for name, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)}


def _are_columns(value: dict[str, Any]) -> bool:
    """Whether an object is columns of cells, as `DataFrame.to_dict("list")` makes them, and not a row with lists."""
    return all(isinstance(item, list) for item in value.values()) and len({*map(len, value.values())}) == 1


def _by_column(value: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of columns that are objects with a cell a row, as `DataFrame.to_json` writes them."""
    keys = dict.fromkeys(key for column in value.values() for key in column)
    return [{name: column.get(key) for name, column in value.items()} for key in keys]
