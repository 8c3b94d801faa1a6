"""Whether predictions can be believed: probabilities, accuracy without the doubtful samples, and errors of numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmfeat.evaluation.metrics import BINS, above_chance, calibration_errors, wilson
from mmfeat.report.plots import GRID, SERIES, new_drawing
from mmfeat.report.section import Card, Figure, Section, Subject, Table, interval, make_card, number, share, title_of
from mmfeat.runs.record import OutOfFold
from mmfeat.system.wording import SCORE_NAMES, rounded

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


FEW = 20  # answers; a smaller group of a confidence says little
OFF_BY_CHANCE = 0.1  # share of groups whose 95 % interval may miss the confidence before the diagram counts as off
SHARES = (1.0, 0.9, 0.75, 0.5, 0.25)
SHOWN = 24  # largest errors
POINTS = 1500  # most points of a plot
PARTS = 5  # parts of the samples by size of the true number


def reliability_section(subject: Subject) -> Section:
    predictions = subject.predictions()
    entry, config = subject.entry, subject.run.config
    chose = "other folds" if len(config.folds) > 1 else "validation rows"
    errors = calibration_errors(predictions.targets, predictions.probabilities, predictions.groups)
    excess = above_chance(errors[:, 0], entry.calibration_error.high)
    words = [
        judge(*confidences(predictions)),
        f"The calibration error of {title_of(entry)} is {interval(entry.calibration_error)}; less what chance gives, "
        f"{interval(excess)}. Temperature, shift of each class and allowance for wrong labels "
        f"({entry.decision.floor:.1%}) come from {chose}.",
    ]
    return Section("reliability", "Confidence", words, [diagram(predictions)],
                   [_by_share(*surest(predictions)), _by_class(predictions, errors[:, 1:])])  # fmt: skip


def judge(confidence: np.ndarray, right: np.ndarray) -> str:
    """A sentence on calibration: whether the diagram leaves its diagonal more often than chance would have it, in
    groups of at least `FEW` answers, and where most."""
    where, accuracy, low, high, count = _bins(confidence, right)
    off = ((where < low) | (where > high)) & (count >= FEW)
    groups, leaving = int((count >= FEW).sum()), int(off.sum())
    if not groups:
        return "There are too few answers to say whether its confidence can be believed."
    if leaving <= max(1, groups * OFF_BY_CHANCE):
        return (
            f"Its confidence can be believed: in {groups - leaving} of {groups} groups of {FEW} answers or more, as "
            "many are right as the confidence says, but for chance."
        )
    worst = np.argmax(np.where(off, np.abs(where - accuracy) * np.sqrt(count), 0))
    kind = "too sure" if (count * (where - accuracy))[off].sum() > 0 else "not sure enough"
    return (
        f"Its confidence cannot be taken at its word, for it is {kind}: of answers given with {where[worst]:.0%} "
        f"confidence, {accuracy[worst]:.0%} are right, and {leaving} of {groups} groups of answers are off by more "
        "than chance."
    )


def confidences(predictions: OutOfFold) -> tuple[np.ndarray, np.ndarray]:
    """((M,) confidence, (M,) right) for the most probable class of each sample, in multi-label data for every class."""
    if predictions.targets.multilabel:
        return predictions.probabilities.ravel(), predictions.targets.matrix.ravel()
    best = predictions.probabilities.argmax(1)
    rows = np.arange(len(best))
    return predictions.probabilities[rows, best], predictions.targets.matrix[rows, best]


def surest(predictions: OutOfFold) -> tuple[np.ndarray, np.ndarray]:
    """((N,) confidence, (N,) right) for the most probable class of each sample.

    In multi-label data, the confidence of the least certain class, and whether all classes are right.
    """
    if not predictions.targets.multilabel:
        return confidences(predictions)
    likely = predictions.probabilities >= 0.5
    return np.maximum(predictions.probabilities, 1 - predictions.probabilities).min(1), (
        likely == predictions.targets.matrix
    ).all(1)


def diagram(predictions: OutOfFold) -> Figure:
    """The share of answers that are right by their confidence."""

    def draw() -> Drawing:
        drawing, (axes,) = new_drawing(3.0)
        _reliability(axes, *confidences(predictions))
        return drawing

    shown = (
        "How often a class is there by its probability" if predictions.targets.multilabel else "How often it is right"
    )
    caption = f"{shown}, with 95 % intervals; on the line, confidence can be believed. Bars: number of answers"
    return Figure("reliability", caption, "the sentence above says what it shows", draw)


def _bins(confidence: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean confidence, accuracy, its interval's ends, and number of answers in each of `BINS` bins; NaN without."""
    bins = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS)
    some = np.where(count > 0, count, np.nan)
    where, accuracy = np.bincount(bins, confidence, BINS) / some, np.bincount(bins, right, BINS) / some
    return where, accuracy, *wilson(accuracy, some), count


def _reliability(axes: Axes, confidence: np.ndarray, right: np.ndarray) -> None:
    where, accuracy, low, high, count = _bins(confidence, right)
    axes.bar((np.arange(BINS) + 0.5) / BINS, count / count.max() * 0.3, 0.9 / BINS, color=GRID)
    axes.plot([0, 1], [0, 1], color=SERIES[7], linewidth=1, linestyle="--")
    beside = np.fmax([accuracy - low, high - accuracy], 0)  # rounding may put an end slightly past the accuracy
    axes.errorbar(where, accuracy, beside, fmt="o", color=SERIES[0], markersize=4, linewidth=1.2)
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))


def _by_class(predictions: OutOfFold, errors: np.ndarray) -> Table:
    """The mean probability of each class beside its share, and its calibration errors (1 + D, C)."""
    shown = zip(predictions.probabilities.mean(0), predictions.targets.matrix.mean(0), errors.T, strict=True)
    rows = [
        [name, *map(number, (probability, labelled, each[0], above_chance(each, None).value))]
        for name, (probability, labelled, each) in zip(predictions.targets.classes, shown, strict=True)
    ]
    header = ["class", "mean probability", "share of labels", "calibration error", "above chance"]
    return Table("class_calibration", "Whether each class's probability can be believed", header, rows, folded=True)


def _by_share(confidence: np.ndarray, right: np.ndarray) -> Table:
    order = np.argsort(-confidence, kind="stable")
    rows = []
    for part in SHARES:
        kept = order[: max(1, round(part * len(order)))]
        least = number(float(confidence[kept[-1]]))
        rows.append([f"{part:.0%}", f"{len(kept):,}", least, share(right[kept].mean(), len(kept))])
    header = ["surest", "samples", "confidence at least", "accuracy"]
    return Table("coverage", "Accuracy if only the surest answers are taken", header, rows)


def residuals_section(subject: Subject) -> Section:
    """The section with both plots, the errors by size of the true number, and the samples with the largest errors."""
    predictions, entry = subject.predictions(), subject.entry
    errors = (predictions.voted - predictions.targets.matrix)[:, 0]
    largest = np.argsort(-np.abs(errors), kind="stable")[:SHOWN]
    scores = (f"{SCORE_NAMES[name]} {interval(entry.score(name)) or 'not defined'}" for name in entry.score_names)
    words = [
        f"{title_of(entry)}: {', '.join(scores)}.",
        f"Below are the {len(largest)} samples with the largest errors: often it is the label that is wrong.",
    ]
    cards = [_card(subject, predictions, int(row), float(errors[row])) for row in largest]
    return Section("residuals", "Errors", words, [scatter(predictions)], [_by_size(predictions, errors)], cards=cards)


def scatter(predictions: OutOfFold) -> Figure:
    """Predicted against true numbers, and what predictions are off by, of at most `POINTS` samples."""
    rows = np.random.default_rng(0).permutation(len(predictions.ids))[:POINTS]
    true, predicted = predictions.targets.matrix[rows, 0], predictions.voted[rows, 0]

    def draw() -> Drawing:
        drawing, (left, right) = new_drawing(2.8, 2)
        ends = [min(true.min(), predicted.min()), max(true.max(), predicted.max())]
        left.plot(ends, ends, color=GRID)
        left.scatter(true, predicted, s=6, color=SERIES[0], alpha=0.5, linewidths=0)
        left.set(xlabel="true", ylabel="predicted")
        right.axhline(0, color=GRID)
        right.scatter(predicted, predicted - true, s=6, color=SERIES[1], alpha=0.5, linewidths=0)
        right.set(xlabel="predicted", ylabel="predicted less true")
        return drawing

    caption = "Predicted against true numbers, and errors by prediction"
    return Figure("residuals", caption, "the table below has the errors by size of the number", draw)


def _by_size(predictions: OutOfFold, errors: np.ndarray) -> Table:
    true = predictions.targets.matrix[:, 0]
    rows = []
    for part in np.array_split(np.argsort(true, kind="stable"), PARTS):
        if len(part):
            span = f"{true[part[0]]:,.6g} to {true[part[-1]]:,.6g}"
            rows.append([span, f"{len(part):,}", rounded(np.abs(errors[part]).mean()), f"{errors[part].mean():+,.4g}"])
    header = ["true number", "samples", "mean absolute error", "mean of predicted less true"]
    return Table("residuals", "Errors by size of the true number", header, rows)


def _card(subject: Subject, predictions: OutOfFold, row: int, error: float) -> Card:
    id = predictions.ids[row]
    true, predicted = predictions.targets.matrix[row, 0], predictions.voted[row, 0]
    title = f"{predicted:,.6g} instead of {true:,.6g}"
    return make_card(subject.by_id.get(id), title, f"id {id} · off by {error:+,.4g}")
