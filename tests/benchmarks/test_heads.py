"""The benchmark of heads in small: every section runs, and its ways train the same heads."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SAMPLES = 400


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """`benchmarks/heads.py`, which finds the modules beside it as when it is run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        spec = importlib.util.spec_from_file_location("benchmarks_heads", BENCHMARKS / "heads.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        yield module


def test_the_full_contest_is_the_one_that_is_described(script: ModuleType) -> None:
    contest = script.make_contest("cpu", 16, small=False)
    cells = contest.task.cells("concat")
    assert len(cells) == contest.sequential == 15
    assert {(len(rows.train), len(rows.validation)) for _, _, rows in cells} == {(2560, 640)}
    assert contest.made.vectors.shape == (4000, 1408)
    assert contest.settings.patience >= contest.settings.epochs
    assert len(script.make_contest("cuda", 16, small=False).task.cells("concat")) == 256


def test_folds_share_no_test_rows_and_repeats_no_validation_rows(script: ModuleType) -> None:
    splits = script.make_splits(SAMPLES, 5)
    tests = np.concatenate([splits.fold(fold, 0).test for fold in range(5)])
    assert sorted(tests) == list(range(SAMPLES))
    held = [splits.fold(0, repeat).validation for repeat in range(3)]
    assert len(np.unique(np.concatenate(held))) == sum(map(len, held))


def test_a_loop_sees_vectors_standardised_by_its_training_rows(script: ModuleType) -> None:
    cell = script.make_contest("cpu", 16, small=True).cells()[0]
    assert abs(float(cell.x.mean(0).max())) < 1e-4
    assert float(cell.x.std(0).sub(1).abs().max()) < 1e-2
    assert abs(float(cell.validation_x.mean(0).abs().max())) > 1e-3


@pytest.fixture(scope="module")
def lines(script: ModuleType) -> dict[str, str]:
    """What the small contest says, without the title of each line."""
    contest = script.make_contest("cpu", 16, small=True)
    assert len(contest.cells()) == len(contest.task.cells("concat")) == 4
    return {line.what.partition(": ")[2]: line.figure for line in script.compare(contest, None)}


def test_all_ways_learn(lines: dict[str, str]) -> None:
    scores = {name: float(figure.split(",")[0].split()[-1]) for name, figure in lines.items() if "macro-F1" in name}
    assert len(scores) >= 2
    assert min(scores.values()) > 0.25  # a head that always says the same gets 0.22


def test_ratios_are_the_times_divided(lines: dict[str, str]) -> None:
    loop = next(float(figure.split()[0]) for name, figure in lines.items() if name.startswith("loop, "))
    ratio = loop / float(lines["mmfeat"].split()[0])
    assert float(lines["mmfeat against loop"].split()[0]) == pytest.approx(ratio, rel=0.05)


def test_training_on_vectors_on_disk_is_measured(script: ModuleType, tmp_path: Path) -> None:
    script.write_vectors(tmp_path, 2000, 16)
    rows = list(script.on_disk(str(tmp_path), "2000"))
    assert [row.what.split()[0] for row in rows] == ["concat", "logistic", "ridge"]
    peaks = [row.value for row in rows]
    assert peaks == sorted(peaks)
    assert peaks[0] > 0.01
    assert {row.goal for row in rows} == {"<= 3"}  # of the process, which other tests may have filled


@pytest.mark.parametrize(
    ("limits", "goal", "verdict"),
    [
        ({"least": 2.0}, ">= 2", "MISSED"),
        ({"least": 1.5}, ">= 1.5", "passed"),
        ({"most": 1.4}, "<= 1.4", "MISSED"),
        ({"most": 2.0}, "<= 2", "passed"),
        ({}, "", ""),
    ],
)
def test_a_row_says_whether_it_meets_its_goal(
    script: ModuleType, limits: dict[str, float], goal: str, verdict: str
) -> None:
    row = script.measured("speed", 1.5, "x", **limits)
    assert (row.figure, row.goal, row.verdict) == ("1.5 x", goal, verdict)


def test_the_cache_of_the_sweep_lacks_nothing(script: ModuleType, tmp_path: Path) -> None:
    """What is written in place of an extraction is what `train_heads` looks for, tokens included."""
    requests = script.write_extracted(tmp_path, 120)
    done = script.train_heads(
        tmp_path / "table.csv",
        requests,
        cache=tmp_path / "cache",
        out=tmp_path / "heads",
        options=script.OPTIONS,
        fusion=["none"],
        baselines=["ridge"],
        device="cpu",
    )
    described = [line.what for line in script.describe_sweep(done)]
    assert described[0] == "sweep of 120 samples with defaults and tokens"
    assert "sweep: ridge on all modalities" in described
    folders = sorted((tmp_path / "cache" / "table").glob("*tokens*"))
    assert len(folders) == 2
