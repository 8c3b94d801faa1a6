"""Trials in Optuna's SQLite file. What a method wrote is on the disk when it returns, and a kill leaves no half."""

from __future__ import annotations

import contextlib
import functools
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfeat.errors import MmfeatError, RunError, WriteError
from mmfeat.sweep.search_space import Value
from mmfeat.system.files import canonical_json, write_atomic, write_errors

LOCK_SECONDS = 60.0
DESCRIPTION, REASON = "search", "reason"  # user attributes of the study and of a failed trial
NOT_WRITTEN = ("full", "readonly", "unable to open", "disk I/O")  # SQLite's words for a disk that refuses
TABLES = {"alembic_version", "studies", "trials"}
_CREATING = threading.Lock()


@dataclass(frozen=True)
class Trial:
    """One setting: `score` once it was told, `reason` if it failed, neither while it is being trained."""

    number: int
    values: dict[str, Value]
    score: float | None = None
    reason: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def pending(self) -> bool:
        return self.score is None and self.reason is None


class SearchFile:
    """One study in the file at `path`, which is made if it is missing.

    Raises `RunError` for a file that Optuna cannot read or a study that is described differently.
    """

    def __init__(
        self, path: Path, study: str, description: Mapping[str, Any], distributions: Mapping[str, Any]
    ) -> None:
        self.path, self.study, self.distributions = path, study, distributions
        optuna = import_optuna()
        with _readable(path):
            _create(path)
            _check(path)
            self.storage = _open(path)
            try:
                self.id = self.storage.create_new_study([optuna.study.StudyDirection.MAXIMIZE], study)
            except optuna.exceptions.DuplicatedStudyError:
                self.id = self.storage.get_study_id_from_name(study)
            found = self.storage.get_study_user_attrs(self.id).get(DESCRIPTION)
        if found is None:
            with _storage_errors(path):
                self.storage.set_study_user_attr(self.id, DESCRIPTION, description)
        elif canonical_json(found) != canonical_json(description):
            raise RunError(
                f"{path}: study {study} searched other settings; search into another folder, or delete the file to "
                "begin again (its trials are lost)"
            )

    def load(self) -> list[Trial]:
        """All trials, by number."""
        with _readable(self.path):
            frozen = sorted(self.storage.get_all_trials(self.id, deepcopy=False), key=lambda trial: trial.number)
            if [trial.number for trial in frozen] != list(range(len(frozen))):
                raise ValueError("trials are missing")
            return [self._trial(trial) for trial in frozen]

    def add(self, number: int, values: dict[str, Value]) -> Trial:
        """A new trial. It comes with all its values in one transaction."""
        with _storage_errors(self.path):
            id = self.storage.create_new_trial(self.id, frozen_trial(Trial(number, values), self.distributions))
            found = self.storage.get_trial(id)
            if found.number != number:
                self.storage.set_trial_state_values(id, import_optuna().trial.TrialState.FAIL)
                raise RunError(
                    f"{self.path}: another process searches study {self.study} too; end one of the two, then run the "
                    "same command again"
                )
        return self._trial(found)

    def finish(self, trial: Trial) -> Trial:
        """The trial as it stands in the file; what another process told first stands.

        The state is written last: a kill before that leaves the trial to be trained again.
        """
        optuna = import_optuna()
        state = optuna.trial.TrialState.FAIL if trial.score is None else optuna.trial.TrialState.COMPLETE
        attributes = trial.extra if trial.reason is None else {REASON: trial.reason}
        with _storage_errors(self.path):
            id = self.storage.get_trial_id_from_study_id_trial_number(self.id, trial.number)
            try:
                for name, value in attributes.items():
                    self.storage.set_trial_user_attr(id, name, value)
                self.storage.set_trial_state_values(id, state, None if trial.score is None else [trial.score])
            except optuna.exceptions.UpdateFinishedTrialError:
                return self._trial(self.storage.get_trial(id))
        return trial

    def _trial(self, frozen: Any) -> Trial:
        values = {name: frozen.params[name] for name in self.distributions}
        if not frozen.state.is_finished():
            return Trial(frozen.number, values)
        if frozen.value is None:
            return Trial(frozen.number, values, reason=str(frozen.user_attrs.get(REASON, "unknown")))
        return Trial(frozen.number, values, frozen.value, extra=dict(frozen.user_attrs))


@functools.cache
def import_optuna() -> Any:
    """Optuna, when it is needed, and quiet."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def frozen_trial(trial: Trial, distributions: Mapping[str, Any], score: float | None = None) -> Any:
    """The trial as Optuna's: finished with `score`, or running."""
    optuna = import_optuna()
    states = optuna.trial.TrialState
    return optuna.trial.create_trial(
        state=states.RUNNING if score is None else states.COMPLETE,
        value=score,
        params=dict(trial.values),
        distributions=dict(distributions),
    )


def _create(path: Path) -> None:
    """An empty storage at `path`, unless there is one. It appears whole: Optuna makes its tables one by one."""
    with _CREATING:
        if path.exists():
            return
        with write_errors(path), tempfile.TemporaryDirectory() as folder:
            new = Path(folder) / "new.db"
            _open(new)
            _forget_journals(path)
            write_atomic(path, new.read_bytes(), exclusive=True)


def _forget_journals(path: Path) -> None:
    """Delete those of a file that was deleted: SQLite would apply them to ours.

    A journal beside a file may be in use; without it, what is being committed counts as failed. Whoever makes one has
    made the file before, so the journal is looked for first.
    """
    for suffix in ("-journal", "-wal", "-shm"):
        journal = Path(f"{path}{suffix}")
        if journal.exists() and not path.exists():
            journal.unlink(missing_ok=True)


def _check(path: Path) -> None:
    """Refuse what Optuna would fail on later, or would add its tables to."""
    if not path.is_file():
        raise ValueError("not a plain file")
    with contextlib.closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as connection:
        if (damage := connection.execute("pragma quick_check(1)").fetchone()[0]) != "ok":
            raise ValueError(damage)
        tables = {name for (name,) in connection.execute("select name from sqlite_master where type = 'table'")}
    if not tables >= TABLES:
        raise ValueError("Optuna's tables are not in it")


def _open(path: Path) -> Any:
    """Optuna's storage on `path`. No connection stays open, so the process may fork and the file be moved."""
    from sqlalchemy.pool import NullPool

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=LOCK_SECONDS)

    # Not by URL: Optuna takes that for a template, and a path may hold braces or question marks.
    options = {"creator": connect, "poolclass": NullPool}
    return import_optuna().storages.RDBStorage("sqlite://", engine_kwargs=options)


@contextlib.contextmanager
def _storage_errors(path: Path, *others: type[Exception]) -> Iterator[None]:
    """One line with a remedy for whatever Optuna, SQLAlchemy or SQLite raises."""
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (import_optuna().exceptions.OptunaError, SQLAlchemyError, sqlite3.Error, *others) as error:
        raise _explained(path, error) from error


def _readable(path: Path) -> contextlib.AbstractContextManager[None]:
    """As `_storage_errors`, where a damaged file may make the libraries raise whatever is about values."""
    return _storage_errors(path, RuntimeError, AssertionError, LookupError, ValueError, TypeError)


def _explained(path: Path, error: BaseException) -> MmfeatError:
    while not isinstance(error, sqlite3.Error) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    if "locked" in text:
        return RunError(f"{path}: another process writes to it ({text}); end that, then run the same command again")
    if any(word in text for word in NOT_WRITTEN):
        return WriteError(
            f"cannot write {path}: {text}; free some space or get the right to write there, then run the same command "
            "again (finished trials are kept)"
        )
    version = import_optuna().__version__
    return RunError(f"{path}: no search that Optuna {version} can read ({text}); delete it (its trials are lost)")
