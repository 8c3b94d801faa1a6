"""Binary tables: the rows of Parquet, Arrow, Feather and Excel files."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, TypeAlias

from mmfeat.errors import DataError
from mmfeat.samples.delimited import check_header
from mmfeat.samples.table_files import open_table
from mmfeat.system.remote import PIECE

BATCH = 4096  # rows that are made Python objects at a time
BATCH_BYTES = 1 << 23  # bytes of a Parquet file that are read at a time
LARGEST_BOOK = 1 << 31  # bytes of an Excel file, unpacked
LINE = "#line"  # the column of line numbers in the copy of a sheet

Rows: TypeAlias = "Iterator[tuple[int, dict[str, object]]]"  # row number and cells


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
