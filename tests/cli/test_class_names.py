"""Class names on the command line: from flags and from a file, and what predicts after a restart."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from mmfeat.runs.run import read_run
from mmfeat.samples.demo import write_demo
from tests.cli.test_main import fails
from tests.cli.typed import invoke
from tests.processes import Command

HEADS = ("heads", "--fusion", "none", "--baselines", "zero-shot", "--folds", 2, "--seeds", 1, "--no-ensembles")
CONFIG = """
[heads.class-names]
happy_face = "a happy face, laughing"
sad-face = "x = sad"
"""


def test_zero_shot_the_whole_way(tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels keep their underscores and dashes; what the file says, a flag may say as well: it is the same run."""
    monkeypatch.chdir(tmp_path)
    labels = write_demo(tmp_path / "demo", pairs=40) / "train.txt"
    text = labels.read_text().replace("positive", "happy_face").replace("negative", "sad-face")
    labels.write_text(text)
    asked = ("extract", "--data", "demo", "--encoders", f"clip:{tiny_clip}", "--dtype", "float32")
    assert invoke(*asked).exit_code == 0
    (tmp_path / "names.toml").write_text(CONFIG)
    answer = invoke(*HEADS, "--config", "names.toml")
    assert answer.exit_code == 0, answer.stderr
    (folder,) = (tmp_path / "heads").glob("demo-zero-shot-*")
    texts = {"happy_face": "a happy face, laughing", "neutral": "neutral", "sad-face": "x = sad"}
    assert read_run(folder).config.class_names == texts
    same = invoke(*HEADS, "--class-names", 'happy_face=a happy face, laughing,sad-face="x = sad"')
    assert "these heads were trained on this data before" in same.stdout
    for flags, words in (
        (("--class-names", "happy=x"), "--class-names happy=...: no such label; did you mean happy_face?"),
        (("--class-names", "happy_face"), "write LABEL=TEXT,..."),
        (("--templates", "none", "--class-names", "sad-face= "), "an empty text"),
    ):
        fails(invoke(*HEADS, *flags), words)
    shown = invoke("runs", "show", folder)
    assert "happy_face=a happy face, laughing" in " ".join(shown.stdout.split())
    predicted = Command(("predict", "--run", folder, "--data", "demo", "--out", "out.csv"), tmp_path)
    said = predicted.wait()
    assert predicted.returncode == 0, said
    with (tmp_path / "out.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 40
