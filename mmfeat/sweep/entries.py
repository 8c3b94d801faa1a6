"""Entries of the leaderboard: one head on one modality, its settings chosen without its test rows, scored, refitted.

HEAD-MODALITY/trials/0000.json, .safetensors   each trial: settings, curves; logits out of fold
HEAD-MODALITY/final-0.safetensors, ...         the heads that predict
HEAD-MODALITY/out_of_fold.csv                  choice and probabilities by sample id
HEAD-MODALITY/curves.csv                       loss and validation score by epoch of the chosen settings
HEAD-MODALITY/metrics.json                     written last: with it the entry is complete
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.errors import HeadError, RunError
from mmfeat.evaluation.blending import mean_logits
from mmfeat.evaluation.decisions import Decision
from mmfeat.evaluation.metrics import headline
from mmfeat.heads.jobs import Fitted, count_parameters
from mmfeat.heads.registry import BASELINES, HeadSettings, Plan, load_fusion, settings_of
from mmfeat.runs.entry import Entry, entry_name
from mmfeat.runs.record import entry_is_whole
from mmfeat.runs.run import CURVES, METRICS
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.search import BATCH, Search
from mmfeat.sweep.trials import (
    HeadTrainer,
    Outcome,
    cross_fit,
    fit_on_all,
    load_outcome,
    save_finals,
    save_outcome,
    score,
    write_predictions,
)
from mmfeat.system.files import csv_text, read_json, write_atomic, write_json
from mmfeat.system.wording import Advance, head_label, ignore

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SEARCH_FILE = "search.db"


Histories = Sequence[Sequence[Mapping[str, Any]]]  # rows of curves, cell by cell


@dataclass(frozen=True)
class TrainedEntry:
    """An entry with its predictions out of fold.

    `logits` are (S, N, C), NaN where no fold tests; `decisions` one a fold, fitted on other rows; `validation` the
    logits of the validation rows of each cell (fold, seed); `best` the trial by which final heads are trained, without
    its logits.
    """

    entry: Entry
    logits: np.ndarray
    decisions: list[Decision]
    validation: list[np.ndarray]
    best: Outcome | None = None

    @property
    def name(self) -> str:
        return self.entry.name

    def updated(self, **fields: Any) -> TrainedEntry:
        """The entry with other values of these fields of `Entry`."""
        return replace(self, entry=replace(self.entry, **fields))

    def save(self, run_folder: Path, problem: Problem, histories: Histories | None = None) -> TrainedEntry:
        """Write `out_of_fold.csv`, the curves of all cells if there are any, and `metrics.json` last; returns the entry
        with the hash of its predictions."""
        folder = run_folder / self.name
        saved = self.updated(predictions=write_predictions(folder, problem, self.logits, self.decisions))
        if histories is not None:
            write_atomic(folder / CURVES, _curves(problem, self.entry.head, histories).encode())
        write_json(folder / METRICS, saved.entry.to_json())
        return saved


@dataclass(frozen=True)
class EntryTrainer:
    """Trains one head on one modality into its folder of the run `run_folder`.

    No trial is begun after `deadline` (seconds of `time.monotonic`); `advance` counts trainings.
    """

    trainer: HeadTrainer
    plan: Plan
    run_folder: Path
    deadline: float
    advance: Advance

    @property
    def head(self) -> str:
        return self.trainer.head

    @property
    def problem(self) -> Problem:
        return self.trainer.problem

    @property
    def folder(self) -> Path:
        return self.run_folder / entry_name(self.head, self.trainer.modality)

    def score(self) -> TrainedEntry:
        """Search, choose and score; trials that an earlier call saved are not repeated."""
        outcomes, over = self._search()
        trained = assemble(self.problem, self.head, self.trainer.modality, outcomes, self.plan.adjustment)
        best = replace(best_outcome(outcomes), logits=np.empty(0), validation=[])
        return replace(trained, best=best).updated(search_over=over, seconds=_seconds(outcomes))

    def finish(self, trained: TrainedEntry) -> TrainedEntry:
        """Train the final heads of an entry that was scored, by its best trial, unless an earlier call did; save it."""
        best = trained.best
        assert best is not None, "only ensembles have no trials"
        if kept := _read_finals(self.folder / METRICS, trained.entry):
            return trained.updated(parameters=kept.parameters, final=kept.final, predictions=kept.predictions)
        started = time.thread_time()
        finals = self._finals(best)
        trained = trained.updated(
            parameters=self._parameters(),
            seconds=round(trained.entry.seconds + _seconds(finals) + time.thread_time() - started, 2),
            final=save_finals(self.folder, finals),
        )
        return trained.save(self.run_folder, self.problem, best.histories)

    def _finals(self, best: Outcome) -> list[Fitted]:
        """The heads that predict: trained on all labelled rows, or without a refit the heads of the folds."""
        return self.trainer.refit(best) if self.plan.refit else self.trainer.fold_heads(best)

    def _search(self) -> tuple[list[Outcome], bool]:
        """All trials of the plan, and whether the search is over; the time limit may have cut it short."""
        if not self.plan.space or self.head in BASELINES:
            only = {self.folder / "trials" / "0000": self.plan.settings}
            return self._trials(only, self.advance, not self.plan.refit), True
        search = Search(self.run_folder / SEARCH_FILE, self.folder.name, self.plan, self.problem.seed)
        over = False
        while not over and (time.monotonic() < self.deadline or not (search.finished or search.failed)):
            asked = search.ask(BATCH)
            over = not asked or search.total == len(search.finished) + len(search.failed) + len(asked)
            for trial, outcome in self._attempts(asked):
                if isinstance(outcome, Outcome):
                    search.tell(trial.number, outcome.score)
                else:
                    search.fail(trial.number, outcome)
        if not search.finished:
            reason = next(iter(search.failed.values()))
            raise HeadError(f"{head_label(self.head, self.trainer.modality)}: no setting could be trained; {reason}")
        return self._trials(self._settings(search.finished), ignore), over

    def _attempts(self, asked: list[FrozenTrial]) -> list[tuple[FrozenTrial, Outcome | str]]:
        """Each trial with its outcome, or with the reason why it has none.

        All trials are stacked; only if one of them diverges is each tried alone.
        """
        try:
            return list(zip(asked, self._trials(self._settings(asked), self.advance), strict=True))
        except HeadError as error:
            if len(asked) == 1:
                return [(asked[0], str(error))]
        return [attempt for trial in asked for attempt in self._attempts([trial])]

    def _settings(self, trials: list[FrozenTrial]) -> dict[Path, HeadSettings]:
        """Path -> settings of some trials of a search."""
        settings = asdict(self.plan.settings)
        return {
            self.folder / "trials" / f"{trial.number:04d}": settings_of({**settings, **trial.params})
            for trial in trials
        }

    def _trials(self, wanted: Mapping[Path, HeadSettings], advance: Advance, keep: bool = False) -> list[Outcome]:
        """The trials at these paths: those that an earlier call saved are read, the others trained and saved."""
        repeats = self.problem.repeats_of(self.head)
        saved = {path: load_outcome(path) for path in wanted}
        outcomes = {path: each for path, each in saved.items() if each is not None and each.settings == wanted[path]}
        since = {path: outcomes[path].repeats if path in outcomes else 0 for path in wanted}
        advance(sum(min(number, repeats) for number in since.values()) * len(self.problem.splits))
        for number in sorted({number for number in since.values() if number < repeats}):
            missing = [path for path in wanted if since[path] == number]
            trained = self.trainer.run([wanted[path] for path in missing], advance, keep, number)
            for path, outcome in zip(missing, trained, strict=True):
                outcomes[path] = outcomes[path].joined(outcome) if number else outcome
                save_outcome(outcomes[path], path)
        return [outcomes[path].first(repeats) for path in wanted]

    def _parameters(self) -> int | None:
        """The number of parameters of one head; None for baselines, whose shape does not tell their size."""
        if self.head in BASELINES:
            return None
        shape = self.trainer.engine.bench.data(self.head, self.trainer.modality).shape
        return count_parameters(load_fusion(self.head), shape, len(self.problem.targets.classes))


def assemble(
    problem: Problem,
    head: str,
    modality: str,
    outcomes: list[Outcome],
    adjustment: float | None,
    chosen: Sequence[int] | None = None,
) -> TrainedEntry:
    """Make an entry of finished trials: the logits of a fold come from the trial with the index `chosen` there, by
    default from the trial that validated best in that fold."""
    adjustment = 0.0 if head == "prior" else adjustment  # the shares of the classes stay what they are
    if chosen is None:
        chosen = np.stack([outcome.scores.mean(0) for outcome in outcomes]).argmax(0).tolist()
    logits = np.full_like(outcomes[0].logits, np.nan)
    for fold in range(len(problem.splits)):
        test = problem.splits.fold(fold, 0).test
        logits[:, test] = outcomes[chosen[fold]].logits[:, test]
    repeats = problem.repeats_of(head)
    validation = [outcomes[chosen[cell // repeats]].validation[cell] for cell in range(len(chosen) * repeats)]
    if not np.isfinite(logits[:, problem.splits.tested]).all():
        raise HeadError(f"{head_label(head, modality)} gives no finite scores; lower --learning-rate")
    decisions = cross_fit(problem, logits, validation, adjustment)
    trained = scored_entry(
        problem, logits, decisions, validation, adjustment,
        head=head,
        modalities=modality,
        trials=len(outcomes),
        settings=best_outcome(outcomes).settings,
    )  # fmt: skip
    return trained.updated(optimism=_optimism(problem, outcomes, trained.entry, adjustment))


def scored_entry(
    problem: Problem, logits: np.ndarray, decisions: list[Decision], validation: list[np.ndarray],
    adjustment: float | None, **fields: Any,
) -> TrainedEntry:  # fmt: skip
    """Score logits (S, N, C) out of fold with the decisions of the folds, fit the decision of the final heads on all
    rows, and make an entry of both and the other `fields`."""
    decision = fit_on_all(problem, logits, adjustment)
    entry = Entry(**score(problem, logits, decisions), decision=decision, **fields)
    return TrainedEntry(entry, logits, decisions, validation)


def best_outcome(outcomes: list[Outcome]) -> Outcome:
    """The trial that validated best over all folds, the first of equal ones."""
    return max(outcomes, key=lambda outcome: outcome.score)


def _seconds(timed: Sequence[Outcome] | Sequence[Fitted]) -> float:
    return sum(part.seconds for part in timed)


def _optimism(problem: Problem, outcomes: list[Outcome], scored: Entry, adjustment: float | None) -> float:
    """The gain of the score if settings and thresholds are chosen on the very rows that are scored."""
    rows, naive = problem.splits.tested, []
    for outcome in outcomes:
        fitted = scored.decision if len(outcomes) == 1 else None  # the decision was fitted on these very logits
        decision = fitted or fit_on_all(problem, outcome.logits, adjustment)
        chosen = decision.choose(mean_logits(outcome.logits[:, rows], decision))
        naive.append(np.mean(headline(problem.tested, chosen[None])))
    return float(max(naive) - scored.headline.value)


def _curves(problem: Problem, head: str, histories: Histories) -> str:
    """A row for each epoch of each head, or each candidate of a baseline."""
    rows = [
        {"fold": problem.splits.names[fold], "seed": repeat + 1, **line}
        for (fold, repeat, _), history in zip(problem.cells(head), histories, strict=True)
        for line in history
    ]
    header = list(rows[0]) if rows else ["fold", "seed"]
    return csv_text(header, [[row.get(name, "") for name in header] for row in rows])


def _read_finals(path: Path, scored: Entry) -> Entry | None:
    """Read the entry in `metrics.json`, of which the files count; None unless these are whole and were chosen
    among as many trials, with as many seeds, as the entry was `scored` with."""
    if not path.exists():
        return None
    try:
        entry = Entry.from_json(read_json(path))
        alike = entry.trials == scored.trials and len(entry.by_seed.values) == len(scored.by_seed.values)
        return entry if alike and entry_is_whole(path.parent, entry) else None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: not whole ({error}); delete it and run mmfeat heads again") from error
