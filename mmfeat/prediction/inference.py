"""Inference: a run's entry over samples whose features go through the cache; what submit and predict share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mmfeat.cache.explain import why_failed
from mmfeat.cache.features import Block, Features, MappedBlock
from mmfeat.cache.store import Cache
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import ConfigError, DataError, SubmissionError
from mmfeat.extraction.extract import Extraction, extract_samples
from mmfeat.extraction.worker import ExtractSettings
from mmfeat.prediction.final_heads import EntryPredictor
from mmfeat.prediction.output_file import Predictions
from mmfeat.runs.entry import Entry
from mmfeat.runs.run import Run, checked_towers
from mmfeat.samples.dataset import MODALITIES, PART, Sample, SampleSet, read_samples
from mmfeat.system.hardware import resolve_device
from mmfeat.system.progress import Progress


@dataclass(frozen=True)
class Inference:
    """Predictions for N samples. `lacking`: by modality that the entry sees, (N,) bool whether an encoder of it has
    nothing; `without`: ids of those of which no encoder has anything; `notes`: lines about what is lacking, and why."""

    predictions: Predictions
    extraction: Extraction
    lacking: dict[str, np.ndarray]
    without: list[str]
    notes: list[str]


def read_for(data: str | Path, columns: Mapping[str, str] | None, own: Mapping[str, str]) -> SampleSet:
    """The data, by default with the names of the run's `own` columns, of which new samples may lack that of the labels,
    or with the plain names."""
    check_columns(data, columns)
    try:
        return read_samples(data, columns or own)
    except DataError:
        if columns or not own:
            raise
        for names in ({name: column for name, column in own.items() if name != "label"}, {}):
            with contextlib.suppress(DataError):
                return read_samples(data, names)
        raise


def check_columns(data: str | Path, columns: Mapping[str, str] | None) -> None:
    """Names of columns belong to a table. Raises `ConfigError` for those of a folder, which would change nothing."""
    if columns and os.path.isdir(data):
        given = ",".join(f"{name}={column}" for name, column in columns.items())
        raise ConfigError(
            f"--columns {given}: {data} is a folder and has no columns; to name those of the file written, list them, "
            "as in --columns guid,tag"
        )


def infer(
    run: Run,
    entry: Entry,
    samples: SampleSet,
    cache: str | Path,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
) -> Inference:
    """Extract what the cache lacks with the run's own encoders, and predict.

    Raises `RunError` where the encoders are not those of the run.
    """
    predictor = EntryPredictor(run, entry, resolve_device(device))
    towers = checked_towers(run, predictor.towers)
    extraction = extract_samples(
        samples, towers, cache=cache, settings=ExtractSettings(device, workers), progress=progress
    )
    specs = [tower.spec for tower in towers]
    features = Cache(cache, samples.name).load(samples.samples, specs)
    predictions = predict_features(predictor, features, samples.samples)
    lacking = _lacking(features)
    notes = _lacking_notes(samples, lacking, partial(_why_failed, cache, samples, specs))
    return Inference(predictions, extraction, lacking, unseen(features), notes)


def predict_features(predictor: EntryPredictor, features: Features, samples: Sequence[Sample]) -> Predictions:
    """Predictions of an entry for samples whose features are there; `SubmissionError` where they are not finite."""
    run, features = predictor.run, features.widened(predictor.widths)
    chosen, probabilities = predictor.predict(features, samples)
    if not np.isfinite(probabilities).all():
        raise SubmissionError(f"{run.folder}: its head gives no finite predictions; train it again")
    return Predictions(features.ids, chosen, probabilities, run.classes, run.config.is_multilabel)


def unseen(features: Features) -> list[str]:
    """Ids of the samples of which no encoder has a vector."""
    seen = np.any(list(features.masks.values()), axis=0)
    return [id for id, there in zip(features.ids, seen, strict=True) if not there]


def _lacking_notes(samples: SampleSet, lacking: Mapping[str, np.ndarray], why: Callable[[str, str], str]) -> list[str]:
    """Lines about what samples do not have, and what they have and nobody can read; `why` tells by modality and id."""
    lines = []
    for modality, gaps in lacking.items():
        absent = [sample for sample in samples if getattr(sample, modality) is None]
        if absent:
            reason = getattr(absent[0], f"{modality}_error")
            lines.append(
                f"{len(absent):,} of {len(samples):,} samples predicted without {PART[modality]} "
                f"(first: {absent[0].id}, {reason})"
            )
        pairs = zip(samples, gaps.tolist(), strict=True)
        if broken := [sample.id for sample, gap in pairs if gap and getattr(sample, modality) is not None]:
            lines.append(
                f"{len(broken):,} of {len(samples):,} samples have a {PART[modality]} that cannot be read and counts "
                f"as missing (first: {broken[0]}, {why(modality, broken[0])})"
            )
    return lines


def _why_failed(cache: str | Path, samples: SampleSet, specs: Sequence[EncoderSpec], modality: str, id: str) -> str:
    return why_failed(cache, samples, id, [spec for spec in specs if spec.modality == modality])


def unseen_note(without: Sequence[str], count: int, modalities: Iterable[str]) -> list[str]:
    """A line about samples of which the head sees nothing, if there are any."""
    if not without:
        return []
    wanted = " nor ".join(PART[modality] for modality in modalities)
    return [
        f"{len(without):,} of {count:,} samples have no {wanted}, which is what this head sees (first: {without[0]}): "
        "they are predicted from nothing"
    ]


def _lacking(features: Features) -> dict[str, np.ndarray]:
    blocks: list[Block | MappedBlock] = [*features.blocks, *features.mapped]
    return {
        modality: ~np.all([block.mask for block in blocks if block.modality == modality], axis=0)
        for modality in MODALITIES
        if any(block.modality == modality for block in blocks)
    }
