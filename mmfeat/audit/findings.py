"""Findings: the results of all checks of an audit, sample by sample; summary and tables are made of the findings.

A leak is a sample of a test or validation part that stands, itself or as a twin, also in the training part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmfeat.audit.label_errors import Opinions, Suspicion, fitting_run, read_opinions, suspicions
from mmfeat.audit.photos import Oddity, PhotosFacts, inspect_photos
from mmfeat.audit.texts import text_findings
from mmfeat.audit.twins import Conflicts, Twins, find_conflicts, find_twins, twins_within
from mmfeat.errors import RunError
from mmfeat.evaluation.protocol import has_splits, read_roles
from mmfeat.evaluation.splits import TEST, TRAIN, VALIDATION
from mmfeat.runs.entry import RunConfig
from mmfeat.runs.run import hash_data
from mmfeat.samples.dataset import Sample, SampleSet
from mmfeat.samples.keys import ContentKeys, content_keys
from mmfeat.samples.labels import SEPARATOR
from mmfeat.samples.thumbnails import SecondLook
from mmfeat.system.wording import Progress

SAME = "sample"  # modality of a leak whose sample itself stands in both parts
UNLABELLED = "unlabelled"
LABELLED = "labelled"


@dataclass(frozen=True)
class Leak:
    """A sample `row` of `part` in `fold`, and its twin `other` (row) in `other_part`."""

    fold: str
    part: str
    row: int
    other_part: str
    other: int
    modality: str
    kind: str


@dataclass(frozen=True)
class GivenSplits:
    """Splits as read, right or wrong: row (M,) and roles (M, F) of each line whose id the data have.

    `unknown` counts lines with another id, `unsplit` labelled samples on no line, `doubled` ids on several lines.
    """

    folder: str
    names: tuple[str, ...]
    rows: np.ndarray
    roles: np.ndarray
    unknown: int
    unsplit: int
    doubled: int

    def parts(self) -> dict[str, np.ndarray]:
        """Rows by part, for counts of classes: the test part of each fold, or the three parts of a holdout."""
        if len(self.names) > 1:
            return {name: self.rows[self.roles[:, column] == TEST] for column, name in enumerate(self.names)}
        role = np.char.partition(self.roles[:, 0], "-")[:, 0] if len(self.roles) else self.roles[:, 0]
        parts = {name: self.rows[role == name] for name in (TRAIN, VALIDATION, TEST)}
        return {name: rows for name, rows in parts.items() if len(rows)}


def read_given_splits(folder: Path, samples: Sequence[Sample]) -> GivenSplits:
    """Read the splits in a folder. Raises `RunError` where the splits name none of the samples."""
    names, ids, roles = read_roles(folder)
    row_of = {sample.id: row for row, sample in enumerate(samples)}
    rows = np.array([row_of.get(id, -1) for id in ids], dtype=int)
    known = rows >= 0
    if not known.any():
        example = f" (first id: {ids[0]})" if ids else ""
        raise RunError(f"{folder}: splits of none of these samples{example}; name their own with --split-dir")
    labelled = {row for row, sample in enumerate(samples) if sample.label is not None}
    unsplit = len(labelled - set(rows.tolist()))
    doubled = len(ids) - len(set(ids))
    return GivenSplits(str(folder), names, rows[known], roles[known], int((~known).sum()), unsplit, doubled)


def find_leaks(splits: GivenSplits, twins: Mapping[str, Twins]) -> list[Leak]:
    """Leaks from the rest of a fold into its test part, and from the training part into a fixed validation part.

    A sample has one leak for each fold and modality (the sample itself, text, photo), however many twins it has.
    """
    leaks: list[Leak] = []
    for column, name in enumerate(splits.names):
        roles = splits.roles[:, column]
        for part, others in ((TEST, roles != TEST), (VALIDATION, (roles != TEST) & (roles != VALIDATION))):
            held, rest = splits.rows[roles == part], splits.rows[others]
            role_of = dict(zip(rest.tolist(), roles[others].tolist(), strict=True))
            leaks += [
                Leak(name, part, row, role_of[other], other, modality, kind)
                for row, other, modality, kind in _given_away(held, rest, twins)
            ]
    return leaks


def find_shared(samples: Sequence[Sample], twins: Mapping[str, Twins]) -> list[Leak]:
    """Unlabelled samples with a labelled twin, which leak into no score but matter for a prediction."""
    has = np.array([sample.label is not None for sample in samples], bool)
    pairs = _given_away(np.flatnonzero(~has), np.flatnonzero(has), twins)
    return [Leak("", UNLABELLED, row, LABELLED, other, modality, kind) for row, other, modality, kind in pairs]


def _given_away(held: np.ndarray, rest: np.ndarray, twins: Mapping[str, Twins]) -> Iterator[tuple[int, int, str, str]]:
    """(row, first twin among the rest, modality, exact or near) for each held row with a twin."""
    both = set(np.intersect1d(held, rest).tolist())
    yield from ((row, row, SAME, "exact") for row in sorted(both))
    for modality, part in twins.items():
        exact, near = (_first_twins(groups, held, rest) for groups in (part.exact, part.near))
        for row, equal, alike in zip(held.tolist(), exact.tolist(), near.tolist(), strict=True):
            if alike >= 0 and row not in both:
                yield row, equal if equal >= 0 else alike, modality, "exact" if equal >= 0 else "near"


def _first_twins(groups: np.ndarray, held: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """(H,) the first row of `rest` in the group of each held row, -1 without one."""
    first = np.full(int(groups.max(initial=-1)) + 2, -1)
    backwards = rest[::-1][groups[rest[::-1]] >= 0]
    first[groups[backwards]] = backwards  # the last row written to a group stays: the first of `rest`
    return np.where(groups[held] >= 0, first[groups[held]], -1)


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
    if splits is None and judge and has_splits(judge.folder):
        splits = read_given_splits(judge.folder, everything)
    opinions = read_opinions(judge) if judge else None
    contents = (everything, photos.keys.keys, photos.hashes, SecondLook(everything, photos.keys.keys, None, progress))
    twins = find_twins(*contents)
    index_of = {name: index for index, name in enumerate(samples.classes)}
    labels = np.array([-1 if sample.label is None else index_of[sample.label] for sample in samples], int)
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


def _hash_labelled(samples: SampleSet, photos: PhotosFacts) -> str:
    """The data hash of a run on these samples, from content keys that the audit already has."""
    labelled, ids = samples.labelled, {sample.id for sample in samples.labelled}
    rows = [row for row, sample in enumerate(samples) if sample.id in ids]
    images = ContentKeys(photos.keys.keys[rows], photos.keys.present[rows], ())
    return hash_data(labelled, {"text": content_keys(labelled, "text"), "image": images})
