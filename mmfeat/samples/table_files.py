"""Files of tables: their suffixes, the files that a name stands for, opening them, compressed or not, and the rows of
binary ones: Parquet, Arrow, Feather and Excel."""

from __future__ import annotations

import errno
import io
import os
import re
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from mmfeat.errors import DataError
from mmfeat.samples.delimited import check_header
from mmfeat.system.files import no_such_data
from mmfeat.system.remote import (
    BROKEN,
    COMPRESSIONS,
    PIECE,
    SLOW,
    Part,
    decompressor,
    files_of,
    is_remote,
    open_file,
    split_url,
    unpack_into,
)
from mmfeat.system.web import is_web

DELIMITED = (".csv", ".tsv", ".psv", ".txt")
JSON = (".jsonl", ".ndjson", ".json")
BINARY = (".parquet", ".feather", ".arrow", ".xlsx")
SUFFIXES = (*DELIMITED, *JSON, *BINARY)
LOOKED_AT = 64  # first bytes of a file that show what it is
FOREIGN = {  # what a file is that was not downloaded -> its first bytes
    "a pointer of Git LFS, not the data; git lfs pull fetches them": rb"version https://git-lfs",
    "a page of the web, not a table; download the file itself": rb"\s*<(!doctype )?html",
}
BATCH = 4096  # rows that are made Python objects at a time
BATCH_BYTES = 1 << 23  # bytes of a Parquet file that are read at a time
LARGEST_BOOK = 1 << 31  # bytes of an Excel file, unpacked
LINE = "#line"  # the column of line numbers in the copy of a sheet

Rows: TypeAlias = "Iterator[tuple[int, dict[str, object]]]"  # row number and cells


def table_files(data: str) -> list[str]:
    """The files of a table: one, or those of a pattern, of names with commas between them, or of a folder of shards."""
    files = shards_in(data) if not is_remote(data) and os.path.isdir(data) else files_of(data)
    if not files:
        raise no_such_data(data)
    if odd := next((file for file in files if not is_remote(file) and not os.path.isfile(file)), ""):
        if os.path.isdir(odd):
            raise DataError(f"{odd}: a folder; of several names each is a table: name them, or the folder of all data")
        raise DataError(f"{odd}: a pipe or a device, which cannot be read twice; write what it gives to a file")
    if twice := [file for file, count in Counter(files).items() if count > 1]:
        raise DataError(f"{data}: {twice[0]} is there twice; name each file once")
    return files


def shards_in(folder: str | Path) -> list[str]:
    """The files of a folder that are parts of one table: their names are alike but for numbers; none otherwise.

    A single file counts if its kind is one that programs write shards of and its name has a number.
    """
    names = sorted(name for name in os.listdir(folder) if not name.startswith((".", "_")))
    tables = [name for name in names if table_suffix(name) in SUFFIXES and table_suffix(name) != ".txt"]
    stems = {os.path.splitext(name)[0] for name in names if name not in tables}
    if any(name.lower().endswith(".json") and os.path.splitext(name)[0] in stems for name in tables):
        return []  # JSON of photos beside it
    alike = {re.sub(r"\d+", "#", name) for name in tables}
    is_single = len(tables) == 1 and (tables[0] in alike or table_suffix(tables[0]) not in BINARY)
    return [] if len(alike) != 1 or is_single else [os.path.join(folder, name) for name in tables]


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


@contextmanager
def open_table(path: str, seekable: bool = False) -> Iterator[BinaryIO]:
    """Open a table for reading the bytes that were compressed, or those of the file; a broken one raises `DataError`.

    With `seekable`, and where unpacking takes as long as reading, what was compressed lies in a temporary file.
    """
    try:
        with _opened(path, seekable) as file:
            yield file
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EIO):
            raise
        if isinstance(error, zipfile.BadZipFile) and split_url(path) is None:  # an Excel file, whose reader says more
            raise
        reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        if is_web(path):
            raise DataError(f"{path}: cannot be read ({reason}); download it, and name the file") from error
        raise DataError(f"{path}: broken or cut short ({reason}); write it again") from error


@contextmanager
def _opened(path: str, seekable: bool) -> Iterator[BinaryIO]:
    with open_file(path) as raw:
        first = raw.read(LOOKED_AT)
    if foreign := next((what for what, mark in FOREIGN.items() if re.match(mark, first, re.IGNORECASE)), ""):
        raise DataError(f"{path}: {foreign}")
    if (unpack := decompressor(first)) is None:
        with open_file(path) as raw:
            yield raw
    elif seekable or unpack in SLOW:
        copy = _copy(path, unpack, time.time_ns() if is_remote(path) else os.stat(path).st_mtime_ns)
        with io.BufferedReader(Part(copy, 0, os.fstat(copy.fileno()).st_size)) as file:
            yield file
    else:
        with open_file(path) as raw, unpack(raw) as file:
            yield file


@lru_cache(maxsize=4)  # a table is read several times
def _copy(path: str, unpack: Callable[[BinaryIO], Any], changed: int) -> BinaryIO:
    whole = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  lives as long as it is cached
    unpack_into(whole, path, unpack)
    return whole


def open_parquet(file: BinaryIO | str) -> Any:
    """A Parquet file that is read page by page; else a whole column of a row group would be in memory."""
    import pyarrow.parquet

    return pyarrow.parquet.ParquetFile(file, buffer_size=PIECE, pre_buffer=False)


def read_parquet(path: str, columns: Collection[str]) -> Rows:
    import pyarrow

    try:
        with open_table(path, seekable=True) as binary, open_parquet(binary) as file:
            names = _used(file.schema_arrow.names, columns)
            # Threads that read ahead through a Python file would crash an interpreter that ends before they do.
            batches = file.iter_batches(_rows_at_once(file.metadata), columns=names, use_threads=False)
            yield from enumerate(_batch_rows(batches, names), 1)
    except pyarrow.ArrowException as error:
        message = str(error).splitlines()[0]
        raise DataError(f"{path}: not a Parquet file ({message}); write it again") from error


def _rows_at_once(facts: Any) -> int:
    """The number of rows to read at a time: fewer where they hold photos."""
    size = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
    return max(1, min(BATCH, BATCH_BYTES * facts.num_rows // max(1, size)))


def read_arrow(path: str, columns: Collection[str]) -> Rows:
    """Rows of a file of Arrow or Feather, in the format of files or in that of streams."""
    import pyarrow
    from pyarrow import feather, ipc

    try:
        with open_table(path, seekable=True) as binary:
            magic = binary.read(6)
            binary.seek(0)
            if magic.startswith(b"FEA1"):
                batches: Any = feather.read_table(binary).to_batches()
                names = batches[0].schema.names if batches else []
            elif magic == b"ARROW1":
                file = ipc.open_file(binary, options=ipc.IpcReadOptions(use_threads=False))
                names, batches = file.schema.names, map(file.get_batch, range(file.num_record_batches))
            else:
                batches = ipc.open_stream(binary, options=ipc.IpcReadOptions(use_threads=False))
                names = batches.schema.names
            yield from enumerate(_batch_rows(batches, _used(names, columns)), 1)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        message = str(error).splitlines()[0]
        raise DataError(f"{path}: not a file of Arrow or Feather ({message}); write it again") from error


def _used(names: list[str], columns: Collection[str]) -> list[str]:
    """The columns to read, without the index that pandas writes; all where none of `columns` is there."""
    return [name for name in names if name in columns] or [n for n in names if not n.startswith("__index_level_")]


def _batch_rows(batches: Iterable[Any], names: list[str]) -> Iterator[dict[str, object]]:
    for batch in batches:
        batch.validate(full=True)  # wrong offsets would read elsewhere in memory
        for start in range(0, batch.num_rows, BATCH):
            part = batch.slice(start, BATCH)
            cells = [part.column(name).to_pylist() for name in names]
            for row in zip(*cells, strict=True):
                yield dict(zip(names, row, strict=True))


def read_sheet(copy: BinaryIO, columns: Collection[str]) -> Rows:
    """Rows of what `copy_sheet` wrote."""
    from pyarrow import ipc

    file = ipc.open_file(copy)
    names = [name for name in file.schema.names if name != LINE]
    used = [LINE, *_used(names, columns)]
    for row in _batch_rows(map(file.get_batch, range(file.num_record_batches)), used):
        yield row.pop(LINE), row  # type: ignore[misc]


def copy_sheet(path: str) -> BinaryIO:
    """The first sheet of an Excel file as Arrow in a temporary file.

    A sheet, of a million rows at most, is in memory as a whole while it is read, so it is read once. Raises `DataError`
    for one that unpacks to more than `LARGEST_BOOK` bytes, of which each takes about a byte of memory.
    """
    import python_calamine

    try:
        with open_table(path, seekable=True) as binary, zipfile.ZipFile(binary) as book:
            if (size := sum(part.file_size for part in book.infolist())) > LARGEST_BOOK:
                raise DataError(f"{path}: {size:,} bytes unpacked would be in memory at once; save it as .csv instead")
        with open_table(path, seekable=True) as binary, python_calamine.CalamineWorkbook.from_filelike(binary) as book:
            sheet = book.get_sheet_by_index(0)
            rows = enumerate(sheet.iter_rows(), (sheet.start or (0, 0))[0] + 1)
            filled = ((line, row) for line, row in rows if row.count("") < len(row))
            return _written(path, filled)
    except (python_calamine.CalamineError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: not an Excel file ({error}); save it again as .xlsx") from error


def _written(path: str, rows: Iterator[tuple[int, list[Any]]]) -> BinaryIO:
    import pyarrow
    from pyarrow import ipc

    _, header = next(rows, (1, None))
    if header is None:
        raise DataError(f"{path}: the first sheet is empty; its first row names the columns, id,text,image,label")
    names = check_header(path, [_shown(cell) or "" for cell in header])
    schema = pyarrow.schema([(LINE, pyarrow.int64()), *((name, pyarrow.string()) for name in names if name)])
    copy: Any = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the table
    with ipc.new_file(copy, schema) as writer:
        while batch := list(islice(rows, BATCH)):
            cells = zip(*(row for _, row in batch), strict=True)
            columns = [[_shown(cell) for cell in column] for name, column in zip(names, cells, strict=True) if name]
            writer.write_batch(pyarrow.record_batch([[line for line, _ in batch], *columns], schema=schema))
    return copy


def _shown(cell: Any) -> str | None:
    """The text of a cell; all numbers of a sheet are floats, and Excel shows 1.0 as 1."""
    return None if cell == "" else str(int(cell) if isinstance(cell, float) and cell.is_integer() else cell)
