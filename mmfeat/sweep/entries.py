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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.errors import HeadError, RunError
from mmfeat.evaluation.decisions import Decision
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.heads.jobs import count_parameters
from mmfeat.heads.registry import BASELINES, load_fusion
from mmfeat.heads.settings import HeadSettings, settings_of
from mmfeat.runs.run import CURVES, METRICS, finals_are_whole
from mmfeat.samples.labels import Targets
from mmfeat.sweep.engine import Advance, Engine
from mmfeat.sweep.scoring import cross_fit, decide, fit_on_all, score, write_predictions
from mmfeat.sweep.search import Plan, Search
from mmfeat.sweep.search_file import Trial
from mmfeat.sweep.task import Task
from mmfeat.sweep.trials import Outcome, fold_heads, load_outcome, refit, run_trials, save_finals, save_outcome
from mmfeat.system.files import csv_text, read_json, write_atomic, write_json

SEARCH_FILE = "search.db"
ASKED_AT_ONCE = 8  # trials of a search that are stacked together


@dataclass(frozen=True)
class Entry:
    """A head on a modality with its predictions out of fold: (S, N, C) logits, NaN where no fold tests."""

    record: Mapping[str, Any]
    logits: np.ndarray
    decisions: list[Decision]  # one a fold, fitted on other rows
    validation: list[np.ndarray]  # logits of each cell's validation rows

    @property
    def name(self) -> str:
        return f"{self.record['head']}-{self.record['modalities']}"


def train_entry(
    task: Task, engine: Engine, head: str, modality: str, plan: Plan, folder: Path, deadline: float, advance: Advance
) -> Entry:
    """Search, choose, score, refit and save; what an earlier call saved is not done again."""
    folder = folder / f"{head}-{modality}"
    metrics = folder / METRICS
    outcomes, over = _search(task, engine, head, modality, plan, folder / "trials", deadline, advance)
    entry = assemble(task, head, modality, outcomes, plan.adjustment)
    best = best_outcome(outcomes)
    if metrics.exists() and (finals_there := _read_finals(metrics, len(outcomes))):
        record = {**entry.record, "search_over": over, **finals_there}
        return Entry(record, entry.logits, entry.decisions, entry.validation)
    started = time.thread_time()
    finals = refit(task, engine, head, modality, best) if plan.refit else fold_heads(task, engine, head, modality, best)
    advance(task.repeats_of(head) if plan.refit else 0)
    record = {
        **entry.record,
        "search_over": over,
        "parameters": _parameters(engine, head, modality, task.targets),
        "seconds": round(
            sum(outcome.seconds for outcome in outcomes)
            + sum(each.seconds for each in finals)
            + time.thread_time()
            - started,
            2,
        ),
        "final": save_finals(folder, finals),
    }
    write_predictions(folder, task, entry.logits, entry.decisions)
    write_atomic(folder / CURVES, _curves(task, head, best).encode())
    write_json(metrics, record)
    return Entry(record, entry.logits, entry.decisions, entry.validation)


def assemble(
    task: Task,
    head: str,
    modality: str,
    outcomes: list[Outcome],
    adjustment: float | None,
    chosen: Sequence[int] | None = None,
) -> Entry:
    """The entry of some finished trials: in each fold the `chosen` one counts, by default that which validated best
    there."""
    if chosen is None:
        chosen = np.stack([outcome.scores.mean(0) for outcome in outcomes]).argmax(0).tolist()
    logits = np.full_like(outcomes[0].logits, np.nan)
    for fold in range(len(task.splits)):
        test = task.splits.fold(fold, 0).test
        logits[:, test] = outcomes[chosen[fold]].logits[:, test]
    repeats = task.repeats_of(head)
    validation = [outcomes[chosen[cell // repeats]].validation[cell] for cell in range(len(chosen) * repeats)]
    if not np.isfinite(logits[:, task.splits.tested]).all():
        raise HeadError(f"{head} on {modality} gives no finite scores; lower --learning-rate")
    decisions = cross_fit(task, logits, validation, adjustment)
    record = {
        "head": head,
        "modalities": modality,
        **score(task, logits, decisions),
        "trials": len(outcomes),
        "settings": asdict(best_outcome(outcomes).settings),
        "optimism": _optimism(task, outcomes, logits, decisions, adjustment),
        "decision": fit_on_all(task, logits, adjustment).to_json(),
    }
    return Entry(record, logits, decisions, validation)


def best_outcome(outcomes: list[Outcome]) -> Outcome:
    """The trial that validated best over all folds, the first of equal ones."""
    return max(outcomes, key=lambda outcome: outcome.score)


def _search(
    task: Task,
    engine: Engine,
    head: str,
    modality: str,
    plan: Plan,
    trials: Path,
    deadline: float,
    advance: Advance,
) -> tuple[list[Outcome], bool]:
    """All trials of the plan, one that was finished before only read; and whether none is left, which time may not
    have allowed."""
    if not plan.space or head in BASELINES:
        return _trials(task, engine, head, modality, {trials / "0000": plan.settings}, advance, not plan.refit), True
    search = Search(
        trials.parents[1] / SEARCH_FILE, f"{head}-{modality}", plan.space, plan.method, task.seed, plan.trials,
        first=asdict(plan.settings),
    )  # fmt: skip
    over = False
    while not over and (time.monotonic() < deadline or not search.finished):
        asked = search.ask(ASKED_AT_ONCE)
        over = not asked or search.total == len(search.finished) + len(search.failed) + len(asked)
        for trial, outcome in _attempts(task, engine, head, modality, plan, trials, asked, advance):
            if isinstance(outcome, Outcome):
                search.tell(trial, outcome.score)
            else:
                search.fail(trial, outcome)
    if not search.finished:
        raise HeadError(f"{head} on {modality}: no setting could be trained; {search.failed[0].reason}")
    finished = _wanted(plan, trials, search.finished)
    return _trials(task, engine, head, modality, finished, lambda heads: None), over


def _attempts(
    task: Task,
    engine: Engine,
    head: str,
    modality: str,
    plan: Plan,
    folder: Path,
    asked: list[Trial],
    advance: Advance,
) -> list[tuple[Trial, Outcome | str]]:
    """Each trial with its outcome, or with the reason why it has none. All are stacked; only if one of them
    diverges is each tried alone."""
    try:
        outcomes = _trials(task, engine, head, modality, _wanted(plan, folder, asked), advance)
        return list(zip(asked, outcomes, strict=True))
    except HeadError as error:
        if len(asked) == 1:
            return [(asked[0], str(error))]
    alone = [_attempts(task, engine, head, modality, plan, folder, [trial], advance) for trial in asked]
    return [each for attempts in alone for each in attempts]


def _wanted(plan: Plan, folder: Path, trials: list[Trial]) -> dict[Path, HeadSettings]:
    """Place -> settings of some trials of a search."""
    settings = asdict(plan.settings)
    return {folder / f"{trial.number:04d}": settings_of({**settings, **trial.values}) for trial in trials}


def _trials(
    task: Task,
    engine: Engine,
    head: str,
    modality: str,
    wanted: Mapping[Path, HeadSettings],
    advance: Advance,
    keep: bool = False,
) -> list[Outcome]:
    """The trials at these places: those that an earlier call saved are read, the others trained and saved."""
    outcomes = {path: load_outcome(path) for path in wanted}
    missing = [path for path, each in outcomes.items() if each is None or each.settings != wanted[path]]
    advance((len(wanted) - len(missing)) * len(task.cells(head)))
    if missing:
        trained = run_trials(task, engine, head, modality, [wanted[path] for path in missing], advance, keep)
        for path, outcome in zip(missing, trained, strict=True):
            save_outcome(outcome, path)
            outcomes[path] = outcome
    return [each for each in outcomes.values() if each is not None]


def _optimism(
    task: Task, outcomes: list[Outcome], logits: np.ndarray, decisions: list[Decision], adjustment: float | None
) -> float:
    """What macro-F1 gains if settings and thresholds are chosen on the very rows that are scored."""
    rows = task.splits.tested
    labels = task.targets.matrix[rows]
    honest = np.mean(macro_f1(labels, decide(task, logits, decisions)[0][:, rows]))
    naive = [
        np.mean(macro_f1(labels, fit_on_all(task, each.logits, adjustment).choose(each.logits[:, rows])))
        for each in outcomes
    ]
    return float(max(naive) - honest)


def _parameters(engine: Engine, head: str, modality: str, targets: Targets) -> int | None:
    """Of one head; None for baselines, whose size is not told by their shape."""
    if head in BASELINES:
        return None
    shape = engine.bench.data(head, modality).shape
    return count_parameters(load_fusion(head), shape, len(targets.classes))


def _curves(task: Task, head: str, outcome: Outcome) -> str:
    """A row for each epoch of each head, or each candidate of a baseline."""
    rows = [
        {"fold": task.splits.names[fold], "seed": repeat + 1, **line}
        for (fold, repeat, _), history in zip(task.cells(head), outcome.histories, strict=True)
        for line in history
    ]
    header = list(rows[0]) if rows else ["fold", "seed"]
    return csv_text(header, [[row.get(name, "") for name in header] for row in rows])


def _read_finals(path: Path, trials: int) -> dict[str, Any] | None:
    """What `metrics.json` tells of the final heads, if they were chosen among so many trials and are as they were
    saved; the scores are computed again."""
    try:
        record = read_json(path)
        found = {name: record[name] for name in ("parameters", "seconds", "final")}
        return found if record["trials"] == trials and finals_are_whole(path.parent, found["final"]) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path}: not whole ({error}); delete it and run mmfeat heads again") from error
