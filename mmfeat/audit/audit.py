"""The audit of a data set: faults and oddities, found by reading every text and photo.

OUT/DATASET/duplicates.csv, conflicts.csv, leaks.csv, files.csv, label_errors.csv, balance.csv, profile.csv
OUT/DATASET/audit.json      the summary, written last: with it the audit is complete
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.audit import result
from mmfeat.audit.findings import Findings, find_everything
from mmfeat.audit.label_errors import judge_labels
from mmfeat.audit.photos import stray_files
from mmfeat.audit.result import HEADERS, Audit
from mmfeat.audit.texts import (
    NO_LANGUAGES,
    are_absent,
    cut_texts,
    language_classifier,
    quantiles,
    text_languages,
    text_profile,
)
from mmfeat.cache.store import folder_name
from mmfeat.errors import ConfigError
from mmfeat.evaluation.metrics import wilson
from mmfeat.evaluation.splits import TEST
from mmfeat.samples.corrections import read_corrected
from mmfeat.samples.dataset import Data, SampleSet
from mmfeat.samples.labels import classes_in
from mmfeat.system.files import csv_text, write_atomic, write_errors, write_json
from mmfeat.system.hardware import cpu_count
from mmfeat.system.notebook import usual_progress
from mmfeat.system.remote import absolute, is_remote
from mmfeat.system.wording import Progress
from mmfeat.version import __version__, install_command

EXAMPLES = 10
ALL = "all"
DRAWS = 9999  # random tables of a permutation test


def audit_data(
    data: Data,
    *,
    columns: Mapping[str, str] | None = None,
    split_dir: str | Path | None = None,
    run: str | Path | None = None,
    heads: str | Path = "heads",
    out: str | Path = "audit",
    export: str | Path | None = None,
    cache: str | Path = "cache",
    workers: int = 0,
    seed: int = 42,
    progress: Progress | None = None,
) -> Audit:
    """Look for duplicates, conflicting labels, leaks, odd files and likely label errors; write them to `out`.

    Parameters
    ----------
    data, columns
        As `read_samples` takes them.
    split_dir
        Folder of splits that are checked for leaks; by default the splits of `run`.
    run, heads
        A run whose out-of-fold predictions judge the labels, "none", or (None) the best run in `heads` that was
        trained on exactly these labels and contents, if any.
    cache
        Where the latest extraction of the data names the text encoders whose limits the texts are counted against.
    export
        A CSV file to write with a row for each likely label error and an empty column `label` to fill: corrections for
        `columns={"labels": ...}`.
    workers
        Number of photos read at once; 0 means the number of cores.

    Raises `ConfigError` if the audit would lie among the data, `RunError` for splits or a run that do not fit.
    """
    if export and Path(export).exists():
        raise ConfigError(f"--export {export}: this file exists, and may have labels filled in; name another file")
    samples, given = read_corrected(data, columns)
    folder = _checked_folder(samples, out)
    splits = Path(split_dir) if split_dir else None
    progress = progress or usual_progress()
    findings = find_everything(samples, given, splits, run, Path(heads), workers or cpu_count(), progress)
    audit = _summary(findings, folder, seed)
    texts = [sample.text for sample in samples if sample.text is not None]
    with progress.step("counting tokens", None):
        cut, notes = cut_texts(cache, data, texts)
    audit.profile["all"]["text"].update({"cut": cut} if cut else {})
    audit = replace(audit, notes=[*audit.notes, *notes])
    if export and findings.opinions is None:
        raise ConfigError(f"--export {export}: no run judges these labels; {findings.no_run or 'name one with --run'}")
    _write(audit, findings)
    if export:
        header, rows = result.DOUBTS, result.doubt_rows(samples.samples, findings.suspicions, findings.is_multilabel)
        write_atomic(Path(export), csv_text(header, rows).encode())
    return audit


def _checked_folder(samples: SampleSet, out: str | Path) -> Path:
    """The folder `OUT/DATASET`, which must not lie among the data: a data file could have the name of a table."""
    if not str(out):
        raise ConfigError("--out is empty; name a folder")
    folder = Path(out) / folder_name(samples.name)
    if not is_remote(samples.source):
        source, target = Path(samples.source).resolve(), folder.resolve()
        if target == source or source in target.parents:
            raise ConfigError(f"--out {out}: {folder} lies among the data in {samples.source}; name another folder")
    return folder


def _summary(findings: Findings, folder: Path, seed: int) -> Audit:
    samples = findings.samples
    parts = findings.splits.parts() if findings.splits else {}
    return Audit(
        folder=folder,
        data=absolute(samples.source),
        dataset=samples.name,
        data_hash=findings.data_hash,
        version=__version__,
        samples=len(samples),
        labelled=len(samples.labelled),
        encodings=dict(samples.encodings),
        duplicates={modality: twins.counts for modality, twins in findings.twins.items()},
        conflicts={modality: conflicts.counts for modality, conflicts in findings.conflicts.items()},
        shared=dict(Counter(leak.modality for leak in findings.shared)),
        leaks=_leaks(findings),
        odd=_odd(findings),
        profile=_profile(findings, seed),
        balance=class_balance([sample.label for sample in samples], parts, findings.is_multilabel, seed),
        label_errors=_label_errors(findings, seed),
        notes=_notes(findings),
    )


def _leaks(findings: Findings) -> dict[str, Any] | None:
    if findings.splits is None:
        return None
    ways = Counter((leak.fold, leak.part, leak.modality, leak.kind) for leak in findings.leaks)
    rows = [{"fold": a, "part": b, "modality": c, "kind": d, "samples": count} for (a, b, c, d), count in ways.items()]
    held = dict(zip(findings.splits.names, (findings.splits.roles == TEST).sum(axis=0).tolist(), strict=True))
    leaking = {leak.row for leak in findings.leaks if leak.part == TEST}
    return {
        "splits": findings.splits.folder,
        "tested": held,
        "samples": len(leaking),
        "ways": rows,
        "unknown": findings.splits.unknown,
        "unsplit": findings.splits.unsplit,
        "doubled": findings.splits.doubled,
    }


def _odd(findings: Findings) -> list[dict[str, Any]]:
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for modality, oddities in findings.odd.items():
        for sample, odd in zip(findings.samples, oddities, strict=True):
            for what, detail in odd:
                new = {"modality": modality, "what": what, "count": 0, "id": sample.id, "detail": detail}
                entries.setdefault((modality, what), new)["count"] += 1
    return sorted(entries.values(), key=lambda entry: -entry["count"])


def _profile(findings: Findings, seed: int) -> dict[str, Any]:
    """Profiles of all samples and, where both exist, of labelled and of unlabelled samples; a difference is a shift."""
    everything = findings.samples.samples
    parts = {"all": everything, "labelled": findings.samples.labelled, "unlabelled": findings.samples.unlabelled}
    if not (parts["labelled"] and parts["unlabelled"]):
        parts = {"all": everything}
    profile: dict[str, Any] = {}
    for name, part in parts.items():
        texts = [sample.text for sample in part if sample.text is not None]
        languages = text_languages(texts, seed)
        profile[name] = {"text": {**text_profile(texts), **({"languages": languages} if languages else {})}}
    sizes = np.array(findings.photos.sizes, int).reshape(-1, 2)
    sides = {"width": quantiles(sizes[:, 0]), "height": quantiles(sizes[:, 1])} if len(sizes) else {}
    profile["all"]["image"] = {"photos": len(sizes), **sides}
    return profile


def _label_errors(findings: Findings, seed: int) -> dict[str, Any] | None:
    if findings.opinions is None:
        return None
    texts = {sample.id: result.shown_text(sample.text) for sample in findings.samples}
    examples = [{**asdict(suspicion), "text": texts[suspicion.id]} for suspicion in findings.suspicions[:EXAMPLES]]
    return {**judge_labels(findings.opinions, findings.suspicions, seed), "examples": examples}


def _notes(findings: Findings) -> list[str]:
    notes = [findings.no_run] if findings.no_run else []
    notes += findings.samples.notes
    if language_classifier() is None and any(sample.text for sample in findings.samples):
        notes.append(NO_LANGUAGES.format(install=install_command("audit")))
    if are_absent(findings.samples.samples):
        notes.append("no sample has a text")
    if findings.photos.absent:
        notes.append("no sample has a photo")
    notes += findings.photos.lost
    if findings.splits:
        counts = {
            "ids that the data do not have": findings.splits.unknown,
            "labelled samples of the data are on no line": findings.splits.unsplit,
            "ids are on several lines": findings.splits.doubled,
        }
        notes += [f"splits in {findings.splits.folder}: {count:,} {what}" for what, count in counts.items() if count]
    if findings.samples.unused_columns:
        notes.append(f"columns not used: {', '.join(findings.samples.unused_columns)}")
    if stray := stray_files(findings.samples):
        notes.append(f"{len(stray):,} files of the data folder belong to no sample (first: {stray[0]})")
    return notes


def _write(audit: Audit, findings: Findings) -> None:
    """Write all tables, then the summary; an earlier summary does not describe new tables and is deleted first."""
    samples = findings.samples.samples
    by_id = {sample.id: sample for sample in samples}
    with write_errors(audit.file):
        audit.file.unlink(missing_ok=True)
    rows = {
        "duplicates.csv": result.duplicate_rows(samples, findings.twins, findings.parts),
        "conflicts.csv": result.conflict_rows(samples, findings.twins, findings.conflicts),
        "leaks.csv": result.leak_rows(samples, [*findings.leaks, *findings.shared]),
        "files.csv": result.file_rows(samples, findings.odd),
        "label_errors.csv": result.error_rows(by_id, findings.suspicions),
        "balance.csv": result.balance_rows(audit.balance),
        "profile.csv": result.profile_rows(audit.profile),
    }
    for name, table in rows.items():
        write_atomic(audit.folder / name, csv_text(HEADERS[name], table).encode())
    write_json(audit.file, audit.to_json())


def class_balance(
    labels: Sequence[str | None], parts: Mapping[str, np.ndarray], multilabel: bool, seed: int = 42
) -> dict[str, Any]:
    """Balance of classes in all samples and in each part.

    `classes` are the sorted names; `parts` maps part -> number of samples and, by class, count, share and 95 % Wilson
    interval; `p` is the p-value of equal shares in all parts (a permutation test, which holds for rare classes too;
    None for fewer than two parts or multi-label).
    """
    names = [classes_in(label, multilabel) for label in labels]
    classes = sorted(set().union(*names)) if names else []
    labelled = [row for row, label in enumerate(labels) if label is not None]
    members = {
        ALL: labelled,
        **{name: [row for row in rows.tolist() if labels[row] is not None] for name, rows in parts.items()},
    }
    tables = {part: _shares([names[row] for row in rows], classes) for part, rows in members.items()}
    counts = [[table["classes"][name]["count"] for name in classes] for part, table in tables.items() if part != ALL]
    return {"classes": classes, "parts": tables, "p": None if multilabel else _chance(counts, seed)}


def _shares(cells: Sequence[set[str]], classes: Sequence[str]) -> dict[str, Any]:
    counts = Counter(name for cell in cells for name in cell)
    rows = {}
    for name in classes:
        share = counts[name] / max(len(cells), 1)
        low, high = map(float, wilson(share, len(cells)))
        rows[name] = {"count": counts[name], "share": share, "low": low, "high": high}
    return {"samples": len(cells), "classes": rows}


def _chance(counts: list[list[int]], seed: int) -> float | None:
    """P-value of a table of parts by classes.

    Chi-squared is compared with `DRAWS` random tables with the same margins, since the asymptotic distribution does
    not hold for classes with few samples.
    """
    table = np.array(counts)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 2:
        return None
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    if min(table.shape, default=0) < 2:
        return None
    from scipy.stats import random_table

    rows, columns = table.sum(1), table.sum(0)
    expected = np.outer(rows, columns) / table.sum()
    drawn = random_table(rows, columns, seed=seed).rvs(DRAWS)
    observed, chance = (((counts - expected) ** 2 / expected).sum((-2, -1)) for counts in (table, drawn))
    return float((1 + (chance >= observed - 1e-9).sum()) / (1 + DRAWS))
