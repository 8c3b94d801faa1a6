"""Samples: id, text, image path and label; any of text, image and label may be missing.

`read_samples` reads the folder layout (`train.txt`, `test_without_label.txt`, `data/GUID.jpg`,
`data/GUID.txt`) or one CSV / TSV / JSONL / Parquet table. A missing or broken part is data, not an
exception: the sample stays, with the reason.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np

from mmfeat.errors import DataError
from mmfeat.samples.images import MemoryFile
from mmfeat.samples.tables import READERS, read_table, table_suffix
from mmfeat.samples.texts import decode_text
from mmfeat.system.remote import RemoteFile, absolute, exists, is_remote


def checked_id(value: str | None, where: str, seen: SeenIds) -> str:
    """The id, if it is new and no path; `seen` maps each id to where it stood."""
    id = (value or "").strip()
    if not id or not id.isprintable():
        raise DataError(f"{where}: an id must be printable text, this is {value!r}; give the sample an id")
    if "/" in id or "\\" in id or ".." in id:
        raise DataError(f"{where}: the id {id!r} looks like a path; use a plain id without / \\ and ..")
    if id in seen:
        raise DataError(f"{where}: the id {id!r} stands already at {seen[id]}; remove or rename one of them")
    seen[id] = where
    return id


class SeenIds(Protocol):
    """Where each id stood; a dict is one."""

    def __contains__(self, id: object) -> bool: ...
    def __getitem__(self, id: str) -> str: ...
    def __setitem__(self, id: str, where: str) -> None: ...


class HashedIds:
    """Ids in eight bytes each, which are compared at the end; equal ones are found among `doubles`."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def __contains__(self, id: object) -> bool:
        return False

    def __getitem__(self, id: str) -> str:
        raise KeyError(id)

    def __setitem__(self, id: str, where: str) -> None:
        self._hashes.append(_hash(id))

    def doubles(self) -> frozenset[int]:
        """Hashes that occur more than once."""
        hashes = np.frombuffer(self._hashes, np.uint64) if self._hashes else np.empty(0, np.uint64)
        hashes = np.sort(hashes)
        return frozenset(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


class SuspectIds(dict[str, str]):
    """Remembers only the ids with one of some hashes."""

    def __init__(self, hashes: frozenset[int]) -> None:
        super().__init__()
        self._hashes = hashes

    def __setitem__(self, id: str, where: str) -> None:
        if self._hashes and _hash(id) in self._hashes:
            super().__setitem__(id, where)


def _hash(id: str) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(id.encode())


MODALITIES = ("text", "image")
PART = {"text": "text", "image": "photo"}  # what a person calls one
COLUMNS = ("id", "text", "image", "label")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TRAIN_LIST = "train.txt"
TEST_LIST = "test_without_label.txt"
NO_LABEL = ("", "null", "nan", "NaN")
KEY_LENGTH = 32
Photo: TypeAlias = "Path | RemoteFile | MemoryFile"


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair. `text_error` and `image_error` say why a part is missing, and are empty otherwise."""

    id: str
    text: str | None = None
    image: Photo | None = None
    label: str | None = None
    text_error: str = ""
    image_error: str = ""

    def key(self, modality: str) -> tuple[bytes | None, str]:
        """(content key, "") of this modality, or (None, why there is none)."""
        if modality == "text":
            return (None, self.text_error) if self.text is None else (content_key(self.text.encode()), "")
        if self.image is None:
            return None, self.image_error
        try:
            return content_key(self.image.read_bytes()), ""
        except OSError as error:
            return None, f"unreadable: {error.strerror}"


@dataclass(frozen=True)
class SampleSet:
    """The samples of one data set in the order of its lists; `classes` are the label names, sorted."""

    name: str
    source: str
    samples: tuple[Sample, ...]
    encodings: Mapping[str, int] = field(default_factory=dict)
    unused_columns: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({sample.label for sample in self.samples if sample.label is not None}))

    @property
    def labelled(self) -> tuple[Sample, ...]:
        return tuple(sample for sample in self.samples if sample.label is not None)

    @property
    def unlabelled(self) -> tuple[Sample, ...]:
        return tuple(sample for sample in self.samples if sample.label is None)


def content_key(data: bytes) -> bytes:
    """What a vector is stored under: the first 32 digits that `sha256sum` prints, as ASCII."""
    return hashlib.sha256(data).hexdigest()[:KEY_LENGTH].encode()


def read_samples(data: str | Path, columns: Mapping[str, str] | None = None) -> SampleSet:
    """Read the folder or table `data`; `columns` maps id, text, image, label to a table's own names.

    A table may be a URL that fsspec opens. Raises `DataError` with file, line and remedy for duplicate ids, ids that
    are paths, unknown labels in a later list, an empty set and a label list without its image folder.
    """
    source = SampleSource(data, columns)
    encodings: Counter[str] = Counter()
    unused: list[str] = []
    samples = tuple(source.read({}, encodings, unused))
    if not samples:
        raise source.empty
    return SampleSet(source.name, str(data), samples, dict(encodings), tuple(unused))


@dataclass(frozen=True)
class Overview:
    """What a data set holds, without holding it: how many samples, how many of them with each label."""

    name: str
    source: str
    count: int
    labels: Mapping[str, int]
    encodings: Mapping[str, int] = field(default_factory=dict)
    unused_columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, samples: SampleSet) -> Overview:
        """That of samples that were read."""
        labels = Counter(sample.label for sample in samples if sample.label is not None)
        return cls(samples.name, samples.source, len(samples), labels, samples.encodings, samples.unused_columns)

    def __len__(self) -> int:
        return self.count


class SampleSource:
    """A data set that is read as it is used: its memory does not grow with the number of samples in a table."""

    def __init__(self, data: str | Path, columns: Mapping[str, str] | None = None) -> None:
        if not str(data):
            raise DataError("--data is empty; name a folder or a table")
        self.data, self.columns = str(data), dict(columns or {})
        self._is_folder = not is_remote(self.data) and os.path.isdir(self.data)
        if not self._is_folder and not exists(self.data):
            raise DataError(f"{self.data}: no such folder or table; check --data")
        place = Path(absolute(self.data))  # gives "." its name, and leaves a link the name the user chose
        self.name = place.name if self._is_folder else place.stem
        self._folder: SampleSet | None = None  # its listing is in memory anyway

    def overview(self) -> Overview:
        """Count and check all samples; no photo is looked at. Raises `DataError` as `read_samples` does."""
        if self._is_folder:
            return Overview.of(self._listed())
        encodings: Counter[str] = Counter()
        labels: Counter[str] = Counter()
        unused: list[str] = []
        seen, count = HashedIds(), 0
        for count, sample in enumerate(self.read(seen, encodings, unused, look=False), 1):  # noqa: B007
            if sample.label is not None:
                labels[sample.label] += 1
        if not count:
            raise self.empty
        if doubles := seen.doubles():
            for _ in self.read(SuspectIds(doubles), Counter(), [], look=False):  # names the two lines
                pass
        return Overview(self.name, self.data, count, labels, dict(encodings), tuple(unused))

    def blocks(self, size: int) -> Iterator[list[Sample]]:
        """All samples, `size` at a time."""
        samples = iter(self._listed()) if self._is_folder else self.read(SuspectIds(frozenset()), Counter(), [])
        while block := list(islice(samples, size)):
            yield block

    def read(self, seen: SeenIds, encodings: Counter[str], unused: list[str], look: bool = True) -> Iterator[Sample]:
        """The samples one by one, noting what is met on the way; with `look`, whether their photos are there."""
        if self._is_folder:
            return _read_folder(Path(self.data), encodings, seen)
        return _read_table(self.data, self.columns, encodings, unused, seen, look)

    def _listed(self) -> SampleSet:
        if self._folder is None:
            self._folder = read_samples(self.data)
        return self._folder

    @property
    def empty(self) -> DataError:
        return DataError(f"{self.data}: no samples; a list needs at least one `guid,tag` line, a table one row")


def _read_folder(folder: Path, encodings: Counter[str], seen: SeenIds) -> Iterator[Sample]:
    lists = [folder / name for name in (TRAIN_LIST, TEST_LIST) if (folder / name).is_file()]
    if not lists:
        raise DataError(f"{folder}: neither {TRAIN_LIST} nor {TEST_LIST} is here; {_named_instead(folder)}")
    if not (folder / "data").is_dir():
        raise DataError(f"{lists[0]}: the folder {folder / 'data'} with its images and texts is missing; put it there")
    images, texts = _index_files(folder / "data")
    for id, label in _read_lists(lists, seen):
        text, text_error = read_text(texts.get(id), encodings)
        image = images.get(id)
        yield Sample(id, text, image, label, text_error, "" if image else "no image file")


def _named_instead(folder: Path) -> str:
    """What else in this folder may be meant."""
    inside = sorted(folder.iterdir())
    if tables := [path for path in inside if path.suffix.lower() in READERS and path.is_file()]:
        return f"name the table: --data {tables[0]}"
    if deeper := [path for path in inside if (path / TRAIN_LIST).is_file()]:
        return f"name the folder that holds them: --data {deeper[0]}"
    return "name the folder that holds them, or a table"


def _read_lists(lists: list[Path], seen: SeenIds) -> Iterator[tuple[str, str | None]]:
    """Yield (id, label) over all lists; only the first may introduce label names."""
    classes: set[str] = set()
    for path in lists:
        known = frozenset(classes)
        for line, cells in _list_rows(path):
            where = f"{path}:{line}"
            if len(cells) != 2:
                raise DataError(f"{where}: {','.join(cells)[:60]!r} is not `guid,tag`; one comma parts the two")
            id, label = checked_id(cells[0], where, seen), cells[1].strip()
            if label in NO_LABEL and path.name == TRAIN_LIST:
                raise DataError(f"{where}: {id!r} has no label; label it or move the line to {TEST_LIST}")
            if label not in NO_LABEL and known and label not in known:
                raise DataError(
                    f"{where}: unknown label {label!r}; {lists[0].name} has {', '.join(sorted(known))}; "
                    "correct the name or leave `null`"
                )
            classes.add(label)
            yield id, None if label in NO_LABEL else label


def _list_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Lines are split by hand: quotes mean nothing in these lists, and must not join lines."""
    text, _ = decode_text(path.read_bytes())
    rows = [(number, line.split(",")) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if rows and rows[0][1][0].strip().lower() in ("guid", "id"):
        del rows[0]
    yield from rows


def _index_files(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Image and text file of each id; where an id has several images the first suffix wins."""
    images: dict[str, Path] = {}
    texts: dict[str, Path] = {}
    rank = {suffix: position for position, suffix in enumerate(IMAGE_SUFFIXES)}
    entries = sorted((Path(entry.path) for entry in os.scandir(folder)), key=lambda path: path.name)
    for path in sorted(entries, key=lambda path: rank.get(path.suffix.lower(), len(rank))):
        if path.suffix.lower() in rank:
            images.setdefault(path.stem, path)
        elif path.suffix.lower() == ".txt":
            texts.setdefault(path.stem, path)
    return images, texts


def read_text(path: Path | None, encodings: Counter[str]) -> tuple[str | None, str]:
    """(text, "") of a file, or (None, why there is none); counts its encoding."""
    if path is None:
        return None, "no text file"
    try:
        text, encoding = decode_text(path.read_bytes())
    except OSError as error:
        return None, f"unreadable: {error.strerror}"
    encodings[encoding] += 1
    return (text, "") if text.strip() else (None, "empty text")


def _read_table(
    path: str, columns: dict[str, str], encodings: Counter[str], unused: list[str], seen: SeenIds, look: bool
) -> Iterator[Sample]:
    """The rows of a table; columns that nothing is read from go into `unused`: one may be a label renamed."""
    names = {column: columns.get(column, column) for column in COLUMNS}
    if unknown := set(columns) - set(COLUMNS):
        raise DataError(f"--columns: {', '.join(sorted(unknown))} is none of {', '.join(COLUMNS)}")
    folder, first = os.path.dirname(path), True
    for line, row in read_table(path, encodings, names.values()):
        if first:
            unused += [name for name in row if name not in names.values()]
            if table_suffix(path) != ".jsonl":  # an object may leave out what it lacks
                _check_columns(path, names, columns, row)
            first = False
        id = checked_id(row.get(names["id"]), f"{path}:{line}", seen)
        text, label = row.get(names["text"]), row.get(names["label"])
        text = text if text and text.strip() else None
        image, image_error = _table_image(folder, row.get(names["image"])) if look else (None, "")
        label = None if label is None or label.strip() in NO_LABEL else label.strip()
        if label and not label.isprintable():
            raise DataError(f"{path}:{line}: the label {label!r} is not one printable line; is a quote missing above?")
        yield Sample(id, text, image, label, "" if text else "no text", image_error)


def _check_columns(path: str, names: dict[str, str], named: dict[str, str], row: Mapping[str, object]) -> None:
    wanted = {"id", *named}
    missing = [names[column] for column in COLUMNS if column in wanted and names[column] not in row]
    if names["text"] not in row and names["image"] not in row and not {"text", "image"} & wanted:
        missing.append(f"{names['text']} or {names['image']}")
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(missing)} among {', '.join(row)}; "
            "name yours with --columns id=...,text=...,image=...,label=..."
        )


def _table_image(folder: str, cell: str | None) -> tuple[Path | RemoteFile | None, str]:
    """A table names images relative to its own folder, or by URL; whether a remote one is there shows in reading."""
    if cell is None:
        return None, "no image file"
    if is_remote(cell):
        return RemoteFile(cell), ""
    image = os.path.join(folder, cell)
    if is_remote(image):
        return RemoteFile(image), ""
    return (Path(image), "") if os.path.isfile(image) else (None, "image file not found")
