"""Reliability: calibration of probabilities, and accuracy when doubtful samples are left out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmfeat.evaluation.metrics import BINS, wilson
from mmfeat.report.plots import GRID, SERIES, new_drawing
from mmfeat.report.section import Figure, Section, Table, interval, number, share, title_of
from mmfeat.report.subject import Subject
from mmfeat.runs.out_of_fold import OutOfFold

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


COMPARED = 8  # entries in the table of calibration
SHARES = (1.0, 0.9, 0.75, 0.5, 0.25)


def reliability_section(subject: Subject) -> Section:
    """The section with reliability diagram, accuracy of the surest samples, and calibration of the best entries."""
    predictions = subject.predictions()
    entry, config = subject.entry, subject.run.config
    error = interval(entry.calibration_error)
    floor = entry.decision.floor
    chose = "other folds" if len(config.folds) > 1 else "validation rows"
    words = [
        f"Expected calibration error of {title_of(entry)}: {error}; 0 is perfect, and chance alone keeps it above 0. "
        f"Probabilities are calibrated by a temperature, one bias a class and a floor for wrong labels ({floor:.1%}), "
        f"which {chose} chose."
    ]
    return Section(
        "reliability",
        "Calibration",
        words,
        [diagram(predictions)],
        [_by_share(*surest(predictions)), _compared(subject)],
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
    def draw() -> Drawing:
        drawing, (left, right) = new_drawing(3.0, 2)
        _reliability(left, *confidences(predictions))
        _coverage(right, *surest(predictions))
        return drawing

    shown = (
        "how often a class is there by its probability" if predictions.targets.multilabel else "accuracy by confidence"
    )
    caption = f"Left: {shown}, with 95 % intervals; bars are how many. Right: accuracy of the surest samples"
    return Figure(
        "reliability", caption, "points on the diagonal are calibrated; the table has accuracy by share", draw
    )


def _reliability(axes: Axes, confidence: np.ndarray, right: np.ndarray) -> None:
    bins = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    present = counts > 0
    count = counts[present]
    where = np.bincount(bins, confidence, BINS)[present] / count
    accuracy = np.bincount(bins, right, BINS)[present] / count
    low, high = wilson(accuracy, count)
    axes.bar((np.arange(BINS) + 0.5) / BINS, counts / counts.max() * 0.3, 0.9 / BINS, color=GRID)
    axes.plot([0, 1], [0, 1], color=SERIES[7], linewidth=1, linestyle="--")
    beside = np.maximum([accuracy - low, high - accuracy], 0)  # rounding may put an end slightly past the accuracy
    axes.errorbar(where, accuracy, beside, fmt="o", color=SERIES[0], markersize=4, linewidth=1.2)
    axes.set(xlabel="confidence", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))


def _coverage(axes: Axes, confidence: np.ndarray, right: np.ndarray) -> None:
    order = np.argsort(-confidence, kind="stable")
    kept = np.arange(1, len(order) + 1)
    accuracy = np.cumsum(right[order]) / kept
    low, high = wilson(accuracy, kept)
    first = max(1, len(order) // 50)  # the accuracy of fewer samples is noise
    shown = np.unique(np.linspace(first - 1, len(order) - 1, 200).astype(int))
    axes.fill_between(kept[shown] / len(order), low[shown], high[shown], color=SERIES[0], alpha=0.2, linewidth=0)
    axes.plot(kept[shown] / len(order), accuracy[shown], color=SERIES[0])
    axes.set(xlabel="share of the samples, surest first", ylabel="accuracy", xlim=(0, 1))


def _by_share(confidence: np.ndarray, right: np.ndarray) -> Table:
    order = np.argsort(-confidence, kind="stable")
    rows = []
    for part in SHARES:
        kept = order[: max(1, round(part * len(order)))]
        least = number(float(confidence[kept[-1]]))
        rows.append([f"{part:.0%}", f"{len(kept):,}", least, share(right[kept].mean(), len(kept))])
    header = ["surest", "samples", "confidence at least", "accuracy of what is most probable"]
    return Table("coverage", "What setting doubtful samples aside brings", header, rows)


def _compared(subject: Subject) -> Table:
    rows = [
        [
            title_of(entry),
            interval(entry.calibration_error),
            interval(entry.log_loss),
            number(entry.decision.temperature, 2),
            number(entry.decision.strength, 2),
        ]
        for entry in subject.run.leaderboard[:COMPARED]
    ]
    header = ["", "calibration error", "log-loss", "temperature", "logit adjustment"]
    return Table("calibration", "Calibration of the best entries", header, rows)
