"""Lines, tables and progress on the screen, in plain text where the output is not a terminal."""

from __future__ import annotations

import io
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.text import Text

from mmfeat.system.wording import (
    SCORE_NAMES,
    Advance,
    finished_line,
    interval,
    progress_line,
    rate_of,
    time_left,
    without_passwords,
)

if TYPE_CHECKING:
    from mmfeat.runs.compare import Partitions
    from mmfeat.runs.run import Run


PLAIN_SECONDS = 10.0  # between two lines of progress where there is no bar
NAMED_AFTER = 10.0  # seconds until a step without units is named there
WORTH_A_LINE = 1.0  # seconds; a shorter step prints no line where there is no bar
VANISHES = 0.5  # seconds; of a shorter step nothing stays on a terminal
WORTH_NAMING = 5.0  # seconds; the same of a step without units, such as loading a model
WINDOW = 30.0  # seconds over which the rate of a bar is taken
BAR = 6, 40  # least and largest width
SHOWN_LABELS = 20
SHOWN_TEXT = 60  # letters of the text of a sample in a table
COLUMNS = 80
COPIED = {"id", "sample", "run", "encoder", "folder"}  # columns whose cells are shortened last, as numbers are
NUMBER = re.compile(r"[-+±]?\d|$")
READABLE = 12  # cells to which the other columns are shortened before those
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what names and texts of data must not send to a terminal
GAP = "  "  # between the columns of a table


def wrapped(line: str, width: int, hang: int = 2) -> str:
    """A line broken between words, its rest indented by `hang` more; a command goes on behind a backslash.

    A word that is wider than the terminal, such as a path, stays whole, so that it can be copied.
    """
    more = " \\" if re.match("(next: |command +| *)mmfeat ", line) else ""
    indent = " " * (len(line) - len(line.lstrip()) + hang)
    lines, (current, *words) = [], line.split(" ")
    for word in words:
        if cell_len(f"{current} {word}{more}") <= width or not current.strip() or cell_len(indent + word) > width:
            current += f" {word}"
        else:
            lines.append(current + more)
            current = indent + word
        more = "" if word.endswith(";") else more  # the command ends there
    return "\n".join([*lines, current])


class _Discreet(Console):
    """A console that shows no secret of a URL, and on a terminal breaks long lines between words."""

    def print(self, *objects: Any, hang: int = 2, **options: Any) -> None:
        super().print(*(self._shown(o, hang) if isinstance(o, str) else o for o in objects), **options)

    def _shown(self, text: str, hang: int) -> str:
        plain = CONTROL.sub(lambda letter: repr(letter[0])[1:-1], without_passwords(text))
        return "\n".join(wrapped(line, self.room, hang) for line in plain.split("\n"))

    @property
    def room(self) -> int:
        """Cells of a line; any number where there is no terminal, also where FORCE_COLOR claims one."""
        return self.width if self.is_terminal and self.file.isatty() else sys.maxsize


out = _Discreet(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = _Discreet(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)


class _Screen(io.FileIO):
    """A standard stream that takes what cannot be written (a full disk, a closed pipe) as lost, and remembers why.

    No work ends because nobody reads its lines.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


@contextmanager
def lasting_streams() -> Iterator[list[str]]:
    """Replace both standard streams by ones to which any line can be written, whatever their encoding and state.

    The list holds at the end why standard output could not take all lines, if so; a reader that went away, such as
    `head`, is no reason.
    """
    if sys.platform == "win32":  # a console there takes no bytes of ours: Python's stream writes to it
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")
        yield []
        return
    while (spare := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # no file of ours may get the number of a closed standard stream, to which libraries print
    os.close(spare)
    screens = [_Screen(number, "w", closefd=False) for number in (1, 2)]
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BufferedWriter(screen), stream.encoding if stream else None, "replace", line_buffering=True)
        for screen, stream in zip(screens, before, strict=True)
    )
    reasons: list[str] = []
    try:
        yield reasons
    finally:
        sys.stdout.flush()
        if (error := screens[0].error) and not isinstance(error, BrokenPipeError):
            reasons.append(error.strerror or str(error))


class ConsoleProgress:
    """Progress of long steps: a bar with rate and time left on a terminal, a line every few seconds elsewhere.

    At the end of a step a line with its count and mean rate stays if the progress `keeps` it.
    """

    keeps = True

    def step(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
        moving = err.is_interactive and err.room != sys.maxsize  # TERM=dumb has a width and moves nothing
        return (_bar if moving else _lines)(title, total, self.keeps)


class _Bar:
    """A step as one line of the terminal: title, bar, count, rate and time left, and lines of its note below."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total = without_passwords(title), total
        self.done, self.note, self.below = 0, "", ""
        self.marks = deque([(time.monotonic(), 0)])  # (seconds, units done)

    def advance(self, steps: int, note: str = "") -> None:
        self.done, now = self.done + steps, time.monotonic()
        if note:
            self.note, self.below = ("", note) if "\n" in note else (note, self.below)
        if now - self.marks[-1][0] >= VANISHES:
            self.marks.append((now, self.done))
            while now - self.marks[1][0] > WINDOW:
                self.marks.popleft()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        width, (since, before) = options.max_width, self.marks[0]
        seconds = time.monotonic() - since
        if self.total is None:
            yield Text(fitted(f"{self.title} ... {seconds:.0f} s", width))
            return
        total, rate = f"{self.total:,}", (self.done - before) / seconds if seconds > VANISHES else 0.0
        left = time_left((self.total - self.done) / rate) if rate else f"{seconds:.0f} s"
        numbers = f" {self.done:>{len(total)},}/{total} {rate_of(rate) if rate else '':>8} {left:>12}"
        title = fitted(self.title, max(width - len(numbers) - BAR[0] - 1, 1))
        bar = min(max(width - len(numbers) - cell_len(title) - 1, 0), BAR[1])
        full = min(bar * self.done // max(self.total, 1), bar)
        line, rest = ("-", " ") if options.ascii_only else ("━", "━" if console.color_system else " ")
        rest = " " if console.no_color else rest
        parts = (f"{title} ", (line * full, "bar.complete"), (rest * (bar - full), "bar.back"), numbers)
        text = Text.assemble(*parts, no_wrap=True, overflow="crop")
        if self.note and text.cell_len + 2 + cell_len(self.note) <= width:
            text.append(f"  {self.note}")
        yield text
        if self.below:
            yield Text(self.below, no_wrap=True, overflow="ellipsis")


@contextmanager
def _bar(title: str, total: int | None, keeps: bool) -> Iterator[Advance]:
    from rich.live import Live

    start, bar = time.monotonic(), _Bar(title, total)
    try:
        with Live(bar, console=err, transient=True, refresh_per_second=8) as live:

            def advance(steps: int, note: str = "") -> None:
                bar.advance(steps, note)
                if "\n" in note:
                    live.refresh()

            yield advance
    finally:
        seconds = time.monotonic() - start
        if keeps and seconds >= (VANISHES if total is not None else WORTH_NAMING):
            figures = finished_line(bar.done, total, seconds)
            err.print(f"{fitted(title, err.width - len(figures) - 2)}: {figures}")


@contextmanager
def _lines(title: str, total: int | None, keeps: bool) -> Iterator[Advance]:
    start = last = time.monotonic()
    done, kept = 0, ""

    def advance(steps: int, note: str = "") -> None:
        nonlocal done, last, kept
        done, kept = done + steps, note.partition("\n")[0] or kept
        now = time.monotonic()
        if total is not None and now - last >= PLAIN_SECONDS:
            last = now
            err.print(progress_line(title, done, total, now - start, kept))

    begun = threading.Timer(NAMED_AFTER, err.print, [f"{title} ..."])
    begun.daemon = True
    if total is None:
        begun.start()
    try:
        yield advance
    finally:
        begun.cancel()
        seconds = time.monotonic() - start
        if keeps and total is not None and seconds >= WORTH_A_LINE:
            err.print(f"{title}: {finished_line(done, total, seconds)}")


def fitted(text: str, width: int) -> str:
    """A text of at most `width` cells: of sentences the first words, of a name its beginning and its end."""
    if cell_len(text) <= width:
        return text
    if max(map(cell_len, text.split())) < width:
        return f"{set_cell_size(text, width - 1).rpartition(' ')[0].rstrip(' ,:;')}…"
    tail = set_cell_size(text[::-1], width // 2).rstrip()[::-1]
    return f"{set_cell_size(text, width - 1 - cell_len(tail)).rstrip()}…{tail}"


def one_line(text: str) -> str:
    return fitted(" ".join(text.split()), SHOWN_TEXT)


def fits(header: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    return _width(_widths([header, *rows])) <= out.room


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(cell_len, column)) for column in zip(*lines, strict=True)]


def _width(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def show_notes(notes: Iterable[str], indent: str = "") -> None:
    for note in notes:
        out.print(f"{indent}note: {note}")


def show_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    spare: Sequence[str] = (),
    styles: Mapping[str, str] | None = None,
    first: str = "",
) -> None:
    """Print one line for each row, in columns as wide as their longest cell; a column without a cell is left out.

    On a terminal that is too narrow for it the columns `spare` of the header are left out, the first of them first;
    where that is not enough, the widest cells are shortened. `styles` maps columns to the style of their cells, and
    `first` is the style of the first row.
    """
    lines = [[*map(without_passwords, line)] for line in (header, *rows)]
    widths, names = _widths(lines), list(header)
    left_out = [name for name, *cells in zip(*lines, strict=True) if rows and not any(cells)]
    needed = len(left_out)  # a column without any cell is left out at any width
    left_out += [name for name in spare if name not in left_out]
    while needed > 0 or _width(widths) > out.room:
        if left_out:
            column, needed = names.index(left_out.pop(0)), needed - 1
            for line in (*lines, names):
                del line[column]
            del widths[column]
        else:
            kept = [name in COPIED or all(map(NUMBER.match, cells)) for name, *cells in zip(*lines, strict=True)]
            order = [(not keep and width > READABLE, width) for keep, width in zip(kept, widths, strict=True)]
            widths[order.index(max(order))] -= 1
    for number, line in enumerate(lines):
        text = Text(style=first if number == 1 else "")
        for name, cell, width in zip(names, line, widths, strict=True):
            text.append(set_cell_size(fitted(cell, width), width), (styles or {}).get(name, ""))
            text.append(GAP if name else " ")  # a sign stands close to its row
        text.rstrip()
        out.print(text)


def show_verdict(sentences: Sequence[str]) -> None:
    """Print a verdict, a sentence a paragraph, the first in bold; lines of a log have 80 columns."""
    for number, sentence in enumerate(sentences):
        out.print(
            wrapped(sentence, COLUMNS if out.room == sys.maxsize else out.room, 0), style=None if number else "bold"
        )


def show_partitions(partitions: Partitions, rows: int) -> None:
    """Print means and ranges of the first `rows` entries over all partitions, and that intervals leave these out."""
    count, first = len(partitions.runs), partitions.entries[0]
    header = "head", "on", f"mean {SCORE_NAMES[partitions.score]}", "lowest to highest", "one seed"
    lines = [
        (one.head, one.modalities, f"{one.mean:.3f}", one.span, f"in {one.dropped}" if one.dropped else "")
        for one in partitions.entries[:rows]
    ]
    show_table(header, lines, header[4:])
    raced = "; one seed: the race gave no more there (--all-seeds does)" if any(line[4] for line in lines) else ""
    out.print(
        f"{count} partitions, seeds {partitions.seeds[0]} to {partitions.seeds[-1]}{raced}\n"
        f"One partition's interval leaves out the spread between partitions: {first.span} over {count} ({first.label})."
    )


def show_overlooked(run: Run, head: str | None, modalities: str | None) -> None:
    """Print a note if another run on the same data scored higher and was passed over, as it has other folds."""
    from mmfeat.runs.run import overlooked_run

    if other := overlooked_run(run, head, modalities):
        scores = [interval(scored.entry(head, modalities).headline) for scored in (other, run)]
        err.print(
            f"note: {other.folder} scored higher, {scores[0]} against {scores[1]}, on other contents or folds; "
            f"--run {other.folder} takes it"
        )
