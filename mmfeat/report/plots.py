"""Plots by matplotlib, as SVG that takes the colours of the page around it, or as PNG for papers."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mmfeat.report.section import Figure, Table
from mmfeat.runs.entry import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


INK, GRID = "#010101", "#c9ccd1"  # a page replaces both by its own colours
SERIES = ("#3b82c4", "#d9782d", "#3f9a6b", "#b8559b", "#7a6fd0", "#9a8a2c", "#2f9fb0", "#8d8d8d")  # on light and dark
WIDTH = 5.2  # inches, half a page or a phone
WIDEST = 9.0  # inches of a matrix
DPI = 200
CELL = 0.36  # inches of height; a cell is two to three times as wide
LONGEST = 28  # most letters of a name in a plot
LETTERS = 80  # most letters of all names that stand side by side

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a class may be named $5
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


def new_drawing(height: float, columns: int = 1) -> tuple[Drawing, list[Axes]]:
    """A figure of the page's width and `height` inches, and its axes from left to right."""
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(WIDTH, height), layout="constrained")
    axes = drawing.subplots(1, columns, squeeze=False)
    return drawing, list(axes.ravel())


def short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


@functools.lru_cache(maxsize=64)  # because a page is rendered twice
def svg(figure: Figure) -> str:
    """The figure as an SVG element with text as text, the page's colours for ink and grid, and ids only where used."""
    buffer = io.StringIO()
    with _style(figure.name):
        figure.draw().savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S)
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r"(font(?:-family)?: [^;\"]*?)'?DejaVu Sans'?(, [^;\"]*)?", r"\1system-ui, sans-serif", text)
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    return text.replace(INK, "currentColor").replace(GRID, "var(--line)")


def png(figure: Figure, dpi: int = DPI) -> bytes:
    return plain(figure, "png", dpi=dpi, metadata={"Software": None})


def plain(figure: Figure, format: str, **options: Any) -> bytes:
    """The figure on white in a format of matplotlib. Raises `ValueError` for another format."""
    buffer = io.BytesIO()
    with _style(figure.name):
        figure.draw().savefig(buffer, format=format, facecolor="white", **options)
    return buffer.getvalue()


def heat_map(table: Table) -> Figure:
    """A table with shades as a figure; its first column names the rows."""

    def draw() -> Drawing:
        assert table.shades
        drawing, (axes,) = new_drawing(1.1 + CELL * len(table.rows))
        drawing.set_figwidth(min(WIDEST, 2.5 + 2.5 * CELL * len(table.header)))
        drawing.suptitle(table.caption, fontsize=9)
        names, header = [short(row[0]) for row in table.rows], list(map(short, table.header[1:]))
        shades = [row[1:] for row in table.shades]
        axes.imshow(shades, cmap=_fade(SERIES[0]), vmin=0, vmax=1, aspect="auto")
        axes.grid(False)
        axes.set_xticks(range(len(header)), header)
        if len(header) * max(map(len, header), default=0) > LETTERS:
            axes.set_xticks(range(len(header)), header, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        for row, cells in enumerate(table.rows):
            for column, cell in enumerate(cells[1:]):
                axes.text(column, row, cell, ha="center", va="center", fontsize=8)
        return drawing

    return Figure(table.name, table.caption, table.caption, draw)


def whiskers(axes: Axes, scores: Sequence[Interval], names: Sequence[str], colours: Sequence[str]) -> None:
    for row, (score, colour) in enumerate(zip(scores, colours, strict=True)):
        axes.plot([score.low, score.high], [row, row], color=colour, linewidth=2.2, alpha=0.6)
        axes.plot(score.value, row, "o", color=colour, markersize=5)
    axes.set_yticks(range(len(names)), list(map(short, names)))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def score_figure(
    name: str, title: str, says: str, scores: Sequence[Interval], names: Sequence[str], colours: Sequence[str]
) -> Figure:
    """A figure of the scores called `title` with their intervals, one below the other."""

    def draw() -> Drawing:
        drawing, (axes,) = new_drawing(0.8 + 0.25 * len(names))
        whiskers(axes, scores, names, colours)
        axes.set_xlabel(title)
        return drawing

    return Figure(name, f"{title} with 95 % intervals", says, draw)


def _fade(colour: str) -> Any:
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    return LinearSegmentedColormap.from_list("fade", [to_rgba(colour, 0.0), to_rgba(colour, 0.85)])


@contextmanager
def _style(name: str) -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # DejaVu Sans lacks the scripts of some labels
        yield
