"""All benchmarks in one table: each row with its goal, and whether the figure meets the goal.

    python benchmarks/run.py [--small] [--data FOLDER] [--model FOLDER] [SECTION ...]

`make benchmark` runs the sections that take 20 minutes together on two quiet cores; those marked * run where they are
named. `--data` are real pairs and `--model` a sentence encoder for the section `extract`; `--small` only shows that
everything runs. Exit code 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial

import extract
import finetune
import hashing
import peers
import startup
import tables
from table import Row, machine, show, ungraded

import cache
import heads

SECTIONS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "startup": startup.rows,
    "hashing": hashing.rows,
    **{f"cache-{name}": cache.section(name) for name in cache.SECTIONS},
    "extract": extract.rows,
    "heads": heads.speed,
    "peers": peers.rows,
    "finetune": finetune.rows,
    "sweep": heads.sweep,
    "tables": tables.measure,
    "disk": heads.memory,
    "scaling": heads.scaling,
}
NAMED = ("cache-memory", "cache-index", "cache-faults", "tables", "disk", "scaling")  # long, or large on disk


def main() -> None:
    """Run the sections and print one table."""
    listed = ", ".join(name + "*" * (name in NAMED) for name in SECTIONS)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=listed)
    parser.add_argument("--data", default="", help="folder or table of real pairs")
    parser.add_argument("--model", default="", help="folder of a sentence encoder")
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    if unknown := set(given.sections) - SECTIONS.keys():
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {listed}")
    chosen = {**SECTIONS, "extract": partial(extract.rows, data=given.data, model=given.model)}
    print(f"{machine()}\n")
    names = given.sections or [name for name in SECTIONS if name not in NAMED]
    rows = (row for name in names for row in chosen[name](given.small))
    missed = sum(row.verdict == "MISSED" for row in show(ungraded(row) if given.small else row for row in rows))
    print(f"\n{missed} goals missed")
    raise SystemExit(int(missed > 0))


if __name__ == "__main__":
    main()
