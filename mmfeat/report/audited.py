"""Doubts about the data in a report: labels that may be wrong, near duplicates, and what `mmfeat audit` found."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np

from mmfeat.audit.label_errors import estimate_noise, find_label_errors, floor_of
from mmfeat.audit.result import Audit, read_audit
from mmfeat.errors import DataError
from mmfeat.report.section import Section, Subject, Table, in_gallery, interval, make_card, title_of
from mmfeat.runs.record import OutOfFold
from mmfeat.samples.labels import cells_of
from mmfeat.system.wording import counted, shown

SHOWN = 30  # rows of the table of odd files
CARDS = 8  # samples shown of labels in doubt, and of near duplicates


def doubted_rows(subject: Subject) -> np.ndarray:
    """Rows of the predictions whose label is likely wrong, the surest first; none for multi-label data."""
    predictions = subject.predictions()
    if predictions.targets.multilabel or not len(predictions.targets):
        return np.empty(0, np.int64)
    return find_label_errors(predictions.targets.numbers, predictions.probabilities).rows


def twins_of(predictions: OutOfFold) -> np.ndarray:
    """(N,) the number of the group of near duplicates, from 1; 0 for a sample without any."""
    if predictions.groups is None:
        return np.zeros(len(predictions.ids), np.int64)
    _, group, sizes = np.unique(predictions.groups, return_inverse=True, return_counts=True)
    return np.where(sizes > 1, np.cumsum(sizes > 1), 0)[group]


def labels_section(subject: Subject) -> Section | None:
    """The section on label errors, by confident learning on the predictions of the report's entry."""
    predictions = subject.predictions()
    if predictions.targets.multilabel:
        return None
    rows, labels, title = doubted_rows(subject), predictions.targets.numbers, title_of(subject.entry)
    words = [
        f"For {len(rows):,} of {len(labels):,} samples, {title} is confident of another class than the label. Look at "
        "them: some labels are wrong, others are hard."
    ]
    noise = estimate_noise(labels, predictions.probabilities, floor=floor_of(subject.run, subject.entry))
    if noise.claimed:
        share, low, high = (f"{end or 0:.0%}" for end in (noise.wrong.value, noise.wrong.low, noise.wrong.high))
        words.append(
            f"We estimate that {share} [{low}, {high}] of the labels are wrong; then even a classifier that is always "
            f"right would score macro-F1 {interval(noise.macro_f1)} against them. This assumes that confident "
            "predictions are right; a weak model makes it too low."
        )
    else:
        words.append("A model as unsure as this one would doubt as many labels if none were wrong.")
    classes, guesses = predictions.targets.classes, predictions.probabilities
    cards = [
        make_card(
            subject.by_id.get(predictions.ids[row]),
            f"{classes[labels[row]]}? rather {classes[guesses[row].argmax()]}, {guesses[row].max():.0%}",
            f"id {predictions.ids[row]}",
        )
        for row in rows[:CARDS].tolist()
    ]
    links = [(in_gallery(status="doubted"), f"all {len(rows):,} in the gallery, to copy or download")] if cards else []
    return Section("labels", "Labels in doubt", words, cards=cards, links=links)


def duplicates_section(subject: Subject) -> Section | None:
    """The section on near duplicates, which the folds of the run keep together, those with different labels first."""
    predictions = subject.predictions()
    twins = twins_of(predictions)
    if not twins.any():
        return None
    cells = cells_of(predictions.targets.matrix, predictions.targets.classes)
    order = np.argsort(twins, kind="stable")[(twins == 0).sum() :]
    groups = [rows.tolist() for rows in np.split(order, np.flatnonzero(np.diff(twins[order])) + 1)]
    unlike = [rows for rows in groups if len({cells[row] for row in rows}) > 1]
    unclear = f"In {counted(len(unlike), 'group')} the labels differ: one of them is wrong, or the question is unclear."
    words = [
        f"{int((twins > 0).sum()):,} samples look or read almost like another one, in {counted(len(groups), 'group')}. "
        "A group is never split between training and scoring.",
        unclear if unlike else "Within each group the labels are equal.",
    ]
    pairs = (
        (rows[0], next((row for row in rows if cells[row] != cells[rows[0]]), rows[1])) for rows in unlike or groups
    )
    examples = [row for pair in islice(pairs, CARDS // 2) for row in pair]
    cards = [
        make_card(
            subject.by_id.get(predictions.ids[row]), cells[row], f"id {predictions.ids[row]} · group {twins[row]}"
        )
        for row in examples
    ]
    links = [(in_gallery(status="unlike"), "all with different labels")] if unlike else []
    links.append((in_gallery(status="twins"), "all near duplicates, to copy or download"))
    return Section("duplicates", "Duplicates", words, cards=cards, links=links)


def audit_section(subject: Subject, folder: Path) -> Section:
    """The section on the audit in `folder` (`OUT/DATASET`), if the audit is of this run's data."""
    title = "Audit of the data"
    try:
        audit = read_audit(folder)
    except DataError:
        words = (
            "mmfeat audit looks for duplicates, conflicting labels, leaks and odd files; then this section shows them."
        )
        return Section("audit", title, [words], folded=True)
    if audit.data_hash != subject.run.config.data_hash:
        words = f"{folder} is about other labels, texts or photos than this run; run mmfeat audit again."
        return Section("audit", title, [words], folded=True)
    found = [*audit.notes, *_leaks(audit)] or ["It found nothing to look at."]
    return Section("audit", title, found, tables=[_odd(audit)] if audit.odd else [], folded=True)


def _leaks(audit: Audit) -> list[str]:
    words = []
    if audit.leaks is not None:
        tested = sum(audit.leaks["tested"].values())
        words.append(
            f"In the splits of {shown(audit.leaks['splits'])}, {audit.leaks['samples']:,} of {tested:,} samples "
            "have a duplicate among those that their fold trained on."
        )
    if audit.shared:
        shared = ", ".join(f"{count:,} by {name}" for name, count in audit.shared.items())
        words.append(f"Unlabelled samples with a labelled duplicate: {shared}.")
    return words


def _odd(audit: Audit) -> Table:
    rows = [
        [odd["modality"], odd["what"], f"{odd['count']:,}", str(odd["id"]), str(odd["detail"])[:60]]
        for odd in audit.odd[:SHOWN]
    ]
    return Table("odd", "Odd texts and photos", ["part", "what", "samples", "first id", "detail"], rows)
