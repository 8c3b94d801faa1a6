"""Search: which training settings a head tries next, kept in Optuna's SQLite file so that any kill is survived.

A study, one a head and modality, is asked for trials and told their validation scores. Both are on the disk when the
call returns. What trial number n tries depends on the seed, n and the scores of earlier batches alone, so a search
that was killed and taken up again tries the same settings as one that ran through.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.errors import ConfigError
from mmfeat.heads.registry import HeadSettings, flag
from mmfeat.sweep.search_file import SearchFile, Trial, frozen_trial, import_optuna
from mmfeat.sweep.search_space import Range, SearchSpace, Space, Value, parse_values


@dataclass(frozen=True)
class Plan:
    """How settings are found: `space` of those that vary, by which method, for how long. `refit`: the final heads are
    trained on all labelled samples; otherwise those of the folds predict together."""

    settings: HeadSettings
    space: Space = field(default_factory=dict)
    method: str = "grid"
    trials: int | None = None
    time_limit: float | None = None
    adjustment: float | None = None
    refit: bool = True

    def __post_init__(self) -> None:
        for name, values in self.space.items():
            if isinstance(values, Range) and self.method == "grid":
                raise ConfigError(f"{flag(name)}: a grid has no ranges; list values, or use --search random or optuna")
            if isinstance(values, Range) and not values.whole and self.trials is None and self.time_limit is None:
                raise ConfigError(
                    f"{flag(name)}: a range has no end of settings to try; say how many with --trials, or for how "
                    "long with --time-limit"
                )


__all__ = ["METHODS", "Range", "Search", "Space", "Trial", "Value", "parse_values"]

METHODS = ("grid", "random", "optuna")
BATCH = 8
REDRAWS = 20  # how often a setting that was tried already is drawn again before any untried one is taken


class Search:
    """One study of the file `storage`: `grid` tries all, `random` draws, `optuna` lets TPE propose.

    `trials` is the most that are tried; without it a search ends when all combinations are done, or with who asks.
    `first` is the setting that `random` and `optuna` begin with, as near as the space has it. `optuna` learns from
    the scores of whole batches of `batch` trials, so within one the order of asking and telling does not matter. No
    setting is tried twice. Raises `ConfigError` for a space that cannot be searched, `RunError` for a file or study
    that does not fit, `WriteError` where the disk refuses.

    Sources: Bergstra and Bengio 2012 (random search), Bergstra et al. 2011 (TPE), Akiba et al. 2019 (Optuna).
    """

    def __init__(
        self,
        storage: str | Path,
        study: str,
        space: Space,
        method: str,
        seed: int,
        trials: int | None = None,
        first: Mapping[str, Value] | None = None,
        batch: int = BATCH,
    ) -> None:
        if method not in METHODS:
            raise ConfigError(f"--search {method}: use one of {', '.join(METHODS)}")
        if batch < 1 or (trials is not None and trials < 1):
            raise ConfigError(f"{trials} trials in batches of {batch}: nothing to search; use at least 1 of each")
        self.method, self.seed, self.trials, self.batch, self.space = method, seed, trials, batch, SearchSpace(space)
        if method == "grid" and self.space.ranges:
            names = ", ".join(self.space.ranges)
            raise ConfigError(f"{names}: a grid has no ranges; list the values, or use --search random or optuna")
        self._first = None if first is None or method == "grid" else self.space.nearest(first)
        self._distributions = self.space.distributions()
        self._file = SearchFile(Path(storage), study, self._description(), self._distributions)
        self._trials = self._file.load()
        self._tried = {_key(trial.values) for trial in self._trials}
        self._given: set[int] = set()
        self._grid: Iterator[dict[str, Value]] = self.space.products()
        self._past: tuple[int, Any] | None = None

    @property
    def total(self) -> int | None:
        """How many trials the whole search has, as far as that is known."""
        return min((size for size in (self.trials, self.space.size) if size is not None), default=None)

    @property
    def finished(self) -> list[Trial]:
        """Trials with a score, by number."""
        return [trial for trial in self._trials if trial.score is not None]

    @property
    def failed(self) -> list[Trial]:
        """Trials with a reason instead of a score, by number."""
        return [trial for trial in self._trials if trial.reason is not None]

    @property
    def best(self) -> Trial | None:
        """The finished trial with the highest score, the first of equal ones."""
        return max(self.finished, key=lambda trial: trial.score or 0.0, default=None)

    def ask(self, count: int) -> list[Trial]:
        """At most `count` trials to train: first those that an earlier process was asked for and did not finish.

        Empty once there are no more. `optuna` gives fewer, or none, while trials of an earlier batch are untold.
        """
        given = [trial for trial in self._trials if trial.pending and trial.number not in self._given][:count]
        while len(given) < count and (trial := self._next()):
            given.append(trial)
        self._given.update(trial.number for trial in given)
        return given

    def tell(self, trial: Trial, score: float, extra: Mapping[str, Any] | None = None) -> None:
        """Finish a trial with its score, higher is better; one that is not finite makes it a failed trial.

        `extra` holds what JSON can, and lies beside the score. A score that was told before stands.
        """
        if not math.isfinite(score):
            self.fail(trial, f"score {score}")
            return
        told = replace(trial, score=float(score), reason=None, extra=dict(extra or {}))
        self._trials[trial.number] = self._file.finish(told)

    def fail(self, trial: Trial, reason: str) -> None:
        """Finish a trial that has no score, for example because it diverged. It is not tried again."""
        self._trials[trial.number] = self._file.finish(replace(trial, score=None, reason=reason, extra={}))

    def _next(self) -> Trial | None:
        """A new trial, which is on the disk; None where there is none, or none yet."""
        number = len(self._trials)
        if self.trials is not None and number >= self.trials:
            return None
        if any(trial.pending for trial in self._trials[: self._known(number)]):
            return None
        if (values := self._propose(number)) is None:
            return None
        trial = self._file.add(number, values)
        self._trials.append(trial)
        self._tried.add(_key(trial.values))
        if self._past is not None:
            self._past[1].add_trial(frozen_trial(trial, self._distributions))
        return trial

    def _known(self, number: int) -> int:
        """Trials below this number are those whose scores trial `number` learns from."""
        return number - number % self.batch if self.method == "optuna" else 0

    def _propose(self, number: int) -> dict[str, Value] | None:
        """Values that no trial has; None where all combinations are used up."""
        if self.method == "grid":
            return next((values for values in self._grid if _key(values) not in self._tried), None)
        if self.space.size is not None and len(self._tried) >= self.space.size:
            return None
        if number == 0 and self._first is not None:
            return self._first
        study, fail = self._study(number), import_optuna().trial.TrialState.FAIL
        for attempt in range(REDRAWS):
            study.sampler = self._sampler(_seed(self.seed, number, attempt))
            drawn = study.ask(self._distributions)
            study.tell(drawn, state=fail)  # a trial that samplers do not see
            values = {name: drawn.params[name] for name in self._distributions}
            if _key(values) not in self._tried:
                return values
        return self._untried(number)

    def _study(self, number: int) -> Any:
        """In memory, what trial `number` may know: earlier batches with their scores, its own as running."""
        known = self._known(number)
        if self._past is None or self._past[0] != known:
            study = import_optuna().create_study(direction="maximize")
            for trial in self._trials:
                shown = trial.score if trial.number < known else None
                if shown is not None or trial.number >= known:
                    study.add_trial(frozen_trial(trial, self._distributions, shown))
            self._past = known, study
        return self._past[1]

    def _sampler(self, seed: int) -> Any:
        samplers = import_optuna().samplers
        if self.method == "random":
            return samplers.RandomSampler(seed)
        return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def _untried(self, number: int) -> dict[str, Value] | None:
        """The next combination that no trial has, from a drawn place on."""
        if (size := self.space.size) is None:  # a range so narrow that it has no other number
            return None
        start = random.Random(_seed(self.seed, number, REDRAWS)).randrange(size)
        found = (self.space.combination((start + step) % size) for step in range(size))
        return next((values for values in found if _key(values) not in self._tried), None)

    def _description(self) -> dict[str, Any]:
        """What makes two searches the same one. The number of trials does not: a search can be prolonged."""
        space = self.space.described()
        return {"method": self.method, "seed": self.seed, "space": space, "first": self._first, "batch": self.batch}


def _seed(*parts: int) -> int:
    """One seed of several: no trial depends on how far a generator has come in memory."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def _key(values: Mapping[str, Value]) -> tuple[Value, ...]:
    return tuple(values.values())
