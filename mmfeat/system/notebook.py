"""Results as Python sessions show and take them: frames, short forms, and progress in notebooks."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from threading import Timer
from typing import TYPE_CHECKING, Any

from mmfeat.errors import ConfigError
from mmfeat.system.wording import Advance, Progress, Silent, finished_line, progress_line, without_passwords

if TYPE_CHECKING:
    import pyarrow

SECONDS = 0.5  # between two changes of a bar, and before the first
SHOWN_ROWS = 10  # rows of a table that stands for a result
Cells = Sequence[Sequence[object]]  # rows; the first is the header


class Frame:
    """A table that pandas, polars and every library of Arrow streams take; a subclass gives `to_arrow`."""

    def to_arrow(self) -> pyarrow.Table:
        """The table of pyarrow."""
        raise NotImplementedError

    def to_pandas(self) -> Any:
        """The frame of pandas. Raises `ConfigError` where pandas is not installed."""
        _installed("pandas")
        return self.to_arrow().to_pandas()

    def to_polars(self) -> Any:
        """The frame of polars. Raises `ConfigError` where polars is not installed."""
        return _installed("polars").from_arrow(self.to_arrow())

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self.to_arrow().__arrow_c_stream__(requested_schema)


class CsvFrame(Frame):
    """A frame of the bytes of a CSV file, in which the cells of `texts` are no numbers, as in ids."""

    def __init__(self, data: bytes, texts: Iterable[str]) -> None:
        self.data, self.texts = data, list(texts)

    def to_arrow(self) -> pyarrow.Table:
        import pyarrow
        from pyarrow import csv

        kinds = dict.fromkeys(self.texts, pyarrow.string())
        cells = csv.ConvertOptions(column_types=kinds, strings_can_be_null=True, quoted_strings_can_be_null=False)
        lines = csv.ParseOptions(newlines_in_values=True)
        return csv.read_csv(pyarrow.BufferReader(self.data), parse_options=lines, convert_options=cells)


class Shown:
    """A result that is shown by a few facts, in notebooks with a table below; a subclass gives both."""

    def facts(self) -> Sequence[str]:
        """What a line says of the result."""
        raise NotImplementedError

    def cells(self) -> Cells:
        """The table below the facts, () without one."""
        return ()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {', '.join(self.facts())}>"

    def _repr_html_(self) -> str:
        header, *rows = [[html.escape(str(cell)) for cell in row] for row in self.cells()] or [[]]
        lines = ["".join(f"<td style='text-align: left'>{cell}</td>" for cell in row) for row in rows[:SHOWN_ROWS]]
        table = "".join(f"<tr>{line}</tr>" for line in ("".join(f"<th>{name}</th>" for name in header), *lines))
        more = f"<p>and {len(rows) - SHOWN_ROWS:,} more</p>" if len(rows) > SHOWN_ROWS else ""
        facts = " · ".join(map(html.escape, self.facts()))
        return f"<p><b>{type(self).__name__}</b> {facts}</p>" + (f"<table>{table}</table>{more}" if header else "")


def usual_progress() -> Progress:
    """The progress of a call that names none: a bar in a notebook, nothing elsewhere."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return NotebookProgress() if hasattr(shell, "kernel") else Silent()


@dataclass(frozen=True)
class Titled:
    """Shows each step under a title that begins with `prefix`."""

    progress: Progress
    prefix: str

    def step(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
        return self.progress.step(self.prefix + title, total)


class NotebookProgress:
    """A bar for each step that takes longer than `SECONDS`, in Jupyter, VS Code and Colab, without their widgets."""

    @contextmanager
    def step(self, title: str, total: int | None) -> Iterator[Advance]:
        from IPython.display import display

        start = last = time.monotonic()
        done, kept, handle = 0, "", None

        def show(words: str) -> None:
            nonlocal handle
            words = without_passwords(words)
            bar = f"<progress value='{done}' max='{total or 1}'></progress> {html.escape(words)}"
            bundle = {"text/plain": words, "text/html": bar}
            if handle is None:
                handle = display(bundle, raw=True, display_id=True)
            else:
                handle.update(bundle, raw=True)

        def advance(steps: int, note: str = "") -> None:
            nonlocal done, last, kept
            done, kept, now = done + steps, note.partition("\n")[0] or kept, time.monotonic()
            if total is not None and now - last >= SECONDS:
                last = now
                show(progress_line(title, done, total, now - start, kept))

        waiting = Timer(SECONDS, show, [f"{title} ..."])  # no bar can be drawn again without a call of `advance`
        waiting.daemon = True
        if total is None:
            waiting.start()
        try:
            yield advance
        finally:
            waiting.cancel()
            if total is None:
                waiting.join()
        if handle is not None:
            show(f"{title}: {finished_line(done, total, time.monotonic() - start)}")


def _installed(library: str) -> Any:
    try:
        return import_module(library)
    except ImportError as error:
        raise ConfigError(f"{library} is not installed; pip install {library}, or take to_arrow()") from error
