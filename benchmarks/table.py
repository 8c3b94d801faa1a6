"""The table of all benchmarks: what was measured, the figure, the goal, and whether the figure meets the goal."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Timer

from mmfeat.system.hardware import cpu_count


@dataclass(frozen=True)
class Row:
    """A line of the table: a figure in words, its value, and the goal that the value is held against."""

    what: str
    figure: str
    value: float | None = None
    goal: str = ""
    verdict: str = ""


def measured(what: str, value: float, unit: str = "", *, least: float | None = None, most: float | None = None,
             note: str = "") -> Row:  # fmt: skip
    """A row whose value is to be at `least` or at `most` so much, or has no goal."""
    wanted, met = (least, least is not None and value >= least) if least is not None else (most, value <= (most or 0))
    goal = "" if wanted is None else f"{'>=' if least is not None else '<='} {wanted:g}"
    figure = f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    words = " ".join(filter(None, [figure, unit])) + (f" ({note})" if note else "")
    return Row(what, words, value, goal, ("passed" if met else "MISSED") if goal else "")


def ungraded(row: Row) -> Row:
    """The row of a small trial, for which no goal counts; a process that failed still does."""
    return replace(row, goal="", verdict="") if row.goal else row


def machine(device: str = "cpu") -> str:
    """What the figures are of."""
    import torch

    gpu = f", {torch.cuda.get_device_name(device)}" if device.startswith("cuda") else ""
    return (
        f"{cpu_count()} of {os.cpu_count()} cores{gpu}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def show(rows: Iterable[Row]) -> list[Row]:
    """Print each row of a Markdown table as it comes."""
    print("| what | figure | goal | |\n| --- | --- | --- | --- |", flush=True)
    shown = []
    for row in rows:
        shown.append(row)
        print(f"| {row.what} | {row.figure} | {row.goal} | {row.verdict} |", flush=True)
    return shown


def in_process(script: str, arguments: Sequence[str], limit: float | None = None) -> Iterator[Row]:
    """The rows that a script prints as lines of JSON, in a process of its own, which ends at the `limit` (seconds)."""
    start = time.monotonic()
    with subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True) as process:
        timer = Timer(limit or 1e6, process.kill)
        timer.start()
        for line in process.stdout or ():
            if line.startswith("{"):
                yield Row(**json.loads(line))
        timer.cancel()
    if process.returncode:
        reason = f"at its limit of {limit:g} s" if limit and time.monotonic() - start >= limit else "with an error"
        yield Row(" ".join([Path(script).name, *arguments[:1]]), f"ended {reason}", verdict="MISSED")


def print_json(rows: Iterable[Row]) -> None:
    """What `in_process` reads."""
    for row in rows:
        print(json.dumps(asdict(row)), flush=True)


def best(
    ways: dict[str, Callable[[], object]], between: Callable[[], None] = lambda: None, rounds: int = 5
) -> dict[str, float]:
    """The fastest of some rounds of each way, in turns, so that all see the same machine."""
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name] = min(seconds[name], timed(way))
            between()
    return seconds


def timed(way: Callable[[], object]) -> float:
    """Wall seconds of a call."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start
