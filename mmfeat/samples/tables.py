"""Tables: delimited text, JSON, Arrow and Excel files, plain or compressed, as rows of named cells."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

from mmfeat.errors import DataError
from mmfeat.samples.binary_tables import Rows, copy_sheet, read_arrow, read_parquet, read_sheet
from mmfeat.samples.contents import without_surrogates
from mmfeat.samples.delimited import Dialect, find_dialect, read_delimited
from mmfeat.samples.encodings import Decoder, decode_text, marked_encoding
from mmfeat.samples.json_rows import read_json
from mmfeat.samples.labels import label_of
from mmfeat.samples.table_files import BINARY, DELIMITED, JSON, SUFFIXES, open_table, table_files, table_suffix
from mmfeat.system.remote import PIECE

_SEPARATOR = re.compile(r'"?sep=(.)"?\s*$')  # Excel's line before the header
PEEKED = 1000  # rows that show the columns of a table whose rows may lack some
READING = ("encoding", "delimiter", "quoting")  # what a user may say of a table beside the names of its columns

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
