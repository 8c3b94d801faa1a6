"""Search: which settings a head tries next. Optuna samples them and keeps them in its SQLite file.

A study, one a head and modality, is asked for trials and told their validation scores. Both are on the disk when the
call returns. The settings of trial number n depend on the seed, n and the scores of earlier batches alone, so a search
that was killed and taken up again tries the same settings as one that ran through.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.errors import MmfeatError, RunError, WriteError
from mmfeat.heads.registry import Plan, Value
from mmfeat.sweep.search_space import SearchSpace
from mmfeat.system.files import canonical_json, make_folder, write_errors

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

BATCH = 8
REDRAWS = 20  # draws of settings that were tried already, before the next untried combination is taken
LOCK_SECONDS = 60.0
BEING_MADE = ("already exists", "UNIQUE constraint")  # SQLite's words where two processes make the same table or row
ANY_VALUE = (RuntimeError, AssertionError, LookupError, ValueError, TypeError)  # what a damaged file makes Optuna raise
DESCRIPTION, REASON = "search", "reason"  # user attributes of a study, and of a study and the number of a failed trial
SETTINGS, SCORE = "settings", "score"  # user attributes that copy the values of a trial, and its score in a study
NOT_WRITTEN = ("full", "readonly", "unable to open", "disk I/O")  # SQLite's words for a disk that refuses

_OPENING = threading.Lock()  # Optuna makes its tables one by one


class Search:
    """One study of the file `storage`: `grid` tries all settings, `random` draws them, `optuna` lets TPE propose them.

    A search ends after the plan's trials or when all combinations are tried. `random` and `optuna` begin with the
    plan's settings, clipped to the space. `optuna` learns from the scores of whole batches of `BATCH` trials, so within
    a batch the order of asking and telling does not matter. No setting is tried twice. Raises `ConfigError` for a space
    that cannot be searched, `RunError` for a file or study that does not fit, `WriteError` where the disk refuses.

    Sources: Bergstra and Bengio 2012 (random search), Bergstra et al. 2011 (TPE), Akiba et al. 2019 (Optuna).
    """

    def __init__(self, storage: Path, study: str, plan: Plan, seed: int) -> None:
        self.plan, self.seed, self.space, self._path = plan, seed, SearchSpace(plan.space), storage
        self._first = None if plan.method == "grid" else self.space.nearest(asdict(plan.settings))
        self._distributions = self.space.distributions()
        self._given = set[int]()
        self._study = _open_study(storage, study, self._description())
        self._load()
        self._check_copies()

    @property
    def total(self) -> int | None:
        """The number of trials of the whole search, as far as it is known."""
        return min((size for size in (self.plan.trials, self.space.size) if size is not None), default=None)

    @property
    def finished(self) -> list[FrozenTrial]:
        """Trials with a score, by number."""
        return [trial for trial in self._all if trial.value is not None]

    @property
    def failed(self) -> dict[int, str]:
        """Number of each trial without a score -> the reason."""
        reasons = self._study.user_attrs
        failed = [trial for trial in self._all if trial.state.is_finished() and trial.value is None]
        return {
            trial.number: reasons.get(f"{REASON} {trial.number}", trial.user_attrs.get(REASON, "unknown"))
            for trial in failed
        }

    def ask(self, count: int) -> list[FrozenTrial]:
        """At most `count` trials to train: first those that an earlier process was asked for and did not finish.

        Empty once there are no more. `optuna` gives fewer, or none, while trials of an earlier batch are untold.
        """
        pending = [trial for trial in self._all if not trial.state.is_finished() and trial.number not in self._given]
        given = pending[:count]
        while len(given) < count and (trial := self._next()):
            given.append(trial)
        self._given.update(trial.number for trial in given)
        return given

    def tell(self, number: int, score: float) -> None:
        """Finish a trial with its score, higher is better; one that is not finite makes it a failed trial.

        A score that was told before stands.
        """
        if not math.isfinite(score):
            self.fail(number, f"score {score}")
            return
        with _storage_errors(self._path):
            self._all[number] = self._study.tell(number, score, skip_if_finished=True)
            self._study.set_user_attr(f"{SCORE} {number}", self._all[number].value)

    def fail(self, number: int, reason: str) -> None:
        """Finish a trial that has no score, for example because it diverged. Its settings are not tried again."""
        from optuna.trial import TrialState

        with _storage_errors(self._path):
            self._study.set_user_attr(f"{REASON} {number}", reason)
            self._all[number] = self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _load(self) -> None:
        with _storage_errors(self._path, *ANY_VALUE):
            self._all = self._study.get_trials(deepcopy=False)
            self._tried = {self._key(trial.params) for trial in self._all}
            if [trial.number for trial in self._all] != list(range(len(self._all))):
                raise ValueError("trials are missing")

    def _check_copies(self) -> None:
        """Refuse settings and scores that differ from their copies: SQLite does not notice a flipped bit."""
        with _storage_errors(self._path, *ANY_VALUE):
            scores = self._study.user_attrs
            for trial in self._all:  # earlier versions made no copies, nor does a process killed just before
                if trial.user_attrs.get(SETTINGS, trial.params) != trial.params:
                    raise ValueError(f"the settings of trial {trial.number} are not what was saved")
                if trial.value is not None and scores.get(f"{SCORE} {trial.number}", trial.value) != trial.value:
                    raise ValueError(f"the score of trial {trial.number} is not what was saved")

    def _next(self) -> FrozenTrial | None:
        """A new trial, with all its values on the disk in one step; None where there is none, or none yet."""
        from optuna.trial import TrialState

        number = len(self._all)
        if self.plan.trials is not None and number >= self.plan.trials:
            return None
        if not all(trial.state.is_finished() for trial in self._all[: self._known(number)]):
            return None
        if (values := self._propose(number)) is None:
            return None
        with _storage_errors(self._path):
            self._study.add_trial(_running(values, self._distributions))
            self._load()
            if len(self._all) != number + 1:
                self._study.tell(len(self._all) - 1, state=TrialState.FAIL)
                raise RunError(
                    f"{self._path}: another process searches study {self._study.study_name} too; end one of the two, "
                    "then run the same command again"
                )
        return self._all[number]

    def _known(self, number: int) -> int:
        """The number of trials, from the first on, whose scores trial `number` learns from."""
        return number - number % BATCH if self.plan.method == "optuna" else 0

    def _propose(self, number: int) -> dict[str, Value] | None:
        """Values that no trial has; None where all combinations are used up."""
        if self.space.size is not None and len(self._tried) >= self.space.size:
            return None
        if self.plan.method == "grid":
            return self._untried(number)
        if number == 0 and self._first is not None:
            return self._first
        for attempt in range(REDRAWS):
            values = self._draw(number, _seed(self.seed, number, attempt))
            if self._key(values) not in self._tried:
                return values
        return None if self.space.size is None else self._untried(_seed(self.seed, number, REDRAWS))

    def _draw(self, number: int, seed: int) -> dict[str, Value]:
        """Let Optuna's sampler propose: its study knows the scores of earlier batches and sees this batch running."""
        import optuna
        from optuna.samplers import BaseSampler, RandomSampler, TPESampler

        sampler: BaseSampler = RandomSampler(seed)
        if self.plan.method == "optuna":
            sampler = TPESampler(seed=seed, multivariate=True, constant_liar=True)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        if self.plan.method == "optuna":
            known = self._known(number)
            study.add_trials(self._all[:known])
            study.add_trials(_running(trial.params, self._distributions) for trial in self._all[known:])
        return study.ask(self._distributions).params

    def _untried(self, start: int) -> dict[str, Value]:
        """The first combination from number `start` on, round and round, that no trial has."""
        while self._key(values := self.space.combination(start)) in self._tried:
            start += 1
        return values

    def _key(self, values: Mapping[str, Any]) -> tuple[Value, ...]:
        return tuple(values[name] for name in self._distributions)

    def _description(self) -> dict[str, Any]:
        """The identity of a search. The number of trials is no part of it: a search can be prolonged."""
        return {
            "method": self.plan.method,
            "seed": self.seed,
            "space": self.space.to_json(),
            "first": self._first,
            "batch": BATCH,
        }


def _seed(*parts: int) -> int:
    """One seed made of several, so that no trial depends on how far a generator has come in memory."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _running(values: Mapping[str, Any], distributions: Mapping[str, Any]) -> FrozenTrial:
    from optuna.trial import TrialState, create_trial

    copy = {SETTINGS: dict(values)}
    return create_trial(
        state=TrialState.RUNNING, params=dict(values), distributions=dict(distributions), user_attrs=copy
    )


def _open_study(path: Path, name: str, description: Mapping[str, Any]) -> Study:
    """The study `name` in the file at `path`, which is made if it is missing; refuses a study of another search."""
    import optuna
    from sqlalchemy.pool import NullPool

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # of Optuna 4's TPE

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=LOCK_SECONDS)

    # Not by URL: Optuna takes that for a template, and a path may hold braces or question marks. No connection stays
    # open, so the process may fork and the file be moved.
    options = {"creator": connect, "poolclass": NullPool}
    with write_errors(path):
        make_folder(path.parent)
    with _storage_errors(path, *ANY_VALUE), _OPENING:
        _check(path)
        storage = _made_storage(options)
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
        if DESCRIPTION not in study.user_attrs:
            study.set_user_attr(DESCRIPTION, description)
        if canonical_json(study.user_attrs[DESCRIPTION]) != canonical_json(description):
            raise RunError(
                f"{path}: study {name} searched other settings; search into another folder, or delete the file to "
                "begin again (its trials are lost)"
            )
    return study


def _made_storage(options: Mapping[str, Any]) -> BaseStorage:
    """Optuna's storage. Optuna makes its tables one by one, and another process may be making them at this moment."""
    import optuna
    from sqlalchemy.exc import IntegrityError, OperationalError

    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            return optuna.storages.RDBStorage("sqlite://", engine_kwargs=dict(options))
        except (IntegrityError, OperationalError) as error:
            if time.monotonic() > deadline or not any(words in str(error) for words in BEING_MADE):
                raise
            time.sleep(0.05)


def _check(path: Path) -> None:
    """Refuse a file that Optuna would fail on later, or would add its tables to."""
    if not path.exists():
        return
    if not path.is_file():
        raise ValueError("not a plain file")
    with contextlib.closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as connection:
        if (damage := connection.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
            raise ValueError(damage)
        tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
        columns = {name for (_, name, *_) in connection.execute("pragma table_info(studies)")}
    if tables and "study_name" not in columns:  # the first table that Optuna makes is that of the studies
        raise ValueError("Optuna's tables are not in it")


@contextlib.contextmanager
def _storage_errors(path: Path, *others: type[Exception]) -> Iterator[None]:
    """Raise one line with a remedy for an error of Optuna, SQLAlchemy or SQLite, and for the `others`."""
    from optuna.exceptions import OptunaError
    from sqlalchemy.exc import SQLAlchemyError

    caught: tuple[type[Exception], ...] = (OptunaError, SQLAlchemyError, sqlite3.Error, *others)
    try:
        yield
    except MmfeatError:
        raise
    except caught as error:
        raise _explained(path, error) from error


def _explained(path: Path, error: BaseException) -> MmfeatError:
    import optuna

    while not isinstance(error, sqlite3.Error) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if "locked" in text or any(words in text for words in BEING_MADE):
        return RunError(f"{path}: another process writes to it ({text}); end that, then run the same command again")
    if any(word in text for word in NOT_WRITTEN):
        return WriteError(
            f"cannot write {path}: {text}; free some space or get the right to write there, then run the same command "
            "again (finished trials are kept)"
        )
    return RunError(
        f"{path}: no search that Optuna {optuna.__version__} can read ({text}); delete it (its trials are lost)"
    )
