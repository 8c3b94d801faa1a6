"""Photos that the cells of a table name or hold: paths in all spellings, URLs, bytes, base64, and several of these."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import os
import re
import shlex
import tempfile
import threading
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias
from unicodedata import normalize
from urllib.parse import unquote, urlsplit

from mmfeat.samples.contents import MemoryFile, without_surrogates
from mmfeat.samples.labels import is_missing, part_named, part_of_file
from mmfeat.samples.table_files import open_parquet
from mmfeat.system.remote import RemoteFile, files_of, is_remote, split_url

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
IMAGE_ROOT, IMAGE_PATTERN, IMAGES = "image-root", "image-pattern", "images"
PHOTO_FLAGS = (IMAGE_ROOT, IMAGE_PATTERN, IMAGES)  # what a user may say of the photos of a table
FIRST, MEAN = "first", "mean"  # what stands for several photos of a sample
NEARBY = 50  # folders beside a table that are tried for the proposal of a root

_ENCODED = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk", "SUkq", "TU0A")  # base64 of the first bytes of photos
_LEAST_ENCODED = 64  # letters of base64; shorter cells are paths
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+=*\s*")
_DATA_URI = re.compile(r"data:[\w/+.-]*(?:;[\w=-]+)*;base64,", re.IGNORECASE)
_URLS = re.compile(r"[;|,\s]+(?=[A-Za-z][A-Za-z0-9+.-]+://)")
COPIED_BYTES = 1 << 18  # bytes of a batch of the copy of a row group
_reading = threading.Lock()
_PATH_KEYS = ("path", "url", "src", "file_name")


@dataclass(frozen=True)
class TablePhoto:
    """A photo in a cell of a Parquet file, read when it is used; `place` counts the photos of the cell."""

    file: str
    column: str
    row: int
    place: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"

    @property
    def name(self) -> str:
        return os.path.basename(str(self))

    def read_bytes(self) -> bytes:
        """The bytes of the photo. Raises `OSError` where the file has changed or cannot be read."""
        import pyarrow

        status = os.stat(self.file)
        try:
            cell = _parquet_cell(self.file, self.column, self.row - 1, (status.st_mtime_ns, status.st_size))
            photos = [item for item in _items(cell) if isinstance(item, bytes)]
            return photos[self.place]
        except (pyarrow.ArrowException, IndexError) as error:
            raise OSError(5, "the table has changed", self.file) from error


@dataclass(frozen=True)
class Photos:
    """The photos of a sample that has several; whatever takes one photo takes the first."""

    photos: tuple[Path | RemoteFile | MemoryFile | TablePhoto, ...]

    def __str__(self) -> str:
        return ";".join(map(str, self.photos))

    @property
    def name(self) -> str:
        return self.photos[0].name

    def read_bytes(self) -> bytes:
        return self.photos[0].read_bytes()


Photo: TypeAlias = "Path | RemoteFile | MemoryFile | TablePhoto | Photos"


class PhotoFinder:
    """Finds the photos of cells; counts the cells that name one and those whose photo is there.

    `named` holds what the user says of photos. Paths are relative to the root that is named, else to the table.
    Whether a remote photo exists shows only when it is read.
    """

    def __init__(self, named: Mapping[str, str]) -> None:
        self._root, self._first = named.get(IMAGE_ROOT, ""), named.get(IMAGES) == FIRST
        self.count = self.found = 0
        self.missing = ("", "", "")  # the folder and the cell of the first photo that is not there, and FILE:LINE

    def find(self, cell: object, where: str, column: str = "") -> tuple[Photo | None, str]:
        """(photo of the cell at "FILE:LINE", "") or (None, the reason for no photo)."""
        folder = self._root or os.path.dirname(where)
        items = list(_items(cell))
        if not items:
            return None, "no image file"
        self.count += 1
        photos: list[Any] = []
        for place, item in enumerate(items):
            if isinstance(item, bytes):
                photos.append(_in_table(where, column, place) or MemoryFile(item, where))
            else:
                photos += self._named(item, folder, where)
        if not photos:
            self.missing = self.missing if self.missing[1] else (folder, str(items[0]), where)
            return None, "image file not found"
        self.found += 1
        return (photos[0] if len(photos) == 1 or self._first else Photos(tuple(photos))), ""

    def complaint(self) -> str:
        """A line about photos that are not there, with the first path and a remedy; "" where most photos are there."""
        folder, cell, where = self.missing
        if self.found * 2 >= self.count:
            return ""
        missing = f"{self.count - self.found:,}" if self.found else "none"
        what = f"{missing} of {self.count:,} photos {'are not' if self.found else 'is'} found"
        tried = os.path.join(os.path.abspath(folder), cell)
        what = f"{what}; the first path tried is {tried}"
        if os.path.isdir(tried):
            return f"{what}, a folder; name photos, or say --image-pattern {shlex.quote(cell.strip('/') + '/{id}.jpg')}"
        if alike := _alike(folder, cell):
            return f"{what}; {alike} is there: write its name so in the table"
        root = nearby_root(folder, cell, part_of_file(where.rpartition(":")[0])) if not self._root else ""
        named = shlex.quote(root) if root else f"FOLDER, where FOLDER/{cell} is the photo"
        return f"{what}; say --image-root {named}"

    def _named(self, text: str, folder: str, where: str) -> Sequence[Photo]:
        """The photo of a text, or its photos where it is a list; none where no photo is there."""
        if (data := _decoded(text)) is not None:
            return [MemoryFile(data, where)]
        if is_remote(text) and len(urls := _URLS.split(text)) > 1:
            return [photo for url in urls if (photo := self._one(url, folder))]
        if photo := self._one(text, folder):
            return [photo]
        for separator in ";|,":
            parts = [part for part in text.split(separator) if part.strip()]
            if len(parts) > 1 and (photos := [photo for part in parts if (photo := self._one(part, folder))]):
                return photos
        return []

    def _one(self, text: str, folder: str) -> Path | RemoteFile | None:
        if is_remote(text.strip()):
            if not text.strip().lower().startswith("file://"):
                return RemoteFile(text.strip())
            text = unquote(urlsplit(text.strip()).path)
        if is_remote(joined := os.path.join(folder, text)):
            in_archive = split_url(joined) is not None
            return RemoteFile(joined) if not in_archive or files_of(joined) else None
        if os.path.isfile(joined):
            return Path(joined)
        names = [*_spellings(text), *([os.path.basename(text.replace("\\", "/"))] if self._root else [])]
        paths = (os.path.join(folder, name) for name in names)
        return next((Path(path) for path in paths if os.path.isfile(path)), None)


def _items(cell: Any) -> Iterator[str | bytes]:
    """The photos of a cell, as bytes or as texts that name them: none for a missing one, several for a list."""
    if isinstance(cell, list | tuple):
        for item in cell:
            yield from _items(item)
    elif isinstance(cell, Mapping):
        data = cell.get("bytes")
        yield from _items(data or next((cell[key] for key in _PATH_KEYS if cell.get(key)), None))
    elif isinstance(cell, bytes):
        text = _as_text(cell)
        yield from [cell] if text is None else _items(text)
    elif isinstance(cell, str) and not is_missing(cell):
        text = cell.strip()
        yield from _items(_listed(text)) if text[:1] + text[-1:] == "[]" else [without_surrogates(cell)]
    elif isinstance(cell, int | float) and cell == cell:
        yield str(int(cell) if float(cell).is_integer() else cell)  # names of files that are numbers


def _as_text(data: bytes) -> str | None:
    """The text of a binary cell that holds a name; None for the bytes of a photo."""
    try:
        return None if b"\0" in data else data.decode()
    except UnicodeDecodeError:
        return None


def _listed(text: str) -> list[str]:
    """The names in a list that was written as text, by JSON or Python."""
    try:
        names = json.loads(text)
    except ValueError:
        names = [name.strip(" '\"") for name in text[1:-1].split(",")]
    return [name for name in names if isinstance(name, str)]


def _decoded(text: str) -> bytes | None:
    """The bytes of a data URI or of base64 without one; None for other texts."""
    if uri := _DATA_URI.match(text.lstrip()):
        text = text.lstrip()[uri.end() :]
    elif len(text) < _LEAST_ENCODED or not text.lstrip().startswith(_ENCODED) or not _BASE64.fullmatch(text):
        return None
    try:
        plain = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
        return base64.b64decode(plain + "=" * (-len(plain) % 4))
    except (binascii.Error, ValueError):
        return b""  # no photo, for a reason that shows when it is decoded


def _spellings(text: str) -> Iterable[str]:
    """Other forms in which systems and people write the path of a file, the likely ones first."""
    stripped = text.strip()
    slashes = stripped.replace("\\", "/")
    forms = [stripped, slashes, unquote(slashes), unquote(slashes).lstrip("/")]
    # A Mac writes the accents of a name as letters of their own, most other systems do not.
    names = dict.fromkeys(normalize(form, name) for name in forms for form in ("NFC", "NFD"))
    for name in (text, *names):
        yield name
    for name in names:
        stem, suffix = os.path.splitext(name)
        others = (suffix.lower(), suffix.upper()) if suffix.lower() in IMAGE_SUFFIXES else ()
        yield from (stem + other for other in others)
        yield from (name + other for suffix in IMAGE_SUFFIXES if not others for other in (suffix, suffix.upper()))


def _alike(folder: str, cell: str) -> str:
    """The file whose path differs from that of a cell in capitals or in the suffix alone, "" without one."""
    here, names = folder or ".", [name for name in re.split(r"[/\\]", cell.strip()) if name not in ("", ".")]
    for place, name in enumerate(names, 1):
        is_last = place == len(names)
        inside = sorted(os.listdir(here)) if os.path.isdir(here) else []
        wanted = (os.path.splitext(name)[0] if is_last else name).casefold()
        plain = [(os.path.splitext(other)[0] if is_last else other).casefold() for other in inside]
        if wanted not in plain:
            return ""
        here = os.path.join(here, inside[plain.index(wanted)])
    return os.path.normpath(here) if names and os.path.isfile(here) else ""


def nearby_root(folder: str, cell: str, part: str) -> str:
    """A folder above the table, or one beside it, in which the photo of a cell is found; "" where there is none.

    Folders of the table's own part of a split come first, and those of other parts last: the photos of training and of
    test data often have the same names. Then come folders that the cell names.
    """
    if is_remote(folder) or not os.path.isdir(folder or "."):
        return ""
    here = Path(folder or ".").absolute()
    inside = sorted(
        (entry.path for entry in os.scandir(here) if entry.is_dir()), key=lambda path: _far(path, part, cell)
    )
    beside = inside[:NEARBY]
    for root in (*map(str, list(here.parents)[:3]), *beside):
        if PhotoFinder({IMAGE_ROOT: root}).find(cell, "")[0] is not None:
            relative = os.path.relpath(root)
            return root if relative.startswith("../..") else relative
    return ""


def _far(path: str, part: str, cell: str) -> tuple[int, bool, str]:
    name = os.path.basename(path)
    own = part_named(name)
    return (0 if own == part != "" else 2 if own else 1), name not in re.split(r"[/\\]", cell), path


def _in_table(where: str, column: str, place: int) -> TablePhoto | None:
    """The photo in a cell of a local Parquet file, which need not stay in memory."""
    file, _, row = where.rpartition(":")
    if not column or is_remote(file) or not file.lower().endswith(".parquet"):
        return None
    return TablePhoto(os.path.abspath(file), column, int(row), place)


def _parquet_cell(file: str, column: str, row: int, stamp: tuple[int, int]) -> Any:
    with _reading:  # else each thread would copy the group
        starts = _row_groups(file, stamp)
        group = bisect_right(starts, row) - 1
        batches, size = _copied_group(file, column, group, stamp)
        number, place = divmod(row - starts[group], size)
        return batches.get_batch(number).column(0)[place].as_py()


@functools.lru_cache(16)
def _row_groups(file: str, stamp: tuple[int, int]) -> list[int]:
    """The first row of each row group of a file with this stamp."""
    import pyarrow.parquet

    facts = pyarrow.parquet.read_metadata(file)
    counts = (facts.row_group(group).num_rows for group in range(facts.num_row_groups))
    return [0, *accumulate(counts)][:-1]


@functools.lru_cache(2)  # neighbours are read one after the other
def _copied_group(file: str, column: str, group: int, stamp: tuple[int, int]) -> tuple[Any, int]:
    """(The cells of a row group in batches of a temporary Arrow file, rows of a batch).

    Within a Parquet file no cell is found without all before it, and a group may be larger than memory.
    """
    import pyarrow
    from pyarrow import ipc

    with open_parquet(file) as opened:
        facts = opened.metadata.row_group(group)
        rows = max(1, COPIED_BYTES * facts.num_rows // max(1, facts.total_byte_size))
        schema = pyarrow.schema([opened.schema_arrow.field(column)])
        copy: Any = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the batches
        with ipc.new_file(copy, schema) as writer:
            for batch in opened.iter_batches(rows, [group], [column], use_threads=False):
                writer.write_batch(batch)
        return ipc.open_file(copy), rows


def packed(photo: Photo | None) -> Any:
    """A photo as plain values for JSON, which `unpacked` reads on another machine."""
    if isinstance(photo, Photos):
        return [packed(one) for one in photo.photos]
    if isinstance(photo, TablePhoto):
        return {"file": photo.file, "column": photo.column, "row": photo.row, "place": photo.place}
    if isinstance(photo, MemoryFile):
        return {"data": base64.b64encode(photo.data).decode(), "name": photo.name}
    return None if photo is None else str(photo)


def unpacked(values: Any) -> Photo | None:
    """The photo of `packed`."""
    if isinstance(values, list):
        return Photos(tuple(unpacked(one) for one in values))  # type: ignore[misc]
    if isinstance(values, dict):
        if "data" in values:
            return MemoryFile(base64.b64decode(values["data"]), values["name"])
        return TablePhoto(**values)
    return None if values is None else RemoteFile(values) if is_remote(values) else Path(values)
