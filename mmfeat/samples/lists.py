"""Lists of a folder: ids and labels by line, the files of each id, and texts in files of one encoding."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from unicodedata import normalize

from mmfeat.errors import DataError
from mmfeat.samples.encodings import Decoder, decode_text, is_utf8
from mmfeat.samples.labels import is_missing
from mmfeat.samples.layouts import File, is_photo
from mmfeat.samples.photo_cells import IMAGE_SUFFIXES
from mmfeat.samples.table_files import TEST_LIST, TRAIN_LIST


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
    """The 64-bit hash of an id."""
    import xxhash

    return xxhash.xxh3_64_intdigest(id.encode())


def read_lists(
    lists: list[File], ids: UniqueIds | None, spellings: Collection[str], missing: Counter[str]
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


def _list_rows(path: File) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, cells); lines are split by hand because quotes mean nothing in a list of ids."""
    text, _ = decode_text(path.read_bytes())
    rows = [(number, line.split(",")) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    if rows and rows[0][1][0].strip().lower() in ("guid", "id"):
        del rows[0]
    yield from rows


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
