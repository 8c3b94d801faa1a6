"""Columns of numbers and of categories as vectors: the modality `table`, beside text and image.

What a column holds is counted once, over the labelled samples, and recorded in the run. Mean, deviation and what stands
for a missing number are those of the training rows of a fold: see `mmfeat.heads.data`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.errors import DataError
from mmfeat.samples.labels import is_missing

if TYPE_CHECKING:
    from mmfeat.samples.dataset import Sample

TABLE = "table"
OFTEN = 2  # samples that share a category which has a place of its own
MOST = 256  # categories of a column with places of their own, the most frequent ones
COUNTED = 100_000  # different cells of a column that are counted
LARGEST = float(np.finfo(np.float32).max)


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
