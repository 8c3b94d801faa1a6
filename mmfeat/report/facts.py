"""Facts: the data, the encoders and their cache, and how the run was made."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from mmfeat.cache.explain import why_failed
from mmfeat.cache.store import Cache, folder_name
from mmfeat.cache.survey import survey
from mmfeat.errors import CacheError, MmfeatError
from mmfeat.report.section import Section, Subject, Table
from mmfeat.samples.dataset import MODALITIES, PART, SampleSet
from mmfeat.samples.labels import cells_of, classes_in, number_of
from mmfeat.system.wording import duration, shown, size_of, without_passwords


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
        vectors = _vectors(*entry.count()) if entry else ""
        size = size_of(entry.bytes) if entry else ""
        width = str(run.results.widths.get(folder, ""))
        facts = [shown(tower.request), spec.output, width, spec.arithmetic, spec.cleaning]
        rows.append([*facts, vectors, size, spec.fingerprint[:16]])
    header = ["encoder", "output", "width", "arithmetic", "cleaning", "vectors", "on disk", "fingerprint"]
    tables = [Table("encoders", "Encoders of the run", header, rows)]
    return Section("cache", "Encoders and cache", words, tables=tables, folded=True)


def _vectors(good: int, failed: int) -> str:
    return f"{good:,}, {failed:,} unreadable" if failed else f"{good:,}"


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
