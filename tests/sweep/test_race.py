"""Seeds by racing: a head that is clearly worse after its first seed is spared the others, and says so."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mmfeat.cli.heads import show_sweep
from mmfeat.heads.jobs import LocalEngine
from mmfeat.heads.registry import HeadSettings, Plan
from mmfeat.report.scores import leaderboard_section
from mmfeat.runs.entry import Interval, PlanRecord
from mmfeat.runs.leaderboard import leaderboard_csv
from mmfeat.sweep.entries import TrainedEntry
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.train import Sweep
from mmfeat.sweep.train_all import Trainers, _train_all, alone_too, behind_in_seeds, quick_first, rank
from mmfeat.sweep.trials import HeadTrainer, Outcome, load_outcome
from mmfeat.system.wording import Advance, Progress, Silent, ignore, interval
from tests.heads import toy_features
from tests.heads.toy_features import TARGETS
from tests.sweep.small_sweeps import SMALL, make_place, run_of, sweep, toy_task

SEEDS = 3
RACE = Plan(HeadSettings(epochs=4, learning_rate=3e-3, batch_size=32), race=True)
PAIRS = [("concat", "both"), ("concat", "text"), ("late", "image"), ("logistic", "text"), ("prior", "both")]


def raced(
    folder: Path,
    plan: Plan = RACE,
    workers: int = 1,
    ensembles: bool = True,
    pairs: Sequence[tuple[str, str]] = PAIRS,
    progress: Progress | None = None,
    by_need: bool = False,
) -> list[TrainedEntry]:
    """The entries of a race of heads on made-up vectors, of which only both modalities tell all classes apart."""
    task = toy_task(seeds=SEEDS)
    engine = LocalEngine(toy_features.features(), task.targets, "cpu", "tokens", workers)
    try:
        trainers = Trainers(task, engine, plan, folder, progress or Silent(), np.inf)
        return _train_all(trainers, pairs, ensembles, by_need)
    finally:
        engine.close()


@pytest.fixture(scope="module")
def race(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TrainedEntry]]:
    folder = tmp_path_factory.mktemp("race")
    return folder, raced(folder)


def seeds_of(entries: Sequence[TrainedEntry]) -> dict[str, int]:
    return {trained.name: len(trained.logits) for trained in entries}


def test_only_what_may_be_the_best_gets_all_seeds(race: tuple[Path, list[TrainedEntry]]) -> None:
    """All ties with the first, and the best head on each modality; the others have one seed and one final head."""
    ranked = rank(toy_task(seeds=SEEDS), race[1])
    assert ranked[0].macro_f1.value > 0.9
    of_name = {entry.name: entry for entry in ranked}
    full = {name for name, seeds in seeds_of(race[1]).items() if seeds == SEEDS}
    assert full == {"concat-both", "concat-text"}
    assert not of_name["concat-text"].tie, "the ablation of the best head"
    assert of_name["late-image"].dropped
    assert [len(of_name[name].final) for name in ("concat-both", "late-image", "prior-both")] == [3, 1, 1]
    assert all(entry.dropped is None for name, entry in of_name.items() if name != "late-image")
    assert behind_in_seeds(ranked, SEEDS) == []


def test_a_head_that_ties_is_owed_its_seeds(race: tuple[Path, list[TrainedEntry]]) -> None:
    """Whoever the first is; an ensemble shows the ablation of the best head, and baselines have one seed anyway."""
    of_name = {entry.name: entry for entry in rank(toy_task(seeds=SEEDS), race[1])}
    late, ensemble, concat = of_name["late-image"], of_name["mean-ensemble"], of_name["concat-text"]
    behind = replace(concat, seeds=late.seeds)
    assert behind_in_seeds([of_name["prior-both"], replace(late, tie=True)], SEEDS) == [("late", "image")]
    assert behind_in_seeds([ensemble, of_name["concat-both"], behind, late], SEEDS) == [("concat", "text")]
    assert behind_in_seeds([ensemble, of_name["logistic-text"], behind, late], SEEDS) == []
    image = replace(behind, modalities="image")
    ranked = [of_name["concat-both"], behind, image]
    assert behind_in_seeds(ranked, SEEDS) == [("concat", "text"), ("concat", "image")]
    ranked[-1] = replace(image, macro_f1=Interval(0.1, 0.0, 0.2))
    assert behind_in_seeds(ranked, SEEDS) == [("concat", "text")], "it shows no more of the ablation's test"


def test_one_modality_alone_is_seen_by_the_best_head_and_where_it_may_win(
    race: tuple[Path, list[TrainedEntry]], tmp_path: Path
) -> None:
    """Late fusion on photos, far behind, is spared; a modality of which an entry ties gets all heads; the best head is
    sure of its place, and gets its ablation, once it has its seeds."""
    seen = seeds_of(raced(tmp_path, by_need=True))
    assert seen == {name: n for name, n in seeds_of(race[1]).items() if name not in ("late-image", "product-ensemble")}
    task = toy_task(seeds=SEEDS)
    of_name = {entry.name: entry for entry in rank(task, race[1])}
    concat, logistic, waiting = (
        of_name["concat-both"],
        of_name["logistic-text"],
        [("film", "text"), ("concat", "image")],
    )
    assert alone_too([concat, logistic], waiting, task) == [("concat", "image")]
    assert alone_too([concat, replace(logistic, tie=True)], waiting, task) == waiting
    assert alone_too([replace(concat, seeds=of_name["late-image"].seeds), logistic], waiting, task) == []
    assert alone_too([logistic, concat], waiting, task) == [("film", "text")]


def kept(folder: Path) -> dict[str, bytes]:
    """Files that a race leaves, without times."""
    names = ("*/final-*", "*/out_of_fold.csv", "*/curves.csv", "*/trials/*.safetensors")
    return {str(path.relative_to(folder)): path.read_bytes() for name in names for path in folder.glob(name)}


def test_workers_and_interruptions_do_not_change_a_race(race: tuple[Path, list[TrainedEntry]], tmp_path: Path) -> None:
    """Also where it was killed while the trial with all seeds replaced that with one: then the first seed is lost too,
    or none of them; and where all trials have all their seeds before the race begins again."""
    folder, entries = race
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run/concat-both/trials/0000.json").unlink()
    for metrics in (tmp_path / "run").glob("*/metrics.json"):
        metrics.unlink()
    again = raced(tmp_path / "run", workers=3)
    assert kept(tmp_path / "run") == kept(folder)
    assert seeds_of(again) == seeds_of(entries)
    for one, other in zip(entries, again, strict=True):
        np.testing.assert_array_equal(one.logits, other.logits)


def test_without_a_refit_each_head_keeps_those_of_its_folds(tmp_path: Path) -> None:
    entries = {trained.name: trained for trained in raced(tmp_path, replace(RACE, refit=False), ensembles=False)}
    assert [len(entries[name].entry.final) for name in ("concat-both", "late-image")] == [3 * SEEDS, 3]


def trained_seeds(task: Problem, since: int = 0) -> Outcome:
    engine = LocalEngine(toy_features.features(), task.targets, "cpu", "tokens", 1)
    try:
        (outcome,) = HeadTrainer(task, engine, "concat", "both").run([RACE.settings], ignore, since=since)
        return outcome
    finally:
        engine.close()


def test_seeds_one_after_another_are_the_seeds_together(race: tuple[Path, list[TrainedEntry]]) -> None:
    """Every seed is drawn from its number, whatever was trained before; sums alone differ by the size of a stack."""
    task = toy_task(seeds=SEEDS)
    together = trained_seeds(task)
    first, others = trained_seeds(replace(task, repeats=1)), trained_seeds(task, since=1)
    joined, saved = first.joined(others), load_outcome(race[0] / "concat-both" / "trials" / "0000")
    assert saved is not None
    for outcome in (joined, saved):
        assert outcome.best_epochs == together.best_epochs
        np.testing.assert_allclose(outcome.logits, together.logits, atol=2e-3)
        np.testing.assert_allclose(outcome.scores, together.scores)
        for one, other in zip(outcome.validation, together.validation, strict=True):
            np.testing.assert_allclose(one, other, atol=2e-3)
    alone = joined.first(1)
    np.testing.assert_array_equal(alone.logits, first.logits)
    assert (alone.best_epochs, alone.histories) == (first.best_epochs, first.histories)


def test_a_run_that_raced_has_another_name_and_says_what_it_dropped(small_demo_folder: Path, tmp_path: Path) -> None:
    """A run of before is found again with all seeds; a single seed or a search is no race."""
    place = make_place(small_demo_folder, tmp_path)
    asked = {"fusion": ["concat", "gated"], "baselines": ["knn"], "modalities": ["both"], "ensembles": False}
    full = sweep(place, **asked).run
    plan = replace(full.config.plan or PlanRecord(HeadSettings()), race=True)
    race = sweep(place, plan=Plan(**{**vars(plan), "trials": None}), **asked).run
    assert race.folder != full.folder
    before, after = (json.loads((run.folder / "run.json").read_text())["plan"] for run in (full, race))
    assert after == {**before, "race": True}
    assert "race" not in before
    assert sweep(place, **asked).reused
    dropped = [entry for entry in race.leaderboard if entry.dropped]
    owed = [entry for entry in race.leaderboard if entry.head in asked["fusion"] and entry not in dropped]
    assert {len(entry.seeds["macro_f1"].values) for entry in dropped} <= {1}
    assert {len(entry.seeds["macro_f1"].values) for entry in owed} == {SMALL.seeds}
    for protocol, fusion in ((replace(SMALL, seeds=1), ["concat", "gated"]), (SMALL, ["none"])):
        own = {**asked, "fusion": fusion, "protocol": protocol}
        assert not sweep(place, plan=replace(Plan(HeadSettings(epochs=1)), race=True), **own).run.config.plan.race


def test_the_screen_marks_heads_with_one_seed(
    tmp_path: Path, race: tuple[Path, list[TrainedEntry]], capsys: pytest.CaptureFixture[str]
) -> None:
    leaderboard = rank(toy_task(seeds=SEEDS), race[1])
    run = run_of(tmp_path, TARGETS, leaderboard, protocol=replace(SMALL, seeds=SEEDS))
    show_sweep(Sweep(run, False, 1.0))
    out = capsys.readouterr().out
    (marked,) = [line for line in out.splitlines() if " 1 of 3 " in line]
    assert marked.split()[:2] == ["late", "image"]
    assert "1 of 3: clearly worse after one seed" in out
    lines = csv.DictReader(leaderboard_csv(leaderboard, TARGETS.classes).splitlines())
    assert {line["head"]: line["seeds"] for line in lines if line["dropped"]} == {"late": "1"}
    _, table = leaderboard_section(SimpleNamespace(run=run)).tables
    assert [row[1:3] for row in table.rows if "1 seed" in row] == [["late", "image"]]


class Noted(Silent):
    """Keeps the notes of all steps."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    @contextmanager
    def step(self, title: str, total: int | None) -> Iterator[Advance]:
        yield lambda steps, note="": self.notes.extend([note] if note else [])


def test_quick_heads_are_scored_first_and_the_best_stands_first(tmp_path: Path) -> None:
    """A person sees an answer in seconds; the order of the entries stays that of the run."""
    pairs, progress = [("concat", "both"), ("prior", "both"), ("logistic", "both")], Noted()
    plan = replace(RACE, race=False, settings=HeadSettings(epochs=1, batch_size=32))
    entries = raced(tmp_path, plan, ensembles=False, pairs=pairs, progress=progress)
    assert [(trained.entry.head, trained.entry.modalities) for trained in entries] == pairs
    assert quick_first([*pairs, ("ridge", "text")]) == [pairs[2], *pairs[:2], ("ridge", "text")]
    last = progress.notes[-1]
    assert last.startswith(f"best so far {interval(entries[2].entry.macro_f1)} logistic on both\n")
    lines = last.removeprefix("best so far").splitlines()
    scores = [float(line.split()[0]) for line in lines]
    assert len(scores) == len(pairs)
    assert scores == sorted(scores, reverse=True)
    assert max(map(len, last.splitlines())) < 80
