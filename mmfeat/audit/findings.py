"""Findings: all that an audit found, sample by sample; the summary and the tables are made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfeat.audit.conflicts import Conflicts, find_conflicts
from mmfeat.audit.leaks import UNLABELLED, GivenSplits, Leak, find_leaks, find_shared, read_given_splits
from mmfeat.audit.opinions import Opinions, Suspicion, fitting_run, read_opinions, suspicions
from mmfeat.audit.photos import Finding, Photos, inspect_photos
from mmfeat.audit.texts import text_findings
from mmfeat.audit.twins import Twins, find_twins, twins_within
from mmfeat.evaluation.splits import TEST, has_splits
from mmfeat.runs.run import Run, hash_data
from mmfeat.samples.dataset import Sample, SampleSet
from mmfeat.samples.keys import ContentKeys, content_keys
from mmfeat.samples.labels import SEPARATOR
from mmfeat.system.progress import Progress


@dataclass(frozen=True)
class Findings:
    """What was found in N samples; lists and arrays are in their order. `no_run` says why there are no opinions."""

    samples: SampleSet
    photos: Photos
    data_hash: str
    twins: Mapping[str, Twins]
    conflicts: Mapping[str, Conflicts]
    shared: Sequence[Leak]
    splits: GivenSplits | None
    leaks: Sequence[Leak]
    odd: Mapping[str, Sequence[tuple[Finding, ...]]]
    opinions: Opinions | None
    no_run: str
    suspicions: Sequence[Suspicion]

    @property
    def is_multilabel(self) -> bool:
        """Whether a sample may have several classes: as the run has it, or because labels are written like that."""
        if self.opinions:
            return self.opinions.targets.multilabel
        return any(SEPARATOR in name for name in self.samples.classes)

    @property
    def parts(self) -> list[str]:
        """Of each sample, where it stands: the fold that tests it, its role in a holdout, labelled or unlabelled."""
        found = [UNLABELLED if sample.label is None else "labelled" for sample in self.samples]
        if self.splits is None:
            return found
        for column, name in enumerate(self.splits.names):
            for row, role in zip(self.splits.rows.tolist(), self.splits.roles[:, column].tolist(), strict=True):
                if len(self.splits.names) == 1:
                    found[row] = role
                elif role == TEST:
                    found[row] = name
        return found


def find_everything(
    samples: SampleSet, split_dir: Path | None, run: str | Path | None, heads: Path, workers: int, progress: Progress
) -> Findings:
    """Read every photo once, then compare; see `audit_data` for the arguments."""
    everything = samples.samples
    splits = read_given_splits(split_dir, everything) if split_dir else None  # what is wrong shows before the reading
    photos = inspect_photos(everything, workers, progress)
    data_hash = _hash_labelled(everything, photos)
    judge, no_run = fitting_run(run, heads, data_hash)
    splits = splits or _run_splits(judge, everything)
    opinions = read_opinions(judge) if judge else None
    contents = (everything, photos.keys.keys, photos.hashes)
    twins = find_twins(*contents)
    labels = _label_numbers(samples)
    return Findings(
        samples=samples,
        photos=photos,
        data_hash=data_hash,
        twins=twins,
        conflicts={modality: find_conflicts(each, labels) for modality, each in twins.items()},
        shared=find_shared(everything, twins),
        splits=splits,
        leaks=find_leaks(splits, twins_within(np.unique(splits.rows), *contents)) if splits else [],
        odd={"text": text_findings(everything), "image": photos.findings},
        opinions=opinions,
        no_run=no_run,
        suspicions=suspicions(opinions) if opinions else [],
    )


def _run_splits(run: Run | None, samples: Sequence[Sample]) -> GivenSplits | None:
    return read_given_splits(run.folder, samples) if run and has_splits(run.folder) else None


def _hash_labelled(samples: Sequence[Sample], photos: Photos) -> str:
    """The data hash of a run on these samples, from what was read of them here."""
    rows = [row for row, sample in enumerate(samples) if sample.label is not None]
    labelled = [samples[row] for row in rows]
    images = ContentKeys(photos.keys.keys[rows], photos.keys.present[rows], ())
    return hash_data(labelled, {"text": content_keys(labelled, "text"), "image": images})


def _label_numbers(samples: SampleSet) -> np.ndarray:
    """(N,) a number for each label cell, -1 without label."""
    number = {name: place for place, name in enumerate(samples.classes)}
    return np.array([number[sample.label] if sample.label is not None else -1 for sample in samples], int)
