"""The audit as a value: what was found, as written to `audit.json`, which is the last file to be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmfeat.errors import DataError
from mmfeat.system.files import read_json, write_json

AUDIT_FILE = "audit.json"
FORMAT = 1


@dataclass(frozen=True)
class Audit:
    """What is to be known of a data set before its scores are believed. All but `folder` is JSON.

    `data_hash` is that of a run (`Run.config.data_hash`): an audit with another one is of other labels or contents.
    """

    folder: Path
    data: str  # absolute
    dataset: str
    data_hash: str
    version: str
    samples: int
    labelled: int
    encodings: Mapping[str, int]
    duplicates: Mapping[str, Any]  # by text, image and pair: groups, samples, exact_samples, exact_surplus, largest
    conflicts: Mapping[str, Any]  # the same: groups, exact_groups, samples, pairs, disagreeing_pairs, wrong
    shared: Mapping[str, Any]  # unlabelled samples with a labelled twin, by what they share
    leaks: Mapping[str, Any] | None  # of the splits in `splits`, by fold; None without splits
    odd: Sequence[Mapping[str, Any]]  # modality, what, count, first id, first detail
    profile: Mapping[str, Any]  # by all, labelled, unlabelled
    balance: Mapping[str, Any]  # as `mmfeat.audit.audit.class_balance`
    label_errors: Mapping[str, Any] | None  # as `mmfeat.audit.opinions.judge_labels`, and the surest `examples`
    notes: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Everything but the folder."""
        found = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "folder"}
        return {"format": FORMAT, **found}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], folder: Path) -> Audit:
        """The audit that `to_json` gave. Raises `ValueError` for anything else."""
        names = {each.name for each in fields(cls)} - {"folder"}
        if not isinstance(value, dict) or value.get("format") != FORMAT or set(value) != names | {"format"}:
            raise ValueError("not an audit of this version")
        return cls(folder=folder, **{name: value[name] for name in names})

    @property
    def file(self) -> Path:
        return self.folder / AUDIT_FILE


def write_audit(audit: Audit) -> None:
    """Declare the audit complete; its tables are written before."""
    write_json(audit.file, audit.to_json())


def read_audit(folder: str | Path) -> Audit:
    """The finished audit in `folder` (`OUT/DATASET`). Raises `DataError` where there is none of this version."""
    path = Path(folder) / AUDIT_FILE
    try:
        return Audit.from_json(read_json(path), Path(folder))
    except FileNotFoundError:
        raise DataError(f"{folder}: no finished audit here (no {AUDIT_FILE}); make one with mmfeat audit") from None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: {error}; run mmfeat audit again") from error
