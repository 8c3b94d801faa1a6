"""Findings: the results of all checks of an audit, sample by sample; summary and tables are made of the findings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfeat.audit.leaks import UNLABELLED, GivenSplits, Leak, find_leaks, find_shared, read_given_splits
from mmfeat.audit.opinions import Opinions, Suspicion, fitting_run, read_opinions, suspicions
from mmfeat.audit.photos import Oddity, PhotosFacts, inspect_photos
from mmfeat.audit.texts import text_findings
from mmfeat.audit.twins import Conflicts, Twins, find_conflicts, find_twins, twins_within
from mmfeat.evaluation.split_files import has_splits
from mmfeat.evaluation.splits import TEST
from mmfeat.runs.entry import RunConfig
from mmfeat.runs.run import Run, hash_data
from mmfeat.samples.dataset import Sample, SampleSet
from mmfeat.samples.keys import ContentKeys, content_keys
from mmfeat.samples.labels import SEPARATOR
from mmfeat.samples.thumbnails import SecondLook
from mmfeat.system.wording import Progress


@dataclass(frozen=True)
class Findings:
    """Findings in N samples; lists and arrays have the order of the samples. `no_run` says why opinions are missing."""

    samples: SampleSet
    photos: PhotosFacts
    data_hash: str
    twins: Mapping[str, Twins]
    conflicts: Mapping[str, Conflicts]
    shared: Sequence[Leak]
    splits: GivenSplits | None
    leaks: Sequence[Leak]
    odd: Mapping[str, Sequence[tuple[Oddity, ...]]]
    opinions: Opinions | None
    no_run: str
    suspicions: Sequence[Suspicion]

    @property
    def is_multilabel(self) -> bool:
        """Whether a sample may have several classes, according to the run or, without a run, to the label cells."""
        if self.opinions:
            return self.opinions.targets.multilabel
        return any(SEPARATOR in name for name in self.samples.classes)

    @property
    def parts(self) -> list[str]:
        """The part of each sample: the fold that tests the sample, a role in a holdout, "labelled" or "unlabelled"."""
        parts = [UNLABELLED if sample.label is None else "labelled" for sample in self.samples]
        if self.splits is None:
            return parts
        for column, name in enumerate(self.splits.names):
            for row, role in zip(self.splits.rows.tolist(), self.splits.roles[:, column].tolist(), strict=True):
                if len(self.splits.names) == 1:
                    parts[row] = role
                elif role == TEST:
                    parts[row] = name
        return parts


def find_everything(
    samples: SampleSet,
    given: Mapping[str, str],
    split_dir: Path | None,
    run: str | Path | None,
    heads: Path,
    workers: int,
    progress: Progress,
) -> Findings:
    """Read every photo, those whose hashes are alike again, and run all checks; `audit_data` has the arguments, and
    `given` the data's own labels of the samples whose labels were corrected."""
    everything = samples.samples
    splits = read_given_splits(split_dir, everything) if split_dir else None  # errors show before photos are read
    photos = inspect_photos(everything, workers, progress)
    data_hash = _hash_labelled(samples, photos)

    def fits(config: RunConfig) -> bool:
        known = _hash_labelled(config.known(samples, given), photos) if config.rare else data_hash
        return config.data_hash == known

    judge, no_run = fitting_run(run, heads, fits)
    splits = splits or _run_splits(judge, everything)
    opinions = read_opinions(judge) if judge else None
    contents = (everything, photos.keys.keys, photos.hashes, SecondLook(everything, photos.keys.keys, None, progress))
    twins = find_twins(*contents)
    labels = _label_numbers(samples)
    return Findings(
        samples=samples,
        photos=photos,
        data_hash=judge.config.data_hash if judge else data_hash,
        twins=twins,
        conflicts={modality: find_conflicts(groups, labels) for modality, groups in twins.items()},
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


def _hash_labelled(samples: SampleSet, photos: PhotosFacts) -> str:
    """The data hash of a run on these samples, from content keys that the audit already has."""
    labelled, ids = samples.labelled, {sample.id for sample in samples.labelled}
    rows = [row for row, sample in enumerate(samples) if sample.id in ids]
    images = ContentKeys(photos.keys.keys[rows], photos.keys.present[rows], ())
    return hash_data(labelled, {"text": content_keys(labelled, "text"), "image": images})


def _label_numbers(samples: SampleSet) -> np.ndarray:
    """(N,) the index of each label cell in the sorted cells, -1 without label."""
    index_of = {name: index for index, name in enumerate(samples.classes)}
    return np.array([index_of[sample.label] if sample.label is not None else -1 for sample in samples], int)
