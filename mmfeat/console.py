"""What a person sees: lines, tables and progress, plain where the output is not a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

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

from mmfeat.clocks import STEPS, Clocks, advice
from mmfeat.progress import Advance
from mmfeat.wording import counted, duration, shown, size_of

if TYPE_CHECKING:
    from mmfeat.extract import Extraction
    from mmfeat.forecast import Forecasts

PLAIN_SECONDS = 10.0
WORTH_A_LINE = 1.0  # seconds; a step that is over sooner needs no report
WORTH_ADVICE = 60.0  # seconds; who waits less needs no cluster
SHOWN_FAILURES = 5
SHOWN_LABELS = 20

out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)


class ConsoleProgress:
    """A bar with rate and time left on a terminal, a line now and then elsewhere."""

    def task(self, title: str, total: int | None) -> AbstractContextManager[Advance]:
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


def show_extraction(result: Extraction) -> None:
    """What was there, what is new, what could not be read."""
    samples = result.samples
    counts = samples.labels
    labelled = f"{sum(counts.values()):,} labelled{_encodings(samples.encodings)}"
    out.print(f"{samples.source}: {len(samples):,} samples, {labelled}")
    if counts:
        out.print(f"  labels: {', '.join(f'{name} {counts[name]:,}' for name in sorted(counts)[:SHOWN_LABELS])}")
    if samples.unused_columns:
        out.print(f"  columns not used: {', '.join(samples.unused_columns)} (--columns label=... names yours)")
    for modality, reasons in result.missing.items():
        for reason, count in reasons.most_common(SHOWN_FAILURES):
            example = shown(result.examples[modality][reason])
            out.print(f"  {modality}: {count:,} without ({reason}; first: {example}); they stay, masked")
        if len(reasons) > SHOWN_FAILURES:
            out.print(f"  {modality}: {len(reasons) - SHOWN_FAILURES:,} more reasons")
    for tower in result.towers:
        spec, folder = tower.spec, tower.spec.folder_name
        new, unreadable = result.new.get(folder, 0), result.unreadable[folder]
        good = f"{result.stored[folder] + new:,} vectors, {new:,} new"
        trouble = f", {unreadable:,} unreadable" if unreadable else ""
        out.print(f"  {spec.name}: {good}{trouble} -> {result.folder / folder}")
    for id, reason in result.failures[:SHOWN_FAILURES]:
        out.print(f"  sample {id}: {reason}; kept as a masked row")
    if result.failed > SHOWN_FAILURES:
        out.print(f"  and {result.failed - SHOWN_FAILURES:,} more that cannot be read")
    if result.nothing_to_do:
        failed = sum(result.unreadable.values())
        again = f"; --retry-failed tries the {failed:,} unreadable again" if failed else ""
        out.print(f"nothing to do: every vector is in {result.folder} ({result.seconds:.1f} s){again}")
    else:
        for modality, clocks in result.clocks.items():
            if clocks.wall >= WORTH_A_LINE:
                out.print(f"  {modality}s: {_spent(clocks, modality, result.room(modality))}")
        out.print(f"wrote {counted(sum(result.new.values()), 'vector')} to {result.folder} in {result.seconds:.1f} s")


def show_forecast(found: Forecasts) -> None:
    """What is missing, how fast it would go, how large it would get."""
    out.print(f"{found.samples.source}: {len(found.samples):,} samples")
    if not found.encoders:
        out.print(f"nothing to do: every vector is in {found.folder}")
        return
    rows = []
    for forecast in found.encoders:
        for number, (spec, missing, size) in enumerate(forecast.outputs):
            shown_once = (_rate(forecast.rate), duration(forecast.seconds)) if number == 0 else ("", "")
            view = f" {spec.view}" if spec.view != "none" else ""
            output = f"{spec.output}:{spec.layer}" if spec.layer else spec.output
            rows.append((shown(forecast.model), output + view, f"{missing:,}", *shown_once, size_of(size)))
    show_table(("encoder", "output", "missing", "rate", "time", "on disk"), rows)
    out.print(f"reading and decoding add {duration(found.reading)}")
    total = f"{duration(found.seconds)} and {size_of(found.bytes)} in all"
    out.print(f"{total}; {size_of(found.free)} free at {found.folder}")
    if found.bytes > found.free:
        out.print("note: the disk is too small for that; name another with --cache, or fewer --outputs and --views")
    out.print("nothing was written; next: the same command without --dry-run")


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as they need, a line a row: a name that is cut or broken cannot be copied. `header` may be ()."""
    lines = [header, *rows] if header else rows
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)]
        out.print("  ".join(cells).rstrip())


def _rate(rate: float) -> str:
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.1f}/s"


def _spent(clocks: Clocks, modality: str, room: set[str]) -> str:
    """Where the time went, and what would save some."""
    slowest = "tokenize" if (modality, clocks.bottleneck) == ("text", "decode") else clocks.bottleneck
    steps = ", ".join(f"{step} {getattr(clocks, step):.1f} s" for step in STEPS)
    readers = f" ({clocks.workers} readers)" if clocks.workers > 1 else ""
    helpful = advice(slowest, room) if clocks.wall >= WORTH_ADVICE else ""
    return f"{steps}{readers}; the others wait for {slowest}{f': {helpful} would help' if helpful else ''}"


def _encodings(counts: Mapping[str, int]) -> str:
    odd = [f"{count:,} {name}" for name, count in counts.items() if name != "utf-8"]
    return f"; not UTF-8: {', '.join(odd)}" if odd else ""
