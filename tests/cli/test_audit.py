"""`mmfeat audit` as a user types it: what is printed, what is written, and one line for wrong input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmfeat
from tests.audit.audited import FAULTY, write_folder
from tests.cli.typed import invoke
from tests.sweep.small_sweeps import make_place, sweep


def run(*arguments: object, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """Exit code and lines of one command."""
    monkeypatch.chdir(cwd)
    answer = invoke(*arguments)
    return answer.exit_code, answer.output.splitlines()


def test_a_process_without_anything_extracted(tmp_path: Path) -> None:
    write_folder(tmp_path / "tweets", FAULTY)
    command = [sys.executable, "-m", "mmfeat", "audit", "--data", "tweets"]
    answer = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[0] == "tweets: 10 samples, 9 labelled"
    assert lines[-3].startswith("tables audit/tweets/*.csv: duplicates, conflicts, leaks")
    assert lines[-2:] == ["audit audit/tweets/audit.json", "next: mmfeat extract --data tweets"]
    row = next(line.split() for line in lines if line.startswith("text  "))
    assert row == ["text", "2", "5", "3", "3", "1", "1", "of", "2"]
    assert any(line.startswith("unlabelled samples with a labelled duplicate") for line in lines)
    assert not [line for line in lines if len(line) > 80 and not line.startswith(("note", "tables"))]


def test_the_latest_extraction_and_its_best_run(
    demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(demo_folder, tmp_path)
    sweep(place)
    code, lines = run("audit", cwd=place, monkeypatch=monkeypatch)
    assert code == 0, lines
    (folder,) = (place / "heads").iterdir()
    assert lines[0] == "using demo"
    assert lines[-1] == f"next: mmfeat report --run heads/{folder.name}"
    text = "\n".join(lines)
    for words in ("label errors:", "test of this list:", "wrong labels:", "leaks: 0 of 108", "truncated"):
        assert words in text, words
    assert mmfeat.read_audit(place / "audit" / "demo").label_errors["run"] == f"heads/{folder.name}"
    code, lines = run("audit", "--run", "none", cwd=place, monkeypatch=monkeypatch)
    assert code == 0
    assert not any("label errors" in line for line in lines)


def test_named_columns_of_an_extraction_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.csv").write_text("guid,caption,tag\n1,so happy,pos\n2,so sad,neg\n")
    columns = {"id": "guid", "text": "caption", "label": "tag"}
    mmfeat.extract_features(tmp_path / "t.csv", ["hashing"], cache=tmp_path / "cache", columns=columns)
    for arguments in ((), ("--data", "t.csv")):
        code, lines = run("audit", *arguments, cwd=tmp_path, monkeypatch=monkeypatch)
        assert code == 0, lines
        assert "t.csv: 2 samples, 2 labelled" in lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--data is needed"),
        (("--data", "nowhere"), "nowhere: no such folder or table"),
        (("--data", "tweets", "--split-dir", "x"), "no saved splits"),
        (("--data", "tweets", "--run", "x"), "x: no such run in heads"),
        (("--data", "tweets", "--out", "."), "lies among the data"),
        (("--data", "tweets", "--out", "tweets/train.txt"), "lies among the data"),
        (("--data", "tweets", "--out", "plain"), "cannot write plain/tweets"),
        (("--data", "tweets", "--columns", "x"), "--columns x: write id="),
    ],
)
def test_wrong_input_is_one_line(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "tweets", FAULTY)
    (tmp_path / "plain").write_text("a file")
    code, lines = run("audit", *arguments, cwd=tmp_path, monkeypatch=monkeypatch)
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith("mmfeat: ")
    assert words in lines[0]


def test_help_has_an_example_and_imports_nothing_heavy(tmp_path: Path) -> None:
    heavy = "{'torch', 'sklearn', 'scipy', 'h5py', 'numpy', 'py3langid', 'PIL'}"
    code = "import sys\nfrom mmfeat.cli.main import main\nsys.argv = ['mmfeat', 'audit', '--help']\n"
    code += f"try: main()\nexcept SystemExit: pass\nprint('imported', sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert answer.stdout.splitlines()[-1] == "imported []"
    assert "mmfeat audit --data tweets" in answer.stdout
