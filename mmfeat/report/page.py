"""The page, one HTML file with style, script, plots and photos inside, and the files of its tables and figures;
and a page of neighbours."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfeat.errors import ConfigError
from mmfeat.prediction.nearest import Neighbours
from mmfeat.report.gallery import Gallery
from mmfeat.report.plots import heat_map, png, svg
from mmfeat.report.section import Section, Table, make_card
from mmfeat.samples.dataset import Sample
from mmfeat.system.files import csv_text, make_folder, write_atomic

if TYPE_CHECKING:
    from markupsafe import Markup


FILES = {name: f"report.{name}" for name in ("css", "js")}


COMMON = ("class", "label", "run", "sample", "view")  # words that the glossary has and the page does not mark
LETTERS = 600  # most letters of a text


@dataclass(frozen=True)
class Page:
    """The content of a page; `headline` holds the (name, value, address in the page or "") at its top."""

    title: str
    subtitle: str
    headline: Sequence[tuple[str, str, str]]
    sections: Sequence[Section]
    gallery: Gallery | None
    classes: Sequence[str] = ()
    verdict: Sequence[str] = ()


def render(page: Page) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mmfeat.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    explained = Explained(json.loads(_read("glossary.json")))
    environment.filters |= {"svg": svg, "explain": explained}
    parts: dict[str, Any] = {name: _read(file) for name, file in FILES.items()}
    return environment.get_template("report.html").render(page=page, explained=explained, **parts)


class Explained:
    """Marks the terms of a glossary in texts of a page, and remembers which of them the page has."""

    def __init__(self, glossary: Mapping[str, str]) -> None:
        self._glossary, self._seen = glossary, set[str]()
        self._spelled = {term.lower(): term for term in glossary if term not in COMMON}
        longest = sorted(map(re.escape, self._spelled), key=len, reverse=True)
        self._terms = re.compile(rf"(?<![\w-])({'|'.join(longest)})(?=s?(?![\w-]))", re.IGNORECASE)

    def __call__(self, text: str) -> Markup:
        """The text as HTML in which the first term, of several the first of each, leads to its line of the glossary."""
        from markupsafe import Markup, escape

        here = set[str]()

        def mark(match: re.Match[str]) -> str:
            term = self._spelled[match[1].lower()]
            if term in here:
                return match[1]
            here.add(term)
            meaning = escape(self._glossary[term])
            return f'<a class="term" href="#term-{term.replace(" ", "-")}" title="{meaning}">{match[1]}</a>'

        marked = Markup(self._terms.sub(mark, str(escape(text))))
        self._seen |= here
        return marked

    def terms(self) -> list[tuple[str, str]]:
        """(term, meaning) of the terms that the page has so far."""
        return [(term, meaning) for term, meaning in self._glossary.items() if term in self._seen]


def checked_page(path: Path) -> Path:
    """The path of a page. Raises `ConfigError` for a folder or another suffix."""
    if path.is_dir() or path.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out {path}: name an HTML file, as in --out report.html")
    return path


def write_page(path: Path, page: Page) -> int:
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


def write_neighbours(found: Neighbours, out: str | Path) -> int:
    """Write one HTML page that opens without a network, and return its size in bytes."""
    path = checked_page(Path(out))
    query = Section("query", "Query", cards=[make_card(found.query, found.query.id, _facts(found.query), LETTERS)])
    pairs = zip(found.samples, found.similarities, strict=True)
    cards = [make_card(s, f"{rank}. {cosine:.3f}", _facts(s), LETTERS) for rank, (s, cosine) in enumerate(pairs, 1)]
    nearest = Section("neighbours", "Neighbours", found.notes, cards=cards)
    subtitle = f"nearest first, by the cosine of vectors of {found.encoder}"
    return write_page(path, Page(f"Neighbours of {found.query.id}", subtitle, [], [query, nearest], None))


def _facts(sample: Sample) -> str:
    return f"id {sample.id}" + (f" · label {sample.label}" if sample.label else "")
