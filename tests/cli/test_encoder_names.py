"""Names of encoders as people paste them, through every command that takes them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.typed import invoke
from tests.encoders.tiny_models import write_hub


def mmfeat(*arguments: object) -> str:
    answer = invoke(*arguments)
    assert answer.exit_code == 0, answer.output
    assert "Warning" not in answer.output
    return answer.stdout


def test_all_commands_read_a_pasted_name_alike(
    small_demo_folder: Path, tiny_timm: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_timm, "a,b:c")
    write_hub(tmp_path / "hub", "org/clip", tiny_clip, monkeypatch)
    flags = ("--data", small_demo_folder, "--dtype", "float32")
    written = mmfeat("extract", *flags, "--encoders", "./a,b:c,org/clip", "--device", "cpu")
    assert "./a,b:c: no family is named; by its files this is timm" in written
    assert "org/clip: no family is named; by its files this is clip" in written
    others = "file:a,b:c,https://huggingface.co/org/clip", f"timm:file://{tmp_path}/a,b:c,clip:hf_hub:org/clip"
    for encoders in others:
        assert "nothing to do" in mmfeat("extract", *flags, "--encoders", encoders)
        assert mmfeat("cache", "explain", "1001", *flags, "--encoders", encoders).count(": hit: ") == 3
    assert mmfeat("cache", "verify", "--parity", 1).count("parity holds") == 3
    quick = ("--fusion", "concat", "--baselines", "none", "--seeds", "1", "--folds", "2", "--no-ensembles")
    answers = [mmfeat("heads", *flags, "--encoders", encoders, *quick) for encoders in others]
    runs = [line for answer in answers for line in answer.splitlines() if line.startswith("run heads/")]
    assert len({line.split()[1] for line in runs}) == 1
    assert mmfeat("predict", *flags[:2]).startswith("guid,tag,p_negative,")
