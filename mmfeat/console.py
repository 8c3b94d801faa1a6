"""What a person sees: lines, tables and progress, plain where the output is not a terminal."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

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
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from mmfeat.extract import Extraction
    from mmfeat.submit import Submission

PLAIN_SECONDS = 10.0
WORTH_A_LINE = 1.0  # seconds; a step that is over sooner needs no report
SHOWN_FAILURES = 5
SHOWN_LABELS = 20

out = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
err = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, stderr=True)


class ConsoleProgress:
    """A bar with rate and time left on a terminal, a line now and then elsewhere."""

    def task(self, title: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return (_bar if err.is_terminal else _lines)(title, total)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.1f}/s")


@contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as progress:
        task = progress.add_task(title, total=total)
        yield lambda steps: progress.advance(task, steps)


@contextmanager
def _lines(title: str, total: int) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    done = 0

    def advance(steps: int) -> None:
        nonlocal done, last
        done += steps
        now = time.monotonic()
        if now - last >= PLAIN_SECONDS:
            last = now
            rate = done / (now - start)
            err.print(f"{title}: {done:,} of {total:,}, {rate:.1f}/s, {(total - done) / rate:.0f} s left")

    yield advance
    seconds = time.monotonic() - start
    if done == total and seconds >= WORTH_A_LINE:
        err.print(f"{title}: {total:,} in {seconds:.1f} s ({total / max(seconds, 1e-9):.1f}/s)")


def shown(place: str) -> str:
    """A path, alone or after `family:`, as seen from here."""
    family, colon, path = place.rpartition(":") if not place.startswith("/") else ("", "", place)
    return f"{family}{colon}{os.path.relpath(path)}" if path.startswith(os.getcwd() + os.sep) else place


def show_extraction(result: Extraction) -> None:
    """What was there, what is new, what could not be read."""
    samples = result.samples
    counts = Counter(sample.label for sample in samples if sample.label is not None)
    labelled = f"{counts.total():,} labelled{_encodings(samples.encodings)}"
    out.print(f"{samples.source}: {len(samples):,} samples, {labelled}")
    if counts:
        out.print(f"  labels: {', '.join(f'{name} {counts[name]:,}' for name in sorted(counts)[:SHOWN_LABELS])}")
    if samples.unused_columns:
        out.print(f"  columns not used: {', '.join(samples.unused_columns)} (--columns label=... names yours)")
    for modality, reasons in result.missing.items():
        for reason, count in reasons.items():
            out.print(f"  {modality}: {count:,} without ({reason}); they stay, masked")
    for tower in result.towers:
        spec, folder = tower.spec, tower.spec.folder_name
        new, unreadable = result.new.get(folder, 0), result.unreadable[folder]
        good = f"{result.stored[folder] + new:,} vectors, {new:,} new"
        trouble = f", {unreadable:,} unreadable" if unreadable else ""
        out.print(f"  {spec.name}: {good}{trouble} -> {result.folder / folder}")
    for id, reason in result.failures[:SHOWN_FAILURES]:
        out.print(f"  sample {id}: {reason}; kept as a masked row")
    if len(result.failures) > SHOWN_FAILURES:
        out.print(f"  and {len(result.failures) - SHOWN_FAILURES:,} more that cannot be read")
    if result.nothing_to_do:
        out.print(f"nothing to do: every vector is in {result.folder} ({result.seconds:.1f} s)")
    else:
        out.print(f"wrote {sum(result.new.values()):,} vectors to {result.folder} in {result.seconds:.1f} s")


def show_submission(result: Submission) -> None:
    """Label distribution beside the training prior, and the files."""
    out.print(f"{result.rows:,} predictions for {shown(result.data)} by {result.head} on {result.modalities}")
    table = Table("label", "predicted", "in training", box=None)
    for label, share in result.trained.items():
        table.add_row(label, f"{result.predicted.get(label, 0.0):.1%}", f"{share:.1%}")
    out.print(table)
    if result.data_changed:
        out.print("note: labels, texts or photos changed since this run was trained; mmfeat heads trains anew")
    if result.without_features:
        count, example = len(result.without_features), result.without_features[0]
        out.print(f"{count:,} samples have neither text nor image that could be read (first: {example})")
    out.print(f"run {result.run.folder}")
    out.print(f"leaderboard {result.run.leaderboard_file}")
    out.print(f"submission {result.path}")


def _encodings(counts: Mapping[str, int]) -> str:
    odd = [f"{count:,} {name}" for name, count in counts.items() if name != "utf-8"]
    return f"; not UTF-8: {', '.join(odd)}" if odd else ""
