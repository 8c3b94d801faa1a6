"""The result of an audit, as written to `audit.json`, the last file of an audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmfeat.audit.tables import HEADERS
from mmfeat.errors import DataError
from mmfeat.system.files import read_json
from mmfeat.system.notebook import Cells, CsvFrame, Frame, Shown
from mmfeat.system.wording import counted

AUDIT_FILE = "audit.json"
FORMAT = 1
NUMBERS = {"rank", "probability", "self_confidence", "count", "share", "low", "high", "value"}  # columns of tables


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
