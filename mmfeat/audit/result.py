"""The result of an audit, as written to `audit.json`, the last file of an audit, and the tables beside it: one row for
each finding, as CSV."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.audit.findings import Leak
from mmfeat.audit.label_errors import Suspicion
from mmfeat.audit.twins import Conflicts, Twins
from mmfeat.errors import DataError
from mmfeat.samples.dataset import Sample
from mmfeat.samples.labels import SEPARATOR, classes_in
from mmfeat.system.files import read_json
from mmfeat.system.notebook import Cells, CsvFrame, Frame, Shown
from mmfeat.system.wording import counted

AUDIT_FILE = "audit.json"
FORMAT = 1
NUMBERS = {"rank", "probability", "self_confidence", "count", "share", "low", "high", "value"}  # columns of tables
HEADERS = {
    "duplicates.csv": ("group", "modality", "kind", "id", "label", "part", "text"),
    "conflicts.csv": ("group", "modality", "kind", "id", "label", "most_frequent", "text"),
    "leaks.csv": ("fold", "part", "id", "label", "modality", "kind", "twin_part", "twin_id", "twin_label", "text"),
    "files.csv": ("id", "modality", "what", "detail", "label", "file"),
    "label_errors.csv": ("rank", "id", "label", "suggested", "probability", "self_confidence", "image", "text"),
    "balance.csv": ("part", "class", "count", "share", "low", "high"),
    "profile.csv": ("part", "measure", "value"),
}
DOUBTS = ("id", "text", "image", "given", "proposed", "probability", "label")  # label is for a person to fill
SHOWN_TEXT = 280
CsvRows = list[tuple[Any, ...]]


@dataclass(frozen=True, repr=False)
class Audit(Shown):
    """Result of an audit; all fields but `folder` are JSON.

    `data_hash` is compared with `Run.config.data_hash`: different hashes mean different labels or contents.
    """

    folder: Path
    data: str  # absolute path or URL
    dataset: str
    data_hash: str
    version: str
    samples: int
    labelled: int
    encodings: Mapping[str, int]
    duplicates: Mapping[str, Any]  # modality -> groups, samples, exact_samples, exact_surplus, largest
    conflicts: Mapping[str, Any]  # modality -> groups, exact_groups, samples, pairs, disagreeing_pairs, wrong
    shared: Mapping[str, Any]  # modality -> number of unlabelled samples with a labelled twin
    leaks: Mapping[str, Any] | None  # leaks between parts of the splits; None without splits
    odd: Sequence[Mapping[str, Any]]  # modality, what, count, first id, first detail
    profile: Mapping[str, Any]  # "all", "labelled", "unlabelled" -> measures
    balance: Mapping[str, Any]  # result of `mmfeat.audit.audit.class_balance`
    label_errors: Mapping[str, Any] | None  # result of `judge_labels`, with `examples`
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "folder"}
        return {"format": FORMAT, **values}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], folder: Path) -> Audit:
        """The audit of a value of `to_json`. Raises `ValueError` for any other value."""
        names = {field.name for field in fields(cls)} - {"folder"}
        if not isinstance(value, dict) or value.get("format") != FORMAT or set(value) != names | {"format"}:
            raise ValueError("not an audit of this version")
        return cls(folder=folder, **{name: value[name] for name in names})

    def table(self, name: str) -> Frame:
        """One of the tables beside `audit.json`, such as `label_errors`. Raises `DataError` for any other name."""
        try:
            return CsvFrame((self.folder / f"{name}.csv").read_bytes(), set(HEADERS[f"{name}.csv"]) - NUMBERS)
        except (KeyError, OSError):
            known = ", ".join(file.removesuffix(".csv") for file in HEADERS)
            raise DataError(f"{self.folder}: no table {name}; the tables are {known}") from None

    def facts(self) -> list[str]:
        doubted = [f"{self.label_errors['errors']:,} doubted"] if self.label_errors else []
        return [
            self.dataset,
            counted(self.samples, "sample"),
            f"{self.labelled:,} labelled",
            *doubted,
            str(self.folder),
        ]

    def cells(self) -> Cells:
        rows = [(name, counts["groups"], counts["samples"]) for name, counts in self.duplicates.items()]
        conflicts = [self.conflicts[name]["groups"] for name, *_ in rows]
        found = [(*row, conflict) for row, conflict in zip(rows, conflicts, strict=True)]
        return [("duplicates", "groups", "samples", "with different labels"), *found]

    @property
    def file(self) -> Path:
        return self.folder / AUDIT_FILE


def read_audit(folder: str | Path) -> Audit:
    """The finished audit in `folder` (`OUT/DATASET`). Raises `DataError` without an audit of this version."""
    path = Path(folder) / AUDIT_FILE
    try:
        return Audit.from_json(read_json(path), Path(folder))
    except FileNotFoundError:
        raise DataError(f"{folder}: no finished audit here (no {AUDIT_FILE}); make one with mmfeat audit") from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}; run mmfeat audit again") from error


def shown_text(text: str | None) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= SHOWN_TEXT else f"{line[: SHOWN_TEXT - 1]}…"


def duplicate_rows(samples: Sequence[Sample], twins: Mapping[str, Twins], parts: Sequence[str]) -> CsvRows:
    """Every member of every group, the largest groups first."""
    return [
        (name, modality, twin.kind(row), samples[row].id, samples[row].label, parts[row], shown_text(samples[row].text))
        for modality, twin in twins.items()
        for name, _, rows in group_rows(modality, twin.near)
        for row in rows
    ]


def group_rows(modality: str, groups: np.ndarray) -> Iterator[tuple[str, int, list[int]]]:
    """(name as in the tables, number, rows) of each group, the largest first."""
    order = np.argsort(groups, kind="stable")
    order = order[groups[order] >= 0]
    numbers, starts = np.unique(groups[order], return_index=True)
    members = np.split(order, starts[1:]) if len(starts) else []
    ranked = sorted(zip(members, numbers.tolist(), strict=True), key=lambda group: (-len(group[0]), group[0][0]))
    for rank, (rows, number) in enumerate(ranked, 1):
        yield f"{modality}-{rank}", number, rows.tolist()


def conflict_rows(samples: Sequence[Sample], twins: Mapping[str, Twins], conflicts: Mapping[str, Conflicts]) -> CsvRows:
    """The labelled samples of groups with conflicts, groups with exact conflicts first."""
    table: CsvRows = []
    for modality, conflict in conflicts.items():
        groups = list(group_rows(modality, twins[modality].near))
        for kind, numbers in (("exact", set(conflict.exact.tolist())), ("near", set(conflict.near.tolist()))):
            for name, number, rows in groups:
                if number in numbers:
                    members = [samples[row] for row in rows if samples[row].label is not None]
                    most = Counter(member.label for member in members).most_common(1)[0][0]
                    table += [(name, modality, kind, m.id, m.label, most, shown_text(m.text)) for m in members]
    return table


def leak_rows(samples: Sequence[Sample], leaks: Sequence[Leak]) -> CsvRows:
    table = []
    for leak in leaks:
        one, other = samples[leak.row], samples[leak.other]
        way = (leak.modality, leak.kind, leak.other_part)
        table.append((leak.fold, leak.part, one.id, one.label, *way, other.id, other.label, shown_text(one.text)))
    return table


def file_rows(samples: Sequence[Sample], findings: Mapping[str, Sequence[Sequence[tuple[str, str]]]]) -> CsvRows:
    table = [
        (sample.id, modality, what, detail, sample.label, str(sample.image or "") if modality == "image" else "")
        for modality, oddities in findings.items()
        for sample, odd in zip(samples, oddities, strict=True)
        for what, detail in odd
    ]
    return sorted(table, key=lambda row: row[1:3])


def error_rows(samples: Mapping[str, Sample], suspected: Sequence[Suspicion]) -> CsvRows:
    rows = []
    for rank, error in enumerate(suspected, 1):
        sample = samples[error.id]
        numbers = (f"{error.probability:.4f}", f"{error.self_confidence:.4f}")
        rows.append(
            (rank, error.id, error.label, error.suggested, *numbers, str(sample.image or ""), shown_text(sample.text))
        )
    return rows


def doubt_rows(samples: Sequence[Sample], suspected: Sequence[Suspicion], multilabel: bool) -> CsvRows:
    """The samples with likely label errors, the surest first, with the label that would have none."""
    by_id, doubts = {sample.id: sample for sample in samples}, dict[str, list[Suspicion]]()
    for error in suspected:
        doubts.setdefault(error.id, []).append(error)
    rows: CsvRows = []
    for id, errors in doubts.items():
        sample, proposed = by_id[id], errors[0].suggested
        if multilabel:  # each error is about one class, `NAME` or `not NAME`
            wrong = {min(error.label, error.suggested, key=len) for error in errors}
            proposed = SEPARATOR.join(sorted(classes_in(sample.label, True) ^ wrong)) or SEPARATOR
        probability = f"{max(error.probability for error in errors):.4f}"
        rows.append((id, sample.text or "", str(sample.image or ""), sample.label, proposed, probability, ""))
    return rows


def balance_rows(balance: Mapping[str, Any]) -> CsvRows:
    return [
        (part, name, row["count"], *(f"{row[key]:.6f}" for key in ("share", "low", "high")))
        for part, table in balance["parts"].items()
        for name, row in table["classes"].items()
    ]


def profile_rows(profile: Mapping[str, Any]) -> CsvRows:
    """The nested profile with one measure in each row, as `text.characters.median`."""
    return [(part, name, f"{value:.10g}") for part, measures in profile.items() for name, value in _flat(measures)]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, measure in value.items():
        if isinstance(measure, dict):
            yield from _flat(measure, f"{prefix}{name}.")
        elif measure is not None:
            yield f"{prefix}{name}", measure
