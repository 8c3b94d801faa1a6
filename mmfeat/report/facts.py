"""Facts: the data, the encoders and their cache, how the run was made; and doubts about the data: labels that may be
wrong, near duplicates, and what `mmfeat audit` found."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.audit.label_errors import estimate_noise, find_label_errors, floor_of
from mmfeat.audit.result import Audit, read_audit
from mmfeat.cache.explain import why_failed
from mmfeat.cache.store import Cache, folder_name
from mmfeat.cache.survey import survey
from mmfeat.errors import CacheError, DataError, MmfeatError
from mmfeat.report.section import Section, Subject, Table, in_gallery, interval, make_card, title_of
from mmfeat.runs.record import OutOfFold
from mmfeat.samples.dataset import MODALITIES, PART, SampleSet
from mmfeat.samples.labels import cells_of, classes_in, number_of
from mmfeat.system.wording import counted, duration, shown, size_of, without_passwords

SHOWN = 30  # rows of the table of odd files
CARDS = 8  # samples shown of labels in doubt, and of near duplicates


def data_section(subject: Subject) -> Section:
    run, samples = subject.run, subject.samples
    labelled, classes = run.results.labelled, run.results.class_counts
    rows = [[name, f"{count:,}", f"{count / labelled:.1%}"] for name, count in classes.items()]
    tables = [Table("labels", f"{labelled:,} labelled samples", ["class", "samples", "share"], rows)] if rows else []
    if samples is None:
        words = [f"{run.config.dataset}: {labelled:,} labelled samples."]
        words += data_notes(subject)
        return Section("data", "Data", words, tables=tables)
    words = [f"{run.config.dataset}: {len(samples):,} samples, {labelled:,} labelled."]
    words += data_notes(subject)
    if fixed := run.config.corrections:
        words.append(f"{fixed.count:,} labels are those of {shown(fixed.file)}, hash {fixed.sha256[:16]}.")
    if odd := {name: count for name, count in samples.encodings.items() if name != "utf-8"}:
        words.append(f"Texts that are not UTF-8: {', '.join(f'{count:,} {name}' for name, count in odd.items())}.")
    kinds: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for part, reason, id in _lost(subject, samples):
        kinds.setdefault((part, re.sub(r"\d+", "", reason)), []).append((reason, id))  # they may name bytes or pixels
    if kinds:
        most = sorted(kinds.items(), key=lambda kind: -len(kind[1]))
        missing = [[part, lost[0][0], f"{len(lost):,}", lost[0][1]] for (part, _), lost in most]
        caption = "Missing parts; the samples stay, and the model uses the other half"
        tables.append(Table("missing", caption, ["part", "why", "samples", "first id"], missing))
    return Section("data", "Data", words, tables=tables)


def _lost(subject: Subject, samples: SampleSet) -> Iterator[tuple[str, str, str]]:
    """(part, reason, id) of each text and photo that is missing, or that the first encoder of its kind cannot read."""
    store = Cache(subject.run.config.cache, subject.run.config.dataset)
    for modality in MODALITIES:
        specs = [tower.spec for tower in subject.run.towers if tower.spec.modality == modality][:1]
        mask = [True] * len(samples)
        for spec in specs:
            with suppress(MmfeatError, OSError):  # a cache that is gone names no errors
                mask = store.map(samples.samples, spec, allow_missing=True).mask.tolist()
        for sample, present in zip(samples, mask, strict=True):
            reason = getattr(sample, f"{modality}_error")
            if reason or (not present and (reason := why_failed(store, sample, specs))):
                yield PART[modality], reason, sample.id


def data_notes(subject: Subject) -> tuple[str, ...]:
    if subject.samples is None:
        return (f"{shown(subject.data)} is not there, so texts and photos are missing; --data says where it is.",)
    fixed = subject.run.config.corrections
    if (changed := _changed(subject) - (fixed.count if fixed else 0)) > 0:
        return (f"The data changed since the run: {changed:,} samples that it scored are gone or have another label.",)
    return ()


def _changed(subject: Subject) -> int:
    """Out-of-fold samples that are gone from the data or have another label now."""
    predictions = subject.predictions()
    if predictions.targets.numeric:
        labels = (number_of(str(sample.label)) if (sample := subject.by_id.get(id)) else None for id in predictions.ids)
        pairs = zip(labels, predictions.targets.matrix[:, 0].tolist(), strict=True)
        return sum(label is None or not math.isclose(label, number, rel_tol=1e-8) for label, number in pairs)
    classes, multilabel = predictions.targets.classes, predictions.targets.multilabel
    then = (classes_in(cell, multilabel) for cell in cells_of(predictions.targets.matrix, classes))
    now = (subject.by_id.get(id) for id in predictions.ids)
    return sum(
        sample is None or classes_in(sample.label, multilabel) != names for sample, names in zip(now, then, strict=True)
    )


def cache_section(subject: Subject) -> Section:
    run, cached, words = subject.run, {}, []
    try:
        cached = {entry.folder.name: entry for entry in survey(run.config.cache, folder_name(run.config.dataset))}
    except CacheError as error:
        words.append(f"The cache is not there: {error}.")
    if run.config.table:
        words.append(f"Columns of the table: {', '.join(column.label for column in run.config.table)}.")
    rows = []
    for tower in run.towers:
        spec, folder = tower.spec, tower.spec.folder_name
        entry = cached.get(folder)
        good, failed = entry.count() if entry else (0, 0)
        vectors = f"{good:,}" + (f", {failed:,} unreadable" if failed else "") if entry else ""
        size = size_of(entry.bytes) if entry else ""
        width = str(run.results.widths.get(folder, ""))
        facts = [shown(tower.request), spec.output, width, spec.arithmetic, spec.cleaning]
        rows.append([*facts, vectors, size, spec.fingerprint[:16]])
    header = ["encoder", "output", "width", "arithmetic", "cleaning", "vectors", "on disk", "fingerprint"]
    tables = [Table("encoders", "Encoders of the run", header, rows)]
    return Section("cache", "Encoders and cache", words, tables=tables, folded=True)


def run_section(subject: Subject) -> Section:
    run, config = subject.run, subject.run.config
    record = run.record
    facts = {
        "run": shown(str(run.folder)),
        "command": without_passwords(record.command),
        "started": record.started,
        "took": duration(record.seconds) if record.started else "",
        "parent": config.parent,
        "task": config.task,
        "hash of the data": config.data_hash[:16],
        "folds": ", ".join(config.folds),
        "hash of the folds": config.splits_hash[:16],
        "seeds": _pairs(record.seeds),
        "machine": _pairs(record.machine),
        "versions": _pairs(record.versions or {"mmfeat": config.version}),
    }
    rows = [[name, str(value)] for name, value in facts.items() if value]
    words = ["This command trains the run again and compares every file:"]
    tables = [Table("run", "How the run was made", ["what", "value"], rows)]
    again = shlex.join(["mmfeat", "runs", "reproduce", shown(str(run.folder))])
    return Section("run", "The run", words, tables=tables, commands=[again], folded=True)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


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
