"""The overview of a data set: counts of samples and labels, without the samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmfeat.samples.rows import Absence
from mmfeat.samples.table_columns import TableColumn

if TYPE_CHECKING:
    from mmfeat.samples.dataset import SampleSet


@dataclass(frozen=True)
class Overview:
    """Counts of a data set that may be larger than memory: all samples, and the samples of each label."""

    name: str
    source: str
    count: int
    labels: Mapping[str, int]
    encodings: Mapping[str, int] = field(default_factory=dict)
    unused_columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    absent: Mapping[str, Absence] = field(default_factory=dict)
    table: tuple[TableColumn, ...] = ()  # what the columns of numbers and categories hold

    @classmethod
    def of(cls, samples: SampleSet) -> Overview:
        """The overview of samples that are in memory."""
        labels = Counter(sample.label for sample in samples if sample.label is not None)
        told = samples.encodings, samples.unused_columns, samples.notes
        return cls(samples.name, samples.source, len(samples), labels, *told)

    def __len__(self) -> int:
        return self.count
