"""Samples: id, text, image path and label; any of text, image and label may be missing.

`read_samples` reads the folder layout (`train.txt`, `test_without_label.txt`, `data/GUID.jpg`,
`data/GUID.txt`) or a table. A missing or broken part is data, not an exception: the sample stays, with the reason.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from unicodedata import normalize

import numpy as np

from mmfeat.errors import DataError
from mmfeat.samples.contents import content_key, joined_key
from mmfeat.samples.encodings import Decoder, decode_text, is_utf8
from mmfeat.samples.labels import is_missing, missing_note, no_labels
from mmfeat.samples.photo_cells import IMAGE_SUFFIXES, Photo, PhotoFinder, Photos
from mmfeat.samples.rows import NO_LABELS, ROW_NUMBER, Absence, Cells, SampleRows
from mmfeat.samples.table_files import SUFFIXES, TEST_LIST, TRAIN_LIST, shards_in, table_name, table_suffix
from mmfeat.system.remote import exists, is_remote

MODALITIES = ("text", "image")
PART = {"text": "text", "image": "photo"}  # the word for a modality in messages


@dataclass(frozen=True, slots=True)
class Sample:
    """One text-image pair; `text_error` and `image_error` say why a part is missing, and are empty otherwise."""

    id: str
    text: str | None = None
    image: Photo | None = None
    label: str | None = None
    text_error: str = ""
    image_error: str = ""

    def key(self, modality: str) -> tuple[bytes | None, str]:
        """(content key, "") of one modality, or (None, the reason for no key)."""
        if modality == "text":
            return (None, self.text_error) if self.text is None else (content_key(self.text.encode()), "")
        if self.image is None:
            return None, self.image_error
        if isinstance(self.image, Photos):
            return joined_key([replace(self, image=photo).key(modality) for photo in self.image.photos])
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
    notes: tuple[str, ...] = ()  # what was decided or lost in reading
    names: Mapping[str, str] = field(default_factory=dict)  # of id and label in the user's table; none in a folder

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


def read_samples(data: str | Path, columns: Mapping[str, str] | None = None) -> SampleSet:
    """Read the folder or table `data`; `columns` maps id, text, image, label to a table's own names.

    A table may be several files, by a pattern or with commas, or a URL that fsspec opens. `columns` may also hold what
    the flags of the same name say: `encoding`, `delimiter`, `quoting` and `no-label`. Raises `DataError` with file,
    line and remedy for duplicate ids, unknown labels in a later list, an empty set and a label list without its image
    folder.
    """
    source = SampleSource(data, columns)
    reading = source.read(UniqueIds())
    samples = tuple(reading)
    if not samples:
        raise source.empty
    told = dict(reading.encodings), source.unused_columns, reading.notes
    return SampleSet(source.name, str(data), samples, *told, source.names)


@dataclass(frozen=True)
class Overview:
    """Counts of a data set that may be larger than memory: all samples, and the samples of each label."""

    name: str
    source: str
    count: int
    labels: Mapping[str, int]
    encodings: Mapping[str, int] = field(default_factory=dict)
    unused_columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    absent: Mapping[str, Absence] = field(default_factory=dict)

    @classmethod
    def of(cls, samples: SampleSet) -> Overview:
        """The overview of samples that are in memory."""
        labels = Counter(sample.label for sample in samples if sample.label is not None)
        told = samples.encodings, samples.unused_columns, samples.notes
        return cls(samples.name, samples.source, len(samples), labels, *told)

    def __len__(self) -> int:
        return self.count


class SampleSource:
    """A data set that is read as it is used, so that the samples of a table may need more memory than there is."""

    def __init__(self, data: str | Path, columns: Mapping[str, str] | None = None) -> None:
        if not str(data):
            raise DataError("--data is empty; name a folder or a table")
        self.data, self.columns = str(data), dict(columns or {})
        if not exists(self.data):
            raise DataError(f"{self.data}: no such folder or table; check --data")
        self.is_folder = not is_remote(self.data) and os.path.isdir(self.data) and not shards_in(self.data)
        # An absolute path resolves ".", but a link keeps the name that the user chose.
        is_folder = not is_remote(self.data) and os.path.isdir(self.data)
        self.name = Path(os.path.abspath(self.data)).name if is_folder else table_name(self.data)
        self._folder: SampleSet | None = None  # samples of a folder stay, since its listing is in memory anyway
        self.rows = None if self.is_folder else SampleRows(self.data, self.columns)

    def check(self) -> None:
        """Raise `DataError` for columns of a table that are not there, and note in `columns` where ids come from."""
        if self.rows is not None:
            self.columns = self.rows.record

    def overview(self) -> Overview:
        """Count and check all samples; no photo is opened. Raises `DataError` as `read_samples` does."""
        if self.is_folder:
            return Overview.of(self._listed())
        labels: Counter[str] = Counter()
        hashes = array("Q")
        reading = self.read()
        for sample in reading:
            hashes.append(hash_of(sample.id))
            if sample.label is not None:
                labels[sample.label] += 1
        if not hashes:
            raise self.empty
        if repeated := _repeated(hashes):
            for _ in self.read(UniqueIds(repeated), look=False):  # raises the error that names the two lines
                pass
        told = dict(reading.encodings), self.unused_columns, reading.notes, reading.absent
        return Overview(self.name, self.data, len(hashes), labels, *told)

    @property
    def unused_columns(self) -> tuple[str, ...]:
        return () if self.rows is None else self.rows.unused

    @property
    def names(self) -> dict[str, str]:
        """The names of the columns of id and label in a table with names; empty for a folder."""
        if self.rows is None or self.rows.is_numbered:
            return {}
        names = {**self.rows.columns, "id": self.rows.id_column}
        return {column: names[column] for column in ("id", "label") if names.get(column, ROW_NUMBER) != ROW_NUMBER}

    def blocks(self, size: int) -> Iterator[list[Sample]]:
        """Yield all samples, `size` at a time; ids are not compared: `overview` does that."""
        samples = iter(self._listed() if self.is_folder else self.read())
        while block := list(islice(samples, size)):
            yield block

    def texts(self) -> Iterator[str]:
        """Yield the texts as they are before any cleaning; no photo is looked at."""
        samples = self._listed() if self.is_folder else self.read(look=False)
        return (sample.text for sample in samples if sample.text is not None)

    def read(self, ids: UniqueIds | None = None, look: bool = True) -> Reading:
        """A pass over the samples; `ids` refuses repeated ids, `look` checks whether the photos of a table exist."""
        return Reading(self, ids, look)

    def _listed(self) -> SampleSet:
        if self._folder is None:
            self._folder = read_samples(self.data, self.columns)
        return self._folder

    @property
    def empty(self) -> DataError:
        return DataError(f"{self.data}: no samples; a list needs at least one `guid,tag` line, a table one row")


class UniqueIds:
    """Lines of ids, to find an id that stands on two lines.

    With `only`, ids with other hashes are let through, in a second pass over a table with too many ids to remember.
    """

    def __init__(self, only: frozenset[int] | None = None) -> None:
        self._lines: dict[str, str] = {}
        self._only = only

    def check(self, id: str, line: str) -> None:
        """Remember the line of an id. Raises `DataError` if the id stands on an earlier line."""
        if self._only is not None and hash_of(id) not in self._only:
            return
        if (first := self._lines.setdefault(id, line)) != line:
            raise DataError(f"{line}: the id {id!r} stands already at {first}; remove or rename one of them")


def _checked_id(value: str | None, line: str, ids: UniqueIds | None, is_file: bool = False) -> str:
    """The id on a line. Raises `DataError` for an id that is empty, known to `ids`, or as a file's name a path."""
    id = (value or "").strip()
    if not id or not id.isprintable():
        raise DataError(f"{line}: an id must be printable text, this is {value!r}; give the sample an id")
    if is_file and ("/" in id or "\\" in id or ".." in id):
        raise DataError(f"{line}: the id {id!r} looks like a path; use a plain id without / \\ and ..")
    if ids is not None:
        ids.check(id, line)
    return id


def hash_of(id: str) -> int:
    """The 64-bit hash of an id."""
    import xxhash

    return xxhash.xxh3_64_intdigest(id.encode())


def _repeated(hashes: array[int]) -> frozenset[int]:
    """The values that occur more than once among 64-bit hashes."""
    ordered = np.sort(np.frombuffer(hashes, np.uint64))
    return frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


class Reading:
    """One pass over the samples of a folder or table.

    After the pass, `encodings` counts the encodings of its texts, and `notes` says what was decided or lost.
    """

    def __init__(self, source: SampleSource, ids: UniqueIds | None, look: bool) -> None:
        self._source, self._ids, self._look = source, ids, look
        table = source.rows and source.rows.table
        self._decoder = table.decoder if table else Decoder(source.columns.get("encoding", ""))
        self._missing = Counter[str]()  # words for no label in the lists of a folder
        self._texts = 0
        self._finder = PhotoFinder(source.rows.named if source.rows else {})
        self._image_column = source.rows.columns.get("image", "") if source.rows else ""

    @property
    def encodings(self) -> Counter[str]:
        return self._decoder.counts

    @property
    def notes(self) -> tuple[str, ...]:
        rows = self._source.rows
        if rows is None:
            return tuple(self._decoder.notes + missing_note(self._missing))
        return (*rows.notes, *([complaint] if (complaint := self._finder.complaint()) and self._finder.found else []))

    @property
    def absent(self) -> dict[str, Absence]:
        """The parts that no sample of a table has, after a pass that looked at photos."""
        rows, finder = self._source.rows, self._finder
        absent = {}
        if rows is not None and not self._texts:
            absent["text"] = Absence(f"no text: {rows.lacking('text')}", "text" in rows.columns)
        if rows is not None and not finder.found:
            reason = finder.complaint() or f"no photo: {rows.lacking('image')}"
            absent["image"] = Absence(reason, finder.count > 0 or "image" in rows.columns)
        return absent

    def __iter__(self) -> Iterator[Sample]:
        rows = self._source.rows
        return self._folder_samples(Path(self._source.data)) if rows is None else map(self._row_sample, rows)

    def _folder_samples(self, folder: Path) -> Iterator[Sample]:
        lists = [folder / name for name in (TRAIN_LIST, TEST_LIST) if (folder / name).is_file()]
        if not lists:
            raise DataError(f"{folder}: neither {TRAIN_LIST} nor {TEST_LIST} is here; {_named_instead(folder)}")
        if not (folder / "data").is_dir():
            where = f"{lists[0]}: the folder {folder / 'data'}"
            raise DataError(f"{where} with its images and texts is missing; put it there")
        images, texts = _index_files(folder / "data")
        rows = list(_read_lists(lists, self._ids, no_labels(self._source.columns.get(NO_LABELS)), self._missing))
        files = [texts.get(normalize("NFC", id)) for id, _ in rows]
        for (id, label), (text, text_error) in zip(rows, read_texts(files, self._decoder), strict=True):
            image = images.get(normalize("NFC", id))
            yield Sample(id, text, image, label, text_error, "" if image else "no image file")

    def _row_sample(self, cells: Cells) -> Sample:
        id, label = _checked_id(cells.id, cells.where, self._ids), cells.label
        text = cells.text if cells.text and cells.text.strip() else None
        self._texts += text is not None
        image, image_error = None, ""
        if self._look:
            image, image_error = self._finder.find(cells.image, cells.where, self._image_column)
        if label and not label.isprintable():
            raise DataError(f"{cells.where}: the label {label!r} is not one printable line; is a quote missing above?")
        return Sample(id, text, image, label, "" if text else "no text", image_error)


def _named_instead(folder: Path) -> str:
    """The remedy for a folder without lists: a table or folder inside the folder that may be meant."""
    inside = sorted(folder.iterdir())
    if tables := [path for path in inside if table_suffix(path.name) in {*SUFFIXES} - {".txt"} and path.is_file()]:
        return f"name the table: --data {tables[0]}"
    if deeper := [path for path in inside if (path / TRAIN_LIST).is_file()]:
        return f"name the folder that holds them: --data {deeper[0]}"
    return "name the folder that holds them, or a table"


def _read_lists(
    lists: list[Path], ids: UniqueIds | None, spellings: Collection[str], missing: Counter[str]
) -> Iterator[tuple[str, str | None]]:
    """Yield (id, label) over all lists; only the first list may introduce label names.

    `spellings` stand for no label; `missing` counts those but `null`, the word of this layout.
    """
    classes: set[str] = set()
    for path in lists:
        known = frozenset(classes)
        for line, cells in _list_rows(path):
            where = f"{path}:{line}"
            if len(cells) != 2:
                raise DataError(f"{where}: {','.join(cells)[:60]!r} is not `guid,tag`; one comma parts the two")
            id, label = _checked_id(cells[0], where, ids, is_file=True), cells[1].strip()
            lacks = is_missing(label, spellings)
            if lacks and path.name == TRAIN_LIST:
                word = f"; if {label!r} is a class, say --no-label null" if label.casefold() not in ("", "null") else ""
                raise DataError(f"{where}: {id!r} has no label; label it or move the line to {TEST_LIST}{word}")
            missing[label] += lacks and label != "null"
            if not lacks and known and label not in known:
                raise DataError(
                    f"{where}: unknown label {label!r}; {lists[0].name} has {', '.join(sorted(known))}; "
                    "correct the name or leave `null`"
                )
            classes.add(label)
            yield id, None if lacks else label


def _list_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells); lines are split by hand because quotes mean nothing in a list of ids."""
    text, _ = decode_text(path.read_bytes())
    rows = [(number, line.split(",")) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if rows and rows[0][1][0].strip().lower() in ("guid", "id"):
        del rows[0]
    yield from rows


def _index_files(folder: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Image and text file of each id in NFC; where an id has several images the first suffix wins."""
    images: dict[str, Path] = {}
    texts: dict[str, Path] = {}
    rank = {suffix: position for position, suffix in enumerate(IMAGE_SUFFIXES)}
    entries = sorted((Path(entry.path) for entry in os.scandir(folder)), key=lambda path: path.name)
    for path in sorted(entries, key=lambda path: rank.get(path.suffix.lower(), len(rank))):
        if path.suffix.lower() in rank:
            images.setdefault(normalize("NFC", path.stem), path)
        elif path.suffix.lower() == ".txt":
            texts.setdefault(normalize("NFC", path.stem), path)
    return images, texts


def read_texts(files: Sequence[Path | None], decoder: Decoder) -> list[tuple[str | None, str]]:
    """(text, "") of each file, or (None, the reason); the encoding of all that is not UTF-8 is guessed at once."""
    contents: list[bytes | str] = []
    for file in files:
        try:
            contents.append("no text file" if file is None else file.read_bytes())
        except OSError as error:
            contents.append(f"unreadable: {error.strerror}")
    decoder.learn(data for data in contents if isinstance(data, bytes) and not is_utf8(data))
    texts = (d if isinstance(d, str) else decoder.decode(d, str(file)) for file, d in zip(files, contents, strict=True))
    return [
        (None, text) if isinstance(data, str) else (text, "") if text.strip() else (None, "empty text")
        for data, text in zip(contents, texts, strict=True)
    ]
