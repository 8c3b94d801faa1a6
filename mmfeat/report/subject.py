"""The subject of a report: a run, one of its entries, the out-of-fold predictions, and the samples, if present."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mmfeat.errors import DataError
from mmfeat.runs.entry import Entry
from mmfeat.runs.out_of_fold import OutOfFold
from mmfeat.runs.run import Run
from mmfeat.samples.dataset import Sample, SampleSet, read_samples

SINGLE = ("text", "image")


@dataclass
class Subject:
    """A run and the one of its entries that a report examines; `data` and `columns` say where its samples are."""

    run: Run
    entry: Entry
    data: str
    columns: Mapping[str, str]
    _read: dict[Path, OutOfFold] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        run: Run,
        head: str | None = None,
        modalities: str | None = None,
        data: str | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> Subject:
        """The subject with the named or the recommended entry; `data` is where the data of the run are now."""
        source = run.config.data if data is None else data
        return cls(run, run.predicting(head, modalities), source, columns or run.config.columns)

    def predictions(self, entry: Entry | None = None) -> OutOfFold:
        """The out-of-fold predictions of an entry, by default of the report's entry."""
        entry = self.entry if entry is None else entry
        folder = self.run.head_folder(entry)
        if folder not in self._read:
            self._read[folder] = self.run.out_of_fold(entry)
        return self._read[folder]

    @property
    def alike(self) -> Entry | None:
        """The best entry on text and image whose head was also trained on text and on image alone, or None; None also
        where a table is a third modality, and for numbers, which no modality flips."""
        if self.run.config.table or self.run.config.is_regression:
            return None
        heads = [{entry.head for entry in self.run.matching(modalities=name)} for name in SINGLE]
        both = [entry for entry in (self.entry, *self.run.leaderboard) if entry.modalities == "both"]
        return next((entry for entry in both if all(entry.head in alone for alone in heads)), None)

    @cached_property
    def samples(self) -> SampleSet | None:
        try:
            return self.run.config.known(read_samples(self.data, self.columns))
        except (DataError, OSError):
            return None

    @cached_property
    def by_id(self) -> dict[str, Sample]:
        return {sample.id: sample for sample in self.samples or ()}
