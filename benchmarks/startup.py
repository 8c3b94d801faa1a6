"""How long `mmfeat --help` takes, beside importing no more than what prints it.

    python benchmarks/startup.py [--rounds 20]

Processes in turns; medians of wall and CPU seconds. What may be imported is a test; how long it takes is told here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

WAYS = {
    'python -c "import typer, rich"': ["-c", "import typer, rich"],
    "mmfeat --help": ["-m", "mmfeat", "--help"],
    "mmfeat heads --help": ["-m", "mmfeat", "heads", "--help"],
}
GOAL = 0.5  # seconds


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in WAYS}
    for round in range(rounds + 1):  # the first fills the page cache
        for name, arguments in WAYS.items():
            spent = seconds_of(arguments)
            found[name] += [spent] if round else []
    print("| command | wall | CPU | goal |\n| --- | --- | --- | --- |")
    for name, spent in found.items():
        wall, cpu = (statistics.median(each) for each in zip(*spent, strict=True))
        print(f"| `{name}` | {wall:.2f} s | {cpu:.2f} s | {f'< {GOAL:g} s' if 'mmfeat' in name else ''} |")


def seconds_of(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one Python process."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


if __name__ == "__main__":
    main()
