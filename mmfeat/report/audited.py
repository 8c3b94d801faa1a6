"""The audit in a report: likely label errors, and the duplicates, conflicts, leaks and odd files of `mmfeat audit`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mmfeat.audit.label_errors import estimate_noise, find_label_errors
from mmfeat.audit.opinions import floor_of
from mmfeat.audit.result import Audit, read_audit
from mmfeat.errors import DataError
from mmfeat.report.section import MOST_CLASSES, Section, Table, interval, title_of
from mmfeat.report.subject import Subject
from mmfeat.system.wording import shown

SHOWN = 30  # rows of the table of odd files


def doubted_rows(subject: Subject) -> np.ndarray:
    """Rows of the predictions whose label is likely wrong, the surest first; none for multi-label data."""
    predictions = subject.predictions()
    if predictions.targets.multilabel or not len(predictions.targets):
        return np.empty(0, np.int64)
    return find_label_errors(predictions.targets.numbers, predictions.probabilities).rows


def labels_section(subject: Subject) -> Section | None:
    """The section on label errors, by confident learning on the predictions of the report's entry."""
    predictions = subject.predictions()
    if predictions.targets.multilabel:
        return None
    floor = floor_of(subject.run, subject.entry)
    noise = estimate_noise(predictions.targets.numbers, predictions.probabilities, floor=floor)
    doubted = len(doubted_rows(subject))
    words = [
        f"{title_of(subject.entry)} is confident of another class than the label for {doubted:,} of "
        f"{len(predictions.ids):,} samples; the gallery below can show just these.",
    ]
    if not noise.claimed:
        words.append("That is no more than a head this unsure would doubt anyway, were no label wrong.")
        return Section("labels", "Label errors", words)
    words.append(
        f"Above what a head this unsure would doubt anyway, {interval(noise.wrong)} of the labels are wrong, and a "
        f"classifier that is always right would score macro-F1 {interval(noise.macro_f1)} against them (confident "
        "learning, Northcutt et al., 2021, less its result on labels drawn from the head's own probabilities)."
    )
    classes = predictions.targets.classes
    shares = np.maximum(noise.joint, 0) / np.maximum(noise.joint.sum(1, keepdims=True), 1e-12)
    rows = [
        [name, *(f"{share:.0%}" for share in line), interval(score)]
        for name, line, score in zip(classes, shares, noise.by_class, strict=True)
    ]
    header = ["label", *(f"truly {name}" for name in classes), "wrong"]
    shades = [[0.0, *line, 0.0] for line in shares.tolist()]
    table = Table("label-noise", "Estimated true classes of each label", header, rows, shades)
    if len(classes) > MOST_CLASSES:
        short = [[row[0], row[-1]] for row in rows]
        table = Table("label-noise", "Labels estimated to be wrong", ["label", "wrong"], short)
    return Section("labels", "Label errors", words, tables=[table])


def audit_section(subject: Subject, folder: Path) -> Section:
    """The section on the audit in `folder` (`OUT/DATASET`), if the audit is of this run's data."""
    try:
        audit = read_audit(folder)
    except DataError:
        words = (
            "mmfeat audit looks for duplicates, conflicting labels, leaks and odd files; its findings then stand here."
        )
        return Section("audit", "Audit of the data", [words])
    if audit.data_hash != subject.run.config.data_hash:
        words = f"{folder} is about other labels, texts or photos than this run; run mmfeat audit again."
        return Section("audit", "Audit of the data", [words])
    tables = [_twins(audit), *([_odd(audit)] if audit.odd else [])]
    return Section("audit", "Audit of the data", [*audit.notes, *_leaks(audit)], tables=tables)


def _twins(audit: Audit) -> Table:
    rows = []
    for modality, duplicates in audit.duplicates.items():
        conflict = audit.conflicts[modality]
        counts = [f"{duplicates[name]:,}" for name in ("groups", "samples", "exact_samples", "largest")]
        pairs = f"{conflict['disagreeing_pairs']:,} of {conflict['pairs']:,}" if conflict["pairs"] else ""
        rows.append([modality, *counts, f"{conflict['groups']:,}", pairs])
    header = ["alike in", "groups", "samples", "equal", "largest", "groups with several labels", "pairs that disagree"]
    return Table("duplicates", "Duplicates and near duplicates", header, rows)


def _leaks(audit: Audit) -> list[str]:
    words = []
    if audit.leaks is not None:
        tested = sum(audit.leaks["tested"].values())
        words.append(
            f"In the splits of {shown(audit.leaks['splits'])}, {audit.leaks['samples']:,} of {tested:,} tested samples "
            "have a twin in training."
        )
    if audit.shared:
        shared = ", ".join(f"{count:,} by {name}" for name, count in audit.shared.items())
        words.append(f"Unlabelled samples with a labelled twin: {shared}.")
    return words


def _odd(audit: Audit) -> Table:
    rows = [
        [odd["modality"], odd["what"], f"{odd['count']:,}", str(odd["id"]), str(odd["detail"])[:60]]
        for odd in audit.odd[:SHOWN]
    ]
    return Table("odd", "Odd texts and photos", ["", "what", "samples", "first", "there"], rows)
