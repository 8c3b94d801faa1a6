"""Results of stage 2: its entries beside stage 1, their paired test, the gap to training rows, and the run on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from mmfeat.encoders.delta import Delta, write_delta
from mmfeat.encoders.registry import describe_encoders, kept_for
from mmfeat.evaluation.decisions import plain_choice
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.evaluation.protocol import files_hash
from mmfeat.evaluation.significance import LEVEL, holm, majority, mcnemar, paired_difference
from mmfeat.finetune.cells import ALPHAS, STAGE_2, CellResult, blended
from mmfeat.finetune.model import HEAD, TunableModel
from mmfeat.finetune.prepare import Experiment
from mmfeat.finetune.settings import EARLY
from mmfeat.finetune.stage_one import StageOne
from mmfeat.finetune.towers import TowerPlan
from mmfeat.finetune.training import tensors_under
from mmfeat.runs.entry import FinalHead, PairedTest, TunedTower
from mmfeat.runs.leaderboard import write_leaderboard
from mmfeat.runs.record import Maker
from mmfeat.runs.run import Moved, Run, write_run
from mmfeat.sweep.entries import TrainedEntry, scored_entry
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.train_all import rank
from mmfeat.sweep.trials import cross_fit, decide, save_finals
from mmfeat.system.files import file_sha256, write_atomic

STAGE_1, WISE = "stage-1", "wise-ft"
GAP = 0.05  # the growth of the gap between training and test rows from which on stage 2 is said to overfit


@dataclass(frozen=True)
class Alphas:
    """The shares of stage 2 in the weights, as indices of ALPHAS: one for each fold, and one for the final models."""

    folds: list[int]
    final: int


@dataclass(frozen=True)
class TrainedStages:
    """Both stages, trained: stage 1, the results of stage 2 for the cells of `folds` and for the final cells, and a
    `model` that takes final weights."""

    first: StageOne
    folds: list[CellResult]
    finals: list[CellResult]
    model: TunableModel

    def final_state(self, seed: int, alpha: float) -> Mapping[str, Tensor]:
        state = self.finals[seed].state
        if alpha == 1.0:
            return state
        head = {HEAD + name: value[None] for name, value in self.first.finals[seed].items()}
        return blended({**self.model.first, **head}, state, alpha)


def choose_alphas(problem: Problem, results: Sequence[CellResult]) -> Alphas:
    """The shares with the best macro-F1 on validation rows, the mean over seeds; the least of equal ones."""
    scores = np.zeros((len(problem.splits), len(ALPHAS)))
    for (fold, _, rows), result in zip(problem.cells(STAGE_2), results, strict=True):
        labels = problem.targets.matrix[rows.validation]
        choices = [plain_choice(logits, problem.targets.multilabel) for logits in result.validation]
        scores[fold] += [macro_f1(labels, choice) / problem.repeats for choice in choices]
    return Alphas(scores.argmax(1).tolist(), int(scores.mean(0).argmax()))


def _entry(experiment: Experiment, results: Sequence[CellResult], name: str, alphas: Alphas) -> TrainedEntry:
    """The entry of stage 2 at the share of each fold; the decision of a fold is fitted on the predictions of the other
    folds."""
    problem, adjustment = experiment.problem, experiment.adjustment
    logits = np.full((problem.repeats, len(problem.targets), len(problem.targets.classes)), np.nan)
    validation = []
    for (fold, repeat, rows), result in zip(problem.cells(STAGE_2), results, strict=True):
        logits[repeat, rows.test] = result.test[alphas.folds[fold]]
        validation.append(result.validation[alphas.folds[fold]].astype(np.float64))
    decisions = cross_fit(problem, logits, validation, adjustment)
    return scored_entry(
        problem, logits, decisions, validation, adjustment,
        head=name,
        modalities=experiment.chosen.modality,
        fusion=experiment.fusion,
        views=experiment.views,
        alphas=tuple(ALPHAS[index] for index in alphas.folds) if name == WISE else None,
        trials=1,
        settings=experiment.settings.of_head(experiment.chosen.best),
        seconds=round(sum(result.seconds for result in results), 2),
    )  # fmt: skip


def gap(
    problem: Problem, entry: TrainedEntry, results: Sequence[CellResult], alphas: Sequence[int]
) -> dict[str, float]:
    """Mean macro-F1 without any adjustment on training, validation and test rows. A model that learned training
    rows by heart has a wide gap between the first score and the last."""
    multilabel, matrix = problem.targets.multilabel, problem.targets.matrix
    cells = problem.cells(STAGE_2)
    train = [result.train_scores[alphas[fold]] for (fold, _, _), result in zip(cells, results, strict=True)]
    validation = [
        macro_f1(matrix[rows.validation], plain_choice(logits, multilabel))
        for (_, _, rows), logits in zip(cells, entry.validation, strict=True)
    ]
    rows = problem.splits.tested
    test = [macro_f1(matrix[rows], plain_choice(logits[rows], multilabel)) for logits in entry.logits]
    scores = {"train": train, "validation": validation, "test": test}
    return {name: float(np.mean(values)) for name, values in scores.items()}


def against_first(problem: Problem, entries: Sequence[TrainedEntry]) -> list[PairedTest]:
    """The differences of macro-F1 between the first entry and each other one, by paired bootstrap and McNemar."""
    rows = problem.splits.tested
    targets, groups = problem.tested, problem.splits.tested_groups
    choices = [decide(problem, entry.logits, entry.decisions)[0][:, rows] for entry in entries]
    correct = [majority((choice == targets.matrix).all(-1)) for choice in choices]
    differences = [paired_difference(targets, choice, choices[0], problem.seed, groups) for choice in choices[1:]]
    disagreements = [mcnemar(right, correct[0]) for right in correct[1:]]
    adjusted = holm([difference.p for difference in differences])
    return [
        PairedTest(**vars(difference), p_holm=float(p), mcnemar=disagreement)
        for difference, disagreement, p in zip(differences, disagreements, adjusted, strict=True)
    ]


def warning(first: Mapping[str, float], second: Mapping[str, float], difference: PairedTest) -> str:
    """A line for the user where stage 2 learned its training rows by heart or is worse than stage 1, else ""."""
    grown = (second["train"] - second["test"]) - (first["train"] - first["test"])
    promised, kept = second["validation"] - first["validation"], second["test"] - first["test"]
    if difference.p_holm < LEVEL and difference.value > 0:
        return ""
    if difference.p_holm < LEVEL:
        return f"stage 2 is worse than stage 1 ({difference.value:+.3f} macro-F1); lower --lr-encoder or unfreeze less"
    if grown > GAP:
        return (
            f"stage 2 overfits: training rows gain {second['train'] - first['train']:+.3f} macro-F1, test rows "
            f"{kept:+.3f}; lower --lr-encoder or --lr-head, or unfreeze less"
        )
    if promised - kept > GAP:
        return (
            f"stage 2 gains {promised:+.3f} macro-F1 on validation rows and {kept:+.3f} on test rows; "
            "prefer wise-ft or stage 1"
        )
    return ""


def _save_final(
    folder: Path, number: int, model: TunableModel, state: Mapping[str, Tensor], experiment: Experiment
) -> FinalHead:
    """Save the head of seed `number` and the deltas of its towers; returns the record that the entry keeps of them."""
    from safetensors.torch import save

    path = folder / f"final-{number}.safetensors"
    head = {name: value.cpu() for name, value in tensors_under(HEAD, state).items()}
    if model.head.is_stacked:  # saved as other heads are, without the axis of heads
        head = {name: value[0] for name, value in head.items()}
    write_atomic(path, save({name: value.contiguous() for name, value in head.items()}))
    model.load(state)
    towers = []
    for tower in model.towers:
        if tower.plan is None or not tower.parameters:
            continue
        moved = tower.merged() if tower.merged else tower.parameters
        spec = tower.plan.tower.spec
        file = folder / f"{spec.tower}-{tower.slot.number}-{number}.safetensors"
        write_delta(file, Delta(tower.plan.tower.request, spec, f"{experiment.folder.name}-{number}"), moved)
        options = replace(experiment.parent.options, outputs=("pooled",), views=0)
        request = f"finetuned:{file.resolve()}"
        (tuned,) = describe_encoders([request], kept_for([request], options))
        towers.append(TunedTower(file.name, file_sha256(file), tower.slot.name, tuned.spec))
    return FinalHead(path.name, file_sha256(path), towers=tuple(towers))


def finish_run(experiment: Experiment, trained: TrainedStages, maker: Maker) -> None:
    """Score both stages, compare them, and save everything that the run consists of."""
    problem, folder, config, chosen = experiment.problem, experiment.folder, experiment.config, experiment.chosen
    first = trained.first.entry.updated(
        head=STAGE_1, fusion=chosen.head, views=experiment.parent.config.options.views, seconds=0.0
    )
    nothing, later = _shares(experiment, trained.folds)
    entries = [first, *(_entry(experiment, trained.folds, name, alphas) for name, alphas in later.items())]
    tests = against_first(problem, entries)
    gaps = [
        gap(problem, entry, trained.folds, alphas.folds)
        for entry, alphas in zip(entries, (nothing, *later.values()), strict=True)
    ]
    if experiment.fusion == EARLY:
        del gaps[0]["train"]  # the cells of early fusion measured their own heads, not stage 1
    saved = [first.updated(scores=gaps[0], final=save_finals(folder / first.name, trained.first.fitted))]
    saved = [saved[0].save(folder, problem)]
    for entry, scores, test, alphas in zip(entries[1:], gaps[1:], tests, later.values(), strict=True):
        entry = _with_finals(experiment, trained, entry, ALPHAS[alphas.final])
        entry = entry.updated(scores=scores, over_stage_1=test)
        saved.append(entry.save(folder, problem, [result.history for result in trained.folds]))
    leaderboard = rank(problem, saved)
    write_leaderboard(folder, leaderboard, problem.targets.classes)
    results = replace(
        experiment.parent.results,
        widths=experiment.features.widths,
        leaderboard=leaderboard,
        record=maker.record(config),
        splits=files_hash(folder),
        moving=tuple(_moved(trained.model, plan) for plan in experiment.plans),
        warning=warning(gaps[0], gaps[1], tests[0]) if experiment.fusion != EARLY else "",
    )
    write_run(Run(folder, config, results))


def _shares(experiment: Experiment, results: Sequence[CellResult]) -> tuple[Alphas, dict[str, Alphas]]:
    """The shares of stage 2 in stage 1, which are 0, and in each other entry, by the name of its head."""
    folds, last = len(experiment.problem.splits), len(ALPHAS) - 1
    nothing, whole = Alphas([0] * folds, 0), Alphas([last] * folds, last)
    if experiment.fusion == EARLY:
        return nothing, {EARLY: whole}
    return nothing, {STAGE_2: whole, WISE: choose_alphas(experiment.problem, results)}


def _with_finals(experiment: Experiment, trained: TrainedStages, entry: TrainedEntry, alpha: float) -> TrainedEntry:
    """Save the final models of an entry with the share `alpha` of stage 2; returns the entry with their records."""
    folder, model = experiment.folder / entry.name, trained.model
    finals = tuple(
        _save_final(folder, seed, model, trained.final_state(seed, alpha), experiment)
        for seed in range(len(trained.finals))
    )
    return entry.updated(alpha=alpha, parameters=sum(p.numel() for p in model.parameters().values()), final=finals)


def _moved(model: TunableModel, plan: TowerPlan) -> Moved:
    moving = next(tower for tower in model.towers if tower.plan == plan)
    count = sum(parameter.numel() for parameter in moving.parameters.values())
    return Moved(plan.tower.spec.model, plan.count, count, plan.path, plan.reason)
