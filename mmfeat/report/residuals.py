"""Residuals: predicted against true numbers of a regression, errors by size of the number, and the largest errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mmfeat.report.card import make_card
from mmfeat.report.plots import GRID, SERIES, new_drawing
from mmfeat.report.section import Card, Figure, Section, Table, interval, title_of
from mmfeat.report.subject import Subject
from mmfeat.runs.out_of_fold import OutOfFold
from mmfeat.system.wording import SCORE_NAMES, rounded

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

SHOWN = 24  # largest errors
POINTS = 1500  # most points of a plot
PARTS = 5  # parts of the samples by size of the true number


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
