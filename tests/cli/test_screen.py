"""Standard streams that cannot show or take a line, and files of the working folder that are named like modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXTRACT = [sys.executable, "-m", "mmfeat", "extract", "--encoders", "hog", "--data"]
VECTORS = "cache/demo/hog-*/*.h5"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf_8_shows_what_it_can(encoding: str, demo_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    answer = subprocess.run([*EXTRACT, demo_folder], cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert b"???" in answer.stdout  # the text in another encoding, which the summary quotes
    assert b"next: mmfeat heads" in answer.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_under_the_log_loses_no_work(demo_folder: Path, tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        answer = subprocess.run([*EXTRACT, demo_folder], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, timeout=300)
    assert answer.returncode == 1
    assert answer.stderr.splitlines()[-1].startswith(b"mmfeat: standard output took no more lines")
    assert list(tmp_path.glob(VECTORS))
    with open("/dev/full", "w") as full:
        again = subprocess.run([*EXTRACT, demo_folder], cwd=tmp_path, stdout=subprocess.PIPE, stderr=full, timeout=300)
    assert again.returncode == 0
    assert b"nothing to do" in again.stdout


def test_a_reader_that_goes_away_and_closed_streams_lose_no_work(demo_folder: Path, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    answer = subprocess.run([*EXTRACT, demo_folder], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, timeout=300)
    os.close(writing)
    assert (answer.returncode, list(tmp_path.glob(VECTORS)) != []) == (0, True), answer.stderr
    assert b"Error" not in answer.stderr
    closed = subprocess.run(["sh", "-c", '"$@" >&- 2>&-', "sh", *EXTRACT, demo_folder], cwd=tmp_path, timeout=300)
    assert closed.returncode == 0


def test_files_named_like_modules_are_no_modules(demo_folder: Path, tmp_path: Path) -> None:
    for name in ("json", "random", "queue", "numpy", "typer"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a file of the user')")
    answer = subprocess.run([*EXTRACT, demo_folder], cwd=tmp_path, capture_output=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert list(tmp_path.glob(VECTORS))
