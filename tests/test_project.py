"""The repository keeps its own promises: README, Makefile, packaging, ignored files."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CODE = (ROOT / "CONTRIBUTING.md").read_text()


def test_readme_tells_its_story_in_order() -> None:
    places = [
        README.index(words)
        for words in ("images/mistakes.png", "mmfeat run", "submission.csv", "make demo", "make test")
    ]
    assert places == sorted(places)
    assert len(README.split()) <= 900


def test_the_packages_that_the_docs_name_exist() -> None:
    table = CODE.split("## What lives where")[1].split("\n## ")[0]
    for name in re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE):
        assert (ROOT / name).exists(), name


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_working_folders_are_ignored_and_code_is_not() -> None:
    ignored = ["cache/demo/x.h5", "heads/run/run.json", "demo/train.txt", "submission.csv"]
    kept = ["cache/README.md", "heads/README.md", "mmfeat/heads/fusions.py", "mmfeat/cache/store.py"]
    command = ["git", "check-ignore", "--no-index", *ignored, *kept]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split() == ignored


def test_constraints_hold_a_torch_and_torchvision_that_match() -> None:
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    torch, vision = (int(pins[name].split(".")[1]) for name in ("torch", "torchvision"))
    assert vision == torch + 15  # torch 2.N goes with torchvision 0.(N + 15)
