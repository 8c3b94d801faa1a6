"""Folders and archives: their files by name, the layout of those with lists, and texts in files of one encoding.

The lists name ids and labels by line, and lie beside `data` with the texts and photos. `mmfeat.samples.layouts` has the
layouts without lists.
"""

from __future__ import annotations

import os
import shlex
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from posixpath import basename, dirname
from typing import TypeAlias
from unicodedata import normalize

import numpy as np

from mmfeat.errors import DataError
from mmfeat.samples.encodings import Decoder, decode_text, is_utf8
from mmfeat.samples.labels import is_missing
from mmfeat.samples.photo_cells import IMAGE_SUFFIXES
from mmfeat.samples.table_files import shards_in
from mmfeat.system.remote import (
    ARCHIVES,
    TARS,
    RemoteFile,
    files_of,
    is_remote,
    member_url,
    open_archive,
    refuse_foreign,
    split_path,
)

File: TypeAlias = "Path | RemoteFile"
TRAIN_LIST = "train.txt"
TEST_LIST = "test_without_label.txt"
MVSA_LIST = "labelResultAll.txt"  # of MVSA as published: an id, and for each annotator the labels of text and photo
LOOKED_AT = 4096  # bytes of a file that show whether it is a list of photos
LISTS = (TRAIN_LIST, TEST_LIST, MVSA_LIST)
SHOWN = 5  # names in a message


@cache
def photo_suffixes() -> frozenset[str]:
    """The suffixes of the formats of photos that Pillow reads, in lower case."""
    from PIL import Image

    from mmfeat.samples.photos import FORMATS

    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS)


def is_photo(name: str) -> bool:
    """Whether a name has the suffix of a photo."""
    return os.path.splitext(name)[1].lower() in photo_suffixes()


@dataclass(frozen=True)
class Tree:
    """The files of a folder or of archives by their names in it, with / between folders; hidden ones are left out.

    `shards` says that the first folder of each name is an archive; `is_packed`, that the files lie in archives;
    `tars`, that a part of a sample is named by all behind the first dot, as in WebDataset's shards.
    """

    data: str
    files: Mapping[str, File]
    is_packed: bool = False
    shards: bool = False
    tars: bool = False

    def below(self, folder: str) -> dict[str, File]:
        """The files below a folder, by their names in it."""
        start = f"{folder}/" if folder else ""
        return {name[len(start) :]: file for name, file in self.files.items() if name.startswith(start)}


def archives_of(data: str) -> list[str]:
    """The archives that a name stands for: one, those of a pattern or list, or those of a folder that has no more."""
    refuse_foreign(data)
    if is_remote(data):
        return []
    if os.path.isdir(data):
        files = [os.path.join(data, name) for name in sorted(os.listdir(data)) if not name.startswith(".")]
        return files if files and all(file.lower().endswith(TARS) for file in files) else []
    files = files_of(data)
    return files if files and all(file.lower().endswith(ARCHIVES) and os.path.isfile(file) for file in files) else []


def open_tree(data: str) -> Tree | None:
    """The files of a folder, of archives or of a part of an archive; None for tables, which a folder may hold too.

    Raises `DataError` for a list, which is no table.
    """
    if basename(data) == MVSA_LIST:
        raise DataError(f"{data}: a list of labels; name its folder: --data {shlex.quote(dirname(data) or '.')}")
    if archives := archives_of(data):
        members = [(path, name) for path in archives for name in open_archive(path).members]
        several = len(archives) > 1
        packed: dict[str, File] = {
            f"{Path(path).name}/{name}" if several else name: RemoteFile(member_url(path, name))
            for path, name in members
        }
        return Tree(data, packed, True, several, all(path.lower().endswith(TARS) for path in archives))
    if os.path.isdir(data):
        if lists := [name for name in LISTS if os.path.isfile(os.path.join(data, name))]:
            below = _walk(os.path.join(data, "data"))  # a cache or other folders may lie beside it
            return Tree(
                data, {**{name: Path(data, name) for name in lists}, **{f"data/{n}": f for n, f in below.items()}}
            )
        return None if shards_in(data) else Tree(data, _walk(data))
    if (inside := split_path(data)) is None:
        return None
    archive, part = inside
    names = {name[len(part) + 1 :]: name for name in open_archive(archive).members if name.startswith(f"{part}/")}
    if not names:
        return None
    files = {short: RemoteFile(member_url(archive, name)) for short, name in names.items()}
    return Tree(data, files, True, tars=archive.lower().endswith(TARS))


def table_in_archive(data: str) -> str | None:
    """The URL of a table whose path leads into an archive, None for other data."""
    inside = None if is_remote(data) or os.path.exists(data) else split_path(data)
    if inside is None:
        return None
    archive, name = inside
    members = open_archive(archive).members
    if name in members:
        return member_url(archive, name)
    if not any(member.startswith(f"{name}/") for member in members):
        tops = dict.fromkeys(member.partition("/")[0] for member in members)
        raise DataError(f"{data}: {archive} has no {name}; it has {some_of(tops)}")
    return None


def _walk(folder: str) -> dict[str, File]:
    """The files below a folder; folders that are links are entered unless they lead back to one above."""
    files: dict[str, File] = {}
    for here, inside, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        inside[:] = sorted(
            name
            for name in inside
            if not name.startswith((".", "__MACOSX"))
            and not (os.path.islink(path := os.path.join(here, name)) and real.startswith(os.path.realpath(path)))
        )
        relative = os.path.relpath(here, folder).replace(os.sep, "/")
        for name in sorted(names):
            if not name.startswith("."):
                files[name if relative == "." else f"{relative}/{name}"] = Path(here, name)
    return files


def lists_in(tree: Tree) -> str | None:
    """The folder of the tree that holds lists beside `data`, "" for the tree itself; None without any."""
    folders = [dirname(name) for name in tree.files if basename(name) in LISTS]
    if "" in folders:
        return ""
    beside = dict.fromkeys(folder for folder in folders if tree.below(f"{folder}/data"))
    if len(beside) > 1:
        raise DataError(f"{tree.data}: {TRAIN_LIST} lies in {some_of(beside)}; name one of the folders")
    return next(iter(beside), None)


def some_of(names: Collection[str]) -> str:
    shown = [str(name) for name in list(names)[:SHOWN]]
    return ", ".join(shown) + (", ..." if len(names) > SHOWN else "")


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
            raise DataError(f"{line}: the id {id!r} is already at {first}; remove or rename one of them")


def checked_id(value: str | None, line: str, ids: UniqueIds | None, is_file: bool = False) -> str:
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
    import xxhash

    return xxhash.xxh3_64_intdigest(id.encode())


def repeated_hashes(hashes: array[int]) -> frozenset[int]:
    """The values that occur more than once among 64-bit hashes."""
    ordered = np.sort(np.frombuffer(hashes, np.uint64))
    return frozenset(ordered[1:][ordered[1:] == ordered[:-1]].tolist())


def read_lists(
    lists: list[File], ids: UniqueIds | None, spellings: Collection[str], missing: Counter[str]
) -> Iterator[tuple[str, str | None]]:
    """Yield (id, label) over all lists; only the first list may introduce label names.

    `spellings` stand for no label; `missing` counts those but `null`, the word of this layout.
    """
    classes: set[str] = set()
    if lists[0].name == MVSA_LIST:
        yield from _mvsa_labels(lists[0], ids)
        return
    for path in lists:
        known = frozenset(classes)
        lines = enumerate(decode_text(path.read_bytes())[0].splitlines(), 1)
        rows = [(line, text.split(",")) for line, text in lines if text.strip()]  # quotes mean nothing in a list of ids
        for line, cells in rows[rows[:1] != [] and rows[0][1][0].strip().lower() in ("guid", "id") :]:
            where = f"{path}:{line}"
            if len(cells) != 2:
                raise DataError(f"{where}: {','.join(cells)[:60]!r} is not `guid,tag`; one comma parts the two")
            id, label = checked_id(cells[0], where, ids, is_file=True), cells[1].strip()
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


def _mvsa_labels(path: File, ids: UniqueIds | None) -> Iterator[tuple[str, str | None]]:
    """Yield (id, label) of MVSA's list by the rule of its users (Xu and Mao, MultiSentiNet, 2017).

    The label of a text or photo is that of most annotators, who must be more than half. Of the two labels a sample has
    the one that is not neutral, and none where they oppose each other.
    """
    for number, line in enumerate(decode_text(path.read_bytes())[0].splitlines(), 1):
        id, *pairs = line.split("\t")
        if not line.strip() or id.strip().casefold() == "id":
            continue
        cells = [[label.strip() for label in pair.split(",")] for pair in pairs]
        if not pairs or any(len(pair) != 2 or not all(pair) for pair in cells):
            raise DataError(f"{path}:{number}: {line[:60]!r} is not an id and, behind tabs, `text,image` labels")
        labels = [Counter(each).most_common(1)[0] for each in zip(*cells, strict=True)]
        agreed = {label for label, count in labels if count * 2 > len(cells)}
        told = agreed - {"neutral"} or agreed
        is_clear = all(count * 2 > len(cells) for _, count in labels) and len(told) == 1
        yield checked_id(id, f"{path}:{number}", ids, is_file=True), told.pop() if is_clear else None


def no_data_folder(path: File, folder: str) -> DataError:
    """The error for a list without its folder, which may be a table that names photos."""
    photos = [] if isinstance(path, RemoteFile) else [name for name in _walk(str(path.parent)) if is_photo(name)]
    flags = list_remedy(str(path), photos) if photos else ""
    remedy = f"put it there, or say {flags}" if flags else "put it there"
    return DataError(f"{path}: the folder {folder} with its images and texts is missing; {remedy}")


def list_remedy(path: str, photos: Collection[str]) -> str:
    """What to type to read a file whose lines name photos of its folder and their labels; "" for another file."""
    roots = {basename(name): dirname(name) for name in photos} | dict.fromkeys(photos, "")
    with open(path, "rb") as file:
        lines = decode_text(file.read(LOOKED_AT))[0].splitlines()[:2]
    for line, delimiter in product(lines, "\t,;| "):
        cells = [cell.strip().removeprefix("./") for cell in line.split(delimiter)]
        photo = next((place for place, cell in enumerate(cells) if cell in roots), None)
        if photo is None or len(cells) == 1:
            continue
        names = [str(number) for number in range(1, len(cells) + 1)] if line == lines[0] else lines[0].split(delimiter)
        label = names[photo + 1] if photo + 1 < len(names) else names[0]
        columns = f"image={names[photo].strip()},label={label.strip()}"
        flags = {"--data": path, "--columns": columns, "--delimiter": "space" if delimiter == " " else ""}
        if root := roots[cells[photo]]:
            flags["--image-root"] = os.path.join(os.path.dirname(path), root)
        return " ".join(f"{flag} {shlex.quote(value)}" for flag, value in flags.items() if value)
    return ""


def index_files(files: Mapping[str, File]) -> tuple[dict[str, File], dict[str, File]]:
    """Image and text file of each id in NFC; where an id has several images the first suffix wins."""
    images: dict[str, File] = {}
    texts: dict[str, File] = {}
    rank = {suffix: position for position, suffix in enumerate(IMAGE_SUFFIXES)}
    names = [(name, *os.path.splitext(name.rpartition("/")[2])) for name in sorted(files)]
    for name, stem, suffix in sorted(names, key=lambda parts: rank.get(parts[2].lower(), len(rank))):
        if suffix.lower() == ".txt":
            texts.setdefault(normalize("NFC", stem), files[name])
        elif is_photo(name):
            images.setdefault(normalize("NFC", stem), files[name])
    return images, texts


def read_texts(files: Sequence[File | None], decoder: Decoder) -> list[tuple[str | None, str]]:
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
