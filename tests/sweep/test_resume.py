"""Runs that were killed or interrupted go on where they stopped: real processes, real signals."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfeat.evaluation.protocol import Protocol
from mmfeat.heads.registry import HeadSettings
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.record import BEGUN
from mmfeat.runs.run import Run
from mmfeat.sweep.search import Plan
from mmfeat.sweep.search_space import Range
from mmfeat.system.files import _owner
from tests.processes import Command
from tests.sweep.small_sweeps import FLOAT32, NO_HEADS, SMALL, results, stamps, sweep

# nine trials are a batch of eight, and another that depends on their scores
SEARCH = ["--search=optuna", "--learning-rate=1e-4..1e-2", "--trials=9", "--epochs=1", "--protocol=holdout"]
NINE = Plan(HeadSettings(epochs=1), {"learning_rate": Range(1e-4, 1e-2, True)}, "optuna", 9)
FLAGS = {"plain": ["--epochs=2", f"--folds={SMALL.folds}"], "optuna": SEARCH}
SWEEPS: dict[str, dict[str, Any]] = {
    "plain": {"plan": Plan(HeadSettings(epochs=2), race=True)},
    "optuna": {"plan": NINE, "protocol": Protocol("holdout", seeds=SMALL.seeds)},
}
TRIAL, ENTRY, ENSEMBLE = "*/trials/0000.json", "*-image/metrics.json", "*-ensemble/metrics.json"
PHOTOS = {"modalities": ["image"]}


@pytest.fixture(scope="module")
def whole(place: Path) -> Callable[[str], Run]:
    """The run of each plan that nobody interrupted."""
    return lambda name: sweep(place, out=place / "whole", **SWEEPS[name], **PHOTOS).run


def start(place: Path, out: Path, flags: list[str]) -> Command:
    """`mmfeat heads` for the run that `sweep` makes."""
    command = [
        *("heads", "--data", "demo", "--cache", "cache", "--encoders", "hashing,hog", "--fusion", "concat"),
        *("--baselines", "knn,logistic", "--modalities", "image", "--dtype", FLOAT32.dtype),
        *("--seeds", str(SMALL.seeds), "--out", str(out), *flags),
    ]
    return Command(command, place)


def finished(folder: Path) -> dict[str, tuple[int, int]]:
    """Files that may not be written again: those of trials, and of entries that have their metrics."""
    entries = {path.parent.name for path in folder.glob(ENTRY)}
    trials = {name.removesuffix(".json") for name in stamps(folder) if "/trials/" in name and name.endswith(".json")}
    return {
        name: stamp
        for name, stamp in stamps(folder).items()
        if name.split("/")[0] in entries or name.rsplit(".", 1)[0] in trials
    }


@pytest.mark.parametrize(
    ("plan", "moment"),
    [("plain", TRIAL), ("plain", ENTRY), ("plain", ENSEMBLE), ("optuna", "concat-image/trials/0003.json")],
    ids=["first trial", "first entry", "ensembles", "search"],
)
def test_a_killed_run_ends_like_one_that_was_not(
    place: Path, whole: Callable[[str], Run], tmp_path: Path, plan: str, moment: str
) -> None:
    process = start(place, tmp_path, FLAGS[plan])
    process.wait_for(tmp_path, f"*/{moment}")
    process.kill()
    (folder,) = tmp_path.iterdir()
    assert not (folder / "run.json").exists(), "it was done before it could be killed"
    assert finished(folder)
    more = "concat-image/trials/" if plan == "plain" else "nothing"  # in a race, a trial may get further seeds
    before = {name: stamp for name, stamp in finished(folder).items() if not name.startswith(more)}
    again = sweep(place, out=tmp_path, **SWEEPS[plan], **PHOTOS)
    assert not again.reused
    assert again.run.folder == folder
    assert results(again.run) == results(whole(plan))
    assert {name: stamps(folder)[name] for name in before} == before
    assert not list(folder.rglob("*.tmp"))


def test_control_c_is_one_line_and_goes_on_from_there(place: Path, whole: Callable[[str], Run], tmp_path: Path) -> None:
    process = start(place, tmp_path, FLAGS["optuna"])
    process.wait_for(tmp_path, f"*/{ENTRY}")
    process.send_signal(signal.SIGINT)
    out, err = process.wait()
    assert process.returncode == 130
    said = [line for line in err.splitlines() if not line.startswith("heads: ")]  # how far it had come
    assert [line for line in said if line] == [
        "interrupted; what was finished is kept, the same command goes on from there"
    ]
    assert "leaderboard" not in out
    (folder,) = tmp_path.iterdir()
    before = finished(folder)
    again = sweep(place, out=tmp_path, **SWEEPS["optuna"], **PHOTOS).run
    assert again.folder == folder
    assert results(again) == results(whole("optuna"))
    assert {name: stamps(folder)[name] for name in before} == before


@pytest.mark.parametrize("method", ["grid", "random"])
def test_other_searches_go_on_too(place: Path, tmp_path: Path, method: str) -> None:
    """Whatever files a kill kept from being written, the others stay and the end is the same."""
    plan = Plan(HeadSettings(epochs=1), {"learning_rate": [1e-4, 1e-3, 1e-2]}, method)
    run = sweep(place, out=tmp_path / "whole", plan=plan, **PHOTOS).run
    folder = Path(shutil.copytree(run.folder, tmp_path / "cut" / run.folder.name))
    for name in ("run.json", "concat-image/metrics.json", "concat-image/trials/0001.json", "knn-image/metrics.json"):
        (folder / name).unlink()
    before = finished(folder)
    assert results(sweep(place, out=tmp_path / "cut", plan=plan, **PHOTOS).run) == results(run)
    kept = {name: stamp for name, stamp in before.items() if not name.startswith("concat-image/final")}
    assert {name: stamps(folder)[name] for name in kept} == kept


def test_what_a_killed_writer_left_is_swept(place: Path, tmp_path: Path) -> None:
    run = sweep(place, **NO_HEADS, out=tmp_path).run
    (run.folder / "run.json").unlink()
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    left = [
        run.folder / where / f".{name}.{_owner()}-{dead.pid}-0.tmp"
        for where, name in ((".", "run.json"), ("knn-text", "metrics.json"), ("knn-text/trials", "0000.json"))
    ]
    for path in left:
        path.write_bytes(b"half")
    sweep(place, **NO_HEADS, out=tmp_path)
    assert not [path for path in left if path.exists()]
    (run.folder / BEGUN).write_text("{}")  # killed after run.json
    assert sweep(place, **NO_HEADS, out=tmp_path).reused
    assert not (run.folder / BEGUN).exists()
    (tmp_path / f".submission.csv.{_owner()}-{dead.pid}-0.tmp").write_bytes(b"half")  # in a folder of the user's
    write_submission(heads=tmp_path, out=tmp_path / "submission.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == [run.folder.name, "submission.csv"]
