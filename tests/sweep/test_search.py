"""Search: what is tried, in which order, and that a kill changes nothing of it."""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mmfeat.errors import ConfigError, RunError, WriteError
from mmfeat.heads.registry import HeadSettings
from mmfeat.sweep.search import Plan, Search
from mmfeat.sweep.search_space import Range, parse_values

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

TWO = {"early": (False, True)}
SMALL = {"dropout": (0.1, 0.3, 0.5), "batch_size": (64, 256), "early": (False, True)}
WIDE = {
    "learning_rate": Range(1e-5, 1e-1, log=True),
    "dropout": Range(0.0, 0.8),
    "batch_size": Range(16, 512, log=True),
}
MIXED = {**WIDE, "loss": ("cross-entropy", "focal")}
FIRST = HeadSettings(learning_rate=3e-4, dropout=0.5, batch_size=256, loss="focal")
LIMIT = 240  # seconds, of a busy machine


def open_search(
    path: Path,
    study: str,
    space: Any,
    method: str,
    seed: int = 1,
    trials: int | None = None,
    first: HeadSettings = FIRST,
) -> Search:
    """A search; one that has ranges and no number of trials may go on for a second."""
    limit = 1.0 if trials is None else None
    return Search(path, study, Plan(first, space, method, trials, limit), seed)


def score(trial: FrozenTrial) -> float:
    """Smooth, best at a learning rate of 1e-3, and different for different settings."""
    values = {"learning_rate": 1e-3, "dropout": 0.3, **trial.params}
    rate, dropout = float(values["learning_rate"]), float(values["dropout"])
    return 1 - abs(math.log10(rate) + 3) / 10 - abs(dropout - 0.3) / 5 + float(values.get("batch_size", 0)) / 1e5


def run(search: Search, count: int = 4) -> list[FrozenTrial]:
    """Ask, tell, until there is no more."""
    while asked := search.ask(count):
        for trial in asked:
            search.tell(trial.number, score(trial))
    return search.finished


def settings(trials: list[FrozenTrial]) -> list[tuple[int, dict[str, Any]]]:
    return [(trial.number, trial.params) for trial in trials]


def distinct(trials: list[FrozenTrial]) -> int:
    return len({tuple(trial.params.items()) for trial in trials})


def work(path: Path, method: str, log: Path, kill_at: int = 0) -> None:
    """A process that searches, notes what it trains, and kills itself before one statement or commit of SQLite."""
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    steps = itertools.count(1)

    def step(*_: object) -> None:
        if next(steps) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(Engine, "before_cursor_execute", step)
    event.listen(Engine, "commit", step)
    with log.open("a", buffering=1) as notes:
        search = make(path, method)
        while asked := search.ask(4):
            for trial in asked:
                notes.write(f"trained {trial.number}\n")
                search.tell(trial.number, score(trial))
                notes.write(f"told {trial.number}\n")
        notes.write(f"steps {next(steps)}\n")


def make(path: Path, method: str) -> Search:
    space = SMALL if method == "grid" else MIXED
    return open_search(path, "concat-both", space, method, seed=5, trials=14)


def in_process(target: Callable[[], None]) -> int:
    """Its exit code; minus the signal where one ended it."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(LIMIT)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("method", ["grid", "random", "optuna"])
def test_a_killed_search_goes_on_as_if_it_had_run_through(method: str, tmp_path: Path) -> None:
    import optuna

    reference, log = tmp_path / "reference.db", tmp_path / "log"
    assert in_process(partial(work, reference, method, log)) == 0
    expected = settings(make(reference, method).finished)
    steps = int(log.read_text().split()[-1])
    for number, kill_at in enumerate(sorted(random.Random(1).sample(range(1, steps), 2))):
        path, log = tmp_path / f"{number}.db", tmp_path / f"log{number}"
        # Killed twice: the second time soon after it took up again.
        assert in_process(partial(work, path, method, log, kill_at)) == -signal.SIGKILL
        assert in_process(partial(work, path, method, log, 60)) in (0, -signal.SIGKILL)
        assert in_process(partial(work, path, method, log)) == 0
        assert settings(make(path, method).finished) == expected
        notes = [tuple(line.split()) for line in log.read_text().splitlines()]
        for place, (what, trial) in enumerate(notes):
            assert what != "told" or ("trained", trial) not in notes[place:], f"trial {trial} was trained twice"
        study = optuna.load_study(study_name="concat-both", storage=f"sqlite:///{path}")
        assert [(trial.number, trial.params) for trial in study.trials] == expected
        assert {trial.state for trial in study.trials} == {optuna.trial.TrialState.COMPLETE}


@pytest.mark.parametrize("method", ["random", "optuna"])
def test_trials_depend_neither_on_how_many_are_asked_at_once_nor_on_the_order_of_telling(
    method: str, tmp_path: Path
) -> None:
    expected = settings(run(open_search(tmp_path / "a.db", "s", MIXED, method, 3, trials=20), 100))
    order = random.Random(2)
    search = open_search(tmp_path / "b.db", "s", MIXED, method, 3, trials=20)
    waiting: list[FrozenTrial] = []
    while waiting := waiting + search.ask(order.randint(1, 3)):
        trial = waiting.pop(order.randrange(len(waiting)))
        search.tell(trial.number, score(trial))
    assert settings(search.finished) == expected
    assert settings(run(open_search(tmp_path / "c.db", "s", MIXED, method, 4, trials=20))) != expected


def test_a_search_can_be_prolonged(tmp_path: Path) -> None:
    expected = settings(run(open_search(tmp_path / "a.db", "s", MIXED, "optuna", 3, trials=21)))
    assert settings(run(open_search(tmp_path / "b.db", "s", MIXED, "optuna", 3, trials=11))) == expected[:11]
    assert settings(run(open_search(tmp_path / "b.db", "s", MIXED, "optuna", 3, trials=21))) == expected


def test_a_grid_is_the_product_in_the_listed_order(tmp_path: Path) -> None:
    trials = run(open_search(tmp_path / "search.db", "s", SMALL, "grid", 0))
    assert [tuple(trial.params[name] for name in SMALL) for trial in trials] == list(itertools.product(*SMALL.values()))
    assert [type(trials[0].params[name]) for name in SMALL] == [float, int, bool]


@pytest.mark.parametrize("method", ["random", "optuna"])
@pytest.mark.parametrize(
    ("space", "size"), [(SMALL, 12), ({"batch_size": Range(2, 13)}, 12), ({"batch_size": (8,)}, 1), ({}, 1)], ids=str
)
def test_a_small_space_is_tried_once_each_and_then_the_search_ends(
    method: str, space: Any, size: int, tmp_path: Path
) -> None:
    search = open_search(tmp_path / "search.db", "s", space, method, 1, trials=30)
    trials = run(search)
    assert search.total == len(trials) == distinct(trials) == size
    assert open_search(tmp_path / "search.db", "s", space, method, 1, trials=30).ask(1) == []


def test_random_and_optuna_begin_with_the_default_as_near_as_the_space_has_it(tmp_path: Path) -> None:
    space = {
        "learning_rate": Range(1e-3, 1e-1, log=True),
        "dropout": (0.1, 0.5),
        "loss": ("focal", "asymmetric"),
        "batch_size": Range(4, 8),
        "another": Range(4, 8),
    }
    first = HeadSettings(learning_rate=3e-4, dropout=0.5, loss="cross-entropy", batch_size=16)
    for method in ("random", "optuna"):
        trial = open_search(tmp_path / f"{method}.db", "s", space, method, 0, trials=2, first=first).ask(1)[0]
        assert trial.params == {"learning_rate": 1e-3, "dropout": 0.5, "loss": "focal", "batch_size": 8, "another": 6}


def test_optuna_learns_from_scores_and_random_does_not(tmp_path: Path) -> None:
    means = {}
    for method in ("random", "optuna"):
        trials = run(open_search(tmp_path / "search.db", method, WIDE, method, 0, trials=40))
        means[method] = sum(trial.value or 0 for trial in trials[24:]) / 16
        assert distinct(trials) == 40
        for trial in trials:
            assert 1e-5 <= trial.params["learning_rate"] <= 1e-1
            assert 0 <= trial.params["dropout"] <= 0.8
            assert trial.params["batch_size"] in range(16, 513)
    assert means["optuna"] > means["random"] + 0.05


def test_a_failed_trial_is_not_tried_again(tmp_path: Path) -> None:
    search = open_search(tmp_path / "search.db", "s", SMALL, "optuna", 1)
    first, second, third = (trial.number for trial in search.ask(3))
    search.fail(first, "diverged")
    search.tell(second, math.nan)
    search.tell(third, 0.5)
    search.tell(third, 0.9)
    search.fail(third, "late")
    again = open_search(tmp_path / "search.db", "s", SMALL, "optuna", 1)
    for each in (search, again):
        assert each.failed == {0: "diverged", 1: "score nan"}
        assert [trial.value for trial in each.finished] == [0.5]
    assert len(run(again)) == 10
    assert distinct(again.finished) == 10


def test_studies_share_a_file_and_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "run {x} 50%?#" / "search.db"  # Optuna would take this apart as a URL
    one = open_search(path, "concat-both", SMALL, "grid", 1)
    two = open_search(path, "concat-text", WIDE, "random", 1, trials=3)
    run(one)
    run(two)
    assert [len(open_search(path, "concat-both", SMALL, "grid", 1).finished), len(two.finished)] == [12, 3]
    assert [entry.name for entry in path.parent.iterdir()] == ["search.db"]


def test_a_study_of_other_settings_is_not_taken_up(tmp_path: Path) -> None:
    import optuna

    path = tmp_path / "search.db"
    open_search(path, "s", MIXED, "optuna", 1)
    open_search(path, "s", MIXED, "optuna", 1, trials=5)
    described = optuna.load_study(study_name="s", storage=f"sqlite:///{path}").user_attrs["search"]
    assert json.loads(json.dumps(described))["method"] == "optuna"
    assert [described["seed"], described["space"][3]] == [1, ["loss", ["cross-entropy", "focal"]]]
    for other in (
        {"space": WIDE},
        {"space": dict(reversed(MIXED.items()))},
        {"seed": 2},
        {"method": "random"},
        {"first": HeadSettings()},
    ):
        changed = {"space": MIXED, "method": "optuna", **other}
        with pytest.raises(RunError, match=r"search.db: study s searched other settings; search into another folder"):
            open_search(path, "s", **changed)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a finished grid."""
    path = tmp_path_factory.mktemp("searched") / "search.db"
    run(open_search(path, "s", SMALL, "grid", 1))
    return path


def foreign(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("create table photos (name text)")
        connection.execute("create table alembic_version (version_num text)")
        connection.execute("create table studies (x text)")


def from_another_optuna(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("update alembic_version set version_num = 'v9.9.9'")
        connection.commit()


def without_a_trial(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("delete from trials where number = 3")
        connection.commit()


def with_a_number(table: str, change: str) -> Callable[[Path], None]:
    """Change the numbers of a table, as a flipped bit may."""

    def damage(path: Path) -> None:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"update {table} set {change}")
            connection.commit()

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        with_a_number("trial_values", "value = value + 1e-9 where trial_id = 3"),
        with_a_number("trial_params", "param_value = 1 - param_value where trial_id = 3 and param_name = 'early'"),
        lambda path: path.write_bytes(b"number,score\n" * 100),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: path.write_bytes(path.read_bytes()[:8192] + bytes(path.stat().st_size - 8192)),
        lambda path: path.unlink() or path.mkdir(),
        foreign,
        from_another_optuna,
        without_a_trial,
    ],
)
def test_a_damaged_file_is_one_clear_line(searched: Path, damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = Path(shutil.copy(searched, tmp_path))
    damage(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(RunError, match=r"search.db: no search that Optuna \S+ can read \(.+\); delete it") as caught:
        open_search(path, "s", SMALL, "grid", 1)
    assert "\n" not in str(caught.value)
    assert before == (path.read_bytes() if path.is_file() else b""), "somebody else's file was written to"


def test_damage_anywhere_is_found_before_a_trial_is_run(searched: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(searched, tmp_path))
    whole, page = path.read_bytes(), 4096
    for start in range(page, len(whole), 4 * page):
        path.write_bytes(whole[:start] + bytes(page) + whole[start + page :])
        with pytest.raises(RunError, match="delete it"):
            open_search(path, "s", SMALL, "grid", 1)


def test_a_file_that_is_locked_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "search.db"
    monkeypatch.setattr("mmfeat.sweep.search.LOCK_SECONDS", 0.01)
    search = open_search(path, "s", SMALL, "grid", 1)
    (trial,) = search.ask(1)
    with closing(sqlite3.connect(path)) as other:
        other.execute("begin exclusive")
        with pytest.raises(RunError, match=r"another process writes to it .*; end that, then run the same command"):
            search.tell(trial.number, 0.5)
    search.tell(trial.number, 0.5)
    assert [trial.value for trial in open_search(path, "s", SMALL, "grid", 1).finished] == [0.5]


def test_a_file_that_cannot_be_written_is_said_so_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    search = open_search(path, "s", SMALL, "grid", 1)
    first, second = search.ask(2)
    search.tell(first.number, 0.5)
    with closing(sqlite3.connect(path)) as other:
        pages = other.execute("pragma page_count").fetchone()[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (pages * 4096 // 2, limits[1]))
        with pytest.raises(WriteError, match=r"cannot write .*search.db: .*finished trials are kept"):
            search.fail(second.number, "x" * 100000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    again = open_search(path, "s", SMALL, "grid", 1)
    assert [trial.number for trial in again.finished] == [0]
    assert settings(again.ask(1)) == settings([second])


def test_the_journal_of_a_deleted_file_does_no_harm(tmp_path: Path) -> None:
    path, journal = tmp_path / "search.db", tmp_path / "search.db-journal"

    def killed() -> None:
        connection = sqlite3.connect(path)
        connection.execute("pragma cache_size = 10")
        for table in ("trials", "studies", "version_info", "alembic_version"):
            connection.execute(f"delete from {table}")
        # More than the cache holds, so that pages, and before them the journal, are written.
        connection.execute("create table many as select randomblob(3000) from trial_params one, trial_params two")
        os.kill(os.getpid(), signal.SIGKILL)

    run(open_search(path, "s", SMALL, "grid", 1))
    assert in_process(killed) == -signal.SIGKILL
    assert journal.stat().st_size > 0
    path.unlink()
    search = open_search(path, "s", SMALL, "grid", 1)
    assert search.finished == []
    assert len(run(search)) == 12


def test_searches_that_begin_at_once_share_a_new_file(tmp_path: Path) -> None:
    for attempt in range(3):
        path, together = tmp_path / str(attempt) / "search.db", threading.Barrier(4)

        def search(study: int, path: Path = path, together: threading.Barrier = together) -> int:
            together.wait()
            return len(run(open_search(path, str(study), TWO, "grid", 1)))

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(search, range(4))) == [2] * 4


def test_processes_that_begin_at_once_share_a_new_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for attempt in range(3):
        path, together = tmp_path / str(attempt) / "search.db", context.Barrier(3)

        def search(study: int, path: Path = path, together: Any = together) -> None:
            together.wait()
            run(open_search(path, str(study), TWO, "grid"))

        processes = [context.Process(target=search, args=(study,)) for study in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(LIMIT)
        assert [process.exitcode for process in processes] == [0] * 3
        assert all(len(open_search(path, str(study), TWO, "grid").finished) == 2 for study in range(3))


def test_a_trial_that_was_never_asked_for_is_no_damage(tmp_path: Path) -> None:
    search = open_search(tmp_path / "search.db", "s", SMALL, "grid")
    with pytest.raises(ValueError, match="99"):
        search.tell(99, 0.5)


def test_two_searches_of_one_study_do_not_corrupt_it(tmp_path: Path) -> None:
    path = tmp_path / "search.db"
    one, two = (open_search(path, "s", SMALL, "grid", 1) for _ in range(2))
    mine = one.ask(2)
    with pytest.raises(RunError, match=r"another process searches study s too; end one of the two"):
        two.ask(1)
    other = open_search(path, "s", SMALL, "grid", 1)
    for trial in other.ask(2):
        other.tell(trial.number, 0.25)
    for trial in mine:
        one.tell(trial.number, 0.75)
    assert [trial.value for trial in one.finished] == [0.25, 0.25]
    last = open_search(path, "s", SMALL, "grid", 1)
    assert len(run(last)) == distinct(last.finished) == 12


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("1e-4,3e-4", float, (1e-4, 3e-4)),
        ("0.3", float, (0.3,)),
        ("8, 16,8", int, (8, 16)),
        ("focal,cross-entropy", str, ("focal", "cross-entropy")),
        ("true,false", bool, (True, False)),
        ("1e-5..1e-3", float, Range(1e-5, 1e-3, log=True)),
        ("0.1..0.9", float, Range(0.1, 0.9)),
        ("0..0.5", float, Range(0.0, 0.5)),
        ("-1..10", float, Range(-1.0, 10.0)),
        ("8..512", int, Range(8, 512, log=True)),
        ("0.5..0.5", float, (0.5,)),
    ],
)
def test_values_are_read_as_they_are_written(text: str, kind: type, expected: object) -> None:
    values = parse_values(text, kind, "--dropout")
    assert values == expected
    if isinstance(values, Range):
        assert values.whole == (kind is int)


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("", float, "'': write numbers, such as 1e-4,3e-4"),
        ("1,,2", float, "'': write numbers"),
        ("low", float, "'low': write numbers"),
        ("nan", float, "'nan': write numbers"),
        ("1e999", float, "'1e999': write numbers"),
        ("1.5", int, "'1.5': write whole numbers, such as 8,16"),
        ("maybe", bool, "'maybe': write true, false or both"),
        ("a,", str, "'': write names, such as one,two"),
        ("a..b", str, "only numbers have ranges"),
        ("1..2,3", float, "write either values .* or one range"),
        ("2..1", float, "the range falls; write 1.0..2.0"),
        ("1..inf", float, "'inf': write numbers"),
        ("1..", float, "'': write numbers"),
    ],
)
def test_values_that_cannot_be_read_name_the_flag_and_the_remedy(text: str, kind: type, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^--dropout .*{message}"):
        parse_values(text, kind, "--dropout")


@pytest.mark.parametrize(
    ("space", "method", "message"),
    [
        (WIDE, "grid", "--learning-rate: a grid has no ranges; list values, or use --search random"),
        (SMALL, "annealing", "--search annealing: use one of grid, random, optuna"),
        ({"dropout": ()}, "grid", r"dropout \(\): nothing to search"),
        ({"dropout": (0.1, math.nan)}, "grid", "dropout .*: nothing to search; list one or more finite numbers"),
        ({"loss": "focal"}, "grid", "loss 'focal': nothing to search"),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused(space: Any, method: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        open_search(tmp_path / "search.db", "s", space, method, 1)
    with pytest.raises(ConfigError, match="use at least 1"):
        open_search(tmp_path / "search.db", "s", SMALL, "grid", 1, trials=0)
    assert not (tmp_path / "search.db").exists()
