"""Sections of a report: words, tables and figures, which a page, LaTeX, CSV and PNG show each in their way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmfeat.runs.entry import Entry
from mmfeat.system import wording

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


MOST_CLASSES = 40  # of a table of classes by classes


@dataclass(frozen=True)
class Table:
    """Text cells below a header. `shades`, from 0 to 1 a cell, colour it; rows named in `strong` stand out."""

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    shades: Sequence[Sequence[float]] | None = None
    strong: frozenset[int] = frozenset()
    folded: bool = False  # behind a line that opens it

    def shade(self, row: int, column: int) -> float:
        """0 where nothing is to be coloured."""
        return self.shades[row][column] if self.shades else 0.0


@dataclass(frozen=True)
class Figure:
    """A plot, drawn when it is shown; `says` tells what is to be seen to whoever does not see it."""

    name: str
    caption: str
    says: str
    draw: Callable[[], Drawing]


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it. `commands` are lines for a shell."""

    name: str
    title: str
    words: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = field(default=())


def interval(score: wording.Estimate) -> str:
    """`0.617 [.598, .638]`; "" where the score is not defined."""
    return wording.interval(score, ", ")


def gain(difference: wording.Estimate) -> str:
    """`+0.055 [+0.040, +0.071]`."""
    return wording.gain(difference, ", ")


def number(value: float | None, digits: int = 3) -> str:
    """Rounded; "" for a value that is not defined."""
    return "" if value is None else f"{value:.{digits}f}"


def p_value(value: float) -> str:
    """Three digits, or how small it is at least."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def title_of(entry: Entry) -> str:
    """`concat on text`; ensembles need no modality."""
    return entry.head if entry.is_ensemble else entry.label
