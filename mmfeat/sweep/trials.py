"""A trial is one setting of one head, trained on every fold with every seed; its choices, probabilities and scores.

Nothing is fitted on rows that it scores.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mmfeat.evaluation.blending import mean_logits
from mmfeat.evaluation.decisions import Decision, fit_decision
from mmfeat.evaluation.metrics import evaluate, plain_headline
from mmfeat.heads.jobs import Engine, Fitted, Job, stack_size
from mmfeat.heads.registry import BASELINES, SHARED, HeadSettings, settings_of
from mmfeat.heads.stack import Member, epoch_steps
from mmfeat.runs.entry import FinalHead, Scores, convert
from mmfeat.runs.record import OUT_OF_FOLD, read_trial, trial_checksum, whole_trial
from mmfeat.samples.labels import Targets, cells_of
from mmfeat.sweep.problem import Cell, Problem
from mmfeat.system.files import csv_text, file_sha256, write_atomic, write_json
from mmfeat.system.wording import Advance, ignore

DIVERGED = -1e9  # R2 of a head that diverged
Chunk: TypeAlias = "list[tuple[int, HeadSettings, Cell]]"  # trainings of one stack, with the numbers of their settings
BY_CELL = ("validation", "histories", "best_epochs", "chosen", "fitted")  # lists of an outcome, fold after fold


def cross_fit(
    problem: Problem, logits: np.ndarray, validation: list[np.ndarray], adjustment: float | None
) -> list[Decision]:
    """A decision for each fold, fitted on the test rows of the others; on validation rows where there is one fold."""
    everything = range(len(problem.splits))
    decisions = []
    for fold in everything:
        tests = [problem.splits.fold(other, 0).test for other in everything if other != fold]
        prior = problem.targets.take(problem.splits.fold(fold, 0).train).prior
        if tests:
            rows = np.concatenate(tests)
            pooled, labels = _pooled(logits, rows), _repeated(problem.targets, rows, len(logits))
        else:
            cells = [problem.splits.fold(fold, repeat).validation for repeat in range(len(logits))]
            pooled, labels = np.concatenate(validation), problem.targets.take(np.concatenate(cells))
        decisions.append(fit_decision(pooled, labels, prior, adjustment, problem.seed))
    return decisions


def fit_on_all(problem: Problem, logits: np.ndarray, adjustment: float | None) -> Decision:
    """The decision of the final heads, fitted on all predictions out of fold."""
    rows = problem.splits.tested
    labels = _repeated(problem.targets, rows, len(logits))
    return fit_decision(_pooled(logits, rows), labels, problem.targets.prior, adjustment, problem.seed)


def decide(problem: Problem, logits: np.ndarray, decisions: list[Decision]) -> tuple[np.ndarray, np.ndarray]:
    """(1, N, C) choices and probabilities of the S seeds together, as final heads predict, each fold by its own
    decision; False and NaN where no fold tests. In a regression both are the numbers that are predicted."""
    shape = (1, *logits.shape[1:])
    chosen, probabilities = np.zeros(shape, problem.targets.matrix.dtype), np.full(shape, np.nan)
    for fold, decision in enumerate(decisions):
        test = problem.splits.fold(fold, 0).test
        together = mean_logits(logits[:, test], decision)
        chosen[0, test] = decision.choose(together)
        probabilities[0, test] = decision.probabilities(together)
    return chosen, probabilities


def score(problem: Problem, logits: np.ndarray, decisions: list[Decision]) -> dict[str, Any]:
    """Every score of the tested rows, by its name in an `Entry`."""
    tested, groups = problem.splits.tested, problem.splits.tested_groups
    chosen, probabilities = (values[:, tested] for values in decide(problem, logits, decisions))
    alone = np.concatenate([decide(problem, seed[None], decisions)[0][:, tested] for seed in logits])
    values = evaluate(problem.tested, chosen, probabilities, problem.seed, groups, alone)
    return vars(convert(values, Scores))


def write_predictions(folder: Path, problem: Problem, logits: np.ndarray, decisions: list[Decision]) -> str:
    """Write `out_of_fold.csv`: id, label, the choice, and the probability of each class, or the predicted number alone.

    Returns the SHA-256 of the file.
    """
    (chosen,), (probabilities,) = decide(problem, logits, decisions)
    classes, tested = problem.targets.classes, problem.splits.tested
    named = () if problem.targets.numeric else classes
    columns = [[problem.ids[row] for row in tested]]
    columns += [cells_of(choice[tested], classes) for choice in (problem.targets.matrix, chosen)]
    columns += [[f"{value:.6f}" for value in values] for values in probabilities[tested].T[: len(named)].tolist()]
    header = ["id", "label", "predicted_1", *(f"p_{name}" for name in named)]
    data = csv_text(header, zip(*columns, strict=True)).encode()
    write_atomic(folder / OUT_OF_FOLD, data)
    return hashlib.sha256(data).hexdigest()


def _pooled(logits: np.ndarray, rows: np.ndarray) -> np.ndarray:
    return logits[:, rows].reshape(-1, logits.shape[-1])


def _repeated(targets: Targets, rows: np.ndarray, times: int) -> Targets:
    return targets.take(np.tile(rows, times))


@dataclass(frozen=True)
class Outcome:
    """A trial that is done. Lists have an item for each cell, fold after fold.

    `logits` (S, N, C) are out of fold, NaN where no fold tests; `validation` holds the (m, C) logits of each cell's
    validation rows and `scores` (S, F) the score of their plain choices, macro-F1 or that of another task.
    """

    settings: HeadSettings
    logits: np.ndarray
    validation: list[np.ndarray]
    scores: np.ndarray
    histories: list[list[dict[str, Any]]]
    best_epochs: list[int]
    chosen: list[dict[str, float]]
    seconds: float
    fitted: list[Fitted] = field(default_factory=list)

    @property
    def score(self) -> float:
        """Mean score on the validation rows, which a search maximises."""
        return float(self.scores.mean())

    @property
    def repeats(self) -> int:
        """S, the number of seeds."""
        return len(self.scores)

    def first(self, repeats: int) -> Outcome:
        """The outcome of the first seeds alone."""
        lists: dict[str, Any] = {name: _by_cell([getattr(self, name)], [self.repeats], repeats) for name in BY_CELL}
        return replace(self, logits=self.logits[:repeats], scores=self.scores[:repeats], **lists)

    def joined(self, further: Outcome) -> Outcome:
        """The outcome with the seeds of `further` behind its own; without the tensors of the heads."""
        both = (self, further)
        values: dict[str, Any] = {"seconds": self.seconds + further.seconds}
        values |= {name: np.concatenate([getattr(part, name) for part in both]) for name in ("logits", "scores")}
        for name in BY_CELL:
            values[name] = _by_cell([getattr(part, name) for part in both], [part.repeats for part in both])
        return replace(self, **{**values, "fitted": []})


@dataclass(frozen=True)
class HeadTrainer:
    """Trains one head on one modality, on the folds and seeds of a problem."""

    problem: Problem
    engine: Engine
    head: str
    modality: str

    def run(
        self, settings: Sequence[HeadSettings], advance: Advance, keep: bool = False, since: int = 0
    ) -> list[Outcome]:
        """Train each of `settings` on all folds and on the seeds from number `since`; heads whose settings allow it
        are stacked.

        With `keep` the outcomes hold the tensors of the heads.
        """
        cells = [cell for cell in self.problem.cells(self.head) if cell[1] >= since]
        chunks = self._chunks(settings, cells)
        results: list[list[Fitted]] = [[] for _ in settings]
        for chunk, fitted in zip(chunks, self.engine.run(self._jobs(chunks, keep), advance), strict=True):
            for (number, _, _), result in zip(chunk, fitted, strict=True):
                results[number].append(result)
        return [self._outcome(*each, cells, keep) for each in zip(settings, results, strict=True)]

    def jobs(self, settings: Sequence[HeadSettings]) -> list[Job]:
        """The jobs that train each of `settings` on all folds and seeds."""
        return self._jobs(self._chunks(settings, self.problem.cells(self.head)))

    def refit(self, best: Outcome) -> list[Fitted]:
        """Train on all labelled samples, as long and as slowly as the heads of the folds did on average."""
        problem, everything, nothing = self.problem, np.arange(len(self.problem.targets)), np.empty(0, np.int64)
        settings = replace(best.settings, batch_size=min(best.settings.batch_size, len(everything)))
        steps = epoch_steps(len(everything), settings.batch_size)
        replay = replayed(best.best_epochs, best.histories) if self.head not in BASELINES else None
        members = tuple(
            Member(settings, everything, nothing, (problem.seed, len(problem.splits), repeat), steps, replay)
            for repeat in range(problem.repeats_of(self.head))
        )
        setting = _middle(best.chosen) if self.head in BASELINES else None
        job = Job(self.head, self.modality, members, ((nothing,),) * len(members), setting, problem.products, keep=True)
        return self.engine.run([job], ignore)[0]

    def fold_heads(self, best: Outcome) -> list[Fitted]:
        """The heads of the folds; the heads of a trial that was read from disk are trained again."""
        if best.fitted:
            return best.fitted
        (again,) = self.run([best.settings], ignore, keep=True)
        return again.fitted

    def _stack_size(self, settings: HeadSettings) -> int:
        data = self.engine.bench.data(self.head, self.modality)
        return stack_size(self.head, data, len(self.problem.targets.classes), settings.batch_size)

    def _chunks(self, settings: Sequence[HeadSettings], cells: Sequence[Cell]) -> list[Chunk]:
        """The trainings of one stack each, with the numbers of their settings."""
        groups: dict[tuple[Any, ...], Chunk] = {}
        for number, setting in enumerate(settings):
            shared = tuple(getattr(setting, name) for name in SHARED)
            groups.setdefault(shared, []).extend((number, setting, cell) for cell in cells)
        return [chunk for group in groups.values() for chunk in _chunks(group, self._stack_size(group[0][1]))]

    def _jobs(self, chunks: Sequence[Chunk], keep: bool = False) -> list[Job]:
        sizes = self.problem.splits.training_sizes  # one size for each fold and seed
        most, fewest = max(sizes), max(2, min(sizes))  # no batch is larger than any training fold
        jobs = []
        for chunk in chunks:
            members, predict, splits = [], [], self.problem.splits
            for _, settings, (fold, repeat, rows) in chunk:
                steps = epoch_steps(most, settings.batch_size)
                whole = np.union1d(rows.train, rows.validation)
                settings = replace(settings, batch_size=min(settings.batch_size, fewest))
                seed = (self.problem.seed, fold, repeat)
                parts = splits.inner(fold, repeat, self.problem.targets, seed[0]) if self.head in BASELINES else ()
                member = Member(settings, rows.train, rows.validation, seed, steps, None, whole, parts, splits.groups)
                members.append(member)
                predict.append((rows.validation, rows.test))
            rest = None, self.problem.products, keep
            jobs.append(Job(self.head, self.modality, tuple(members), tuple(predict), *rest))
        return jobs

    def _outcome(self, settings: HeadSettings, fitted: list[Fitted], cells: list[Cell], keep: bool) -> Outcome:
        problem, since = self.problem, cells[0][1]
        repeats = problem.repeats_of(self.head) - since
        validation = [_as_saved(result.logits[0]) for result in fitted]
        logits = np.full((repeats, len(problem.targets), len(problem.targets.classes)), np.nan)
        scores = np.full((repeats, len(problem.splits)), DIVERGED if problem.targets.numeric else 0.0)
        for (fold, repeat, rows), result, seen in zip(cells, fitted, validation, strict=True):
            logits[repeat - since, rows.test] = _as_saved(result.logits[1])
            if np.isfinite(seen).all():  # a head that diverged scores 0 and loses against any other
                scores[repeat - since, fold] = plain_headline(problem.targets.take(rows.validation), seen)
        return Outcome(
            settings,
            logits,
            validation,
            scores,
            [result.history for result in fitted],
            [result.best_epoch for result in fitted],
            [result.setting for result in fitted],
            sum(result.seconds for result in fitted),
            fitted if keep else [],
        )


def save_outcome(outcome: Outcome, path: Path) -> None:
    """`PATH.safetensors` with the logits, `PATH.seconds`, whose bytes alone differ when the trial is repeated, then
    `PATH.json`, whose existence says that all are there; an outcome with fewer seeds is replaced."""
    from safetensors.numpy import save

    tensors = {"logits": outcome.logits.astype(np.float32)}
    tensors |= {f"validation.{cell}": logits.astype(np.float32) for cell, logits in enumerate(outcome.validation)}
    file, described = (path.with_name(f"{path.name}.{kind}") for kind in ("safetensors", "json"))
    described.unlink(missing_ok=True)
    write_atomic(file, save(tensors))
    record = {
        "settings": asdict(outcome.settings),
        "scores": outcome.scores.tolist(),
        "histories": outcome.histories,
        "best_epochs": outcome.best_epochs,
        "chosen": outcome.chosen,
    }
    write_atomic(path.with_name(f"{path.name}.seconds"), f"{outcome.seconds:.2f}\n".encode())
    write_json(described, {**record, "sha256": trial_checksum(record, file)})


def load_outcome(path: Path) -> Outcome | None:
    """Read the outcome that `save_outcome` wrote; None if there is none. Raises `RunError` for a damaged file."""
    from safetensors.numpy import load_file

    if not path.with_name(f"{path.name}.json").exists():
        return None
    values = read_trial(path)
    with whole_trial(path):
        tensors = load_file(path.with_name(f"{path.name}.safetensors"))
        if "seconds" not in values:  # an earlier version wrote them here
            values["seconds"] = float(path.with_name(f"{path.name}.seconds").read_text())
        return Outcome(
            logits=tensors["logits"].astype(np.float64),
            validation=[tensors[f"validation.{cell}"].astype(np.float64) for cell in range(len(tensors) - 1)],
            settings=settings_of(values.pop("settings")),
            scores=np.array(values.pop("scores")),
            **values,
        )


def _by_cell(parts: Sequence[Sequence[Any]], repeats: Sequence[int], most: int | None = None) -> list[Any]:
    """The items of several lists, each with so many seeds a fold, in one list fold after fold; `most` seeds of each."""
    folds = len(parts[0]) // repeats[0]
    pairs = list(zip(parts, repeats, strict=True))
    return [item for fold in range(folds) for part, n in pairs for item in part[fold * n : (fold + 1) * n][:most]]


def _chunks(items: list[Any], size: int) -> list[list[Any]]:
    """Parts of at most `size` items, as equal as can be; an even number of parts, so that two cores end together.

    The number of workers has no say, because rounding differs a little with the size of a stack.
    """
    count = -(-len(items) // size)
    count = min(count + count % 2, len(items)) if count > 1 else count
    bounds = np.linspace(0, len(items), count + 1).round().astype(int)
    return [items[start:stop] for start, stop in itertools.pairwise(bounds)]


def _as_saved(logits: np.ndarray) -> np.ndarray:
    """Round as the file does, so that an interrupted run goes on with the numbers of an uninterrupted one."""
    return logits.astype(np.float32).astype(np.float64)


def replayed(best_epochs: Sequence[int], histories: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[float, ...]:
    """The scale of the learning rate for each epoch: the folds' geometric mean, for their mean number of epochs."""
    epochs = max(1, round(float(np.mean([epoch + 1 for epoch in best_epochs]))))
    scales = [[entry["scale"] for entry in history] for history in histories]
    longest = [[line[min(epoch, len(line) - 1)] for line in scales] for epoch in range(epochs)]
    return tuple(float(np.exp(np.mean(np.log(line)))) for line in longest)


def save_finals(folder: Path, finals: list[Fitted]) -> tuple[FinalHead, ...]:
    """Write `final-N.safetensors` for each head that predicts; the result rebuilds the heads."""
    from safetensors.numpy import save

    saved = []
    for number, fitted in enumerate(finals):
        path = folder / f"final-{number}.safetensors"
        write_atomic(path, save({name: np.ascontiguousarray(value) for name, value in fitted.tensors.items()}))
        saved.append(FinalHead(path.name, file_sha256(path), fitted.config))
    return tuple(saved)


def _middle(chosen: list[dict[str, float]]) -> dict[str, float]:
    """The median of the settings that the folds of a baseline chose; some folds may have sampled their rows."""
    names = [name for name in chosen[0] if all(name in setting for setting in chosen)]
    return {name: sorted(setting[name] for setting in chosen)[(len(chosen) - 1) // 2] for name in names}
