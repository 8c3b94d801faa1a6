"""How long `mmfeat --help` takes beside importing only what prints it, and how many files of mmfeat a command runs.

    python benchmarks/startup.py [--rounds 20]

Help: processes in turns, medians of wall and CPU seconds. What may be imported is a test; the time is told here.
Files: those in which a function runs that is not part of an import, in three commands on the demo data.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

WAYS = {
    'python -c "import typer, rich"': ["-c", "import typer, rich"],
    "mmfeat --help": ["-m", "mmfeat", "--help"],
    "mmfeat heads --help": ["-m", "mmfeat", "heads", "--help"],
}
GOAL = 0.3  # seconds
FILES = {  # command -> most files that it should run
    "extract --data demo --encoders hashing,hog": 30,
    "heads --data demo --fusion concat": 55,
    "submit --data demo": 45,
}
COUNT = """
import atexit, runpy, sys, threading

files = set()

def is_import(frame):
    name = frame.f_code.co_filename
    return frame.f_code.co_name == "<module>" and "/mmfeat/" in name and not name.endswith("__main__.py")

def count(frame, event, argument):
    code = frame.f_code
    if event != "call" or "/mmfeat/" not in code.co_filename or not code.co_flags & 1 or code.co_filename in files:
        return
    outer = frame
    while outer is not None and not is_import(outer):
        outer = outer.f_back
    if outer is None:
        files.add(code.co_filename)

def show():
    sys.setprofile(None)
    print(len([name for name in files if "site-packages" not in name]), file=sys.stderr)

atexit.register(show)
threading.setprofile(count)
sys.setprofile(count)
runpy.run_module("mmfeat", run_name="__main__")
"""


def main() -> None:
    """Measure and print two tables."""
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
    print("\n| command | files | goal |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "mmfeat", "demo"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
        for command, goal in FILES.items():
            words = [sys.executable, "-c", COUNT, *command.split()]
            answer = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
            print(f"| `mmfeat {command}` | {answer.stderr.split()[-1]} | {goal} |")


def seconds_of(arguments: list[str]) -> tuple[float, float]:
    """Wall and CPU seconds of one Python process."""
    start, before = time.perf_counter(), os.times()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - start, cpu


if __name__ == "__main__":
    main()
