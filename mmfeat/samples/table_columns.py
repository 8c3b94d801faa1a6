"""Columns of a table: which is what, by their names; and those of numbers and of categories as vectors, which are the
modality `table` beside text and image.

What a column holds is counted once, over the labelled samples, and recorded in the run. Mean, deviation and what stands
for a missing number are those of the training rows of a fold: see `mmfeat.heads.data`.
"""

from __future__ import annotations

import difflib
import math
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.errors import DataError
from mmfeat.samples.labels import SPLIT, is_missing

if TYPE_CHECKING:
    from mmfeat.samples.dataset import Sample

TABLE = "table"
OFTEN = 2  # samples that share a category which has a place of its own
MOST = 256  # categories of a column with places of their own, the most frequent ones
COUNTED = 100_000  # different cells of a column that are counted
LARGEST = float(np.finfo(np.float32).max)
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


@dataclass(frozen=True)
class TableColumn:
    """A column of numbers, or with `values` of categories; with `has_missing` an empty cell has a place of its own.

    `centre` and `scale` are mean and deviation of its numbers, which float32 can then tell apart.
    """

    name: str
    values: tuple[str, ...] = ()
    has_missing: bool = False
    centre: float = 0.0
    scale: float = 1.0

    @property
    def width(self) -> int:
        """D of the column's part of a vector."""
        return (len(self.values) or 1) + self.has_missing

    @property
    def label(self) -> str:
        """What people read of the column."""
        return f"{self.name} ({f'{len(self.values)} categories' if self.values else 'numbers'})"

    def vectors(self, cells: Sequence[str | None]) -> np.ndarray:
        """(N,) cells -> (N, D) float32: a number, NaN where it is missing, or 1 in the place of the category, all zeros
        where that has none. Raises `ValueError` for a cell that is no number where all were numbers."""
        out = np.zeros((len(cells), self.width), np.float32)
        places = {value: place for place, value in enumerate(self.values)}
        for row, cell in enumerate(cells):
            if cell is None or (not self.values and is_missing(cell)):
                out[row, -1] = self.has_missing
                if not self.values:
                    out[row, 0] = np.nan
            elif not self.values:
                out[row, 0] = (_number(cell) - self.centre) / self.scale
            elif cell in places:
                out[row, places[cell]] = 1
        return out


class TableCounts:
    """The cells of the columns `names`, counted over labelled samples."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.rows = tuple(names), 0
        self._counts: list[Counter[str | None]] = [Counter() for _ in names]
        self._words: dict[int, str] = {}  # number of a column -> its first cell that is no number

    def add(self, sample: Sample) -> None:
        if sample.label is None or sample.table is None:
            return
        self.rows += 1
        for number, (cell, counts) in enumerate(zip(sample.table, self._counts, strict=True)):
            if cell not in counts and number not in self._words and cell is not None and not _is_number(cell):
                self._words[number] = cell
            if cell in counts or len(counts) < COUNTED:
                counts[cell] += 1

    def columns(self) -> tuple[TableColumn, ...]:
        """What the columns hold, none where no sample has a label.

        Raises `DataError` for a column without values, and for one whose cells are most of them different words.
        """
        return tuple(map(self._column, range(len(self.names)))) if self.rows else ()

    def _column(self, number: int) -> TableColumn:
        name, counts = self.names[number], self._counts[number]
        if number not in self._words:
            return _of_numbers(name, counts)
        empty = counts.pop(None, 0)
        often = sorted((-count, cell) for cell, count in counts.items() if cell is not None and count >= OFTEN)
        if 2 * sum(-count for count, _ in often) < self.rows - empty:
            raise DataError(
                f"--columns {TABLE}={name}: {len(counts):,} values in {self.rows - empty:,} labelled rows, most of "
                f"them once ({self._words[number][:40]!r}): no numbers and no categories; leave it out, or make it a "
                f"part of the text, text=...+{name}"
            )
        return TableColumn(name, tuple(sorted(cell for _, cell in often[:MOST])), empty > 0)


def table_vectors(columns: Sequence[TableColumn], samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) float32 vectors of samples, all columns side by side, and (N,) bool: whether a sample is of a table.

    Raises `DataError` for a table of other columns, or with words where all were numbers.
    """
    mask = np.array([sample.table is not None for sample in samples], bool)
    rows = [sample.table or (None,) * len(columns) for sample in samples]
    if odd := next((row for row in rows if len(row) != len(columns)), None):
        names = "+".join(column.name for column in columns)
        raise DataError(f"--columns {TABLE}=...: {len(odd)} columns; the run needs {len(columns)}, as {names}")
    parts = []
    for number, column in enumerate(columns):
        cells = [row[number] for row in rows]
        try:
            parts.append(column.vectors(cells))
        except ValueError:
            row = next(row for row, cell in enumerate(cells) if cell is not None and not _is_number(cell))
            raise DataError(
                f"sample {samples[row].id}: {column.name} is {cells[row]!r}, and a number in each sample that trained "
                "the run; correct the cell, or leave it empty"
            ) from None
    vectors = np.concatenate(parts, axis=1)
    vectors[~mask] = np.nan
    return vectors, mask


def _of_numbers(name: str, counts: Counter[str | None]) -> TableColumn:
    numbers = {cell: count for cell, count in counts.items() if cell is not None and not is_missing(cell)}
    if not numbers:
        raise DataError(f"--columns {TABLE}={name}: no labelled row has a value there; leave it out")
    values, weights = np.array([_number(cell) for cell in numbers]), np.array(list(numbers.values()), np.float64)
    centre = float(np.average(values, weights=weights))
    scale = float(np.sqrt(np.average((values - centre) ** 2, weights=weights)))
    return TableColumn(name, (), len(numbers) < len(counts), centre, scale or 1.0)


def _is_number(cell: str) -> bool:
    try:
        return is_missing(cell) or math.isfinite(_number(cell))
    except ValueError:
        return False


def _number(cell: str) -> float:
    """The number in a cell. Raises `ValueError` for a cell that holds none, or one that float32 cannot hold."""
    value = float(cell)
    if "_" in cell or not abs(value) < LARGEST:
        raise ValueError(cell)
    return value


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
    return f"name yours with --columns id=...,text=...,image=...,label=...{parts}"


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
