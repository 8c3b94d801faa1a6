"""How long `mmfeat --help` takes beside importing only what prints it, and how many files of mmfeat a command runs.

Help: processes in turns, medians of wall seconds. What may be imported is a test; the time is told here.
Files: those in which a function runs that is not part of an import, in three commands on the demo data.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial

from table import Row, measured, timed

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


def rows(small: bool) -> Iterator[Row]:
    """Medians of the help texts, then the files."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for number in range(3 if small else 11):  # the first fills the page cache
        for name, arguments in WAYS.items():
            command = [sys.executable, *arguments]
            seconds = timed(partial(subprocess.run, command, stdout=subprocess.DEVNULL, check=True))
            found[name] += [seconds] if number else []
    for name, spent in found.items():
        yield measured(name, statistics.median(spent), "s", most=GOAL if "mmfeat" in name else None)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "mmfeat", "demo"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
        for command, most in FILES.items():
            words = [sys.executable, "-c", COUNT, *command.split()]
            answer = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
            yield measured(f"mmfeat {command}", int(answer.stderr.split()[-1]), "files", most=most)
