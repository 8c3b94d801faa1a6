"""The audit: what is wrong or odd in a data set, found by reading every text and photo once.

OUT/DATASET/duplicates.csv, conflicts.csv, leaks.csv, files.csv, label_errors.csv, balance.csv, profile.csv
OUT/DATASET/audit.json      the summary, written last: with it the audit is complete
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.audit import tables
from mmfeat.audit.conflicts import class_balance
from mmfeat.audit.findings import Findings, find_everything
from mmfeat.audit.opinions import judge_labels
from mmfeat.audit.photos import stray_files
from mmfeat.audit.result import Audit, write_audit
from mmfeat.audit.texts import NO_LANGUAGES, are_absent, language_classifier, text_languages, text_profile
from mmfeat.cache.store import folder_name
from mmfeat.errors import ConfigError
from mmfeat.evaluation.splits import TEST
from mmfeat.samples.dataset import SampleSet, read_samples
from mmfeat.system.files import write_errors
from mmfeat.system.hardware import cpu_count
from mmfeat.system.progress import Progress, Silent
from mmfeat.system.remote import absolute, is_remote
from mmfeat.version import __version__

EXAMPLES = 10
PHOTO_SIDES = {"min": 0, "q05": 5, "median": 50, "q95": 95, "max": 100}


def audit_data(
    data: str | Path,
    *,
    columns: Mapping[str, str] | None = None,
    split_dir: str | Path | None = None,
    run: str | Path | None = None,
    heads: str | Path = "heads",
    out: str | Path = "audit",
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
        Folder of splits whose leaks are looked for; those of `run` by default.
    run, heads
        A run whose predictions out of fold judge the labels, "none", or (None) the best in `heads` that was trained
        on these very labels and contents, if there is one.
    workers
        Photos that are read at once; 0 suits the machine.

    Raises `ConfigError` if the audit would lie among the data, `RunError` for splits or a run that do not fit.
    """
    samples = read_samples(data, columns)
    folder = _checked_folder(samples, out)
    place = Path(split_dir) if split_dir else None
    found = find_everything(samples, place, run, Path(heads), workers or cpu_count(), progress or Silent())
    audit = _summary(found, folder, seed)
    _write(audit, found)
    return audit


def _checked_folder(samples: SampleSet, out: str | Path) -> Path:
    """`OUT/DATASET`; it is never among the data, whose files could have the names of tables."""
    if not str(out):
        raise ConfigError("--out is empty; name a folder")
    folder = Path(out) / folder_name(samples.name)
    if not is_remote(samples.source):
        source, target = Path(samples.source).resolve(), folder.resolve()
        if target == source or source in target.parents:
            raise ConfigError(f"--out {out}: {folder} lies among the data in {samples.source}; name another folder")
    return folder


def _summary(found: Findings, folder: Path, seed: int) -> Audit:
    samples = found.samples
    parts = found.splits.parts() if found.splits else {}
    return Audit(
        folder=folder,
        data=absolute(samples.source),
        dataset=samples.name,
        data_hash=found.data_hash,
        version=__version__,
        samples=len(samples),
        labelled=len(samples.labelled),
        encodings=dict(samples.encodings),
        duplicates={modality: each.counts for modality, each in found.twins.items()},
        conflicts={modality: each.counts for modality, each in found.conflicts.items()},
        shared=dict(Counter(leak.modality for leak in found.shared)),
        leaks=_leaks(found),
        odd=_odd(found),
        profile=_profile(found, seed),
        balance=class_balance([sample.label for sample in samples], parts, found.is_multilabel),
        label_errors=_label_errors(found, seed),
        notes=_notes(found),
    )


def _leaks(found: Findings) -> dict[str, Any] | None:
    if found.splits is None:
        return None
    ways = Counter((leak.fold, leak.part, leak.modality, leak.kind) for leak in found.leaks)
    rows = [{"fold": a, "part": b, "modality": c, "kind": d, "samples": count} for (a, b, c, d), count in ways.items()]
    held = {name: int((found.splits.roles[:, column] == TEST).sum()) for column, name in enumerate(found.splits.names)}
    leaking = {leak.row for leak in found.leaks if leak.part == TEST}
    return {
        "splits": found.splits.folder,
        "tested": held,
        "samples": len(leaking),
        "ways": rows,
        "unknown": found.splits.unknown,
        "unsplit": found.splits.unsplit,
        "doubled": found.splits.doubled,
    }


def _odd(found: Findings) -> list[dict[str, Any]]:
    """Each oddity: how often, and where first."""
    entries: dict[tuple[str, str], dict[str, Any]] = {}
    for modality, each in found.odd.items():
        for sample, findings in zip(found.samples, each, strict=True):
            for what, detail in findings:
                new = {"modality": modality, "what": what, "count": 0, "id": sample.id, "detail": detail}
                entries.setdefault((modality, what), new)["count"] += 1
    return sorted(entries.values(), key=lambda entry: -entry["count"])


def _profile(found: Findings, seed: int) -> dict[str, Any]:
    """Of all, and of labelled and unlabelled samples where there are both: what differs there is a shift."""
    everything = found.samples.samples
    parts = {"all": everything, "labelled": found.samples.labelled, "unlabelled": found.samples.unlabelled}
    if not (parts["labelled"] and parts["unlabelled"]):
        parts = {"all": everything}
    profile: dict[str, Any] = {}
    for name, part in parts.items():
        texts = [sample.text for sample in part if sample.text is not None]
        languages = text_languages(texts, seed)
        profile[name] = {"text": {**text_profile(texts), **({"languages": languages} if languages else {})}}
    profile["all"]["image"] = _photo_profile(found)
    return profile


def _photo_profile(found: Findings) -> dict[str, Any]:
    sizes = np.array(found.photos.sizes, int).reshape(-1, 2)
    if not len(sizes):
        return {"photos": 0}
    quantiles = np.percentile(sizes, list(PHOTO_SIDES.values()), axis=0).T.tolist()
    sides = (dict(zip(PHOTO_SIDES, side, strict=True)) for side in quantiles)
    return {"photos": len(sizes), **dict(zip(("width", "height"), sides, strict=True))}


def _label_errors(found: Findings, seed: int) -> dict[str, Any] | None:
    if found.opinions is None:
        return None
    texts = {sample.id: tables.shown_text(sample.text) for sample in found.samples}
    examples = [{**asdict(each), "text": texts[each.id]} for each in found.suspicions[:EXAMPLES]]
    return {**judge_labels(found.opinions, found.suspicions, seed), "examples": examples}


def _notes(found: Findings) -> list[str]:
    """What was left out and why, and what may not be as the user thinks."""
    notes = [found.no_run] if found.no_run else []
    if language_classifier() is None and any(sample.text for sample in found.samples):
        notes.append(NO_LANGUAGES)
    if are_absent(found.samples.samples):
        notes.append("no sample has a text")
    if found.photos.absent:
        notes.append("no sample has a photo")
    if found.splits:
        counts = {
            "ids that the data do not have": found.splits.unknown,
            "labelled samples of the data are on no line": found.splits.unsplit,
            "ids stand on several lines": found.splits.doubled,
        }
        notes += [f"splits in {found.splits.folder}: {count:,} {what}" for what, count in counts.items() if count]
    if found.samples.unused_columns:
        notes.append(f"columns not used: {', '.join(found.samples.unused_columns)} (--columns label=... names yours)")
    if stray := stray_files(found.samples):
        notes.append(f"{len(stray):,} files of the data folder belong to no sample (first: {stray[0]})")
    return notes


def _write(audit: Audit, found: Findings) -> None:
    """All tables, then the summary; an earlier summary must not stand beside newer tables."""
    samples = found.samples.samples
    by_id = {sample.id: sample for sample in samples}
    with write_errors(audit.file):
        audit.file.unlink(missing_ok=True)
    rows = {
        "duplicates.csv": tables.duplicate_rows(samples, found.twins, found.parts),
        "conflicts.csv": tables.conflict_rows(samples, found.twins, found.conflicts),
        "leaks.csv": tables.leak_rows(samples, [*found.leaks, *found.shared]),
        "files.csv": tables.file_rows(samples, found.odd),
        "label_errors.csv": tables.error_rows(by_id, found.suspicions),
        "balance.csv": tables.balance_rows(audit.balance),
        "profile.csv": tables.profile_rows(audit.profile),
    }
    for name, each in rows.items():
        tables.write_table(audit.folder, name, each)
    write_audit(audit)
