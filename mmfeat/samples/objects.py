"""Data that are no files of the user: frames, Arrow tables, lists of dicts, and data sets of the library `datasets`.

Each is written once a process into a temporary Parquet file, and read from there as a table. An object is called
`object://frame-HASH`, by its content: a run records the name and needs the object again. `hf:NAME[:SPLIT]` names a data
set of the Hub, or the folder of one that was saved to disk.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfeat.errors import DataError
from mmfeat.system.remote import HUB, absolute, hub_parts, temporary_folder
from mmfeat.version import install_command

if TYPE_CHECKING:
    import pyarrow

OBJECT = "object://"
FRAME = "frame"  # the cache folder of every object, so that one with more rows finds the old vectors
ROWS = 1000  # rows that are in memory at once, and in one group of the file
_files: dict[str, str] = {}  # name -> temporary Parquet file
_passing = threading.Lock()


def written(data: Any) -> str:
    """The name `object://frame-HASH` of an object, after it is written. Raises `DataError` for one of another kind."""
    path = _write(_batches(data))
    name = f"{OBJECT}{FRAME}-{Path(path).stem}"
    _files[name] = path
    return name


@contextmanager
def passing(data: Any) -> Iterator[str]:
    """The name of an object whose file, unless it was there before, is deleted at the end; one thread at a time."""
    with _passing:
        before = set(_files)
        name = written(data)
        try:
            yield name
        finally:
            if name not in before:
                os.unlink(_files.pop(name))


def file_of(name: str) -> str:
    """The Parquet file of a name that stands for an object or a data set of the Hub.

    Raises `DataError` for an object of another process, and for a data set that is not there.
    """
    if name.startswith(HUB):
        key = f"{absolute(name)} {_changed(hub_parts(name)[0])}"
        if key not in _files:
            _files[key] = _write(_batches(_load(name)))
        return _files[key]
    if name not in _files:
        raise DataError(f"{name}: an object of a Python program, which is not here; give it again as data=...")
    return _files[name]


def _changed(folder: str) -> int:
    """When a file below a folder was last changed, in nanoseconds; 0 where there is none."""
    files = (os.path.join(here, name) for here, _, names in os.walk(folder) for name in names)
    return max((os.stat(file).st_mtime_ns for file in files), default=0)


def without_files(message: str) -> str:
    """The message with the names of objects and data sets in place of their temporary files."""
    for name, path in _files.items():
        message = message.replace(path, "data" if name.startswith(OBJECT) else name.split()[0])
    return message


def short_name(name: str) -> str:
    return FRAME if name.startswith(OBJECT) else Path(hub_parts(name)[0]).name


def _batches(data: Any) -> Iterator[pyarrow.Table]:
    """Yield the rows of an object, some at a time."""
    import pyarrow

    if hasattr(data, "with_format") and hasattr(data, "features"):
        yield from _of_hub(data)
        return
    try:
        if isinstance(data, list | tuple) and all(isinstance(row, dict) for row in data):
            table = pyarrow.Table.from_pylist([{name: _plain(cell) for name, cell in row.items()} for row in data])
        elif isinstance(data, pyarrow.Table):
            table = data
        elif hasattr(data, "to_arrow"):
            table = data.to_arrow()
        elif type(data).__module__.startswith("pandas") and hasattr(data, "columns"):
            objects = data.columns[[str(kind) == "object" for kind in data.dtypes]]
            cells = {str(name): [_plain(cell) for cell in data[name]] for name in objects}
            index = [name for name in data.index.names if name is not None and name not in data.columns]
            rows = data.assign(**cells).reset_index(index) if index else data.assign(**cells)
            table = pyarrow.Table.from_pandas(rows, preserve_index=False)
        elif hasattr(data, "__arrow_c_stream__"):  # of DuckDB, narwhals, Ibis and others
            table = pyarrow.table(data)
        else:
            kinds = "a path, a pandas or polars frame, an Arrow table, a datasets.Dataset or a list of dicts"
            raise DataError(f"data is {type(data).__name__}; give {kinds}")
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise DataError(f"data: no table can be made of it ({reason}); give a frame with a column for each") from error
    table = table.combine_chunks().replace_schema_metadata(None)
    yield table.slice(0, 0)
    yield from (table.slice(start, ROWS) for start in range(0, len(table), ROWS))


def _plain(cell: Any) -> Any:
    """A cell as Arrow takes it: a picture of Pillow becomes the bytes of a PNG, a path its text."""
    if isinstance(cell, os.PathLike):
        return os.fspath(cell)
    if hasattr(cell, "save") and hasattr(cell, "getexif"):
        file = io.BytesIO()
        cell.save(file, "PNG")
        return file.getvalue()
    return cell


def _of_hub(data: Any) -> Iterator[pyarrow.Table]:
    """Yield the rows of a `datasets.Dataset` with the names of classes in place of their numbers."""
    import pyarrow

    if isinstance(data.features, dict) and not hasattr(data, "num_rows"):
        raise DataError("data is several splits of datasets; give one of them, as in data['train']")
    classes = {name: kind.names for name, kind in data.features.items() if getattr(kind, "names", None)}
    plain = data.with_format("arrow")
    for start in range(0, max(1, data.num_rows), ROWS):
        table = plain[start : start + ROWS].replace_schema_metadata(None)
        for name, names in classes.items():
            numbers = table.column(name).to_pylist()
            labels = [None if number is None or number < 0 else names[number] for number in numbers]
            column = pyarrow.array(labels, pyarrow.string())
            table = table.set_column(table.schema.get_field_index(name), name, column)
        yield table


def _write(batches: Iterable[pyarrow.Table]) -> str:
    """Write rows into a Parquet file; its name is the hash of names, types and cells."""
    import pyarrow.parquet

    digest, writer = hashlib.sha256(), None
    with tempfile.NamedTemporaryFile(dir=temporary_folder(), delete=False) as file:
        for table in batches:
            if writer is None:
                writer = pyarrow.parquet.ParquetWriter(file, table.schema)
                digest.update(str(table.schema).encode())
            table = table.cast(writer.schema).combine_chunks()
            for batch in table.to_batches():
                digest.update(batch.serialize())
            writer.write_table(table, row_group_size=ROWS)
        if writer is not None:
            writer.close()
    path = os.path.join(temporary_folder(), f"{digest.hexdigest()[:16]}.parquet")
    os.replace(file.name, path)
    return path


def _load(name: str) -> Any:
    """The data set that `hf:NAME[:SPLIT]` names. Raises `DataError` in one line for all that can go wrong."""
    try:
        import datasets
        import huggingface_hub
    except ImportError as error:
        raise DataError(f"{name}: the library datasets is not installed; {install_command('hf')}") from error
    source, split = hub_parts(name)
    datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity_error()
    huggingface_hub.utils.logging.set_verbosity_error()
    try:
        saved = os.path.isdir(source) and any(
            os.path.isfile(os.path.join(source, file)) for file in ("dataset_info.json", "dataset_dict.json")
        )
        loaded = datasets.load_from_disk(source) if saved else datasets.load_dataset(source)
    except Exception as error:  # the library and the network raise errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{name}: datasets cannot load it ({type(error).__name__}: {reason})") from error
    if not isinstance(loaded, dict):
        if split:
            raise DataError(f"{name}: {source} has no splits; say {HUB}{source}")
        return loaded
    if len(loaded) == 1 and not split:
        return next(iter(loaded.values()))
    if split not in loaded:
        what = f"no split {split}" if split else "several splits"
        shown = ", ".join(f"{HUB}{source}:{part}" for part in loaded)
        raise DataError(f"{name}: {what}; name one: {shown}")
    return loaded[split]
