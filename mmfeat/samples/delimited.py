"""Delimited tables: the delimiter and the quoting that a whole file supports, and its rows."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mmfeat.errors import DataError
from mmfeat.system.wording import counted

DELIMITERS = {".csv": ",", ".tsv": "\t", ".psv": "|", ".txt": "\t"}
OTHERS = (";", "\t", "|", ",")  # delimiters that are tried where that of the suffix does not fit
NAMED = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "space": " "}
QUOTINGS = ("auto", "csv", "backslash", "none")
SHAPED_ROWS = 2000  # rows whose cells show how the cells of a column look
FEW_SHAPES = 20  # a column of more shapes holds free text, and says nothing about a line
SHOWN_SPANS = 100  # quoted cells of several lines that are looked at
LONGEST_SPAN = 10_000  # lines; a quoted cell of more lines was never closed
_BINARY = re.compile(r"^(PK\x03\x04|PAR1|%PDF|\x89PNG|Rar!)|\0")
_ESCAPED = re.compile(r'\\(["\\])')
Lines = Callable[[], Iterator[str]]


@dataclass(frozen=True)
class Dialect:
    """How the cells of a file are parted: a delimiter, quotes that mean something or not, blanks after delimiters."""

    delimiter: str
    quoted: bool = True
    blanks: bool = False  # after each delimiter
    escaped: bool = False  # a quote within a quoted cell stands behind a backslash, as Spark and MySQL write it
    note: str = ""  # a decision that the user should hear of

    def reader(self, lines: Iterator[str]) -> Any:
        csv.field_size_limit(1 << 30)  # a long text is no error
        return csv.reader(
            map(_doubled, lines) if self.escaped else lines,
            delimiter=self.delimiter,
            quoting=csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE,
            skipinitialspace=self.blanks,
            strict=self.quoted,
        )


@dataclass
class _Span:
    """A quoted cell over several lines: the number of the first line, and the lines."""

    first: int
    lines: list[str]


@dataclass
class _Fit:
    """How well a delimiter fits a file, with quotes and without."""

    delimiter: str
    escaped: bool = False
    width: int = 0
    plain: bool = True
    quoted: bool = True
    opening: int = 0  # the line in which the cell begins that ends the quoted reading
    spans: list[_Span] = field(default_factory=list)
    shapes: list[set[str]] = field(default_factory=list)

    def is_rows(self, span: _Span) -> bool:
        """Whether each line of a span alone is a row like the others: in its width, and in its cells without text."""
        rows = [line.rstrip("\r\n").split(self.delimiter) for line in span.lines if line.strip()]
        if self.width < 2 or any(len(row) != self.width for row in rows):
            return False
        opening = next((column for column, cell in enumerate(rows[0]) if cell.count('"') % 2), -1)
        shapes = self.shapes[: self.width] or [{_shape(cell)} for cell in rows[0]]  # no other rows: like the first
        told = [n for n, known in enumerate(shapes) if n != opening and len(known) <= FEW_SHAPES and _are_words(known)]
        return bool(told) and all(_shape(row[column].strip('"')) in shapes[column] for row in rows for column in told)


def find_dialect(path: str, lines: Lines, suffix: str, reading: Mapping[str, str], has_quotes: bool) -> Dialect:
    """The dialect that the whole file supports, or what `reading` says of delimiter and quoting.

    `lines` begins a pass over the lines of the file. Raises `DataError` where quotes make one cell of lines that are
    rows by themselves, and nothing tells which is meant.
    """
    delimiter, quoting = _delimiter(reading.get("delimiter", "")), reading.get("quoting") or "auto"
    if quoting not in QUOTINGS:
        raise DataError(f"--quoting {quoting}: one of {', '.join(QUOTINGS)}")
    default, first = DELIMITERS[suffix], next((line for line in lines() if line.strip()), "")
    if not delimiter and not has_quotes and first.count(default) >= max(1, *map(first.count, OTHERS)):
        dialect = Dialect(default, quoting != "none")
    else:
        fit = _best_fit(lines, [delimiter] if delimiter else _candidates(first, default), quoting)
        plainly = quoting != "auto" or not has_quotes or fit.escaped
        dialect = Dialect(fit.delimiter, quoting != "none", escaped=fit.escaped) if plainly else _decided(path, fit)
    mark = dialect.delimiter
    return replace(dialect, blanks=first.count(mark) == first.count(mark + " ") > 0)


def _doubled(line: str) -> str:
    """A line whose quotes behind a backslash are doubled instead."""
    return _ESCAPED.sub(lambda match: '""' if match[1] == '"' else "\\", line) if "\\" in line else line


def _delimiter(named: str) -> str:
    mark = chr(int(named[2:], 16)) if re.fullmatch(r"\\x[\da-fA-F]{2}", named) else NAMED.get(named, named)
    if len(mark) > 1 or mark in ('"', "\n", "\r"):
        raise DataError(f"--delimiter {named}: one character, its code as \\x01, or one of {', '.join(NAMED)}")
    return mark


def _candidates(first: str, default: str) -> list[str]:
    """Delimiters in the order in which they are tried: by the cells of the first line, that of the suffix first."""
    marks = [mark for mark in dict.fromkeys((default, *OTHERS)) if mark in first]
    return sorted(marks, key=lambda mark: -first.count(mark)) or [default]


def _best_fit(lines: Lines, candidates: list[str], quoting: str) -> _Fit:
    """The first candidate with which every line has as many cells as the header; the first one where none has.

    Quotes behind a backslash are looked for last.
    """
    fits = []
    for escaped in (False, True) if quoting == "auto" else (quoting == "backslash",):
        for delimiter in candidates:
            fit = _fit(lines(), delimiter, escaped)
            if (fit.quoted and quoting != "none") or (fit.plain and quoting == "none"):
                return fit
            if fit.plain and quoting == "auto":
                other = _fit(lines(), delimiter, True) if any('\\"' in line for line in lines()) else fit
                return other if other.quoted else fit
            fits.append(fit)
    return fits[0]


def _decided(path: str, fit: _Fit) -> Dialect:
    rows = [span for span in fit.spans if fit.is_rows(span)]
    if fit.plain and (not fit.quoted or (rows and len(rows) == len(fit.spans))):
        at = f"{path}:{rows[0].first if rows else fit.opening}"
        note = f"{at}: a quote begins a cell and does not enclose it, so quotes are letters (else say --quoting csv)"
        return Dialect(fit.delimiter, False, note=note)
    if rows:
        lines = len(rows[0].lines)
        raise DataError(
            f"{path}:{rows[0].first}: a quote opens here and makes one cell of {lines} lines that are rows by "
            "themselves; write the quote twice or close it, or say --quoting none (rows) or csv (one cell)"
        )
    if not fit.quoted and fit.opening and not fit.plain:
        raise DataError(
            f"{path}:{fit.opening}: a quote opens here and does not close before a delimiter or the end of a line; "
            "a quote is missing or too many: write a quote inside a quoted cell twice, or say --quoting none"
        )
    return Dialect(fit.delimiter)


def _fit(lines: Iterator[str], delimiter: str, escaped: bool) -> _Fit:
    """Read a file both ways at once: with quotes by `csv`, and without by counting delimiters in each line."""
    fit, pending = _Fit(delimiter, escaped), []

    def watched() -> Iterator[str]:
        for line in lines:
            pending.append(line)
            yield line
            if len(pending) > LONGEST_SPAN:
                raise csv.Error("a quoted cell without an end")

    reader, width, row, done = Dialect(delimiter, escaped=escaped).reader(watched()), 0, 0, 0
    try:
        for cells in reader:
            if len(pending) > 1 and len(fit.spans) < SHOWN_SPANS:
                fit.spans.append(_Span(done + 1, list(pending)))
            for line in pending:
                fit.plain &= _is_row(line, fit, delimiter)
            if cells:
                width = width or len(cells)
                fit.quoted &= len(cells) == width or (not any(cells[width:]) and len(cells) > width)
                if len(pending) == 1 and 0 < row < SHAPED_ROWS:
                    _note_shapes(fit, cells)
                row += 1
            done += len(pending)
            pending.clear()
    except csv.Error:
        fit.quoted, fit.opening = False, done + 1
        for line in pending:
            fit.plain &= _is_row(line, fit, delimiter)
        fit.plain = fit.plain and all(_is_row(line, fit, delimiter) for line in lines)
    return fit


def _is_row(line: str, fit: _Fit, delimiter: str) -> bool:
    """Whether a line has the header's number of cells where quotes mean nothing; the first line is the header."""
    count = line.count(delimiter) + 1
    if not fit.width and line.strip():
        fit.width = count
    rest = line.rstrip("\r\n").split(delimiter)[fit.width :] if count > fit.width else ["too few"]
    return count == fit.width or not line.strip() or not any(rest)


def _note_shapes(fit: _Fit, cells: list[str]) -> None:
    fit.shapes += [set() for _ in range(len(cells) - len(fit.shapes))]
    for shapes, cell in zip(fit.shapes, cells, strict=False):
        if len(shapes) <= FEW_SHAPES:
            shapes.add(_shape(cell))


def _are_words(shapes: set[str]) -> bool:
    """Whether the cells of a column are single words or numbers, and not texts."""
    return any(shapes) and not any(" " in shape for shape in shapes)


def _shape(cell: str) -> str:
    """How a cell looks: a for letters, 0 for digits, all else as it is."""
    return re.sub(r"\d+", "0", re.sub(r"[^\W\d_]+", "a", cell))


def read_delimited(
    path: str, lines: Iterator[str], dialect: Dialect, wanted: Collection[str]
) -> Iterator[tuple[int, dict[str, object]]]:
    """(number of the first line, row) of a file with a header line; a row of another width is an error.

    Where all `wanted` columns are numbers and none is in the first line, the file has no header and its columns are
    called 1, 2 and so on.
    """
    reader = dialect.reader(lines)
    try:
        header = next(filter(None, reader), None)
        if header is None:
            raise DataError(f"{path}: the file is empty; it begins with a line of column names, id,text,image,label")
        names = check_header(path, header, dialect.delimiter)
        if wanted and all(map(str.isdecimal, wanted)) and not set(wanted) & set(names):
            names = [str(number) for number in range(1, len(header) + 1)]
            yield 1, dict(zip(names, header, strict=True))
        nameless, end = "" in names, reader.line_num
        for cells in reader:
            line, end = end + 1, reader.line_num  # a row may have several lines
            if not any(map(str.strip, cells)):
                continue  # a blank row, as spreadsheets leave at the end
            if len(cells) != len(names) and (len(cells) < len(names) or any(cells[len(names) :])):
                raise DataError(
                    f"{path}:{line}: {counted(len(cells), 'cell')} under a header of {len(names)}; "
                    + (
                        "quote cells that contain the delimiter, and write one for each column"
                        if len(names) > 1
                        else "the first line names the columns: remove what stands above the names"
                    )
                )
            row: dict[str, object] = dict(zip(names, cells, strict=False))
            if nameless:
                del row[""]
            yield line, row
    except csv.Error as error:
        if "NUL" in str(error):  # which Python 3.10 does not read
            raise _no_text(path) from error
        raise DataError(f"{path}:{reader.line_num}: {error}; a quote is missing or too many up to this line") from error


def _no_text(path: str) -> DataError:
    return DataError(f"{path}: binary, not text; name a table of text, or give the file the suffix of what it is")


def check_header(path: str, header: list[str], delimiter: str = ",") -> list[str]:
    """The names of the columns: without blanks round them, "" for a column without a name, NAME (2) for the second of
    one name. Raises `DataError` for a first line that does not name the columns."""
    line = delimiter.join(header)
    if _BINARY.search(line):
        raise _no_text(path)
    names, seen = [name.strip("\ufeff \t\r\n") for name in header], dict[str, int]()
    if not any(names):
        raise DataError(f"{path}:1: no column names in the first line; it reads id,text,image,label or as your columns")
    for place, name in enumerate(names):
        seen[name] = seen.get(name, 0) + 1
        if name and seen[name] > 1:
            names[place] = f"{name} ({seen[name]})"
    return names
