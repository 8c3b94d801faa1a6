"""Entries: settings, thresholds and temperatures are chosen without the rows that score them; damage is noticed."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from mmfeat.errors import HeadError, RunError
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.heads.data import HeadData
from mmfeat.heads.registry import HeadSettings, load_fusion
from mmfeat.heads.stack import Member, train_stack
from mmfeat.samples.labels import Targets, names_of
from mmfeat.sweep.entries import assemble
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.search import Plan
from mmfeat.sweep.search_space import Range
from mmfeat.sweep.trials import Outcome, cross_fit, decide, load_outcome, save_outcome
from tests.heads.toy_features import MULTILABEL, TARGETS, features
from tests.sweep.small_sweeps import QUICK, made_up_entry, stamps, toy_entry, toy_task

GRID = replace(QUICK, space={"learning_rate": [1e-3, 1e-2], "dropout": [0.2, 0.5]})


def outcome(task: Problem, skill: float, scores: list[float], name: str = "head") -> Outcome:
    """A trial of invented logits with these validation scores, one a fold."""
    entry = made_up_entry(task, name, skill)
    cells = [np.full((2, len(scores)), scores)]
    return Outcome(HeadSettings(), entry.logits, entry.validation, cells[0], [], [], [{}] * 2 * len(scores), 0.0)


@pytest.mark.parametrize("targets", [TARGETS, MULTILABEL], ids=["multiclass", "multilabel"])
@pytest.mark.parametrize("fold", range(3))
def test_a_fold_s_own_rows_have_no_say_in_its_decision(targets: Targets, fold: int) -> None:
    task = toy_task(targets)
    entry = made_up_entry(task, "head", 1.0)
    before = cross_fit(task, entry.logits, entry.validation, None)
    rows = task.splits.fold(fold, 0).test
    logits, matrix = entry.logits.copy(), targets.matrix.copy()
    logits[:, rows] = -3 * logits[:, rows]
    matrix[rows] = np.roll(matrix[rows], 1, axis=0)  # as often as before: the prior of the others' training stays
    other = replace(task, targets=replace(targets, matrix=matrix))
    after = cross_fit(other, logits, entry.validation, None)
    assert after[fold] == before[fold]
    assert all(after[each] != before[each] for each in range(3) if each != fold)


@pytest.mark.parametrize("shares", [(8, 1, 1), (8, 2)])
def test_the_decision_of_a_holdout_is_fitted_on_its_validation_rows(shares: tuple[int, ...]) -> None:
    task = toy_task(shares=shares)
    entry = made_up_entry(task, "head", 1.0)
    (before,) = cross_fit(task, entry.logits, entry.validation, None)
    test = task.splits.tested
    logits, matrix = entry.logits.copy(), TARGETS.matrix.copy()
    logits[:, test], matrix[test] = 0.0, np.roll(matrix[test], 1, axis=1)
    other = replace(task, targets=replace(TARGETS, matrix=matrix))
    assert cross_fit(other, logits, entry.validation, None) == [before]
    assert cross_fit(task, entry.logits, [3 * each for each in entry.validation], None) != [before]


def test_each_fold_takes_the_trial_that_validates_best_there_whatever_it_tests() -> None:
    task = toy_task()
    good, bad = outcome(task, 5.0, [0.1, 0.9, 0.1], "good"), outcome(task, -5.0, [0.2, 0.2, 0.2], "bad")
    entry = assemble(task, "concat", "both", [good, bad], QUICK.adjustment)
    tests = [task.splits.fold(fold, 0).test for fold in range(3)]
    for test, chosen in zip(tests, (bad, good, bad), strict=True):
        np.testing.assert_array_equal(entry.logits[:, test], chosen.logits[:, test])
    for cell, each in enumerate(entry.validation):
        np.testing.assert_array_equal(each, (good if cell // 2 == 1 else bad).validation[cell])
    assert entry.entry.macro_f1.value < 0.5
    assert entry.entry.trials == 2


def test_the_first_of_equal_trials_counts() -> None:
    task = toy_task()
    first, second = outcome(task, 1.0, [0.5] * 3, "first"), outcome(task, 2.0, [0.5] * 3, "second")
    entry = assemble(task, "concat", "both", [first, second], QUICK.adjustment)
    np.testing.assert_array_equal(entry.logits[:, task.splits.tested], first.logits[:, task.splits.tested])


def test_optimism_is_what_choosing_on_the_scored_rows_would_have_gained() -> None:
    """A trial that is perfect on test rows and validates worst: whoever peeks takes it, and claims 1."""
    task = toy_task()
    perfect, honest = outcome(task, 50.0, [0.1] * 3, "perfect"), outcome(task, 0.5, [0.9] * 3, "honest")
    record = assemble(task, "concat", "both", [perfect, honest], QUICK.adjustment).entry
    assert record.macro_f1.value < 0.8
    assert record.optimism == pytest.approx(1 - record.macro_f1.value)
    alone = assemble(task, "concat", "both", [perfect], QUICK.adjustment).entry
    assert alone.optimism == pytest.approx(0)


def test_scores_are_of_the_choices_of_each_fold_s_decision() -> None:
    task = toy_task()
    entry = assemble(task, "concat", "both", [outcome(task, 1.0, [0.5] * 3)], QUICK.adjustment)
    scores = []
    together = np.zeros_like(TARGETS.matrix)
    for logits in entry.logits:
        chosen = np.zeros_like(TARGETS.matrix)
        for fold, decision in enumerate(entry.decisions):
            test = task.splits.fold(fold, 0).test
            chosen[test] = decision.choose(logits[test])
            mean = decision.probabilities(entry.logits[:, test]).mean(0)
            together[test] = decision.choose(decision.logits(mean))
        scores.append(macro_f1(TARGETS.matrix, chosen))
    assert entry.entry.seeds["macro_f1"].values == pytest.approx(scores)
    assert entry.entry.macro_f1.value == pytest.approx(macro_f1(TARGETS.matrix, together))  # as final heads predict
    assert decide(task, entry.logits, entry.decisions)[0].sum() == len(TARGETS)


def test_the_prior_stays_the_prior_whatever_the_adjustment() -> None:
    task = toy_task()
    shares = outcome(task, 1.0, [0.5] * 3)
    shares.logits[:] = np.log(TARGETS.prior)
    for adjustment in (None, 1.0, 2.0):
        entry = assemble(task, "prior", "both", [shares], adjustment)
        chosen = decide(task, entry.logits, entry.decisions)[0]
        assert (chosen.argmax(-1) == TARGETS.prior.argmax()).all()
        assert entry.entry.decision.strength == 0


def test_logits_that_are_not_finite_are_no_entry() -> None:
    task = toy_task()
    broken = outcome(task, 1.0, [0.5] * 3)
    broken.logits[0, 0, 0] = np.nan
    with pytest.raises(HeadError, match="concat on both gives no finite scores; lower --learning-rate"):
        assemble(task, "concat", "both", [broken], QUICK.adjustment)


def test_the_final_heads_see_every_row_for_the_mean_number_of_epochs(tmp_path: Path) -> None:
    task = toy_task()
    plan = Plan(HeadSettings(epochs=9, patience=1, batch_size=50, learning_rate=5e-3))
    entry = toy_entry(task, tmp_path, plan)
    trial = load_outcome(tmp_path / "concat-both" / "trials" / "0000")
    assert trial is not None
    epochs = round(np.mean([epoch + 1 for epoch in trial.best_epochs]))
    assert len(set(trial.best_epochs)) > 1
    scales = [[line["scale"] for line in history] for history in trial.histories]
    longest = max(map(len, scales))
    padded = np.array([line + line[-1:] * (longest - len(line)) for line in scales])
    replay = tuple(float(scale) for scale in np.exp(np.log(padded).mean(0))[:epochs])
    steps = train_steps(len(TARGETS), 50)
    everything, nothing = np.arange(len(TARGETS)), np.empty(0, np.int64)
    data = HeadData(features(), "both", "cpu", "")
    for seed, file in enumerate(("final-0.safetensors", "final-1.safetensors")):
        member = Member(plan.settings, everything, nothing, (1, 3, seed), steps, replay)
        (alone,) = train_stack(load_fusion("concat"), data, TARGETS, [member])
        assert len(alone.history) == epochs
        saved = load_file(tmp_path / "concat-both" / file)
        assert saved.keys() == alone.tensors.keys()
        for name, value in saved.items():
            np.testing.assert_allclose(value, alone.tensors[name].numpy(), atol=1e-5, err_msg=name)
    assert [each.file for each in entry.entry.final] == ["final-0.safetensors", "final-1.safetensors"]


def train_steps(rows: int, batch_size: int) -> int:
    from mmfeat.heads.stack import epoch_steps

    return epoch_steps(rows, batch_size)


@pytest.mark.parametrize("head", ["concat", "knn", "prior"])
@pytest.mark.parametrize("plan", [QUICK, GRID], ids=["one setting", "grid"])
def test_without_a_refit_the_heads_of_the_folds_predict(tmp_path: Path, head: str, plan: Plan) -> None:
    """One head for each fold and seed, also where a search has trained more, and after an interruption."""
    task = toy_task()
    plan = replace(plan, refit=False)
    entry = toy_entry(task, tmp_path, plan, head)
    assert len(entry.entry.final) == len(task.cells(head)) == (6 if head == "concat" else 3)
    folder = tmp_path / f"{head}-both"
    before = {path.name: path.read_bytes() for path in folder.glob("final-*")}
    assert len(before) == len(entry.entry.final)
    for path in [*folder.glob("final-*"), folder / "metrics.json"]:
        path.unlink()
    toy_entry(task, tmp_path, plan, head)
    assert {path.name: path.read_bytes() for path in folder.glob("final-*")} == before


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("head", ["prior", "knn", "ridge", "logistic", "svm"])
def test_baselines_are_refitted_without_a_warning(tmp_path: Path, head: str) -> None:
    assert len(toy_entry(toy_task(), tmp_path, head=head).entry.final) == 1


@pytest.mark.parametrize(
    ("method", "space"),
    [
        ("grid", {"learning_rate": [1e-3, 1e-2], "dropout": [0.2, 0.5]}),
        ("random", {"learning_rate": Range(1e-4, 1e-2, True)}),
        ("optuna", {"learning_rate": Range(1e-4, 1e-2, True), "class_weights": ["none", "sqrt"]}),
    ],
)
def test_a_search_goes_on_where_it_stopped(tmp_path: Path, method: str, space: dict) -> None:
    """Trials that are on the disk are not trained again, also where the search was not told of them."""
    task = toy_task(folds=2, seeds=1)
    plan = Plan(HeadSettings(epochs=1), space, method, trials=4)
    whole = toy_entry(task, tmp_path / "whole", plan)
    short = tmp_path / "short"
    toy_entry(task, short, plan, deadline=-np.inf)  # no time at all: one batch
    trials = short / "concat-both" / "trials"
    assert sorted(path.name for path in trials.glob("*.json")) == [f"{number:04d}.json" for number in range(4)]
    for path in [*trials.glob("0002.*"), short / "concat-both" / "metrics.json"]:
        path.unlink()
    kept = {name: stamp for name, stamp in stamps(trials).items() if "0002" not in name}
    again = toy_entry(task, short, plan)
    assert {name: stamps(trials)[name] for name in kept} == kept
    assert (trials / "0002.json").exists()
    (short / "search.db").unlink()  # the trials are there all the same
    kept = stamps(trials)
    toy_entry(task, short, plan)
    assert stamps(trials) == kept
    np.testing.assert_array_equal(again.logits, whole.logits)
    assert replace(again.entry, seconds=0) == replace(whole.entry, seconds=0)


def test_a_setting_that_diverges_loses_and_the_search_goes_on(tmp_path: Path) -> None:
    task = toy_task(folds=2, seeds=1)
    plan = Plan(HeadSettings(epochs=1), {"learning_rate": [1e30, 1e-3, 1e-2]})
    for _ in range(2):  # and it is not tried again
        entry = toy_entry(task, tmp_path, plan)
        assert entry.entry.trials == 2
        assert entry.entry.settings.learning_rate < 1
    trials = sorted(path.name for path in (tmp_path / "concat-both" / "trials").glob("*.json"))
    assert trials == ["0001.json", "0002.json"]
    hopeless = Plan(HeadSettings(epochs=1), {"learning_rate": [1e30, 2e30]})
    with pytest.raises(HeadError, match=r"concat on both: no setting could be trained; .*lower --learning-rate"):
        toy_entry(task, tmp_path / "hopeless", hopeless)
    endless = Plan(HeadSettings(epochs=1), {"learning_rate": Range(1e30, 2e30)}, "random", time_limit=0.0)
    with pytest.raises(HeadError, match="no setting could be trained"):
        toy_entry(task, tmp_path / "endless", endless, deadline=0.0)


def test_no_trial_is_begun_after_the_time_limit(tmp_path: Path) -> None:
    plan = Plan(HeadSettings(epochs=1), {"dropout": [number / 20 for number in range(12)]})
    entry = toy_entry(toy_task(folds=2, seeds=1), tmp_path, plan, deadline=-np.inf)
    assert entry.entry.trials == 8  # those that are trained together


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("entry")
    toy_entry(toy_task(), folder, GRID)
    return folder


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def change_a_score(path: Path) -> None:
    values = json.loads(path.read_text())
    values["scores"][0][0] += 0.5
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("concat-both/trials/0001.json", lambda path: path.write_text("{}"), r"0001\.json: not a whole trial"),
        ("concat-both/trials/0001.json", lambda path: path.write_bytes(b""), r"0001\.json: not a whole trial"),
        ("concat-both/trials/0001.json", change_a_score, r"0001\.json: not a whole trial \(it or 0001\.safetensors"),
        ("concat-both/trials/0001.safetensors", lambda path: flip(path, 0.7), "it or 0001.safetensors is not what was"),
        ("concat-both/trials/0001.safetensors", Path.unlink, r"0001\.json: not a whole trial"),
        ("concat-both/metrics.json", lambda path: path.write_text("{}"), r"metrics\.json: not whole .*; delete it"),
        ("concat-both/metrics.json", lambda path: flip(path, 0), r"metrics\.json: not whole .*; delete it"),
        ("search.db", lambda path: path.write_bytes(b"garbage" * 99), r"search\.db: no search .*; delete it"),
    ],
)
def test_a_damaged_file_is_one_clear_line(trained: Path, tmp_path: Path, name: str, damage, message: str) -> None:
    import shutil

    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    damage(folder / name)
    with pytest.raises(RunError, match=message) as caught:
        toy_entry(toy_task(), folder, GRID)
    assert "\n" not in str(caught.value)
    assert "delete it" in str(caught.value)


def test_an_outcome_is_read_as_it_was_written(tmp_path: Path) -> None:
    task = toy_task()
    made = outcome(task, 1.0, [0.5, 0.25, 0.125])
    save_outcome(made, tmp_path / "0000")
    read = load_outcome(tmp_path / "0000")
    assert read is not None
    np.testing.assert_array_equal(read.logits, made.logits.astype(np.float32))
    assert read.scores.tolist() == made.scores.tolist()
    assert asdict(read.settings) == asdict(made.settings)
    assert load_outcome(tmp_path / "0001") is None


def test_names_of_a_choice() -> None:
    assert names_of(np.array([True, False, True]), ("a", "b", "c")) == "a|c"
    assert names_of(np.array([False, True, False]), ("a", "b", "c")) == "b"
    assert names_of(np.array([False, False, False]), ("a", "b", "c")) == "|"
