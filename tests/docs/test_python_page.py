"""Every block of docs/python.md runs as it stands, one after the other, in an empty folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mmfeat
from tests.docs.markdown import ROOT, Code, blocks

PAGE = ROOT / "docs/python.md"
NEEDS_WEIGHTS = "# needs weights"
CLASSIFIER = "from mmfeat import FusionClassifier"  # tests/heads/test_classifier.py runs it
CODE = blocks(PAGE, "python")


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the blocks before have left, in the folder where they wrote."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("python"))
    yield {}
    os.chdir(before)


@pytest.mark.parametrize("block", CODE, ids=lambda block: f"line{block.line}")
def test_block_runs(block: Code, namespace: dict[str, Any]) -> None:
    code = compile(block.text, f"{PAGE.name}:{block.line}", "exec")
    if not block.text.startswith(NEEDS_WEIGHTS) and CLASSIFIER not in block.text:
        exec(code, namespace)


def test_what_was_said_to_be_written_is_there(namespace: dict[str, Any]) -> None:
    if "submission" not in namespace:
        pytest.skip("the blocks were not all run")
    assert Path("submission.csv").read_text().startswith("guid,tag\n")
    assert namespace["report"].path.is_file()
    assert {path.name for path in Path("heads").iterdir()} == {
        namespace["quick"].run.folder.name,
        namespace["run"].folder.name,
        namespace["searched"].folder.name,
    }


def test_every_public_name_is_told() -> None:
    text = PAGE.read_text()
    told = set(re.findall(r"\w+", text))
    assert set(mmfeat.__all__) - {"__version__"} <= told, sorted(set(mmfeat.__all__) - told)


def test_few_blocks_need_weights() -> None:
    assert sum(block.text.startswith(NEEDS_WEIGHTS) for block in CODE) <= 2
