"""docs/quickstart.ipynb runs in a kernel of Jupyter, and its outputs are what it shows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.docs.markdown import ROOT, blocks
from tests.docs.test_commands_page import load_script

# What a user of Jupyter has by himself: a loop of asyncio that runs, and a bar.
KERNEL = """import asyncio
from mmfeat.system.notebook import usual_progress
type(usual_progress()).__name__, asyncio.get_running_loop().is_running()"""
# The last three lines are wrong, and a checker of types says so.
SCRIPT = """
one: np.ndarray = mmfeat.embed("a text", encoder="hashing")
texts, photos = mmfeat.embed(["a text", None], [Path("a.jpg"), np.zeros((2, 2, 3), np.uint8)], ["hashing", "hog"])
print(texts.shape, photos.mean(), mmfeat.embed(images=["a.jpg"], encoder="hog", cache=None).dtype)
labels: list[str] = model.predict("a text")
run: mmfeat.Run = model.run
print(run.leaderboard[0].macro_f1.value, run.leaderboard.to_pandas().head(), run.out_of_fold().to_arrow().num_rows)
run.plot.confusion().save("confusion.png")
print([sample.text for sample in mmfeat.read_samples("demo")], mmfeat.audit_data("demo").table("balance").to_pandas())
number: int = model.predict("a text")
one.nothing
mmfeat.nothing
"""
HEAVY = (
    "torch transformers sklearn scipy matplotlib pandas PIL pyarrow ray huggingface_hub optuna open_clip timm msgspec"
)


def kinds(cell: Any) -> list[set[str]]:
    """The forms of a cell's outputs but for bars, of which a fast machine shows fewer."""
    data = [output.get("data", {}) for output in cell.outputs]
    return [set(each) for each in data if "<progress" not in each.get("text/html", "")]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """The cells of the notebook, run in an empty folder."""
    notebook = load_script("make_quickstart").executed(tmp_path_factory.mktemp("quickstart"), KERNEL)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def stored() -> list[Any]:
    notebook = nbformat.read(ROOT / "docs/quickstart.ipynb", as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_it_shows_what_is_stored(cells: list[Any]) -> None:
    *told, kernel = cells
    assert [kinds(cell) for cell in told] == [kinds(cell) for cell in stored()]
    assert kernel.outputs[0].data["text/plain"] == "('NotebookProgress', True)"
    assert all(output.output_type != "stream" for cell in told for output in cell.outputs)  # no warnings


def test_what_is_stored_is_whole_short_and_of_no_machine() -> None:
    outputs = [output for cell in stored() for output in cell.outputs]
    assert all(kinds(cell) for cell in stored())
    assert sum("image/png" in output.data for output in outputs) == 3
    texts = [text for output in outputs for kind, text in output.data.items() if kind.startswith("text/")]
    assert max(map(len, texts)) < 6000
    assert not re.search(r"/(tmp|home|root|Users)/", "".join(texts))


def test_the_three_lines_of_the_readme_run(
    small_demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks(ROOT / "README.md", "python")
    assert len(list(filter(str.strip, block.text.splitlines()))) == 3
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small_demo_folder, "mvsa")
    shutil.copy("mvsa/data/1001.jpg", "photo.jpg")
    exec(compile(block.text, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip() in [f"['{name}']" for name in ("negative", "neutral", "positive")]


@pytest.mark.skipif("MMFEAT_CHECK" not in os.environ, reason="mypy reads the whole package; make check does this")
def test_a_script_of_a_user_is_checked_by_its_types(tmp_path: Path) -> None:
    """What is right in strict mypy, and what is wrong is found; libraries of others are passed over, for the time."""
    (block,) = blocks(ROOT / "README.md", "python")
    text = "from pathlib import Path\nimport numpy as np\n" + block.text + SCRIPT
    (tmp_path / "script.py").write_text(text)
    passed = ",".join(f"{name}.*" for name in HEAVY.split())
    (tmp_path / "mypy.ini").write_text(f"[mypy]\n[mypy-{passed}]\nfollow_imports = skip\n")
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file",
        "mypy.ini",
        "--cache-dir",
        "cache",
        "script.py",
    ]
    given = {**os.environ, "MYPYPATH": str(ROOT)}  # mypy sees no package that is installed by an import hook
    answer = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=False)
    wrong = [int(line) for line in re.findall(r"^script.py:(\d+): error", answer.stdout, flags=re.MULTILINE)]
    last = len(text.splitlines())
    assert wrong == [last - 2, last - 1, last], answer.stdout
