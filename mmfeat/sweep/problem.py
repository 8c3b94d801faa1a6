"""The problem of a run: labelled samples, their contents, their targets, and how they are split."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.explain import why_failed
from mmfeat.cache.features import Features
from mmfeat.cache.store import Cache
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import HeadError
from mmfeat.evaluation.protocol import KFOLD, Protocol, near_duplicates, protocol_splits
from mmfeat.evaluation.splits import Fold, Splits, check_folds, rare_classes
from mmfeat.extraction.missing import place_of
from mmfeat.heads.registry import BASELINES
from mmfeat.runs.run import hash_data, hash_table
from mmfeat.samples.corrections import LABELS, Corrections, Rare, check_rare, read_corrected, without_labels
from mmfeat.samples.dataset import MODALITIES, SampleSet
from mmfeat.samples.keys import ContentKeys
from mmfeat.samples.labels import (
    MULTICLASS,
    ORDINAL,
    REGRESSION,
    SEPARATOR,
    Targets,
    absent_note,
    labels_alike,
    looks_numeric,
    read_targets,
)
from mmfeat.samples.table_columns import TableColumn, TableCounts
from mmfeat.system.files import canonical_json
from mmfeat.system.remote import absolute
from mmfeat.system.wording import Progress, without_passwords
from mmfeat.version import __version__

Cell = tuple[int, int, Fold]  # number of a fold, number of a seed, and the rows
IN_MEMORY = 1 << 30  # bytes of pooled vectors; more stay on disk and are read batch by batch


@dataclass(frozen=True)
class LabelledData:
    """A data set with the content keys, the targets and the splits of its labelled samples."""

    samples: SampleSet
    columns: dict[str, str]
    store: Cache
    keys: Mapping[str, ContentKeys]
    targets: Targets
    protocol: Protocol
    splits: Splits
    new_splits: Path | None
    given: Mapping[str, str]  # id -> the data's own label, where it was corrected
    split_notes: tuple[str, ...] = ()
    rare: Rare | None = None
    order: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines about labels and splits that may not be what the user expects."""
        notes = [
            *([f"{self.rare} (--rare {self.rare.how})"] if self.rare else []),
            *self.split_notes,
            *(self.samples.notes[-1:] if LABELS in self.columns else ()),
        ]
        if self.protocol.split_dir and self.new_splits is None:
            sizes = f"{len(self.splits)} folds" if len(self.splits) > 1 else "a holdout"
            notes.append(
                f"splits of {self.protocol.split_dir} are used again ({sizes}); "
                "--folds, --split and --seed have no effect"
            )
        if self.targets.numeric:
            return tuple(notes)
        if self.targets.task == MULTICLASS and looks_numeric(self.targets.classes):
            notes.append(
                f"labels are {len(self.targets.classes)} different numbers, and each counts as a class "
                f"(to predict numbers: --task {REGRESSION} or {ORDINAL})"
            )
        if not self.targets.multilabel and any(SEPARATOR in name for name in self.targets.classes):
            notes.append(
                f"labels contain {SEPARATOR}, and each combination counts as a class "
                "(for several labels a sample: --task multilabel)"
            )
        return (*notes, *labels_alike(self.targets.classes), *absent_note(self.targets.take(self.splits.tested)))

    @cached_property
    def table(self) -> tuple[TableColumn, ...]:
        """What the columns of numbers and categories hold."""
        if not self.samples.table:
            return ()
        counts = TableCounts(self.samples.table)
        for sample in self.samples.labelled:
            counts.add(sample)
        return counts.columns()

    @cached_property
    def recorded(self) -> dict[str, Any]:
        """The fields of a `RunConfig` about the data: where they lie, their contents and task, and how they are split,
        and the version that read them."""
        roles = "\n".join(map(",".join, self.splits.roles.tolist()))
        return {
            "version": __version__,
            "task": self.targets.task,
            "order": self.order or None,
            "data": absolute(self.samples.source),
            "columns": {name: without_passwords(value) for name, value in without_labels(self.columns).items()},
            "cache": os.path.abspath(self.store.folder.parent),
            "dataset": self.samples.name,
            "data_hash": hash_data(self.samples.labelled, self.keys),
            "folds": tuple(self.splits.names),
            "splits_hash": hashlib.sha256(roles.encode()).hexdigest(),
            "table": self.table or None,
            "table_hash": hash_table(self.samples.labelled),
            "corrections": self._corrections,
            "rare": self.rare,
        }

    @property
    def _corrections(self) -> Corrections | None:
        if not self.given:
            return None
        own = [replace(sample, label=self.given.get(sample.id, sample.label)) for sample in self.samples.labelled]
        new = [[sample.id, sample.label] for sample in self.samples.labelled if sample.id in self.given]
        digest = hashlib.sha256(canonical_json(new).encode()).hexdigest()
        return Corrections(absolute(self.columns[LABELS]), len(new), digest, hash_data(own, self.keys))

    def load(self, specs: Sequence[EncoderSpec]) -> tuple[Features, list[str]]:
        """The vectors of the labelled samples and their table, and a line for each encoder that lacks more than half.

        Raises `HeadError` for an encoder that has none.
        """
        features = self.store.load(self.samples.labelled, specs, self.keys, IN_MEMORY)
        lacking = list(self._lacking(specs, features))
        return features.with_table(self.table, self.samples.labelled), lacking

    def _lacking(self, specs: Sequence[EncoderSpec], features: Features) -> Iterator[str]:
        for spec in specs:
            mask = features.masks[spec.folder_name]
            if mask.sum() * 2 >= len(mask):
                continue
            sample = self.samples.labelled[int(mask.argmin())]
            first = f"first: {place_of(sample, spec.part)}: {why_failed(self.store, sample, [spec])}"
            if not mask.any():
                others = {other.modality for other in specs} - {spec.modality}
                rest = f"; --modalities {min(others)} trains on the rest" if others else ""
                raise HeadError(
                    f"{self.samples.source}: no labelled sample has a vector of {spec.folder_name} ({first}){rest}"
                )
            yield f"{(~mask).sum():,} of {len(mask):,} labelled samples have no vector of {spec.folder_name} ({first})"


def read_labelled(
    data: str | Path,
    columns: Mapping[str, str] | None,
    cache: str | Path,
    task: str,
    protocol: Protocol,
    progress: Progress,
    order: Sequence[str] = (),
    rare: str | Rare = "",
) -> LabelledData:
    """Read the samples, hash the contents of the labelled ones, and split them by the data's own labels: with
    corrections, too, the folds are the same. `rare` says what to do with classes too few for that: `drop`, `join`, or
    what an earlier run did."""
    samples, given = read_corrected(data, columns)
    if not samples.labelled:
        raise HeadError(
            f"{data}: no labelled samples; label some, or predict these with a run on other data: mmfeat predict"
        )
    protocol = protocol.of(samples.labelled)
    store = Cache(cache, samples.name)
    few = _rare(samples, given, rare, task, order, protocol, store, progress)
    if few:
        samples, given = few.over(samples, given), {id: few.name(label) for id, label in given.items()}
    labelled = samples.labelled
    keys = {modality: store.content_keys(labelled, modality, progress) for modality in MODALITIES}
    targets = read_targets([str(sample.label) for sample in labelled], task, order)
    own = read_targets([given.get(s.id, str(s.label)) for s in labelled], task, order) if given else targets
    if unknown := set(targets.classes) - set(own.classes):
        raise HeadError(f"--labels: {min(unknown)} is no class of the data; is it --task multilabel?")
    if given and protocol.kind == KFOLD:
        check_folds(targets, np.arange(len(labelled)), protocol.folds)
    splits, new, notes = protocol_splits(labelled, own, keys["image"], store.folder, protocol, progress)
    named = dict(columns or {})
    return LabelledData(samples, named, store, keys, targets, protocol, splits, new, given, notes, few, tuple(order))


def _rare(
    samples: SampleSet,
    given: Mapping[str, str],
    rare: str | Rare,
    task: str,
    order: Sequence[str],
    protocol: Protocol,
    store: Cache,
    progress: Progress,
) -> Rare | None:
    """The classes, by the data's own labels, with too few samples or groups of near duplicates for the protocol."""
    if isinstance(rare, Rare):
        return rare
    check_rare(rare, task)
    if not rare:
        return None
    labelled = samples.labelled
    targets = read_targets([given.get(s.id, str(s.label)) for s in labelled], task, order)
    images = store.content_keys(labelled, "image", progress)
    _, groups = near_duplicates(labelled, images, store.folder, protocol, progress)
    few = rare_classes(targets, groups, protocol.folds if protocol.kind == KFOLD else 3)
    return Rare(rare, few, targets.multilabel) if few else None


@dataclass(frozen=True)
class Problem:
    """The data and splits on which every head of a sweep is trained and scored, with `repeats` seeds a fold, and the
    arithmetic of the `products` in training."""

    ids: tuple[str, ...]
    targets: Targets
    splits: Splits
    repeats: int
    seed: int
    products: str = "float32"

    def repeats_of(self, head: str) -> int:
        """The trainings a fold: baselines have next to nothing random in them, so one is enough."""
        return 1 if head in BASELINES else self.repeats

    @property
    def tested(self) -> Targets:
        """The targets of the rows that are scored."""
        return self.targets.take(self.splits.tested)

    def cells(self, head: str) -> list[Cell]:
        """(fold, repeat, rows) of all trainings, fold after fold."""
        return [
            (fold, repeat, self.splits.fold(fold, repeat))
            for fold in range(len(self.splits))
            for repeat in range(self.repeats_of(head))
        ]
