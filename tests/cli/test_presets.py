"""Presets: published recipes are values of flags that exist; what is given wins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import Result

from mmfeat.cli.heads import PARAMETERS
from mmfeat.cli.presets import PRESETS, preset_values
from mmfeat.errors import ConfigError
from tests.cli.typed import invoke


def heads(place: Path, out: Path, *flags: str) -> Result:
    """`mmfeat heads` on the demo data, short."""
    config = ["--config", str(place / "mmfeat.toml")] if (place / "mmfeat.toml").exists() else []
    own = [f"--data={place / 'demo'}", f"--cache={place / 'cache'}", "--encoders=hashing,hog", f"--out={out}"]
    return invoke(*config, "heads", *own, "--dtype=float32", *flags)


def run_of(out: Path) -> dict:
    (folder,) = out.iterdir()
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("name", PRESETS)
def test_every_flag_of_a_preset_exists_and_takes_its_value(name: str) -> None:
    for flag, value in preset_values(name).items():
        assert flag in PARAMETERS
        default = PARAMETERS[flag][1]
        assert isinstance(value, type(default) if default is not None else str), flag


def test_an_unknown_preset_is_refused() -> None:
    assert preset_values("system-b") == preset_values("frozen-clip")
    with pytest.raises(ConfigError, match="--preset system-z: use one of bert-resnet50, frozen-clip"):
        preset_values("system-z")


def test_system_a_runs_and_what_is_given_wins(place: Path, tmp_path: Path) -> None:
    quick = ("--epochs=1", "--learning-rate=1e-5", "--dropout=0.3", "--modalities=both")
    answer = heads(place, tmp_path, "--preset=system-a", *quick)
    assert answer.exit_code == 0, answer.output
    run = run_of(tmp_path)
    assert [pair[0] for pair in run["pairs"]] == ["late", "cross-attention"]
    assert (run["attend"], run["protocol"]["kind"], run["protocol"]["shares"]) == ("pooled", "holdout", [8, 2])
    assert run["plan"]["space"] == {"batch_size": [16, 32]}
    settings = run["plan"]["settings"]
    assert (settings["epochs"], settings["learning_rate"], settings["class_weights"]) == (1, 1e-5, "none")
    assert run["plan"]["adjustment"] == 0
    assert all(entry["trials"] == 2 for entry in run["leaderboard"] if "trials" in entry)


def test_system_b_runs_and_the_config_file_wins_too(place: Path, tmp_path: Path) -> None:
    (place / "mmfeat.toml").write_text('[heads]\nepochs = "1"\nfusion = "concat,gated"\nmodalities = "both"\n')
    try:
        answer = heads(place, tmp_path, "--preset=frozen-clip")
    finally:
        (place / "mmfeat.toml").unlink()
    assert answer.exit_code == 0, answer.output
    run = run_of(tmp_path)
    assert [pair[0] for pair in run["pairs"]] == ["concat", "gated"]
    settings = run["plan"]["settings"]
    assert (settings["epochs"], settings["learning_rate"], settings["batch_size"]) == (1, 3e-4, 16)
    assert (settings["class_weights"], settings["dropout"], settings["weight_decay"]) == ("sqrt", 0.5, 0.05)
    assert run["protocol"]["shares"] == [8, 1, 1]
