"""Rows of a table as the cells of samples: which column is what, ids, and labels; and the counts of a data set."""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mmfeat.errors import DataError
from mmfeat.samples.labels import (
    SPLIT,
    is_missing,
    label_of,
    missing_note,
    no_labels,
    part_named,
    part_of_file,
    written_list,
)
from mmfeat.samples.photo_cells import FIRST, IMAGE_PATTERN, IMAGE_ROOT, IMAGES, MEAN, PHOTO_FLAGS
from mmfeat.samples.table_columns import (
    COLUMNS,
    ROW_NUMBER,
    SOUGHT,
    TABLE,
    TableColumn,
    columns_flag,
    columns_in,
    find_column,
    find_columns,
    join_texts,
    meant_column,
    proposal_of,
    remedy_for,
    usual_name,
)
from mmfeat.samples.table_files import DELIMITED, table_suffix
from mmfeat.samples.tables import READING, Table
from mmfeat.system.remote import absolute, is_remote
from mmfeat.system.wording import counted

if TYPE_CHECKING:
    from mmfeat.samples.dataset import SampleSet

NO_LABELS = "no-label"  # the spellings of a missing label, beside what `READING` says of a table

LONGEST_NAME = 256  # letters of a photo's name that may be an id; base64 has more
VAGUE = ("url", "path", "file", "name", "index", "key")  # proposed only where nothing else is there to be read
_WHOLE = re.compile(r"-?\d+\.0+")


class Cells(NamedTuple):
    """The cells of one sample; `where` is FILE:LINE."""

    where: str
    id: str | None
    text: str | None
    image: object
    label: str | None
    split: str = ""
    table: tuple[str | None, ...] | None = None


@dataclass(frozen=True)
class Absence:
    """Why no sample of a data set has a part, with a remedy; `is_named`: a column or folder should have the part."""

    reason: str
    is_named: bool


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
    table: tuple[TableColumn, ...] = ()  # what the columns of numbers and categories hold

    @classmethod
    def of(cls, samples: SampleSet) -> Overview:
        """The overview of samples that are in memory."""
        labels = Counter(sample.label for sample in samples if sample.label is not None)
        told = samples.encodings, samples.unused_columns, samples.notes
        return cls(samples.name, samples.source, len(samples), labels, *told)

    def __len__(self) -> int:
        return self.count


class SampleRows:
    """The rows of a table as cells of samples, read as they are used.

    `named` maps id, text, image and label to names of columns, and encoding, delimiter, quoting, no-label, image-root,
    image-pattern and images to what holds for the table. Raises `DataError` for columns that are not there, before a
    row is read.
    """

    def __init__(self, data: str, named: Mapping[str, str], files: Sequence[str] = ()) -> None:
        if unknown := set(named) - {*COLUMNS, *READING, NO_LABELS, *PHOTO_FLAGS}:
            meant = [meant_column(part) for part in sorted(unknown)]
            remedy = f"; did you mean {', '.join(f'{part}=' for part in meant)}?" if all(meant) else ""
            raise DataError(f"--columns: {', '.join(sorted(unknown))} is none of {', '.join(COLUMNS)}{remedy}")
        self.table = Table(data, {name: named[name] for name in READING if name in named}, files)
        self.named = dict(named)
        self._columns_named = {column: named[column] for column in COLUMNS if column in named}
        if named.get(IMAGES, MEAN) not in (FIRST, MEAN):
            raise DataError(f"--images {named[IMAGES]}: use {FIRST} or {MEAN}")
        if IMAGE_ROOT in named:
            self.named[IMAGE_ROOT] = _checked_root(named[IMAGE_ROOT])
        self._missing = Counter[str]()
        self._no_part = ""  # a note on the first cell that is no part of a split
        self._no_label = no_labels(named.get(NO_LABELS))

    @cached_property
    def columns(self) -> dict[str, str]:
        """The names in the table of id, text, image and label; those that are not there are left out."""
        names, named = self.table.names, self._columns_named
        if self.is_numbered:
            numbers = [number for column, name in named.items() for number in columns_in(column, name, names)]
            if odd := [number for number in numbers if not 0 < int(number) <= len(names)]:
                raise DataError(
                    f"{self.table.data}: no column {', '.join(odd)}; a row has {counted(len(names), 'cell')}"
                )
            return named  # the file has no header
        sought = {column: named.get(column, column) for column in COLUMNS if column in (*SOUGHT, *named)}
        columns = {column: find_columns(column, name, names) for column, name in sought.items()}
        missing = [
            part
            for column, name in named.items()
            for part in columns_in(column, name, names)
            if find_column(part, names) is None
        ]
        readable = {column for column in ("text", "image", TABLE) if columns.get(column)}
        if not missing and not readable and names and not self._pattern:
            missing = ["text or image"]
        if missing:
            remedy = remedy_for(names, columns, named)
            if len(names) == 1 and table_suffix(self.table.files[0]) in (*DELIMITED, ".xlsx"):
                remedy += "; the names stand in the first line: remove what is above them"
            raise DataError(f"{self.table.data}: no column {', '.join(missing)} among {', '.join(names)}; {remedy}")
        if columns["label"] in columns_in(TABLE, columns.get(TABLE) or "", names):
            raise DataError(f"--columns {TABLE}={named[TABLE]}: {columns['label']} is the label; leave it out there")
        return {column: name for column, name in columns.items() if name is not None}

    @property
    def is_numbered(self) -> bool:
        """Whether the user names all columns by number, since the file has no header."""
        names = self.table.names
        named = {part for column, name in self._columns_named.items() for part in columns_in(column, name, names)}
        return bool(named) and all(map(str.isdecimal, named)) and not named & set(names)

    @cached_property
    def id_column(self) -> str:
        """The column of ids; without one, that of the photos if each row names another photo, else `ROW_NUMBER`."""
        if "id" in self.columns:
            return self.columns["id"]
        image = self.columns.get("image")
        return image if image is not None and self._names_each_row(image) else ROW_NUMBER

    @cached_property
    def _pattern(self) -> list[str]:
        """The pattern of the paths of photos, in which each second part is the name of a column, or id."""
        pattern = self.named.get(IMAGE_PATTERN, "")
        parts = re.split(r"{([^{}]*)}", pattern)
        absent = [name for name in parts[1::2] if name != "id" and name not in self.table.names]
        if absent or (pattern and len(parts) == 1):
            names = ", ".join(self.table.names)
            raise DataError(f"--image-pattern {pattern}: write {{id}} or a column in braces, of {names}")
        return parts if pattern else []

    @property
    def record(self) -> dict[str, str]:
        """What the user named of the table, and the column of ids if the reader chose it."""
        chosen = {} if "id" in self.columns or not self.table.names else {"id": self.id_column}
        return self.named | chosen

    @property
    def unused(self) -> tuple[str, ...]:
        """The columns from which nothing is read; such a column may be the label under another name."""
        used = {*self.columns.values(), *self._parts["text"], *self._parts[TABLE], self.id_column}
        return () if self.is_numbered else tuple(name for name in self.table.names if name not in used)

    def lacking(self, modality: str) -> str:
        """What to do where no row has a part: the column that is empty, or how to name one."""
        here, plain = self.columns.get(modality), [name for name in self.unused if name.casefold() not in VAGUE]
        flag = columns_flag(self._columns_named | {modality: "..."} | proposal_of([modality], plain))
        if here:
            return f"the column {here} is empty; {flag} names another"
        return f"no column {modality} among {', '.join(self.table.names)}; {flag} names one"

    @property
    def notes(self) -> list[str]:
        """What the user should hear of, after a pass over the rows."""
        notes = [*self.table.notes, *self.table.decoder.notes]
        if self.is_numbered:
            notes.append("columns are numbered: the first line is a row and not names")
        plain = [name for name in self.unused if name.casefold() not in VAGUE]
        absent = proposal_of([column for column in SOUGHT[1:] if column not in self.columns], plain)
        if absent:
            flag = columns_flag(self._columns_named | absent)
            notes.append(f"no {', '.join(absent)} is read; {flag} names columns")
        if "id" not in self.columns and self.table.names:
            made = "numbers of rows" if self.id_column == ROW_NUMBER else f"names of photos in {self.id_column}"
            usual = usual_name("id", self.unused)
            notes.append(
                f"no column of ids: ids are the {made}" + (f"; --columns id={usual} names one" if usual else "")
            )
        notes += [f"{name}s 1.0, 2.0, ... are whole numbers and read as 1, 2, ..." for name in sorted(self._whole)]
        return [*notes, *([self._no_part] if self._no_part else []), *missing_note(self._missing)]

    def cells(self, photos: bool = True) -> Iterator[Cells]:
        """Yield the cells of each row; a label that is spelled as missing is None, a photo's cell is as in the file.

        Without `photos` their column, which may hold most of the file, is left out.
        """
        columns, id_column, whole, pattern = self.columns, self.id_column, self._whole, self._pattern
        texts, tables, image, label = *self._parts.values(), columns.get("image"), columns.get("label")
        files = self.table.files
        several = 0 if len(files) == 1 else 1 if len({*map(os.path.basename, files)}) == len(files) else 2
        plain = image if image and image != id_column else ""
        used = [name for name in self._used if photos or name != plain]
        self._missing.clear()
        for number, (where, row) in enumerate(self.table.rows(used, plain, label), 1):
            own = row.get(id_column) if id_column != ROW_NUMBER else _row_id(where, number, several)
            tag = row.get(label) if label else None
            if tag is not None:
                tag = tag.strip()
                if (listed := written_list(tag)) is not None:
                    tag = label_of(listed, f"{where}: column {label}")
                if is_missing(tag, self._no_label):
                    self._missing[tag] += tag != ""  # a blank cell needs no word
                    tag = None
            own = own.partition(".")[0] if own and "id" in whole else own
            yield Cells(
                where,
                own,
                row.get(texts[0]) if len(texts) == 1 else join_texts(map(row.get, texts)),
                _filled(pattern, {**row, "id": own}) if pattern else row.get(image) if image else None,
                tag.partition(".")[0] if tag and "label" in whole else tag,
                self._part(where, row),
                tuple((row.get(name) or "").strip() or None for name in tables) if tables else None,
            )

    def _part(self, where: str, row: Mapping[str, str | None]) -> str:
        """The part of the user's split that a row is in, by its cell or file. Raises `DataError` for other words."""
        if (column := self.columns.get(SPLIT)) is None:
            return self._file_parts.get(where.rpartition(":")[0], "") if self._file_parts else ""
        cell = row.get(column) or ""
        if not (part := part_named(cell)):
            if SPLIT in self.named:
                raise DataError(f"{where}: {cell!r} in the column {column} is no part of a split: train, val or test")
            self._no_part = self._no_part or f"the column {column} is no split: {cell!r} is none of train, val, test"
        return part

    @cached_property
    def _file_parts(self) -> dict[str, str]:
        """File -> its part of the user's split, where the files of the table are named by parts."""
        parts = {file: part_of_file(file) for file in self.table.files}
        return parts if all(parts.values()) and len({*parts.values()}) > 1 else {}

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """The columns of the text and of the table of a sample."""
        names = self.table.names
        return {c: columns_in(c, self.columns[c], names) if c in self.columns else [] for c in ("text", TABLE)}

    @property
    def table_columns(self) -> list[str]:
        return self._parts[TABLE]

    @property
    def _used(self) -> list[str]:
        of_photos = [name for name in self._pattern[1::2] if name in self.table.names]
        plain = [name for column, name in self.columns.items() if column not in self._parts]
        used = dict.fromkeys([*plain, *self._parts["text"], *self._parts[TABLE], self.id_column, *of_photos])
        return [name for name in used if name != ROW_NUMBER]

    @cached_property
    def _whole(self) -> frozenset[str]:
        """Those of id and label whose cells are all whole numbers with a fraction of zero, as 1.0."""
        columns = self.columns.items()
        left = {column: name for column, name in columns if column in ("id", "label") and name != ROW_NUMBER}
        seen = set()
        if left:
            for _, row in self.table.rows(list(left.values()), label=left.get("label")):
                for column, name in tuple(left.items()):
                    cell = (row.get(name) or "").strip()
                    if _WHOLE.fullmatch(cell):
                        seen.add(column)
                    elif not is_missing(cell, self._no_label):
                        del left[column]
                if not left:
                    break
        return frozenset(seen & left.keys())

    def _names_each_row(self, column: str) -> bool:
        """Whether every cell of a column is there and none occurs twice; remembers 8 bytes a row."""
        hashes = array("q")
        for _, row in self.table.rows([column], column):
            if not isinstance(name := row.get(column), str) or not 0 < len(name) < LONGEST_NAME:
                return False
            hashes.append(hash(name))
        return len(np.unique(np.frombuffer(hashes, np.int64))) == len(hashes)


def _checked_root(root: str) -> str:
    """The folder of photos, from wherever it is asked for later. Raises `DataError` where it is none."""
    if not is_remote(root) and not os.path.isdir(root):
        raise DataError(f"--image-root {root}: no such folder; name the folder that the paths of photos begin in")
    return absolute(root)


def _filled(pattern: Sequence[str], row: Mapping[str, object]) -> str | None:
    """The path of a row's photo; None where a cell is missing or would lead out of the folder of photos."""
    values = [str(row.get(name) or "").strip() for name in pattern[1::2]]
    if not all(values) or any(".." in value for value in values):
        return None
    return "".join(part for pair in zip_longest(pattern[::2], values, fillvalue="") for part in pair)


def _row_id(where: str, number: int, parts: int) -> str:
    """The id of a row without one: its number, or in several files the last `parts` of FILE:LINE."""
    return "/".join(where.replace("\\", "/").split("/")[-parts:]) if parts else str(number)
