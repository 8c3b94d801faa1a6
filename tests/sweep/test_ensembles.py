"""Ensembles: the rows that score one had no say in its weights, and what is saved is what predicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mmfeat.evaluation.metrics import headline
from mmfeat.runs.entry import TOGETHER, Entry
from mmfeat.samples.labels import Targets
from mmfeat.sweep.ensembles import KINDS, combine, ensemble_entries
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.trials import cross_fit, decide
from tests.heads.toy_features import MULTILABEL, TARGETS
from tests.sweep.small_sweeps import made_up_entry, rows, toy_task

SKILLS = {"strong": 2.0, "middle": 1.0, "weak": 0.3}


def candidates(task: Problem) -> list[Entry]:
    found = [made_up_entry(task, name, skill) for name, skill in SKILLS.items()]
    alone = [made_up_entry(task, f"{modality}-only", 0.8, 1, modality) for modality in ("text", "image")]
    return [*found, *alone, made_up_entry(task, "prior", 0.0, 1)]


def by_kind(task: Problem, entries: list[Entry], folder: Path) -> dict[str, Entry]:
    return {entry.entry.head: entry for entry in ensemble_entries(task, entries, None, folder)}


def decided(task: Problem, entries: list[Entry]) -> list[Entry]:
    """The same logits, with the decisions that the labels of this task lead to."""
    return [replace(each, decisions=cross_fit(task, each.logits, each.validation, None)) for each in entries]


@pytest.mark.parametrize("targets", [TARGETS, MULTILABEL], ids=["multiclass", "multilabel"])
def test_a_fold_s_own_rows_have_no_say_in_its_ensemble(targets: Targets, tmp_path: Path) -> None:
    """Other labels and other logits there change neither how the heads are combined nor what is decided."""
    task = toy_task(targets)
    entries = candidates(task)
    before = by_kind(task, decided(task, entries), tmp_path / "before")
    test = task.splits.fold(1, 0).test
    matrix = targets.matrix.copy()
    matrix[test] = np.roll(matrix[test], 1, axis=0)
    other = replace(task, targets=replace(targets, matrix=matrix))
    after = by_kind(other, decided(other, entries), tmp_path / "after")
    assert before.keys() == after.keys() == KINDS.keys()
    for kind in KINDS:
        np.testing.assert_array_equal(after[kind].logits[0, test], before[kind].logits[0, test])
        assert after[kind].decisions[1] == before[kind].decisions[1]
        assert after[kind].decisions != before[kind].decisions
    others = np.setdiff1d(np.arange(len(targets)), test)
    for kind in ("greedy", "stacking"):  # which do listen to the other folds
        assert not np.array_equal(after[kind].logits[0, others], before[kind].logits[0, others])


@pytest.mark.parametrize("shares", [(8, 1, 1), (8, 2)])
def test_the_weights_of_a_holdout_are_fitted_on_validation_rows(shares: tuple[int, ...], tmp_path: Path) -> None:
    task = toy_task(shares=shares)
    entries = candidates(task)
    before = by_kind(task, entries, tmp_path / "before")
    test = task.splits.tested
    matrix = TARGETS.matrix.copy()
    matrix[test] = np.roll(matrix[test], 1, axis=1)
    other = replace(task, targets=replace(TARGETS, matrix=matrix))
    after = by_kind(other, entries, tmp_path / "after")
    for kind in KINDS:
        np.testing.assert_array_equal(after[kind].logits[0, test], before[kind].logits[0, test])
        assert after[kind].decisions == before[kind].decisions
        assert after[kind].entry.macro_f1 != before[kind].entry.macro_f1


@pytest.mark.parametrize("targets", [TARGETS, MULTILABEL], ids=["multiclass", "multilabel"])
def test_an_ensemble_is_the_weighted_mean_of_its_members(targets: Targets, tmp_path: Path) -> None:
    task = toy_task(targets)
    entries = candidates(task)
    made = by_kind(task, entries, tmp_path)
    members = [entry for entry in entries if entry.entry.head != "prior"]
    log_probabilities = np.stack([np.log(decide(task, entry.logits, entry.decisions)[1].mean(0)) for entry in members])
    for kind, entry in made.items():
        assert entry.entry.modalities == TOGETHER
        names = [member.name for member in members]
        used = [names.index(name) for name in entry.entry.members]
        logits = combine(entry.entry.rule, log_probabilities[used], entry.entry.decision)
        assert logits.shape == targets.matrix.shape
        if kind in ("stacking", "product"):
            assert kind == "stacking" or entry.entry.members == ("text-only-text", "image-only-image")
            continue
        assert used == list(range(5))
        weights = np.array(entry.entry.rule.weights)
        mean = np.einsum("h,hnc->nc", weights / weights.sum(), np.exp(log_probabilities))
        wanted = np.log(mean / (1 - mean)) if targets.multilabel else np.log(mean)
        np.testing.assert_allclose(logits, wanted, atol=1e-6)
    assert made["mean"].entry.rule.weights == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0, 0])
    greedy = made["greedy"].entry.rule.weights
    assert sum(greedy) == pytest.approx(1)
    assert greedy[0] > 0.22 > max(greedy[2:])


def test_strong_members_make_an_ensemble_that_is_no_worse(tmp_path: Path) -> None:
    """Its score is of its own choices, and three heads that err in other places are better than one."""
    task = toy_task()
    entries = [made_up_entry(task, name, 1.5, 1) for name in ("one", "two", "three")]
    alone = [(decide(task, e.logits, e.decisions)[0][0] == TARGETS.matrix).all(1).mean() for e in entries]
    made = ensemble_entries(task, entries, 0.0, tmp_path)
    assert [entry.entry.head for entry in made] == ["mean", "greedy", "stacking"]  # no modality alone, no product
    for entry in made:
        right = (decide(task, entry.logits, entry.decisions)[0][0] == TARGETS.matrix).all(1).mean()
        assert entry.entry.accuracy.value == pytest.approx(right)
        assert right > max(alone) + 0.03
        written = rows(tmp_path / f"{entry.entry.head}-{TOGETHER}" / "out_of_fold.csv")
        chosen = [row["predicted_1"] == row["label"] for row in written]
        assert np.mean(chosen) == pytest.approx(right)


def test_one_head_is_no_ensemble(tmp_path: Path) -> None:
    task = toy_task()
    entries = [made_up_entry(task, "alone", 1.0), made_up_entry(task, "prior", 0.0)]
    assert ensemble_entries(task, entries, None, tmp_path) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("targets", [TARGETS, MULTILABEL], ids=["multiclass", "multilabel"])
def test_the_product_takes_the_best_head_of_each_modality_and_beats_both(targets: Targets, tmp_path: Path) -> None:
    task = toy_task(targets)
    skills = {("good", "text"): 2.0, ("poor", "text"): 0.2, ("bad", "image"): 0.1, ("fair", "image"): 1.5}
    entries = [made_up_entry(task, name, skill, 1, modality) for (name, modality), skill in skills.items()]
    entries = decided(task, entries)
    product = by_kind(task, entries, tmp_path)["product"].entry
    assert product.members == ("good-text", "fair-image")
    alone = [np.mean(headline(targets, decide(task, one.logits, one.decisions)[0])) for one in entries]
    assert product.macro_f1.value > max(alone) + 0.02


def test_nothing_is_learned_of_heads_that_know_nothing(tmp_path: Path) -> None:
    task = toy_task()
    entries = [made_up_entry(task, f"{on}-{number}", 0.0, 1, on) for on in ("text", "image") for number in range(3)]
    ensembles = by_kind(task, decided(task, entries), tmp_path)
    for one in ensembles.values():
        np.testing.assert_array_equal(one.logits, ensembles["mean"].logits)
