"""The audit in a report: duplicates, conflicts, leaks and odd files, as `mmfeat audit` found them."""

from __future__ import annotations

from pathlib import Path

from mmfeat.audit.result import Audit, read_audit
from mmfeat.errors import DataError
from mmfeat.report.results import Results
from mmfeat.report.section import Section, Table
from mmfeat.wording import shown

SHOWN = 30


def audit_section(results: Results, folder: Path) -> Section:
    """What the audit in `folder` (`OUT/DATASET`) says, if it is about this run's data."""
    try:
        audit = read_audit(folder)
    except DataError:
        words = (
            "mmfeat audit looks for duplicates, conflicting labels, leaks and odd files; its findings then stand here."
        )
        return Section("audit", "Audit of the data", [words])
    if audit.data_hash != results.run.config["data_hash"]:
        words = f"{folder} is about other labels, texts or photos than this run; run mmfeat audit again."
        return Section("audit", "Audit of the data", [words])
    tables = [_twins(audit), *([_odd(audit)] if audit.odd else [])]
    return Section("audit", "Audit of the data", [*audit.notes, *_leaks(audit)], tables=tables)


def _twins(audit: Audit) -> Table:
    rows = []
    for modality, found in audit.duplicates.items():
        conflict = audit.conflicts[modality]
        counts = [f"{found[name]:,}" for name in ("groups", "samples", "exact_samples", "largest")]
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
        [each["modality"], each["what"], f"{each['count']:,}", str(each["id"]), str(each["detail"])[:60]]
        for each in audit.odd[:SHOWN]
    ]
    return Table("odd", "Odd texts and photos", ["", "what", "samples", "first", "there"], rows)
