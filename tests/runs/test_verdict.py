"""The verdict: the recommendation is the cheapest near tie, sentences say what the tests say, and no step fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmfeat.evaluation.significance import Difference
from mmfeat.prediction.submit import write_submission
from mmfeat.runs.compare import RunTest, compare_runs
from mmfeat.runs.entry import Entry
from mmfeat.runs.run import Run, read_run
from mmfeat.runs.verdict import near_best, prediction_step, previous_run, recommend, standing, verdict, verdict_on
from tests.sweep.small_sweeps import made_up_entry, make_place, sweep, toy_task

BOTH: Any = [SimpleNamespace(spec=SimpleNamespace(modality=name)) for name in ("text", "image")]
SMALL: dict[str, Any] = {"fusion": ["none"], "baselines": ["ridge"], "modalities": ["both", "text", "image"]}


@pytest.fixture(scope="module")
def run(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return sweep(make_place(demo_folder, tmp_path_factory.mktemp("verdict")), **SMALL).run


def entry(head: str, modalities: str, score: float, seconds: float = 1.0, tie: bool = True) -> Entry:
    made = made_up_entry(toy_task(), "a", 1.0).entry
    f1 = replace(made.macro_f1, value=score, low=score - 0.0196, high=score + 0.0196)
    return replace(made, head=head, modalities=modalities, macro_f1=f1, seconds=seconds, tie=tie)


def test_recommended_is_the_cheapest_tie_within_one_standard_error() -> None:
    best, slow = entry("mean", "ensemble", 0.7), entry("film", "both", 0.695, 90.0)
    quick, text = entry("kernel", "both", 0.692, 9.0), entry("ridge", "text", 0.691, 90.0)
    quicker = entry("ridge", "both", 0.691, 0.1)
    far, worse = entry("knn", "text", 0.689), entry("svm", "text", 0.695, tie=False)
    assert near_best([best, slow, quick, text, far]) == [best, slow, quick, text]
    assert recommend([best, far], BOTH) == best
    assert recommend([best, slow, far], BOTH) == slow
    assert recommend([best, slow, worse, quick, quicker, far], BOTH) == quick
    assert recommend([best, slow, worse, quick, text, far], BOTH) == text


def test_what_predicts_is_the_recommended_entry_and_of_an_older_run_the_first(run: Run) -> None:
    assert run.results.recommended == recommend(run.leaderboard, run.config.encoders).name
    second = run.leaderboard[1]
    other = replace(run, results=replace(run.results, recommended=second.name))
    assert other.predicting() == other.recommended == second
    assert other.predicting(run.leaderboard[0].head, run.leaderboard[0].modalities) == run.leaderboard[0]
    assert any(f"Recommended: {second.label}, a tie at " in line for line in verdict(other))
    before = replace(run, results=replace(run.results, recommended=""))
    assert "recommended" not in before.to_json()
    assert before.predicting() == run.leaderboard[0]
    assert not any(line.startswith("Recommended") for line in verdict(before))


def test_sentences_say_what_the_tests_say(run: Run) -> None:
    gains = [entry for entry in run.leaderboard if entry.gain]
    sentence = verdict(run)[-1]
    assert "ext and photo together " in sentence
    assert f" (p {gains[0].gain.p_holm:.3f})." in sentence
    assert (" tie with " in sentence) == (gains[0].gain.p_holm >= 0.05)

    def told(value: float, p: float) -> str:
        return standing(RunTest(Difference(value, 0, 0, p), p, p, p, 9), "[2]", "[1]")

    assert told(0.012, 0.2) == "[2] ties with [1] at +0.012."
    assert told(-0.012, 0.01) == "[2] is worse than [1] by 0.012 (p 0.010)."


def test_the_last_run_on_the_same_folds_is_compared(run: Run) -> None:
    assert previous_run(run) is None
    place = run.folder.parent.parent
    later = sweep(place, fusion=["none"], baselines=["prior"], modalities=["text"], ensembles=False).run
    found = previous_run(later)
    assert found
    assert found.name == run.name
    best, against_first = verdict_on(compare_runs((found, later)))
    assert best.startswith(f"Best: [1] {run.leaderboard[0].label}, macro-F1 ")
    assert against_first.startswith("[2] is worse than [1] by 0.")


def test_submit_is_named_only_where_it_has_something_to_predict(run: Run, tmp_path: Path) -> None:
    run = read_run(run.folder)
    assert prediction_step(run).startswith("mmfeat submit --run ")
    written = write_submission(run.folder, out=tmp_path / "s.csv")
    assert (written.head, written.modalities) == (run.recommended.head, run.recommended.modalities)
    gone = replace(run, config=replace(run.config, data=str(tmp_path / "gone")))
    assert prediction_step(gone).startswith("mmfeat predict --run ")
    assert prediction_step(gone).endswith(" --data test.csv")
