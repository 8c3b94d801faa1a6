"""What version 0.1.0 wrote before its records had types opens and is reused: a cache, runs, a search, a second stage.

`before.tar.xz` holds the demo data of 60 pairs, two tiny encoders, their cache, three runs (a search of Optuna over
five heads; a head alone; its second stage) and what their heads predicted, all made by that version.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from mmfeat.errors import RunError
from mmfeat.runs.run import read_run
from mmfeat.samples.keys import StatIndex
from tests.cli.typed import invoke
from tests.sweep.small_sweeps import rows, stamps

MADE_IN = "/tmp/before"  # the folder that paths in these files name
SEARCHED, PLAIN, TUNED = "demo-5-heads-2eb6325b", "demo-concat-ec481aa4", "demo-concat-text1-640818b1"
SEARCH = (
    "heads --fusion concat --baselines knn,logistic,forest,boosting --modalities both --folds 2 --seeds 1 --epochs 2 "
    "--search optuna --learning-rate 1e-4..1e-2 --trials"
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with everything in it, the current one."""
    with tarfile.open(Path(__file__).with_name("before.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    for file in (*tmp_path.glob("heads/*/run.json"), *tmp_path.glob("cache/requests/*.json")):
        file.write_text(file.read_text().replace(MADE_IN, str(tmp_path)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mmfeat(*arguments: str) -> str:
    """What a command prints."""
    answer = invoke(*arguments[0].split(), *arguments[1:])
    assert answer.exit_code == 0, answer.output
    return answer.stdout


def test_nothing_is_encoded_again(place: Path) -> None:
    encoders = ("--encoders", "bert:tiny-bert,timm:tiny-timm", "--dtype", "float32")
    said = mmfeat("extract --data demo", *encoders)
    assert "nothing to do: every vector is in cache/demo" in said
    assert "photos count as stored, as before; --exif upright --background white shows them" in said
    assert "all sound" in mmfeat("cache verify")


def test_photos_are_encoded_anew_once_they_are_asked_for_upright(place: Path) -> None:
    encoders = ("--encoders", "hog", "--dtype", "float32")
    upright = mmfeat("extract --data demo --exif upright --background white", *encoders)
    assert "hog: " in upright
    assert "nothing to do" in mmfeat("extract --data demo", *encoders)  # and stay upright
    assert "photos count as stored" not in upright


def test_the_stat_index_is_read(place: Path) -> None:
    index = StatIndex(place / "cache" / "demo" / "images.index")
    assert len(index) == len(list((place / "demo" / "data").glob("*.[jJpP]*")))


@pytest.mark.parametrize("head", ["concat", "knn", "logistic", "forest", "boosting"])
def test_a_head_predicts_what_it_predicted(place: Path, head: str) -> None:
    mmfeat(f"predict --run heads/{SEARCHED} --head {head} --data demo --out now.csv")
    now, then = rows(place / "now.csv"), rows(place / f"expected-{head}.csv")
    for new, old in zip(now, then, strict=True):
        same = [name for name in old if not name.startswith("p_")]
        assert [new[name] for name in same] == [old[name] for name in same]
        chances = [name for name in old if name.startswith("p_")]
        np.testing.assert_allclose([float(new[n]) for n in chances], [float(old[n]) for n in chances], atol=1e-5)


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("offsets", [float("inf")] * 3), ("strength", "x")])
def test_a_decision_that_was_changed_is_refused(place: Path, name: str, value: object) -> None:
    file = place / "heads" / SEARCHED / "run.json"
    values = json.loads(file.read_text())
    values["leaderboard"][0]["decision"][name] = value
    file.write_text(json.dumps(values))
    with pytest.raises(RunError, match=r"run.json: not a run of this version .*decision"):
        read_run(file.parent)


def test_the_submission_is_the_same(place: Path) -> None:
    mmfeat(f"submit --run heads/{SEARCHED} --out now.csv")
    assert (place / "now.csv").read_bytes() == (place / "expected-submission.csv").read_bytes()


def test_a_finished_search_is_reused_and_extended(place: Path) -> None:
    """On the folds of the run: that version also joined short texts without a photo in common."""
    before = stamps(place / "heads" / SEARCHED / "concat-both" / "trials")
    again = f"{SEARCH} 3 --split-dir heads/{SEARCHED}"
    assert f"run heads/{SEARCHED}" in mmfeat(again)
    assert f"run heads/{SEARCHED}" in mmfeat(again.replace(" 3 ", " 5 "))
    after = stamps(place / "heads" / SEARCHED / "concat-both" / "trials")
    assert {name: after[name] for name in before} == before
    assert len([name for name in after if name.endswith(".json")]) == 5


def test_a_run_is_reproduced_on_its_own_folds(place: Path) -> None:
    """Near duplicates are others now: folds that were dealt anew would be another run's. So are decisions, which have
    biases now: that is said."""
    answer = invoke("runs", "reproduce", f"heads/{PLAIN}", "--out", "again")
    assert (answer.exit_code, answer.exception.__class__) in ((0, type(None)), (1, SystemExit)), answer.output
    assert "macro-F1" in answer.output
    for name in ("folds.csv", "run.json"):
        assert (place / "again" / PLAIN / name).is_file()
    folds = [(place / folder / PLAIN / "folds.csv").read_bytes() for folder in ("heads", "again")]
    assert folds[0] == folds[1]
    mmfeat(
        "heads --data demo --fusion concat --baselines none --modalities both --folds 2 --seeds 1 --epochs 1 --out new"
    )
    (new,) = (place / "new").iterdir()
    assert (new / "folds.csv").read_bytes() != folds[0]
    assert "other folds; --split-dir makes runs share them" in mmfeat(f"runs compare heads/{PLAIN} {new}")


def test_a_second_stage_opens(place: Path) -> None:
    run = read_run(place / "heads" / TUNED)
    assert run.is_finetuned
    assert {row["head"] for row in rows(run.leaderboard_file)} == {"stage-1", "stage-2", "wise-ft"}
    shown = mmfeat(f"runs show heads/{TUNED}")
    assert all(word in shown for word in (PLAIN, "stage-2", "mmfeat finetune --unfreeze text:1 --epochs 1"))
    assert run.name in mmfeat("runs ls")
    mmfeat(f"report --run heads/{TUNED}")
    assert (run.folder / "report.html").is_file()
