"""Results that a report shows: a run, one of its entries, its out-of-fold predictions, and the samples, if present."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from mmfeat.errors import DataError
from mmfeat.runs.entry import Entry, OutOfFold
from mmfeat.runs.run import Run
from mmfeat.samples.dataset import Sample, SampleSet, read_samples
from mmfeat.system.remote import absolute

SINGLE = ("text", "image")


@dataclass
class Results:
    """A run and the entry that the report is about."""

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
    ) -> Results:
        """Results of the best entry or of the entry named; `data` is the present place of data that were moved."""
        place = run.config.data if data is None else absolute(data)
        return cls(run, run.entry(head, modalities), place, columns or run.config.columns)

    def predictions(self, entry: Entry | None = None) -> OutOfFold:
        """The out-of-fold predictions of an entry, by default of the report's entry."""
        entry = self.entry if entry is None else entry
        folder = self.run.head_folder(entry)
        if folder not in self._read:
            self._read[folder] = self.run.out_of_fold(entry)
        return self._read[folder]

    @property
    def alike(self) -> Entry | None:
        """The best entry on text and image whose head was also trained on text and on image alone, or None."""
        kinds = {name: {each.head for each in self.run.matching(modalities=name)} for name in SINGLE}
        both = [self.entry, *self.run.leaderboard]
        fit = (each for each in both if each.modalities == "both" and all(each.head in kinds[n] for n in SINGLE))
        return next(fit, None)

    @cached_property
    def samples(self) -> SampleSet | None:
        """The samples of the run's data, None where the data are gone."""
        try:
            return read_samples(self.data, self.columns)
        except (DataError, OSError):
            return None

    @cached_property
    def by_id(self) -> dict[str, Sample]:
        return {sample.id: sample for sample in self.samples or ()}
