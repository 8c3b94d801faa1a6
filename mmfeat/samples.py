"""Samples: id, text, image path and label; any of text, image and label may be missing.

`read_samples` reads the folder layout (`train.txt`, `test_without_label.txt`, `data/GUID.jpg`,
`data/GUID.txt`) or one CSV / TSV / JSONL / Parquet table. A missing or broken part is data, not an
exception: the sample stays, with the reason.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmfeat.errors import DataError
from mmfeat.tables import read_table
from mmfeat.texts import decode_text

MODALITIES = ("text", "image")
COLUMNS = ("id", "text", "image", "label")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TRAIN_LIST = "train.txt"
TEST_LIST = "test_without_label.txt"
NO_LABEL = ("", "null", "nan", "NaN")
KEY_LENGTH = 32


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair. `text_error` and `image_error` say why a part is missing, and are empty otherwise."""

    id: str
    text: str | None = None
    image: Path | None = None
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

    Raises `DataError` with file, line and remedy for duplicate ids, ids that are paths, unknown
    labels in a later list, an empty set and a label list without its image folder.
    """
    if not str(data):
        raise DataError("--data is empty; name a folder or a table")
    path = Path(data)
    encodings: Counter[str] = Counter()
    unused: list[str] = []
    if path.is_dir():
        samples = list(_read_folder(path, encodings))
    elif path.is_file():
        samples = list(_read_table(path, dict(columns or {}), encodings, unused))
    else:
        raise DataError(f"{path}: no such folder or table; check --data")
    if not samples:
        raise DataError(f"{path}: no samples; a list needs at least one `guid,tag` line, a table one row")
    place = Path(os.path.abspath(path))  # gives "." its name, and leaves a link the name the user chose
    name = place.stem if path.is_file() else place.name
    return SampleSet(name, str(data), tuple(samples), dict(encodings), tuple(unused))


def _read_folder(folder: Path, encodings: Counter[str]) -> Iterator[Sample]:
    lists = [folder / name for name in (TRAIN_LIST, TEST_LIST) if (folder / name).is_file()]
    if not lists:
        raise DataError(f"{folder}: neither {TRAIN_LIST} nor {TEST_LIST} is here; name the folder that holds them")
    if not (folder / "data").is_dir():
        raise DataError(f"{lists[0]}: the folder {folder / 'data'} with its images and texts is missing; put it there")
    images, texts = _index_files(folder / "data")
    for id, label in _read_lists(lists):
        text, text_error = _read_text(texts.get(id), encodings)
        image = images.get(id)
        yield Sample(id, text, image, label, text_error, "" if image else "no image file")


def _read_lists(lists: list[Path]) -> Iterator[tuple[str, str | None]]:
    """Yield (id, label) over all lists; only the first may introduce label names."""
    seen: dict[str, str] = {}
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


def checked_id(value: str | None, where: str, seen: dict[str, str]) -> str:
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


def _read_text(path: Path | None, encodings: Counter[str]) -> tuple[str | None, str]:
    if path is None:
        return None, "no text file"
    try:
        text, encoding = decode_text(path.read_bytes())
    except OSError as error:
        return None, f"unreadable: {error.strerror}"
    encodings[encoding] += 1
    return (text, "") if text.strip() else (None, "empty text")


def _read_table(path: Path, columns: dict[str, str], encodings: Counter[str], unused: list[str]) -> Iterator[Sample]:
    """The rows of a table; columns that nothing is read from go into `unused`: one may be a label renamed."""
    names = {column: columns.get(column, column) for column in COLUMNS}
    if unknown := set(columns) - set(COLUMNS):
        raise DataError(f"--columns: {', '.join(sorted(unknown))} is none of {', '.join(COLUMNS)}")
    seen: dict[str, str] = {}
    place, folder = str(path), str(path.parent)  # as text: a million rows are read in seconds, not minutes
    for line, row in read_table(path, encodings):
        if not seen:
            unused += [name for name in row if name not in names.values()]
        if not seen and path.suffix.lower() != ".jsonl":  # an object may leave out what it lacks
            _check_columns(path, names, columns, row)
        id = checked_id(row.get(names["id"]), f"{place}:{line}", seen)
        text, label = row.get(names["text"]), row.get(names["label"])
        text = text if text and text.strip() else None
        image, image_error = _table_image(folder, row.get(names["image"]))
        label = None if label is None or label.strip() in NO_LABEL else label.strip()
        if label and not label.isprintable():
            raise DataError(f"{path}:{line}: the label {label!r} is not one printable line; is a quote missing above?")
        yield Sample(id, text, image, label, "" if text else "no text", image_error)


def _check_columns(path: Path, names: dict[str, str], named: dict[str, str], row: Mapping[str, object]) -> None:
    wanted = {"id", *named}
    missing = [names[column] for column in COLUMNS if column in wanted and names[column] not in row]
    if names["text"] not in row and names["image"] not in row:
        missing.append(f"{names['text']} or {names['image']}")
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(missing)} among {', '.join(row)}; "
            "name yours with --columns id=...,text=...,image=...,label=..."
        )


def _table_image(folder: str, cell: str | None) -> tuple[Path | None, str]:
    """A table names images relative to its own folder."""
    if cell is None:
        return None, "no image file"
    image = os.path.join(folder, cell)
    return (Path(image), "") if os.path.isfile(image) else (None, "image file not found")
