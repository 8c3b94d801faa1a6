"""Labels in doubt: which are likely wrong, and how high scores can be against labels like these."""

from __future__ import annotations

import numpy as np

from mmfeat.audit.label_errors import estimate_noise, find_label_errors
from mmfeat.report.results import Results
from mmfeat.report.section import MOST_CLASSES, Section, Table, interval, title_of


def doubted_rows(results: Results) -> np.ndarray:
    """Rows of the predictions whose label is likely wrong, the surest first; none where labels are several a sample."""
    found = results.predictions()
    if found.targets.multilabel or not len(found.targets):
        return np.empty(0, np.int64)
    return find_label_errors(found.targets.numbers, found.probabilities).rows


def labels_section(results: Results) -> Section | None:
    """Confident learning on the predictions of the report's entry."""
    found = results.predictions()
    if found.targets.multilabel:
        return None
    noise = estimate_noise(found.targets.numbers, found.probabilities)
    doubted = len(doubted_rows(results))
    words = [
        f"{title_of(results.entry)} is confident of another class than the label for {doubted:,} of {len(found.ids):,} "
        "samples; the gallery below can show just these.",
        f"If the head is right where it is confident, {interval(vars(noise.wrong))} of the labels are wrong, and a "
        f"classifier that is always right would score macro-F1 {interval(vars(noise.macro_f1))} against them: a rough "
        "ceiling (confident learning, Northcutt et al., 2021). A head that errs confidently lowers it.",
    ]
    classes = found.targets.classes
    shares = noise.joint / np.maximum(noise.joint.sum(1, keepdims=True), 1e-12)
    rows = [
        [name, *(f"{share:.0%}" for share in line), interval(vars(score))]
        for name, line, score in zip(classes, shares, noise.by_class, strict=True)
    ]
    header = ["label", *(f"truly {name}" for name in classes), "wrong"]
    shades = [[0.0, *line, 0.0] for line in shares.tolist()]
    table = Table("label-noise", "Estimated true classes of each label", header, rows, shades)
    if len(classes) > MOST_CLASSES:
        short = [[row[0], row[-1]] for row in rows]
        table = Table("label-noise", "Labels estimated to be wrong", ["label", "wrong"], short)
    return Section("labels", "Label errors", words, tables=[table])
