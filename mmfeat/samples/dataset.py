"""Samples: id, text, image path and label; any of text, image and label may be missing.

`read_samples` reads a table, a folder or archives: the layout with lists (`train.txt`, `test_without_label.txt`,
`data/GUID.jpg`, `data/GUID.txt`), or one of those in `mmfeat.samples.layouts`. A missing or broken part is data, not an
exception: the sample stays, with the reason.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias
from unicodedata import normalize

from mmfeat.errors import DataError
from mmfeat.samples.contents import content_key, joined_key
from mmfeat.samples.encodings import Decoder
from mmfeat.samples.folders import (
    LISTS,
    MVSA_LIST,
    File,
    UniqueIds,
    checked_id,
    hash_of,
    index_files,
    lists_in,
    no_data_folder,
    open_tree,
    read_lists,
    read_texts,
    repeated_hashes,
    table_in_archive,
)
from mmfeat.samples.labels import label_notes, missing_note, no_labels
from mmfeat.samples.layouts import FILE_NAME, METADATA, NO_TEXT, GroupedFiles, Layout, find_layout
from mmfeat.samples.objects import OBJECT, file_of, short_name, without_files, written
from mmfeat.samples.photo_cells import IMAGE_ROOT, Photo, PhotoFinder, Photos
from mmfeat.samples.rows import NO_LABELS, Absence, Overview, SampleRows
from mmfeat.samples.table_columns import ROW_NUMBER, TABLE, TableCounts
from mmfeat.samples.table_files import table_name
from mmfeat.system.files import no_such_data
from mmfeat.system.notebook import Cells, Shown
from mmfeat.system.remote import HUB, exists, is_remote
from mmfeat.system.wording import counted

MODALITIES = ("text", "image")
SHOWN_LABELS = 8  # labels in the short form of a data set
Data: TypeAlias = Any  # a name of data, or a frame, Arrow table, data set or list of dicts
PART = {"text": "text", "image": "photo", TABLE: "cells of a table", "id": "vector"}  # words of messages


@dataclass(frozen=True, slots=True)
class Sample:
    """One text-image pair; `text_error` and `image_error` say why a part is missing, and are empty otherwise."""

    id: str
    text: str | None = None
    image: Photo | None = None
    label: str | None = None
    text_error: str = ""
    image_error: str = ""
    split: str = ""  # the part that the user's own split gives the sample: train, validation or test
    table: tuple[str | None, ...] | None = None  # cells of the columns of numbers and categories, None without any

    def key(self, modality: str) -> tuple[bytes | None, str]:
        """(content key, "") of one modality, or (None, the reason for no key)."""
        if modality != "image":
            own = self.id if modality == "id" else self.text
            return (None, self.text_error) if own is None else (content_key(own.encode()), "")
        if self.image is None:
            return None, self.image_error
        if isinstance(self.image, Photos):
            return joined_key([replace(self, image=photo).key(modality) for photo in self.image.photos])
        try:
            return content_key(self.image.read_bytes()), ""
        except OSError as error:
            return None, f"unreadable: {error.strerror}"


def name_of(data: Data) -> Any:
    """The name of data: a path or None as it is, and of an object the name under which its rows are written."""
    return data if data is None or isinstance(data, str | os.PathLike) else written(data)


@dataclass(frozen=True, repr=False)
class SampleSet(Shown):
    """The samples of one data set in the order of its lists; `classes` are the label names, sorted."""

    name: str
    source: str
    samples: tuple[Sample, ...]
    encodings: Mapping[str, int] = field(default_factory=dict)
    unused_columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # what was decided or lost in reading
    names: Mapping[str, str] = field(default_factory=dict)  # of id and label in the user's table; none in a folder
    table: tuple[str, ...] = ()  # the columns of numbers and categories
    left_out: frozenset[str] = frozenset()  # labels that count as neither labelled nor unlabelled

    def facts(self) -> list[str]:
        counts = Counter(sample.label for sample in self.labelled).most_common()
        labels = [f"{name} {count:,}" for name, count in counts[:SHOWN_LABELS]]
        rest = ["..."] if len(counts) > SHOWN_LABELS else []
        return [self.name, counted(len(self), "sample"), f"{len(self.labelled):,} labelled", *labels, *rest]

    def cells(self) -> Cells:
        rows = [(s.id, (s.text or s.text_error)[:80], s.image or s.image_error, s.label or "") for s in self]
        return [("id", "text", "image", "label"), *rows]

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self) -> Iterator[Sample]:
        return iter(self.samples)

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({str(sample.label) for sample in self.labelled}))

    @property
    def labelled(self) -> tuple[Sample, ...]:
        return tuple(s for s in self.samples if s.label is not None and s.label not in self.left_out)

    @property
    def unlabelled(self) -> tuple[Sample, ...]:
        return tuple(sample for sample in self.samples if sample.label is None)


def read_samples(data: Data, columns: Mapping[str, str] | None = None) -> SampleSet:
    """Read the folder or table `data`; `columns` maps id, text, image, label to a table's own names.

    `data` may also be a pandas or polars frame, an Arrow table, a `datasets.Dataset` or a list of dicts.
    A table may be several files, by a pattern or with commas, or a URL that fsspec opens. `columns` may also hold what
    the flags of the same name say: `encoding`, `delimiter`, `quoting` and `no-label`. Raises `DataError` with file,
    line and remedy for duplicate ids, unknown labels in a later list, an empty set and a label list without its image
    folder.
    """
    data = name_of(data)
    source = SampleSource(data, columns)
    reading = source.read(UniqueIds())
    samples = tuple(reading)
    if not samples:
        raise source.empty
    photos = reading.absent.get("image")
    lost = [photos.reason] if photos and photos.is_named else []
    told = dict(reading.decoder.counts), source.unused_columns, (*reading.notes, *lost)
    table = tuple(source.rows.table_columns) if source.rows else ()
    return SampleSet(source.name, str(data), samples, *told, source.names, table)


class SampleSource:
    """A data set that is read as it is used, so that the samples of a table may need more memory than there is."""

    def __init__(self, data: Data, columns: Mapping[str, str] | None = None) -> None:
        if data is None or (isinstance(data, str) and not data):
            raise DataError("--data is empty; name a folder or a table")
        if not isinstance(columns or {}, Mapping):
            raise DataError(f"columns is {type(columns).__name__}; give a dict, as in {{'text': 'title'}}")
        self.data, self.columns = str(name_of(data)), dict(columns or {})
        if os.path.isfile(whole := self.data.rstrip("/")):
            self.data = whole  # an archive, which has folders in it
        self.layout = self._find_layout()
        self.is_folder = self.layout.tree is not None and not self.layout.tables
        if self.is_folder and TABLE in self.columns:
            raise DataError(f"--columns {TABLE}={self.columns[TABLE]}: {self.data} is no table; leave it out")
        self.rows = None if self.is_folder else SampleRows(self.data, self.columns, self.layout.tables)
        self._folder: SampleSet | None = None  # samples of a folder stay, since its listing is in memory anyway

    def _find_layout(self) -> Layout:
        """The layout of the data; its usual columns go to `columns`."""
        if self.data.startswith((HUB, OBJECT)):
            file = file_of(self.data)
            if self.data.startswith(OBJECT):
                self.columns.setdefault(IMAGE_ROOT, os.getcwd())  # an object has no folder of its own
            return Layout((file,))
        if not exists(self.data):
            raise no_such_data(self.data)
        if (tree := open_tree(self.data)) is None:
            layout = Layout(tuple(filter(None, [table_in_archive(self.data)])))
        elif (lists := lists_in(tree)) is not None:
            layout = Layout(tree=tree, lists=lists)
        else:
            layout = find_layout(tree, self.columns, no_labels(self.columns.get(NO_LABELS)))
        if os.path.basename((*layout.tables, self.data)[0]).lower() in METADATA:
            self.columns = {"image": FILE_NAME, **self.columns}
        return layout

    @property
    def name(self) -> str:
        """The name of the data set, which is that of its folder in the cache."""
        if self.data.startswith((HUB, OBJECT)):
            return short_name(self.data)
        # An absolute path resolves ".", but a link keeps the name that the user chose.
        is_folder = not is_remote(self.data) and os.path.isdir(self.data)
        return Path(os.path.abspath(self.data)).name if is_folder else table_name(self.data)

    def check(self) -> None:
        """Raise `DataError` for columns of a table that are not there, and note in `columns` where ids come from."""
        if self.rows is not None:
            self.columns = self.rows.record

    def overview(self, is_test: bool = False) -> Overview:
        """Count and check all samples and, unless `is_test`, what the columns of a table hold; no photo is opened."""
        if self.is_folder:
            samples = self._listed()
            unread = [note for note in samples.notes if note.startswith(NO_TEXT)]  # else photos alone are a data set
            parts = MODALITIES if self.layout.lists is not None or unread else ("image",)
            lost = [name for name in parts if all(getattr(sample, name) is None for sample in samples)]
            return replace(
                Overview.of(samples), absent={name: self._absence(name, samples.samples[0].id, unread) for name in lost}
            )
        hashes, table = array("Q"), TableCounts(self.rows.table_columns if self.rows and not is_test else ())
        reading = self.read()
        for sample in reading:
            hashes.append(hash_of(sample.id))
            if table.names:
                table.add(sample)
        if not hashes:
            raise self.empty
        if repeated := repeated_hashes(hashes):
            for _ in self.read(UniqueIds(repeated), look=False):  # raises the error that names the two lines
                pass
        labels: Counter[str] = Counter()
        for (_, label), count in reading.labels.items():
            labels[label] += count
        told = dict(reading.decoder.counts), self.unused_columns, reading.notes, reading.absent, table.columns()
        return Overview(self.name, self.data, len(hashes), labels, *told)

    def tried(self, modality: str, id: str) -> str:
        """The first path at which the layout with lists looks for a part of a sample, in words; "" for others."""
        if self.layout.lists is None:
            return ""
        name = id + {"image": ".jpg", "text": ".txt"}[modality]
        return f"; the first path tried is {os.path.join(self.data, self.layout.lists, 'data', name)}"

    def _absence(self, modality: str, id: str, unread: Sequence[str]) -> Absence:
        """Why no sample of a folder has a part; `id` is that of the first sample, `unread` tell of texts in JSON."""
        if modality == "text" and unread:
            return Absence(unread[0], False)
        part, beside = PART[modality], "texts" if modality == "image" else "photos"
        return Absence(
            f"no sample has a {part}{self.tried(modality, id)}; put {part}s named by the ids beside the {beside}", False
        )

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
        self._folder = self._folder or read_samples(self.data, self.columns)
        return self._folder

    @property
    def empty(self) -> DataError:
        lacking = "row below the names of its columns" if self.rows else "line `guid,tag`"
        return DataError(f"{self.data}: no samples; it needs at least one {lacking}")


class Reading:
    """One pass over the samples of a folder or table.

    After the pass, `decoder.counts` are the encodings of its texts, and `notes` says what was decided or lost.
    """

    def __init__(self, source: SampleSource, ids: UniqueIds | None, look: bool) -> None:
        self._source, self._ids, self._look = source, ids, look
        table = source.rows and source.rows.table
        self.decoder = table.decoder if table else Decoder(source.columns.get("encoding", ""))
        self._missing = Counter[str]()  # words for no label in the lists of a folder
        self.labels = Counter[tuple[str, str]]()  # (part of the user's split, label)
        self._texts = 0
        self._not_found: list[str] = []
        self._finder: PhotoFinder | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        rows = self._source.rows
        if rows is None:
            groups = self._source.layout.groups
            told = groups.notes if groups else self._not_found
            return (*self.decoder.notes, *missing_note(self._missing), *label_notes(self.labels), *told)
        complaint = self._finder.complaint() if self._finder and self._finder.found else ""
        return (*rows.notes, *label_notes(self.labels), *self._source.layout.notes, *([complaint] if complaint else []))

    @property
    def absent(self) -> dict[str, Absence]:
        """The parts that no sample of a table has, after a pass that looked at photos."""
        rows, finder = self._source.rows, self._finder
        absent: dict[str, Absence] = {}
        if rows is None or finder is None:
            return absent
        if not self._texts:
            absent["text"] = Absence(f"no text: {rows.lacking('text')}", "text" in rows.columns)
        if not finder.found:
            reason = finder.complaint() or f"no photo: {rows.lacking('image')}"
            absent["image"] = Absence(reason, finder.count > 0 or "image" in rows.columns)
        return absent

    def __iter__(self) -> Iterator[Sample]:
        try:
            for sample in self._samples():
                if sample.label is not None:
                    self.labels[sample.split, sample.label] += 1
                yield sample
        except DataError as error:  # an object of Python has rows, but no file that the user knows
            raise DataError(without_files(str(error))) from error

    def _samples(self) -> Iterator[Sample]:
        source = self._source
        if source.rows is not None:
            return self._row_samples(source.rows)
        if source.layout.groups is not None:
            return self._grouped_samples(source.layout.groups)
        assert source.layout.tree is not None
        return self._listed_samples(source.layout.tree.below(source.layout.lists or ""))

    def _grouped_samples(self, groups: GroupedFiles) -> Iterator[Sample]:
        groups.missing = self._missing
        entries = list(groups)
        texts = read_texts([entry.text_file for entry in entries], self.decoder)
        for entry, (text, text_error) in zip(entries, texts, strict=True):
            if entry.text is not None:
                text, text_error = (entry.text, "") if entry.text.strip() else (None, "empty text")
            id, image = checked_id(entry.id, entry.where, self._ids), entry.image
            yield Sample(id, text, image, entry.label, text_error, "" if image else "no image file", entry.split)

    def _listed_samples(self, files: Mapping[str, File]) -> Iterator[Sample]:
        lists = [files[name] for name in LISTS if name in files]
        folder = str(lists[0]).rpartition(lists[0].name)[0] + "data"
        if not any(name.startswith("data/") for name in files) and not os.path.isdir(folder):
            raise no_data_folder(lists[0], folder)
        images, texts_of = index_files({name: file for name, file in files.items() if name.startswith("data/")})
        rows = list(read_lists(lists, self._ids, no_labels(self._source.columns.get(NO_LABELS)), self._missing))
        found = [texts_of.get(normalize("NFC", id)) for id, _ in rows]
        photos = [images.get(normalize("NFC", id)) for id, _ in rows]
        self._not_found = [note for pair in (("image", photos), ("text", found)) for note in self._seek(*pair, rows)]
        unclear = sum(label is None for _, label in rows) if lists[0].name == MVSA_LIST else 0
        if unclear:
            why = "text and photo oppose each other, or no two annotators agree"
            self._not_found.append(f"{MVSA_LIST}: {unclear:,} of {len(rows):,} samples have no label: {why}")
        texts = read_texts(found, self.decoder)
        for (id, label), (text, text_error), image in zip(rows, texts, photos, strict=True):
            yield Sample(id, text, image, label, text_error, "" if image else "no image file")

    def _row_samples(self, rows: SampleRows) -> Iterator[Sample]:
        finder = self._finder = PhotoFinder(rows.named)
        column = rows.columns.get("image", "")
        for cells in rows.cells(self._look):
            id, label = checked_id(cells.id, cells.where, self._ids), cells.label
            text = cells.text if cells.text and cells.text.strip() else None
            self._texts += text is not None
            image, image_error = finder.find(cells.image, cells.where, column) if self._look else (None, "")
            if label and not label.isprintable():
                raise DataError(
                    f"{cells.where}: the label {label!r} is not one printable line; "
                    + ("is a quote missing above?" if "\n" in label else "remove what cannot be seen from it")
                )
            yield Sample(id, text, image, label, "" if text else "no text", image_error, cells.split, cells.table)

    def _seek(self, modality: str, files: Sequence[File | None], rows: Sequence[tuple[str, str | None]]) -> list[str]:
        """A line where more than half of the texts or photos of a folder with lists are absent, but not all."""
        absent = [id for (id, _), file in zip(rows, files, strict=True) if file is None]
        if not len(rows) < 2 * len(absent) < 2 * len(rows):
            return []
        what = f"{len(absent):,} of {len(rows):,} {PART[modality]}s are not found"
        return [what + self._source.tried(modality, absent[0])]
