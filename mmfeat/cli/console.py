"""What a person sees: lines, tables and progress, plain where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from rich.cells import cell_len
from rich.console import Console
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

from mmfeat.system.wording import Advance

PLAIN_SECONDS = 10.0
WORTH_A_LINE = 1.0  # seconds; a step that is over sooner needs no report
SHOWN_LABELS = 20

out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)


class ConsoleProgress:
    """A bar with rate and time left on a terminal, a line now and then elsewhere."""

    def step(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
        if total is None:
            return _begun(title)
        return (_bar if err.is_terminal else _lines)(title, total)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.1f}/s")


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
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(title, total=total, note="")
        yield lambda steps, note="": progress.update(task, advance=steps, note=note)


@contextmanager
def _begun(title: str) -> Iterator[Advance]:
    """A line that says what one waits for."""
    err.print(f"{title} ...")
    yield lambda steps, note="": None


@contextmanager
def _lines(title: str, total: int) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def advance(steps: int, note: str = "") -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS:
            last = now
            rate = done / (now - start)
            left = f"{(total - done) / rate:.0f} s left" if done else ""
            err.print(", ".join(filter(None, (f"{title}: {done:,} of {total:,}", f"{rate:.1f}/s", left, note))))

    yield advance
    seconds = time.monotonic() - start
    if done == total and seconds >= WORTH_A_LINE:
        err.print(f"{title}: {total:,} in {seconds:.1f} s ({total / max(seconds, 1e-9):.1f}/s)")


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need, a line a row: a name that is cut or broken cannot be copied. `header` may be ()."""
    lines = [header, *rows] if header else rows
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        out.print("  ".join(cells).rstrip())
