"""Names of the columns of a table: which is what, how they are found, and what to write where one is not there."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Iterable, Mapping

from mmfeat.samples.labels import SPLIT
from mmfeat.samples.table_columns import TABLE

COLUMNS = ("id", "text", "image", "label", SPLIT, TABLE)
SOUGHT = COLUMNS[:5]  # those that are found without being named
SEVERAL = "+"  # between the columns of a text or a table
ROW_NUMBER = "#"  # stands for the number of a row where a column of ids is named

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
_PHOTO_NAME = re.compile(r"\.(jpe?g|png|webp|gif|bmp|tiff?)$", re.IGNORECASE)


def find_column(wanted: str, names: Collection[str]) -> str | None:
    """The name as it stands in a table: the very one, else the only one that differs in capitals alone."""
    if wanted in names or wanted == ROW_NUMBER:
        return wanted
    alike = [name for name in names if name.casefold() == wanted.strip().casefold()]
    return alike[0] if len(alike) == 1 else None


def columns_in(column: str, name: str, names: Collection[str]) -> list[str]:
    """The columns that the user names for a part of samples: one, or of a text or table several with + between."""
    is_one = column not in ("text", TABLE) or find_column(name, names) is not None
    return [name] if is_one else [part.strip() for part in name.split(SEVERAL)]


def find_columns(column: str, wanted: str, names: Collection[str]) -> str | None:
    """What is named for a part of samples as it stands in a table, None where a column of it is not there."""
    found = [find_column(part, names) for part in columns_in(column, wanted, names)]
    return SEVERAL.join(name for name in found if name is not None) if None not in found else None


def join_texts(parts: Iterable[str | None]) -> str | None:
    """One text of the cells of several columns, each on lines of its own; blank cells leave nothing behind."""
    return "\n".join(part for part in parts if part and part.strip()) or None


def usual_name(column: str, names: Iterable[str]) -> str | None:
    """The name among `names` that people most likely give a column."""
    writable = [name for name in names if not {",", "="} & set(name)]
    plain = {re.sub(r"\W+", "_", name.casefold()).strip("_"): name for name in reversed(writable)}
    usual = USUAL[column].split()
    for name in usual:
        if name in plain:
            return plain[name]
    words = {word: name for key, name in plain.items() for word in key.split("_")}
    return next((words[name] for name in usual if name in words), None)


def remedy_for(names: Collection[str], columns: Mapping[str, str | None], named: Mapping[str, str]) -> str:
    """The complete line to write where columns are not found."""
    if photo := next((place for place, name in enumerate(names, 1) if _PHOTO_NAME.search(name)), 0):
        rest = sorted(
            (place for place in range(1, len(names) + 1) if place != photo), key=lambda p: -len(list(names)[p - 1])
        )
        numbers = {"image": str(photo), **dict(zip(("text", "label"), map(str, rest), strict=False))}
        return (
            f"the first line is a row, not names; number the columns, {columns_flag(numbers)}, or write a line of names"
        )
    corrected = _corrected(names, columns, named)
    found = {column: name for column, name in columns.items() if name is not None} | corrected
    taken = {part for column, name in found.items() for part in columns_in(column, name, names)}
    left = [name for name in names if name not in taken]
    proposal = found | proposal_of([column for column in SOUGHT if column not in found], left)
    proposal = {column: name for column, name in proposal.items() if name != column}
    if not proposal and {"text", "image"} & {*names}:
        return "leave --columns out, or name others"
    if corrected.keys() == {column for column in named if columns[column] is None} and corrected:
        return f"did you mean {columns_flag(proposal)}?"
    if {"text", "image", TABLE} & {*proposal, *names}:
        return f"say {columns_flag(proposal)}, or name others"
    is_uncut = len(names) == 1 and re.search(r"\w\W\w", next(iter(names)))
    parts = ", or with --delimiter what parts the cells" if is_uncut else ""
    above = "; the names stand in the first line: remove what is above them" if len(names) == 1 else ""
    return f"name yours with --columns id=...,text=...,image=...,label=...{parts}{above}"


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


def meant_column(name: str) -> str:
    """The part of samples that a misspelled or usual name most likely means, "" where none is like it."""
    words = {word: column for column in COLUMNS for word in (column, *USUAL.get(column, "").split())}
    close = difflib.get_close_matches(name.casefold(), words, 3)
    return words[max(close, key=lambda word: sorted(word) == sorted(name.casefold()))] if close else ""


def proposal_of(columns: Iterable[str], names: Collection[str]) -> dict[str, str]:
    """For each of some columns the name that people most likely give it; none twice."""
    left, proposal = list(names), dict[str, str]()
    for column in columns:
        if usual := usual_name(column, left):
            proposal[column] = usual
            left.remove(usual)
    return proposal


def columns_flag(columns: Mapping[str, str]) -> str:
    pairs = ",".join(f"{column}={columns[column]}" for column in COLUMNS if column in columns)
    return f"--columns {shlex.quote(pairs)}"
