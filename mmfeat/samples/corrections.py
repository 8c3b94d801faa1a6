"""Changes of the labels of a data set, whose files stay as they are: corrections, which are a table of ids and labels
that is laid over the data, and classes with too few samples, which are left out or joined."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mmfeat.errors import ConfigError, DataError
from mmfeat.samples.dataset import Data, SampleSet, read_samples
from mmfeat.samples.labels import (
    ORDINAL,
    REGRESSION,
    SEPARATOR,
    TASKS,
    classes_in,
    looks_numeric,
    number_of,
    some_counts,
)
from mmfeat.samples.table_columns import find_column
from mmfeat.samples.tables import Table
from mmfeat.system.remote import exists
from mmfeat.system.wording import counted

LABELS = "labels"  # the name of the table among `columns`
DROP, JOIN = "drop", "join"  # ways to treat rare classes
OTHER = "other"  # the class that rare classes are joined to


@dataclass(frozen=True)
class Corrections:
    """The table that was laid over the labels of a run's data, `count` labels that differ from the data's own, the hash
    of their ids and labels, and the `data_hash` with the data's own labels."""

    file: str
    count: int
    sha256: str
    data_hash: str


@dataclass(frozen=True)
class Rare:
    """The classes with too few samples for the folds, each with its count, and what is done with them: `drop` leaves
    them out, `join` makes them the class `other`. With `several` classes a sample, only these change in its label."""

    how: str
    classes: dict[str, int]
    several: bool = False

    def __str__(self) -> str:
        return f"{some_counts(self.classes)} {'left out' if self.how == DROP else f'joined as {OTHER}'}"

    def name(self, label: str) -> str:
        """The label with rare classes joined, or out of several dropped; one that is left out as a whole stays."""
        if self.how == DROP and not self.several:
            return label
        names = classes_in(label, self.several)
        kept = names - self.classes.keys() | ({OTHER} if self.how == JOIN and names & self.classes.keys() else set())
        return SEPARATOR.join(sorted(kept)) or SEPARATOR if kept != names else label

    def over(self, samples: SampleSet, given: Mapping[str, str] | None = None) -> SampleSet:
        """The samples as a run with these rare classes knows them. The data's own label of a sample is in `given` where
        it was corrected: no correction brings back what is left out."""
        out = frozenset(self.classes if self.how == DROP and not self.several else ())
        own = {id: label for id, label in (given or {}).items() if label in out}
        named = (replace(s, label=own.get(s.id, self.name(s.label))) if s.label is not None else s for s in samples)
        return replace(samples, samples=tuple(named), left_out=out)


def check_rare(how: str, task: str) -> None:
    """Raise `ConfigError` for a way to treat rare classes that there is not, or that does not suit the task."""
    if task not in TASKS:
        raise ConfigError(f"--task {task}: use one of {', '.join(TASKS)}")
    if how not in ("", DROP, JOIN):
        raise ConfigError(f"--rare {how}: use {DROP} or {JOIN}")
    if how and task == REGRESSION:
        raise ConfigError(f"--rare {how}: numbers are no classes; leave it out with --task {REGRESSION}")
    if how == JOIN and task == ORDINAL:
        raise ConfigError(f"--rare {JOIN}: a joined class has no place in an order; --rare {DROP} leaves it out")


def without_labels(columns: Mapping[str, str] | None) -> dict[str, str]:
    """The columns for readers that no label concerns."""
    return {name: column for name, column in (columns or {}).items() if name != LABELS}


def read_corrected(data: Data, columns: Mapping[str, str] | None = None) -> tuple[SampleSet, dict[str, str]]:
    """(the samples with the labels of the table that `columns` names as `labels`, id -> the data's own label where it
    differs). An empty label in that table changes nothing.

    Raises `DataError` for ids and labels that the data do not have.
    """
    samples, path = read_samples(data, without_labels(columns)), (columns or {}).get(LABELS)
    if path is None:
        return samples, {}
    before = {sample.id: sample.label for sample in samples}
    changed = {id: label for id, label in _read_labels(path, samples, before).items() if label != before[id]}
    corrected = (replace(s, label=changed[s.id]) if s.id in changed else s for s in samples)
    note = f"{counted(len(changed), 'label')} of {path} replace those of the data; the folds stay the same"
    given = {id: str(before[id]) for id in changed}
    return replace(samples, samples=tuple(corrected), notes=(*samples.notes, note)), given


def _read_labels(path: str, samples: SampleSet, before: Mapping[str, str | None]) -> dict[str, str]:
    """Id -> label of the rows of a table that have one; of several files the last one that has an id counts."""
    if not path or not exists(path):
        raise DataError(f"--labels {path}: no such table; check its name")
    table, labels, lines = Table(path), dict[str, str](), dict[str, str]()
    names = {part: find_column(part, table.names) for part in ("id", "label")}
    if not table.names:  # no row
        return {}
    if lacking := [part for part, name in names.items() if name is None]:
        raise DataError(f"--labels {path}: no column {lacking[0]} among {', '.join(table.names)}; name its columns so")
    several = any(SEPARATOR in name for name in samples.classes)  # then a label is any of the classes, a|b, or a lone |
    classes = set().union(*(classes_in(name, several) for name in samples.classes))
    numeric = looks_numeric(samples.classes)  # then a label may be another number
    columns = [str(name) for name in names.values()]
    for where, row in table.rows(columns, label=columns[1]):
        id, label = (row.get(column) or "" for column in columns)
        if not (label := label.strip()):
            continue
        if before.get(id) is None:
            known = f"sample {id!r} has no label to correct" if id in before else f"the data have no sample {id!r}"
            raise DataError(f"--labels {where}: {known}; take this line out")
        if numeric and number_of(label) is None:
            raise DataError(f"--labels {where}: {label!r} is no number, as all labels are")
        if not numeric and not classes_in(label, several) <= classes:
            raise DataError(f"--labels {where}: no sample is {label!r}; use one of {', '.join(sorted(classes))}")
        if labels.setdefault(id, label) != label and lines[id] == where.rpartition(":")[0]:
            raise DataError(f"--labels {where}: sample {id!r} has another label above; leave one of them")
        labels[id], lines[id] = label, where.rpartition(":")[0]
    return labels
