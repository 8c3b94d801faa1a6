"""Tables: delimited text, JSON, Arrow and Excel files, plain or compressed, as rows of named cells."""

from __future__ import annotations

import codecs
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from mmfeat.errors import DataError
from mmfeat.samples.contents import without_surrogates
from mmfeat.samples.delimited import DELIMITERS, Dialect, check_header, find_dialect, read_delimited
from mmfeat.samples.encodings import Decoder, decode_text, marked_encoding
from mmfeat.samples.json_rows import read_json
from mmfeat.system.remote import files_of, is_remote, open_file

PIECE = 1 << 20  # bytes of a text file that are read at a time
_SEPARATOR = re.compile(r'"?sep=(.)"?\s*$')  # Excel's line before the header
BATCH = 4096  # rows of a binary table that are made Python objects at a time
PEEKED = 1000  # rows that show the columns of a table whose rows may lack some
READING = ("encoding", "delimiter", "quoting")  # what a user may say of a table beside the names of its columns

Row = dict[str, str | None]
Rows: TypeAlias = "Iterator[tuple[int, dict[str, object]]]"  # line number or row number, and cells


class Table:
    """The rows of one table, in one file or in several with the same columns; cells are text, empty or null is None.

    Rows are read as they are used, so a table may be larger than memory. `decoder` counts the encodings of the lines
    of the latest pass. `reading` holds the encoding, delimiter and quoting that the user names.
    """

    def __init__(self, data: str | Path, reading: Mapping[str, str] | None = None) -> None:
        self.data, self.reading = str(data), dict(reading or {})
        self.files = table_files(self.data)
        if odd := next((file for file in self.files if table_suffix(file) not in READERS), None):
            raise DataError(f"{odd}: a table must end in {', '.join(READERS)}; rename or convert the file")
        self.decoder = Decoder(self.reading.get("encoding", ""), "line")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the columns. The objects of JSON may lack some, so many are looked at."""
        count = PEEKED if table_suffix(self.files[0]) in JSON else 1
        return tuple(dict.fromkeys(name for _, row in islice(self.rows(), count) for name in row))

    @property
    def notes(self) -> list[str]:
        """Decisions on how the files are read that the user should hear of."""
        return [dialect.note for dialect in self.dialects.values() if dialect.note]

    def rows(self, columns: Collection[str] = ()) -> Iterator[tuple[str, Row]]:
        """("FILE:LINE", row) of each row; of a binary file with the cells of `columns` only, if there are any.

        Raises `DataError` for a list or an object in one of `columns`.
        """
        dialects = self.dialects  # found before a pass, since to find them is to read lines
        self.decoder.counts.clear()
        for file in self.files:
            reader = READERS[table_suffix(file)]
            with _broken_files(file):
                for line, row in reader(self, file, columns):
                    for name in columns:
                        if isinstance(value := row.get(name), (dict, list)):
                            kind = "a list" if isinstance(value, list) else "an object"
                            where = f"{file}:{line}: column {name}"
                            raise DataError(
                                f"{where} holds {kind}; write plain text there, or name another with --columns"
                            )
                    # Most of the cells, which may be millions, are plain text and stay as they are.
                    cells = {n: v if v.__class__ is str and v.isascii() and v else _cell(v) for n, v in row.items()}
                    yield f"{file}:{line}", cells
        del dialects

    @cached_property
    def dialects(self) -> dict[str, Dialect]:
        """The dialect of each delimited file. All files are scanned first, for what is not UTF-8."""
        quotes = {file: self._scan(file) for file in self.files if table_suffix(file) not in BINARY}
        return {
            file: find_dialect(file, partial(self.lines, file), table_suffix(file), self.reading, has_quotes)
            for file, has_quotes in quotes.items()
            if table_suffix(file) in DELIMITERS
        }

    def _scan(self, file: str) -> bool:
        """Whether there are quotes in a file of text; the decoder learns of the lines that are not UTF-8."""
        quotes = False
        with _broken_files(file), open_table(file) as binary:
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
                    lines = piece.splitlines(keepends=True)
                    yield "".join(self.decoder.decode(line, f"{file}:{number + n}") for n, line in enumerate(lines))
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
    rest = b""
    while block := binary.read(PIECE):
        block = rest + block
        end = max(block.rfind(b"\n"), block.rfind(b",") if suffix in JSON else -1) + 1
        if end:
            yield block[:end]
        rest = block[end:]
    if rest:
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


@contextmanager
def _broken_files(file: str) -> Iterator[None]:
    """Turn the errors of broken compressed files into `DataError`."""
    import lzma
    import zlib

    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"{file}: broken or cut short ({error}); write it again") from error


def table_files(data: str) -> list[str]:
    """The files of a table: one, or those of a pattern, of names with commas between them, or of a folder of shards."""
    files = shards_in(data) if not is_remote(data) and os.path.isdir(data) else files_of(data)
    if not files:
        raise DataError(f"{data}: no such table; check --data")
    return files


def shards_in(folder: str | Path) -> list[str]:
    """The files of a folder that are parts of one table: their names are alike but for numbers; none otherwise.

    A single file counts if its kind is one that programs write shards of and its name has a number.
    """
    names = sorted(name for name in os.listdir(folder) if not name.startswith((".", "_")))
    tables = [name for name in names if table_suffix(name) in READERS and table_suffix(name) != ".txt"]
    alike = {re.sub(r"\d+", "#", name) for name in tables}
    if len(alike) != 1 or (len(tables) == 1 and ("#" not in alike.pop() or table_suffix(tables[0]) not in BINARY)):
        return []
    return [os.path.join(folder, name) for name in tables]


def _suffixes(path: str) -> tuple[str, str, str]:
    """(stem, suffix of the format, suffix of the compression), the suffixes in lower case and maybe empty."""
    stem, suffix = os.path.splitext(os.path.basename(path.partition("?")[0] if is_remote(path) else path))
    if suffix.lower() not in COMPRESSIONS:
        return stem, suffix.lower(), ""
    return *_suffixes(stem)[:2], suffix.lower()


def table_suffix(path: str) -> str:
    """The suffix of a table, such as `.csv`, in lower case, without that of a compression and the query of a URL."""
    return _suffixes(path)[1]


def table_name(data: str) -> str:
    """The name of a data set in one file or several: without suffixes, pattern and numbers of shards."""
    first = data.partition(",")[0] if not os.path.exists(data) else data
    stem = _suffixes(first)[0]
    if "*" in stem or "?" in stem:
        stem = re.sub(r"[^\w].*|[*?\[].*", "", stem) or os.path.basename(os.path.dirname(os.path.abspath(first)))
    return stem


def open_table(path: str) -> AbstractContextManager[BinaryIO]:
    """Open a table for reading the bytes that were compressed, or those of the file."""
    return _decompressed(path) if _suffixes(path)[2] else open_file(path)


@contextmanager
def _decompressed(path: str) -> Iterator[BinaryIO]:
    with open_file(path) as raw, COMPRESSIONS[_suffixes(path)[2]](raw) as file:
        yield file


@contextmanager
def _seekable(path: str) -> Iterator[BinaryIO]:
    """Open a table that is not read from front to back; one that is compressed lies in a temporary file meanwhile."""
    with open_table(path) as file:
        if not _suffixes(path)[2]:
            yield file
            return
        with tempfile.TemporaryFile() as whole:
            shutil.copyfileobj(file, whole, PIECE)
            whole.seek(0)
            yield whole


def _gzip(raw: BinaryIO) -> Any:
    import gzip

    return gzip.GzipFile(fileobj=raw)


def _bz2(raw: BinaryIO) -> Any:
    import bz2

    return bz2.BZ2File(raw)


def _xz(raw: BinaryIO) -> Any:
    import lzma

    return lzma.LZMAFile(raw)


def _zstd(raw: BinaryIO) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), PIECE)


def _read_text(table: Table, path: str, columns: Collection[str]) -> Rows:
    return read_delimited(path, table.lines(path), table.dialects[path], columns)


def _read_json(table: Table, path: str, columns: Collection[str]) -> Rows:
    return read_json(path, table.pieces(path), columns)


def _read_parquet(table: Table, path: str, columns: Collection[str]) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with _seekable(path) as binary, pyarrow.parquet.ParquetFile(binary) as file:
            names = _used(file.schema_arrow.names, columns)
            yield from enumerate(_batch_rows(file.iter_batches(BATCH, columns=names), names), 1)
    except pyarrow.ArrowException as error:
        message = str(error).splitlines()[0]
        raise DataError(f"{path}: not a Parquet file ({message}); write it again") from error


def _read_arrow(table: Table, path: str, columns: Collection[str]) -> Rows:
    """Rows of a file of Arrow or Feather, in the format of files or in that of streams."""
    import pyarrow
    from pyarrow import feather, ipc

    try:
        with _seekable(path) as binary:
            magic = binary.read(6)
            binary.seek(0)
            if magic.startswith(b"FEA1"):
                batches: Any = feather.read_table(binary).to_batches()
                names = batches[0].schema.names if batches else []
            elif magic == b"ARROW1":
                file = ipc.open_file(binary)
                names, batches = file.schema.names, map(file.get_batch, range(file.num_record_batches))
            else:
                batches = ipc.open_stream(binary)
                names = batches.schema.names
            yield from enumerate(_batch_rows(batches, _used(names, columns)), 1)
    except pyarrow.ArrowException as error:
        message = str(error).splitlines()[0]
        raise DataError(f"{path}: not a file of Arrow or Feather ({message}); write it again") from error


def _used(names: list[str], columns: Collection[str]) -> list[str]:
    """The columns to read, without the index that pandas writes; all where none of `columns` is there."""
    return [name for name in names if name in columns] or [n for n in names if not n.startswith("__index_level_")]


def _batch_rows(batches: Iterable[Any], names: list[str]) -> Iterator[dict[str, object]]:
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH):
            part = batch.slice(start, BATCH)
            cells = [_python_values(part.column(name)) for name in names]
            for row in zip(*cells, strict=True):
                yield dict(zip(names, row, strict=True))


def _python_values(column: Any) -> list[object]:
    """The cells of a column of Arrow; texts by way of NumPy, which is several times as fast."""
    import pyarrow

    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        return column.to_numpy(zero_copy_only=False).tolist()
    return column.to_pylist()


def _read_excel(table: Table, path: str, columns: Collection[str]) -> Rows:
    """Rows of the first sheet, which is in memory as a whole; a sheet has a million rows at most."""
    import python_calamine

    try:
        with _seekable(path) as binary, python_calamine.CalamineWorkbook.from_filelike(binary) as book:
            sheet = book.get_sheet_by_index(0)
            rows = enumerate(sheet.iter_rows(), (sheet.start or (0, 0))[0] + 1)
            line, header = next(((n, row) for n, row in rows if any(cell != "" for cell in row)), (1, []))
            if not header:
                raise DataError(
                    f"{path}: the first sheet is empty; its first row names the columns, id,text,image,label"
                )
            names = check_header(path, [str(name) for name in header])
            for line, cells in rows:
                if any(cell != "" for cell in cells):
                    values = {n: _excel_value(value) for n, value in zip(names, cells, strict=True) if n}
                    yield line, values
    except python_calamine.CalamineError as error:
        raise DataError(f"{path}: not an Excel file ({error}); save it again as .xlsx") from error


def _excel_value(value: Any) -> object:
    """A cell of a sheet; all numbers there are floats, and Excel shows 1.0 as 1."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


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


COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {".gz": _gzip, ".bz2": _bz2, ".xz": _xz, ".zst": _zstd}
READERS: dict[str, Callable[[Table, str, Collection[str]], Rows]] = {
    **dict.fromkeys(DELIMITERS, _read_text),
    **dict.fromkeys(JSON := (".jsonl", ".ndjson", ".json"), _read_json),
    ".parquet": _read_parquet,
    ".feather": _read_arrow,
    ".arrow": _read_arrow,
    ".xlsx": _read_excel,
}
BINARY = (".parquet", ".feather", ".arrow", ".xlsx")
