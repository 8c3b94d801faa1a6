"""Files of tables: their suffixes, the files that a name stands for, and opening them, compressed or not."""

from __future__ import annotations

import errno
import io
import os
import re
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from mmfeat.errors import DataError
from mmfeat.system.files import no_such_data
from mmfeat.system.remote import (
    BROKEN,
    COMPRESSIONS,
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
