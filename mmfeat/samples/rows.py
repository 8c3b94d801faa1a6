"""Rows of a table as the cells of samples: which column is what, ids, and labels."""

from __future__ import annotations

import difflib
import os
import re
import shlex
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

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
from mmfeat.samples.tables import READING, Table
from mmfeat.system.remote import absolute, is_remote
from mmfeat.system.wording import counted

COLUMNS = ("id", "text", "image", "label", SPLIT)
SEVERAL = "+"  # between the columns that make one text
ROW_NUMBER = "#"  # stands for the number of a row where a column of ids is named
NO_LABELS = "no-label"  # the spellings of a missing label, beside what `READING` says of a table

# Names that people give their columns, the usual first.
USUAL = {
    "id": "id guid uid uuid sku asin key tweet_id post_id product_id item_id sample_id image_id index",
    "text": "text caption title tweet tweet_text sentence comment description content body message review headline "
    "clean_title product_name name",
    "image": "image img photo picture image_path img_path filename file_name image_name file path image_url "
    "img_url url",
    "label": "label class category target tag sentiment labels gold_label genre topic emotion intent label_text y",
    SPLIT: "",  # only by its own name, since only words for parts make a split
}
LONGEST_NAME = 256  # letters of a photo's name that may be an id; base64 has more
VAGUE = ("url", "path", "file", "name", "index", "key")  # proposed only where nothing else is there to be read
_WHOLE = re.compile(r"-?\d+\.0+")
_PHOTO_NAME = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)


class Cells(NamedTuple):
    """The cells of one sample; `where` is FILE:LINE."""

    where: str
    id: str | None
    text: str | None
    image: object
    label: str | None
    split: str = ""


@dataclass(frozen=True)
class Absence:
    """Why no sample of a data set has a part, with a remedy; `is_named`: a column or folder should have the part."""

    reason: str
    is_named: bool


class SampleRows:
    """The rows of a table as cells of samples, read as they are used.

    `named` maps id, text, image and label to names of columns, and encoding, delimiter, quoting, no-label, image-root,
    image-pattern and images to what holds for the table. Raises `DataError` for columns that are not there, before a
    row is read.
    """

    def __init__(self, data: str, named: Mapping[str, str], files: Sequence[str] = ()) -> None:
        if unknown := set(named) - {*COLUMNS, *READING, NO_LABELS, *PHOTO_FLAGS}:
            raise DataError(f"--columns: {', '.join(sorted(unknown))} is none of {', '.join(COLUMNS)}")
        self.table = Table(data, {name: named[name] for name in READING if name in named}, files)
        self.named = dict(named)
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
        names, named = self.table.names, {column: self.named[column] for column in COLUMNS if column in self.named}
        if self.is_numbered:
            numbers = [number for column, name in named.items() for number in columns_in(column, name, names)]
            if odd := [number for number in numbers if not 0 < int(number) <= len(names)]:
                raise DataError(
                    f"{self.table.data}: no column {', '.join(odd)}; a row has {counted(len(names), 'cell')}"
                )
            return named  # the file has no header
        columns = {column: find_columns(column, named.get(column, column), names) for column in COLUMNS}
        missing = [
            part
            for column, name in named.items()
            for part in columns_in(column, name, names)
            if find_column(part, names) is None
        ]
        if not missing and columns["text"] is None and columns["image"] is None and names and not self._pattern:
            missing = ["text or image"]
        if missing:
            remedy = _remedy(names, columns, named)
            raise DataError(f"{self.table.data}: no column {', '.join(missing)} among {', '.join(names)}; {remedy}")
        return {column: name for column, name in columns.items() if name is not None}

    @property
    def is_numbered(self) -> bool:
        """Whether the user names all columns by number, since the file has no header."""
        names = self.table.names
        columns = (column for column in COLUMNS if column in self.named)
        named = {part for column in columns for part in columns_in(column, self.named[column], names)}
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
        used = {*self.columns.values(), *self._texts, self.id_column}
        return () if self.is_numbered else tuple(name for name in self.table.names if name not in used)

    def lacking(self, modality: str) -> str:
        """What to do where no row has a part: the column that is empty, or how to name one."""
        here, plain = self.columns.get(modality), [name for name in self.unused if name.casefold() not in VAGUE]
        named = {column: self.named[column] for column in COLUMNS if column in self.named} | {modality: "..."}
        flag = _flag(named | _proposal([modality], plain))
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
        absent = _proposal([column for column in COLUMNS[1:] if column not in self.columns], plain)
        if absent:
            named = {column: self.named[column] for column in COLUMNS if column in self.named}
            notes.append(f"no {', '.join(absent)} is read; {_flag(named | absent)} names columns")
        if "id" not in self.columns and self.table.names:
            made = "numbers of rows" if self.id_column == ROW_NUMBER else f"names of photos in {self.id_column}"
            usual = _usual("id", self.unused)
            notes.append(
                f"no column of ids: ids are the {made}" + (f"; --columns id={usual} names one" if usual else "")
            )
        notes += [f"{name}s 1.0, 2.0, ... are whole numbers and read as 1, 2, ..." for name in sorted(self._whole)]
        return [*notes, *([self._no_part] if self._no_part else []), *missing_note(self._missing)]

    def __iter__(self) -> Iterator[Cells]:
        return self.cells()

    def cells(self, photos: bool = True) -> Iterator[Cells]:
        """Yield the cells of each row; a label that is spelled as missing is None, a photo's cell is as in the file.

        Without `photos` their column, which may hold most of the file, is left out.
        """
        columns, id_column, whole, pattern = self.columns, self.id_column, self._whole, self._pattern
        texts, image, label = self._texts, columns.get("image"), columns.get("label")
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
    def _texts(self) -> list[str]:
        """The columns that make the text of a sample."""
        return columns_in("text", self.columns["text"], self.table.names) if "text" in self.columns else []

    @property
    def _used(self) -> list[str]:
        of_photos = [name for name in self._pattern[1::2] if name in self.table.names]
        plain = [name for column, name in self.columns.items() if column != "text"]
        used = dict.fromkeys([*plain, *self._texts, self.id_column, *of_photos])
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


def find_column(wanted: str, names: Collection[str]) -> str | None:
    """The name as it stands in a table: the very one, else the only one that differs in capitals alone."""
    if wanted in names or wanted == ROW_NUMBER:
        return wanted
    alike = [name for name in names if name.casefold() == wanted.strip().casefold()]
    return alike[0] if len(alike) == 1 else None


def columns_in(column: str, name: str, names: Collection[str]) -> list[str]:
    """The columns that the user names for a part of samples: one, or for a text several with + between them."""
    is_one = column != "text" or find_column(name, names) is not None
    return [name] if is_one else [part.strip() for part in name.split(SEVERAL)]


def find_columns(column: str, wanted: str, names: Collection[str]) -> str | None:
    """What is named for a part of samples as it stands in a table, None where a column of it is not there."""
    found = [find_column(part, names) for part in columns_in(column, wanted, names)]
    return SEVERAL.join(name for name in found if name is not None) if None not in found else None


def join_texts(parts: Iterable[str | None]) -> str | None:
    """One text of the cells of several columns, each on lines of its own; blank cells leave nothing behind."""
    return "\n".join(part for part in parts if part and part.strip()) or None


def _usual(column: str, names: Iterable[str]) -> str | None:
    """The name among `names` that people most likely give a column."""
    writable = [name for name in names if not {",", "="} & set(name)]
    plain = {re.sub(r"\W+", "_", name.casefold()).strip("_"): name for name in reversed(writable)}
    usual = USUAL[column].split()
    for name in usual:
        if name in plain:
            return plain[name]
    words = {word: name for key, name in plain.items() for word in key.split("_")}
    return next((words[name] for name in usual if name in words), None)


def _remedy(names: Collection[str], columns: Mapping[str, str | None], named: Mapping[str, str]) -> str:
    """The complete line to write where columns are not found."""
    if photo := next((place for place, name in enumerate(names, 1) if _PHOTO_NAME.search(name)), 0):
        rest = sorted(
            (place for place in range(1, len(names) + 1) if place != photo), key=lambda p: -len(list(names)[p - 1])
        )
        numbers = {"image": str(photo), **dict(zip(("text", "label"), map(str, rest), strict=False))}
        return f"the first line is a row, not names; number the columns, {_flag(numbers)}, or write a line of names"
    found = {column: name for column, name in columns.items() if name is not None} | _corrected(names, columns, named)
    taken = {part for column, name in found.items() for part in columns_in(column, name, names)}
    left = [name for name in names if name not in taken]
    proposal = found | _proposal([column for column in COLUMNS if column not in found], left)
    proposal = {column: name for column, name in proposal.items() if name != column}
    if not proposal and {"text", "image"} & {*names}:
        return "leave --columns out, or name others"
    if {"text", "image"} & {*proposal, *names}:
        return f"say {_flag(proposal)}, or name others"
    return "name yours with --columns id=...,text=...,image=...,label=..."


def _corrected(names: Collection[str], columns: Mapping[str, str | None], named: Mapping[str, str]) -> dict[str, str]:
    """Part of samples -> the names that are there and look like those that are named and not there."""
    corrected = {}
    for column in (column for column in named if columns[column] is None):
        parts = columns_in(column, named[column], names)
        close = [
            find_column(part, names) or next(iter(difflib.get_close_matches(part, names, 1)), "") for part in parts
        ]
        if all(close):
            corrected[column] = SEVERAL.join(close)
    return corrected


def _proposal(columns: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """For each of some columns the name that people most likely give it; none twice."""
    left, proposal = list(names), dict[str, str]()
    for column in columns:
        if usual := _usual(column, left):
            proposal[column] = usual
            left.remove(usual)
    return proposal


def _flag(columns: Mapping[str, str]) -> str:
    pairs = ",".join(f"{column}={columns[column]}" for column in COLUMNS if column in columns)
    return f"--columns {shlex.quote(pairs)}"
