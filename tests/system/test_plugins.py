"""Plug-ins: a package that pip installs brings an encoder and a fusion, and a broken one costs one line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mmfeat
from mmfeat import HeadSettings, Plan, Protocol
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, EncoderError, HeadError
from mmfeat.heads.registry import load_fusion

EXAMPLE = Path(__file__).parents[2] / "docs" / "plugin"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example of the documentation, installed by pip."""
    folder = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, folder / "source")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command += ["--disable-pip-version-check", "--target", str(folder / "site"), str(folder / "source")]
    subprocess.run(command, check=True, timeout=120)
    return folder / "site"


@pytest.fixture
def plugged(installed: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(installed))
    return installed


def declared(folder: Path, name: str, *points: str) -> str:
    """A folder with a package that declares entry points, as an installed one does."""
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    (info / "entry_points.txt").write_text("\n".join(points))
    return str(folder)


def test_an_encoder_and_a_fusion_of_a_plugin_go_all_the_way(
    plugged: Path, demo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {
        "fusion": ["all", "votes"],
        "baselines": ["none"],
        "protocol": Protocol(folds=3, seeds=1),
    }
    mmfeat.extract_features(demo_folder, ["lengths", "hog"])
    run = mmfeat.train_heads(
        demo_folder, ["lengths", "hog"], plan=Plan(HeadSettings(epochs=1)), device="cpu", ensembles=False, **options
    ).run
    assert {"votes", "concat"} <= {entry.head for entry in run.leaderboard}
    model = mmfeat.load(run.folder, head="votes", modalities="both", device="cpu")
    assert model.predict_proba(["what a day!"]).shape == (1, len(run.classes))
    vectors = mmfeat.embed(["a b!"], encoder="lengths")
    np.testing.assert_array_equal(vectors, [[4, 1, 1, 0]])
    X, y = np.random.default_rng(0).standard_normal((40, 8)), np.arange(40) % 2
    assert mmfeat.FusionClassifier("votes", epochs=1, device="cpu").fit(X, y).predict(X).shape == (40,)


def test_without_the_plugin_a_name_is_unknown_in_one_line() -> None:
    with pytest.raises(EncoderError, match="no encoder family 'lengths'"):
        describe_encoders(["lengths"], EncoderOptions(dtype="float32"))
    with pytest.raises(HeadError, match="no fusion 'votes' here; install the plug-in"):
        load_fusion("votes")


def test_a_broken_plugin_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    points = "[mmfeat.encoders]", "gone = not_a_module:X", "odd = json:dumps", "[mmfeat.fusions]", "votes = json:dumps"
    monkeypatch.syspath_prepend(declared(tmp_path / "site", "broken", *points))
    options = EncoderOptions(dtype="float32")
    with pytest.raises(ConfigError, match=r"not_a_module:X of broken cannot be imported \(ModuleNotFoundError"):
        describe_encoders(["gone"], options)
    with pytest.raises(ConfigError, match=r"json:dumps of broken is no mmfeat.encoders.Family"):
        describe_encoders(["odd"], options)
    with pytest.raises(ConfigError, match=r"json:dumps of broken is no subclass of mmfeat.heads.Fusion"):
        load_fusion("votes")
    assert describe_encoders(["hashing"], EncoderOptions(dtype="float32", cleaning="none"))
    monkeypatch.syspath_prepend(declared(tmp_path / "other", "rival", "[mmfeat.encoders]", "odd = json:loads"))
    with pytest.raises(ConfigError, match="odd: plug-in of rival and of broken; uninstall one"):
        describe_encoders(["odd"], options)


def test_help_and_known_names_read_no_entry_points(tmp_path: Path) -> None:
    """The module of plug-ins marks that it ran; a known name and the help never get so far."""
    site = declared(tmp_path / "site", "slow", "[mmfeat.encoders]", "slow = slow_plugin:X")
    (tmp_path / "site" / "slow_plugin.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    watch = (
        "import importlib.metadata as m\n"
        "def read(**kw): raise SystemExit('entry points were read')\n"
        "m.entry_points = read\n"
        "import runpy\nrunpy.run_module('mmfeat', run_name='__main__')\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{ROOT}"}
    for arguments in (["--help"], ["encoders", "hashing"]):
        command = [sys.executable, "-c", watch, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert "entry points" not in done.stderr, done.stderr
        assert done.stdout
    assert not (tmp_path / "ran").exists()
