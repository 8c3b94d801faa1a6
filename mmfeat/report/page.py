"""The page, one HTML file with style, script, plots and photos inside, and the files of its tables and figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mmfeat.errors import ConfigError
from mmfeat.report.gallery import Gallery
from mmfeat.report.plots import heat_map, png, svg
from mmfeat.report.section import Section, Table
from mmfeat.system.files import csv_text, make_folder, write_atomic

FILES = {name: f"report.{name}" for name in ("css", "js")}


@dataclass(frozen=True)
class Page:
    """The content of a page; `headline` holds the (name, value) pairs at its top."""

    title: str
    subtitle: str
    headline: Sequence[tuple[str, str]]
    sections: Sequence[Section]
    gallery: Gallery | None
    classes: Sequence[str] = ()


def render(page: Page) -> str:
    """The page as HTML text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mmfeat.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["svg"] = svg
    parts: dict[str, Any] = {name: _read(file) for name, file in FILES.items()}
    return environment.get_template("report.html").render(page=page, **parts)


def checked_page(path: Path) -> Path:
    """The path of a page. Raises `ConfigError` for a folder or another suffix."""
    if path.is_dir() or path.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {path}: name an HTML file, as in --out report.html")
    return path


def write_page(path: Path, page: Page) -> int:
    """Write the page and return its size in bytes."""
    text = render(page).encode()
    make_folder(path.absolute().parent)
    write_atomic(path, text)
    return len(text)


def _read(name: str) -> str:
    return resources.files("mmfeat.report").joinpath("templates", name).read_text(encoding="utf-8")


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\to$", "<": r"$<$", ">": r"$>$",
    "|": r"\textbar{}", "[": "{[}", "*": "{*}",
}  # fmt: skip


def write_tables(folder: Path, sections: Sequence[Section], latex: bool) -> list[Path]:
    """Write every table as `NAME.csv`, or as `NAME.tex` for LaTeX with the package booktabs."""
    make_folder(folder)
    files = []
    for table in _tables(sections):
        path = folder / f"{table.name}.{'tex' if latex else 'csv'}"
        write_atomic(path, (latex_table(table) if latex else csv_text(table.header, table.rows)).encode())
        files.append(path)
    return files


def write_figures(folder: Path, sections: Sequence[Section]) -> list[Path]:
    """Write every figure, and every table with shades, as `NAME.png`."""
    make_folder(folder)
    shaded = [heat_map(table) for table in _tables(sections) if table.shades]
    files = []
    for figure in [*(figure for section in sections for figure in section.figures), *shaded]:
        path = folder / f"{figure.name}.png"
        write_atomic(path, png(figure))
        files.append(path)
    return files


def latex_table(table: Table) -> str:
    """The table as a `tabular` with the rules of booktabs, caption and label; strong rows are bold."""
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_escape(table.caption)}}}", rf"\label{{tab:{table.name}}}"]
    lines += [rf"\begin{{tabular}}{{{'l' * len(table.header)}}}", r"\toprule", _line(table.header), r"\midrule"]
    lines += [_line(row, index in table.strong) for index, row in enumerate(table.rows)]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}", ""])


def _line(cells: Sequence[str], strong: bool = False) -> str:
    shown = [_escape(cell) for cell in cells]
    return " & ".join(rf"\textbf{{{cell}}}" if strong and cell else cell for cell in shown) + r" \\"


def _escape(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in text)


def _tables(sections: Sequence[Section]) -> Iterator[Table]:
    for section in sections:
        yield from section.tables
