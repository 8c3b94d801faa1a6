"""Layouts of folders and archives without lists: which of their files are the parts of which sample.

A folder, a .zip or .tar files hold a metadata table of the Hub or other tables, or files that one name groups, in class
folders or not (`GroupedFiles`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from posixpath import basename, dirname
from typing import Any, NamedTuple

from mmfeat.errors import DataError
from mmfeat.samples.folders import TEST_LIST, TRAIN_LIST, File, Tree, is_photo, list_remedy, photo_suffixes, some_of
from mmfeat.samples.labels import SPLIT, TEST, TRAIN, VALIDATION, is_missing, label_of, part_named, part_of_name
from mmfeat.samples.table_columns import columns_in, join_texts
from mmfeat.samples.table_files import SUFFIXES, table_suffix
from mmfeat.system.wording import counted

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"  # the Hub's column of photos
NO_TEXT = "no text "  # begins the note that JSON beside the photos may hold texts
BESIDE = ("txt", "json", "cls")  # files beside a photo that have its name


class Layout(NamedTuple):
    """What data hold: the files of tables; or a tree with lists in the folder `lists`; or with `groups` of files.

    The layout of a single table is empty.
    """

    tables: tuple[str, ...] = ()
    tree: Tree | None = None
    lists: str | None = None
    groups: GroupedFiles | None = None
    notes: tuple[str, ...] = ()


def find_layout(tree: Tree, named: Mapping[str, str], spellings: Collection[str]) -> Layout:
    """The layout of a folder or of archives without lists; `named` and `spellings` are those of `GroupedFiles`.

    Raises `DataError` for several tables of which none is meant, and where nothing is found.
    """
    tables, notes = _metadata_in(tree)
    groups = None if tables else GroupedFiles(tree, named, spellings)
    if groups is not None and not groups.has_pairs:
        tables, notes = _tables_in(tree)
    if not tables and not groups:
        raise DataError(
            f"{tree.data}: neither {TRAIN_LIST} nor {TEST_LIST} nor photos nor tables are here; {_hint(tree)}"
        )
    return Layout(tuple(str(tree.files[name]) for name in tables), tree, None, None if tables else groups, tuple(notes))


def _hint(tree: Tree) -> str:
    """What to do where nothing is found in a tree."""
    if deeper := [dirname(name) for name in tree.files if basename(name) == TRAIN_LIST]:
        return f"name the folder that holds them: --data {_part(tree, deeper[0])}"
    inside = some_of(dict.fromkeys(name.partition("/")[0] for name in tree.files))
    return f"it has {inside}; name the folder that holds them" if inside else "it is empty"


def _metadata_in(tree: Tree) -> tuple[list[str], list[str]]:
    """(The metadata tables of the Hub in a tree, notes). A table of test data beside others is left out."""
    found = [name for name in tree.files if basename(name).lower() in METADATA]
    test = [name for name in found if part_named(basename(dirname(name))) == TEST]
    if not test or test == found:
        return found, []
    return [name for name in found if name not in test], [_left_out(test[0], _part(tree, dirname(test[0])))]


def _tables_in(tree: Tree) -> tuple[list[str], list[str]]:
    """(The table of a tree, or its tables of training and validation data, notes). A table of test data is left out."""
    tables = [name for name in tree.files if table_suffix(name) in {*SUFFIXES} - {".txt"}]
    if not tree.is_packed:
        tables = [name for name in tables if "/" not in name or dirname(name) == "data"]  # others lie among photos
    parts = {part: [name for name in tables if part_of_name(name) == part] for part in (TRAIN, VALIDATION, TEST)}
    kept, test = parts[TRAIN] + parts[VALIDATION], parts[TEST]
    shards = {re.sub(r"\d+", "#", name) for name in kept + test}
    if parts[TRAIN] and len(shards) == sum(map(bool, parts.values())) and len({*map(table_suffix, shards)}) == 1:
        named = _part(tree, test[0] if len(test) == 1 else re.sub(r"\d+", "*", test[0])) if test else ""
        others = [name for name in tables if name not in kept + test]
        left = [_left_out(some_of(test), named)] if test else []
        return kept, left + ([f"{some_of(others)} not read beside {some_of(kept)}"] if others else [])
    if len(tables) > 1:
        raise DataError(f"{tree.data}: several tables, {some_of(tables)}; name one: --data {_part(tree, tables[0])}")
    return tables, []


def _left_out(what: str, named: str) -> str:
    return f"{what} is left out, --test {named} predicts it"


class Entry(NamedTuple):
    """One sample of grouped files; its text is known, or in a file."""

    where: str
    id: str
    text: str | None
    text_file: File | None
    image: File | None
    label: str | None
    split: str


@dataclass
class GroupedFiles:
    """Samples as the files of one name: a photo, and beside it a text (.txt), JSON or the name of a class (.cls).

    Without such files each photo is a sample. Labels are those of .cls, of JSON, or the names of folders, if there are
    several. `named` maps text, label and id to the fields of JSON. Folders of training and validation are parts of a
    split; a folder of test data beside them is left out, for --test to name.
    """

    tree: Tree
    named: Mapping[str, str]
    spellings: Collection[str] = ()
    missing: Counter[str] = field(default_factory=Counter)  # words for no label

    def __post_init__(self) -> None:
        self._groups: dict[str, dict[str, str]] = {}
        self._left_out: list[str] = []
        self._same: list[str] = []
        self._fields: dict[str, None] = {}
        for name in self.tree.files:
            stem, kind = self._parts(name)
            kind = "photo" if f".{kind}" in photo_suffixes() else kind
            if kind not in (*BESIDE, "photo"):
                self._left_out.append(name)
            elif self._groups.setdefault(stem, {}).setdefault(kind, name) != name:
                self._same.append(name)
        self.has_pairs = any("photo" in group and len(group) > 1 for group in self._groups.values())
        if self.has_pairs or self.tree.tars:
            self._drop_strangers()
        else:
            self._left_out = [name for name in self.tree.files if not is_photo(name)]
            self._groups, self._same = {name: {"photo": name} for name in self.tree.files if is_photo(name)}, []
        self._classes = self._class_folders()

    def _parts(self, name: str) -> tuple[str, str]:
        """(what the files of a sample have in common, the kind of the file)."""
        folder, base = dirname(name), basename(name)
        stem, kind = base.split(".", 1) if self.tree.tars and "." in base else os.path.splitext(base)
        return (f"{folder}/{stem}" if folder else stem), kind.lower().removeprefix(".")

    def _drop_strangers(self) -> None:
        """Leave out texts without a photo in folders of a data set that have no pairs, such as a README.txt."""
        paired = {dirname(stem) for stem, group in self._groups.items() if "photo" in group}
        strange = [stem for stem, group in self._groups.items() if "photo" not in group and dirname(stem) not in paired]
        if paired:
            self._left_out += [name for stem in strange for name in self._groups.pop(stem).values()]

    def _class_folders(self) -> dict[str, str]:
        """Sample -> name of its class folder; drops test data from the samples where there are others."""
        places = {stem: stem.partition("/")[2] if self.tree.shards else stem for stem in self._groups}
        common = os.path.commonpath([dirname(place) or "." for place in places.values()]) if places else ""
        start = len(common) + 1 if common not in ("", ".") else 0
        inner, self._split = {}, dict[str, str]()  # sample -> class folder, and folder of a part
        for stem, place in places.items():
            first, _, rest = place[start:].partition("/")
            if rest and part_named(first):
                self._split[stem], place = first, rest
            else:
                place = place[start:]
            inner[stem] = place.partition("/")[0] if "/" in place else ""
        tested = [stem for stem, name in self._split.items() if part_named(name) == TEST]
        self._tested = tested if len(tested) < len(self._split) else []
        for stem in self._tested:
            del self._groups[stem]
        if len({name for stem, name in inner.items() if name}) < 2 or (self.has_pairs and not all(inner.values())):
            return {}
        return {stem: name for stem, name in inner.items() if name and stem in self._groups}

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Entry]:
        """Yield the samples. Raises `DataError` for JSON that is no object."""
        for stem, group in self._groups.items():
            files = {kind: self.tree.files[name] for kind, name in group.items()}
            where = str(next(iter(files.values())))
            values = self._json(files["json"]) if "json" in files else {}
            text, label = self._cell(values, "text"), self._cell(values, "label")
            if "cls" in files:
                label = files["cls"].read_bytes().decode("utf-8", "replace").strip()
            label = self._classes.get(stem) if label is None else label
            if label is not None and is_missing(label, self.spellings):
                self.missing[label] += label != ""
                label = None
            id = self._cell(values, "id") if "id" in self.named else None
            short = stem.partition("/")[2] if self.tree.shards else stem
            part = part_named(self._split.get(stem) or self._cell(values, SPLIT) or "")
            yield Entry(where, id or short, text, files.get("txt"), files.get("photo"), label, part)

    def _json(self, file: File) -> Mapping[str, Any]:
        try:
            values = json.loads(file.read_bytes())
        except (ValueError, OSError) as error:
            raise DataError(f"{file}: no JSON that can be read ({error}); correct or remove it") from error
        if not isinstance(values, dict):
            raise DataError(f"{file}: JSON beside a photo must be one object; this is a {type(values).__name__}")
        self._fields.update(dict.fromkeys(values))
        return values

    def _cell(self, values: Mapping[str, Any], column: str) -> str | None:
        """The text of a field, or of several with + between; several labels are joined by |, texts by a new line."""
        cells = []
        for name in columns_in(column, self.named.get(column, column), values):
            value = values.get(name)
            if isinstance(value, dict):
                raise DataError(f"--columns {column}={name}: the field is an object; name another")
            if isinstance(value, list):
                listed = label_of(value, f"--columns {column}={name}") if column == "label" else ""
                value = listed or "\n".join(map(str, value)) or None
            cells.append(None if value is None else str(value))
        return cells[0] if len(cells) == 1 else join_texts(cells)

    @property
    def notes(self) -> list[str]:
        notes = []
        if self._classes:
            notes.append("labels are the names of folders")
        if self._tested:
            test = self._split[self._tested[0]]
            notes.append(_left_out(f"{test} ({len(self._tested):,})", self._below(test)))
        named = {c: columns_in(c, self.named.get(c, c), self._fields) for c in ("text", "label") if self._fields}
        if any("txt" in group for group in self._groups.values()):
            named.pop("text", None)
        if lacking := {name: column for column, names in named.items() for name in names if name not in self._fields}:
            flag = ",".join(f"{column}=..." for column in dict.fromkeys(lacking.values()))
            here = some_of(self._fields)
            notes.append(f"no {' or '.join(lacking)} is read from JSON with {here}; --columns {flag} names fields")
        if self._same:
            notes.append(
                f"{counted(len(self._same), 'file')} left out for another of the same name and kind "
                f"(first: {self._same[0]})"
            )
        if self._left_out:
            notes.append(f"{counted(len(self._left_out), 'file')} not read (first: {self._left_out[0]})" + self._list())
        return notes

    def _list(self) -> str:
        """What to type where a file that is not read may be the list of the labels; "" where there are labels."""
        if self._classes or self.has_pairs or self.tree.is_packed:
            return ""
        lists = [name for name in self._left_out if "/" not in name and name.lower().endswith(".txt")]
        photos = [name for name in self.tree.files if is_photo(name)]
        flags = next(filter(None, (list_remedy(str(self.tree.files[name]), photos) for name in lists)), "")
        return f"; it names the photos: {flags} reads their labels" if flags else ""

    def _below(self, part: str) -> str:
        """The path of a split folder."""
        first = next(name for name in self.tree.files if f"/{part}/" in f"/{name}")
        return _part(self.tree, f"{f'/{first}'.partition(f'/{part}/')[0]}/{part}".lstrip("/"))


def _part(tree: Tree, folder: str) -> str:
    return shlex.quote(f"{tree.data.rstrip('/')}/{folder}")
