"""What terminals of several widths show, streams that cannot show or take a line, and files named like modules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.cells import cell_len

from mmfeat.cli.predict import show_few
from mmfeat.prediction.output_file import Predictions
from tests.cli.typed import invoke

EXTRACT = [sys.executable, "-m", "mmfeat", "extract", "--encoders", "hog", "--data"]
VECTORS = "cache/demo/hog-*/*.h5"


def test_a_terminal_that_is_not_utf_8_shows_what_it_can(demo_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    answer = subprocess.run([*EXTRACT, demo_folder], cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    assert b"???" in answer.stdout  # the text in another encoding, which the summary quotes
    assert b"next: mmfeat heads" in answer.stdout


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_names_of_data_send_nothing_to_a_terminal_but_letters(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("id\x01words\x1b[31m\n1\x01a\n")
    answer = invoke("extract", "--data", tmp_path / "t.csv", "--encoders", "hashing")
    assert (answer.exit_code, "\x1b" in answer.output) == (1, False)
    assert r"id\x01words\x1b[31m" in answer.output


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


STEPS = """
import fcntl, struct, sys, termios, time
from mmfeat.cli.console import ConsoleProgress, out, show_table
for width in (60, 72, 80, 120):
    fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    print(f"width {width}")
    with ConsoleProgress().step("text: st:models/" + "long-name-" * 9, 34000) as advance:
        advance(17000, "read 0% decode 75% encode 95% write 0%")
        time.sleep(0.8)
        advance(17000)
    with ConsoleProgress().step("quick", 600) as advance:
        advance(600)
    with ConsoleProgress().step("heads", 3) as advance:
        advance(1, "best so far 0.6 a\\n            0.5 b")
    rows = [("a" * 20, "衣料品" * 9, "3 MB", ""), ("b", "https://u:secret@h", "d", "")]
    show_table(("id", "label", "size", "note"), rows, ("size",))
    out.print("  note: the words of a long sentence stay whole where a line of the terminal ends, also 衣料品")
    out.print("next: mmfeat heads --data a-folder-with-a-long-name/listings.csv --cache elsewhere --out another-folder")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_what_is_shown_fits_the_terminal(tmp_path: Path) -> None:
    shown = in_terminal([sys.executable, "-c", STEPS], tmp_path)
    for width, text in zip((60, 72, 80, 120), re.split(r"width \d+\r\n", shown)[1:], strict=True):
        lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text))
        assert max(map(cell_len, lines)) <= width
        bars = [line for line in lines if re.search(r"━ 17,000/34,000 .*/s +\d+ s left", line)]
        assert bars
        assert all(line.startswith("text: st") for line in bars)
        assert any(re.fullmatch(r"text: .+: 34,000 in \S+ s \([\d,]+/s\)", line) for line in lines)
        assert not any(line.startswith("quick: ") for line in lines)
        assert any(line.startswith("best so far 0.6 a") for line in lines)
        assert not [line for line in lines if line.startswith("heads: ")]
        assert "secret" not in text
        (header,) = (line for line in lines if line.startswith("id "))
        assert header.split() == ["id", "label", *(["size"] if width > 80 else [])]
        assert [line.split()[0] for line in lines if "衣料品衣" in line] == ["a" * 20]
        words = " ".join(" ".join(lines[lines.index(header) + 3 :]).replace("\\ ", "").split())
        assert words.startswith(
            "note: the words of a long sentence stay whole where a line of the terminal ends, also 衣料品"
        )
        assert words.endswith(
            "next: mmfeat heads --data a-folder-with-a-long-name/listings.csv --cache elsewhere --out another-folder"
        )


def in_terminal(words: list[str], folder: Path) -> str:
    """What a command writes to a terminal."""
    import pty

    process, terminal = pty.fork()
    if not process:
        os.chdir(folder)
        plain = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        os.execvpe(words[0], words, {**plain, "TERM": "xterm-256color"})
    written = b""
    while True:
        try:
            if not (part := os.read(terminal, 65536)):
                break
        except OSError:  # Linux ends so
            break
        written += part
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, written.decode()
    return written.decode()


def test_a_label_that_is_not_the_most_probable_class_is_noted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmfeat.cli.predict.fits", lambda header, rows: False)
    chosen = np.array([[True, False], [False, True]])
    predictions = Predictions(("1", "2"), chosen, np.array([[0.4, 0.6], [0.2, 0.8]]), ("a", "b"))
    show_few(SimpleNamespace(predictions=predictions))
    table, _, note = capsys.readouterr().out.partition("note: ")
    assert "most probable" in table
    assert "b 0.600" in table
    assert note.startswith("1 label is not the most probable class")
