"""What a fine-tuning is worth: entries of both stages, their paired test, the gap to the training rows, a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmfeat.encoders.delta import Delta, write_delta
from mmfeat.encoders.registry import Tower, describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.evaluation.significance import holm, majority, mcnemar, paired_difference
from mmfeat.finetune.cells import ALPHAS, CellResult, blended
from mmfeat.finetune.model import EARLY, HEAD, TunableModel
from mmfeat.finetune.prepare import Work
from mmfeat.finetune.stage_one import StageOne
from mmfeat.finetune.tower_plan import TowerPlan
from mmfeat.heads.registry import HeadSettings
from mmfeat.heads.stack import plain_choice
from mmfeat.runs.entry import Entry, FinalHead, PairedTest, RunConfig, TunedTower
from mmfeat.runs.leaderboard import write_leaderboard
from mmfeat.runs.record import Maker
from mmfeat.runs.run import CURVES, METRICS, Moved, Run, write_run
from mmfeat.sweep.entries import TrainedEntry
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.train_all import rank
from mmfeat.sweep.trials import cross_fit, decide, fit_on_all, save_finals, score, write_predictions
from mmfeat.system.files import csv_text, file_sha256, write_atomic, write_json

STAGE_1, STAGE_2, WISE = "stage-1", "stage-2", "wise-ft"
GAP = 0.05  # by which the gap between training and test rows may grow before stage 2 is said to overfit


@dataclass(frozen=True)
class Chosen:
    """The share of stage 2 in the weights: of each fold, by its validation rows, and of the final models."""

    folds: list[int]  # places in ALPHAS
    final: int


def choose_alphas(problem: Problem, results: Sequence[CellResult]) -> Chosen:
    """By macro-F1 on validation rows, the mean over seeds; of equal ones the least."""
    scores = np.zeros((len(problem.splits), len(ALPHAS)))
    for (fold, _, rows), each in zip(problem.cells(STAGE_2), results, strict=True):
        labels = problem.targets.matrix[rows.validation]
        choices = [plain_choice(logits, problem.targets.multilabel) for logits in each.validation]
        scores[fold] += [macro_f1(labels, choice) / problem.repeats for choice in choices]
    return Chosen(scores.argmax(1).tolist(), int(scores.mean(0).argmax()))


def make_entry(
    problem: Problem,
    named: Mapping[str, Any],
    results: Sequence[CellResult],
    alphas: Sequence[int],
    adjustment: float | None,
    settings: HeadSettings,
) -> TrainedEntry:
    """The entry of a stage: each fold's predictions at its place in ALPHAS, decided on by those of the other folds."""
    logits = np.full((problem.repeats, len(problem.targets), len(problem.targets.classes)), np.nan)
    validation = []
    for (fold, repeat, rows), each in zip(problem.cells(STAGE_2), results, strict=True):
        logits[repeat, rows.test] = each.test[alphas[fold]]
        validation.append(each.validation[alphas[fold]].astype(np.float64))
    decisions = cross_fit(problem, logits, validation, adjustment)
    entry = Entry(
        **named,
        **score(problem, logits, decisions),
        trials=1,
        settings=settings,
        decision=fit_on_all(problem, logits, adjustment),
        seconds=round(sum(each.seconds for each in results), 2),
    )
    return TrainedEntry(entry, logits, decisions, validation)


def gap(
    problem: Problem, entry: TrainedEntry, results: Sequence[CellResult], alphas: Sequence[int]
) -> dict[str, float]:
    """macro-F1 without any adjustment on training, validation and test rows: what learning by heart looks like."""
    multilabel, matrix = problem.targets.multilabel, problem.targets.matrix
    cells = problem.cells(STAGE_2)
    train = [each.train_scores[alphas[fold]] for (fold, _, _), each in zip(cells, results, strict=True)]
    seen = [
        macro_f1(matrix[rows.validation], plain_choice(logits, multilabel))
        for (_, _, rows), logits in zip(cells, entry.validation, strict=True)
    ]
    rows = problem.splits.tested
    test = [macro_f1(matrix[rows], plain_choice(each[rows], multilabel)) for each in entry.logits]
    return {name: float(np.mean(each)) for name, each in (("train", train), ("validation", seen), ("test", test))}


def against_first(problem: Problem, entries: Sequence[TrainedEntry]) -> list[PairedTest]:
    """How far each entry but the first is above the first: macro-F1 with interval, paired bootstrap, McNemar."""
    rows = problem.splits.tested
    targets = problem.targets.take(rows)
    chosen = [decide(problem, entry.logits, entry.decisions)[0][:, rows] for entry in entries]
    correct = [majority((each == targets.matrix).all(-1)) for each in chosen]
    differences = [paired_difference(targets, choices, chosen[0], problem.seed) for choices in chosen[1:]]
    disagreements = [mcnemar(right, correct[0]) for right in correct[1:]]
    adjusted = holm([difference.p for difference in differences])
    return [
        PairedTest(**vars(difference), p_holm=float(p), mcnemar=disagreement)
        for difference, disagreement, p in zip(differences, disagreements, adjusted, strict=True)
    ]


def warning(first: Mapping[str, float], second: Mapping[str, float], difference: PairedTest) -> str:
    """What a user should know of a stage 2 that learned by heart; "" if it did not."""
    grown = (second["train"] - second["test"]) - (first["train"] - first["test"])
    promised, kept = second["validation"] - first["validation"], second["test"] - first["test"]
    if difference.p_holm < 0.05 and difference.value > 0:
        return ""
    if difference.p_holm < 0.05:
        return f"stage 2 is worse than stage 1 ({difference.value:+.3f} macro-F1); lower --lr-encoder or unfreeze less"
    if grown > GAP:
        return (
            f"stage 2 overfits: training rows gain {second['train'] - first['train']:+.3f} macro-F1, test rows "
            f"{kept:+.3f}; lower --lr-encoder or --lr-head, or unfreeze less"
        )
    if promised - kept > GAP:
        return (
            f"validation rows promise {promised:+.3f} macro-F1, test rows keep {kept:+.3f}; prefer wise-ft or stage 1"
        )
    return ""


def save_entry(folder: Path, problem: Problem, entry: TrainedEntry, curves: Sequence[Mapping[str, Any]] = ()) -> None:
    """Predictions, curves, and last `metrics.json`."""
    place = folder / entry.name
    write_predictions(place, problem, entry.logits, entry.decisions)
    if curves:
        header = list(curves[0])
        write_atomic(
            place / CURVES, csv_text(header, [[line.get(name, "") for name in header] for line in curves]).encode()
        )
    write_json(place / METRICS, entry.entry.to_json())


def save_final(
    folder: Path, number: int, model: TunableModel, state: Mapping[str, Tensor], options: EncoderOptions, run: str
) -> FinalHead:
    """Save the head and the deltas of its towers; the result finds them again."""
    from safetensors.torch import save

    path = folder / f"final-{number}.safetensors"
    head = {name.removeprefix(HEAD): value.cpu() for name, value in state.items() if name.startswith(HEAD)}
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
        write_delta(file, Delta(tower.plan.tower.request, spec, f"{run}-{number}"), moved)
        (tuned,) = _described(f"finetuned:{file.resolve()}", options)
        towers.append(TunedTower(file.name, file_sha256(file), tower.slot.name, tuned.spec))
    return FinalHead(path.name, file_sha256(path), towers=tuple(towers))


def _described(request: str, options: EncoderOptions) -> list[Tower]:
    return describe_encoders([request], EncoderOptions(**{**asdict(options), "outputs": ("pooled",), "views": 0}))


def finish_run(
    work: Work, config: RunConfig, maker: Maker, folder: Path, first: StageOne, results: Sequence[CellResult],
    finals: Sequence[CellResult], model: TunableModel,
) -> None:  # fmt: skip
    """Score, compare and save all there is; `model` is one to put final weights into."""
    problem, stages = work.problem, _stages(work, results)
    entries = _entries(work, first, results, stages)
    tests = against_first(problem, entries)
    gaps = [gap(problem, entry, results, alphas.folds) for entry, alphas in zip(entries, stages.values(), strict=True)]
    if work.fusion == EARLY:
        del gaps[0]["train"]  # the cells know that of their own heads
    predicts = save_finals(folder / entries[0].name, first.fitted)
    records = [_with(entries[0], scores=gaps[0], final=predicts)]
    for entry, scores, test in zip(entries[1:], gaps[1:], tests, strict=True):
        saved = _save_finals(work, folder, entry, model, first, finals, ALPHAS[stages[entry.entry.head].final])
        records.append(_with(entry, scores=scores, over_stage_1=test, **saved))
    for number, entry in enumerate(records):
        save_entry(folder, problem, entry, _curves(problem, results) if number else ())
    leaderboard = rank(problem, records)
    write_leaderboard(folder, leaderboard, problem.targets.classes)
    results_of_run = replace(
        work.parent.results,
        widths=work.features.widths,
        leaderboard=leaderboard,
        record=maker.record(config),
        moving=tuple(_moved(model, plan) for plan in work.plans),
        warning=warning(gaps[0], gaps[1], tests[0]) if work.fusion != EARLY else "",
    )
    write_run(Run(folder, config, results_of_run))


def _stages(work: Work, results: Sequence[CellResult]) -> dict[str, Chosen]:
    """Name of an entry -> the share of stage 2 in its weights."""
    folds = len(work.problem.splits)
    nothing, whole = Chosen([0] * folds, 0), Chosen([len(ALPHAS) - 1] * folds, len(ALPHAS) - 1)
    if work.fusion == EARLY:
        return {STAGE_1: nothing, EARLY: whole}
    return {STAGE_1: nothing, STAGE_2: whole, WISE: choose_alphas(work.problem, results)}


def _entries(
    work: Work, first: StageOne, results: Sequence[CellResult], stages: Mapping[str, Chosen]
) -> list[TrainedEntry]:
    """Stage 1 as it was, then the others from their cells."""
    views = work.parent.config.options.views
    found = [_with(first.entry, head=STAGE_1, fusion=work.chosen.head, views=views, seconds=0.0)]
    for name, alphas in stages.items():
        named = {"head": name, "modalities": work.chosen.modality, "fusion": work.fusion, "views": work.views}
        if name == WISE:
            named["alphas"] = tuple(ALPHAS[place] for place in alphas.folds)
        if name != STAGE_1:
            settings = work.settings.of_head(work.chosen.best)
            found.append(make_entry(work.problem, named, results, alphas.folds, work.adjustment, settings))
    return found


def _with(trained: TrainedEntry, **more: Any) -> TrainedEntry:
    return replace(trained, entry=replace(trained.entry, **more))


def _save_finals(
    work: Work,
    folder: Path,
    entry: TrainedEntry,
    model: TunableModel,
    first: StageOne,
    finals: Sequence[CellResult],
    alpha: float,
) -> dict[str, Any]:
    """What predicts, and what the record says of it."""
    options = work.parent.options
    saved = tuple(
        save_final(folder / entry.name, seed, model, _blend(model, first, each, seed, alpha), options, folder.name)
        for seed, each in enumerate(finals)
    )
    return {"alpha": alpha, "parameters": sum(p.numel() for p in model.parameters().values()), "final": saved}


def _blend(model: TunableModel, first: StageOne, final: CellResult, seed: int, alpha: float) -> Mapping[str, Tensor]:
    """The final weights with this share of stage 2."""
    if alpha == 1.0:
        return final.state
    head = {HEAD + name: value[None] for name, value in first.finals[seed].items()}
    return blended({**model.first, **head}, final.state, alpha)


def _curves(problem: Problem, results: Sequence[CellResult]) -> list[dict[str, Any]]:
    return [
        {"fold": problem.splits.names[fold], "seed": repeat + 1, **line}
        for (fold, repeat, _), each in zip(problem.cells(STAGE_2), results, strict=True)
        for line in each.history
    ]


def _moved(model: TunableModel, plan: TowerPlan) -> Moved:
    own = next(tower for tower in model.towers if tower.plan == plan)
    count = sum(parameter.numel() for parameter in own.parameters.values())
    return Moved(plan.tower.spec.model, plan.count, count, plan.path, plan.reason)
