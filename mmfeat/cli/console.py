"""Lines, tables and progress on the screen, in plain text where the output is not a terminal."""

from __future__ import annotations

import io
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from mmfeat.system.wording import Advance, ignore, interval, progress_line, without_passwords

if TYPE_CHECKING:
    from mmfeat.runs.run import Run


PLAIN_SECONDS = 10.0  # between two lines of progress where there is no bar
WORTH_A_LINE = 1.0  # seconds; a shorter step prints no line at its end
SHOWN_LABELS = 20
COLUMNS = 80


class _Discreet(Console):
    """A console that shows no secret of a URL."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(without_passwords(o) if isinstance(o, str) else o for o in objects), **options)


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
    """Progress of long steps: a bar with rate and time left on a terminal, a line every few seconds elsewhere."""

    def step(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
        if total is None:
            return _begun(title)
        return (_bar if err.is_terminal else _lines)(title, total)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.1f}/s")


class _Bar(Progress):
    """A bar with the note of its step behind it; of a note of several lines, all below it while the step runs."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.tasks and (below := self.tasks[0].fields["below"]):
            yield Text(below)


@contextmanager
def _bar(title: str, total: int) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )

    def advance(steps: int, note: str = "") -> None:
        fields: dict[str, Any] = {"below" if "\n" in note else "note": note} if note else {}
        progress.update(task, advance=steps, refresh="below" in fields, **fields)

    with _Bar(*columns, console=err) as progress:
        task = progress.add_task(title, total=total, note="", below="")
        try:
            yield advance
        finally:
            progress.update(task, below="")


@contextmanager
def _begun(title: str) -> Iterator[Advance]:
    """Print the title of a step whose length is not known."""
    err.print(f"{title} ...")
    yield ignore


@contextmanager
def _lines(title: str, total: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    done, kept = 0, ""

    def advance(steps: int, note: str = "") -> None:
        nonlocal done, last, kept
        done, kept = done + steps, note.partition("\n")[0] or kept
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS:
            last = now
            err.print(progress_line(title, done, total, now - start, kept))

    yield advance
    seconds = time.monotonic() - start
    if done == total and seconds >= WORTH_A_LINE:
        err.print(f"{title}: {total:,} in {seconds:.1f} s ({total / max(seconds, 1e-9):.1f}/s)")


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print one line for each row, in columns as wide as their longest cell; `header` may be ().

    rich's own tables cut or wrap long cells, and a name that is cut or wrapped cannot be copied.
    """
    lines = [header, *rows] if header else rows
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        out.print("  ".join(cells).rstrip())


def show_verdict(sentences: Sequence[str]) -> None:
    """Print a verdict, a sentence a paragraph, the first in bold; words are not cut at 80 columns."""
    for number, sentence in enumerate(sentences):
        out.print(
            textwrap.fill(sentence, COLUMNS, break_long_words=False, break_on_hyphens=False),
            style=None if number else "bold",
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
