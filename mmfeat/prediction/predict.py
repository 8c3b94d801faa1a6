"""Prediction for a data set, for files, or for one pair of text and image, with scores where samples have labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.store import Cache
from mmfeat.errors import ConfigError
from mmfeat.evaluation.metrics import evaluate
from mmfeat.extraction.extract import ExtractSettings
from mmfeat.prediction.drift import check_labels, find_drift, out_of_fold_choices, training_set
from mmfeat.prediction.final_heads import Inference, infer, read_for, unseen_note, with_places
from mmfeat.prediction.model import Model, unread
from mmfeat.prediction.output_file import NAMES, Predictions, names_in
from mmfeat.runs.entry import Scores, convert
from mmfeat.runs.run import Run, choose_run
from mmfeat.samples.dataset import MODALITIES, Data, Sample, SampleSet, name_of
from mmfeat.samples.labels import MULTILABEL, ORDINAL, REGRESSION, Targets, absent_note, classes_in
from mmfeat.system.wording import Progress, counted


@dataclass(frozen=True)
class Predicted:
    """Predictions with the run and the head that predicted; `notes` are lines for the user.

    `scores` are measured on labelled samples outside the training data of the run, None without such samples. `names`
    are the columns of a file of the predictions.
    """

    run: Run
    head: str
    modalities: str
    predictions: Predictions
    scores: Scores | None = None
    notes: list[str] = field(default_factory=list)
    names: tuple[str, str] = NAMES


def predict_data(
    data: Data,
    run: str | Path | None = None,
    *,
    heads: str | Path = "heads",
    head: str | None = None,
    modalities: str | None = None,
    cache: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    encoders: Sequence[str] = (),
    device: str = "auto",
    runtime: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
) -> Predicted:
    """Predict all samples of a folder or table, labelled or not; vectors go through the cache, as in a submission.

    `encoders` says where weights of the run lie now, if they have moved.
    """
    data = name_of(data)
    chosen = with_places(choose_run(run, heads, data, head, modalities), encoders)
    entry = chosen.predicting(head, modalities)
    samples = read_for(data, columns, chosen.config)
    cache = cache or chosen.config.cache
    inference = infer(chosen, entry, samples, cache, ExtractSettings(device, workers, runtime=runtime), progress)
    trained = training_set(chosen, samples)
    training = trained.labelled
    scores, score_notes = score(chosen, samples, inference, training, Cache(cache, samples.name))
    before = out_of_fold_choices(chosen, entry)
    notes = [
        *samples.notes,
        *inference.notes,
        *unseen_note(inference.without, len(samples), inference.lacking),
        *score_notes,
        *find_drift(chosen, inference, before, training, samples.samples),
    ]
    names = names_in(samples, trained)
    return Predicted(chosen, entry.head, entry.modalities, inference.predictions, scores, notes, names)


def predict_files(model: Model, samples: SampleSet, progress: Progress | None = None) -> Predicted:
    """Predict samples outside a data set, whose vectors are computed in memory and not cached."""
    predictions, embedded = model.predict_samples(samples.samples, progress)
    entry = model.entry
    return Predicted(
        model.run,
        entry.head,
        entry.modalities,
        predictions,
        notes=[*samples.notes, *unread(samples.samples, embedded, model.table)],
    )


def check_inputs(
    files: Sequence[str], data: str | None, text: str | None, image: str | None, data_flags: Mapping[str, Any]
) -> None:
    """Raise `ConfigError` unless exactly one kind of input is given, and values of `data_flags` only with --data."""
    inputs = {"files": files, "--data": data, "--text/--image": text is not None or image}
    names = [name for name, value in inputs.items() if value]
    if len(names) != 1:
        given = " and ".join(names) or "nothing"
        raise ConfigError(f"{given} given to predict; name photos and .txt files, or --data, or --text and --image")
    if data is None and (unused := next((flag for flag, value in data_flags.items() if value), "")):
        raise ConfigError(f"{unused} goes with --data; files and pairs are encoded in memory, leave it out")


def score(
    run: Run, samples: SampleSet, inference: Inference, training: Sequence[Sample], store: Cache
) -> tuple[Scores | None, list[str]]:
    """(scores on labelled samples outside the training data of the run, None without such samples; notes)."""
    labels = [None if sample.label in samples.left_out else sample.label for sample in samples]
    rows = np.array([row for row, label in enumerate(labels) if label is not None], np.int64)
    if not len(rows):
        return None, []
    if unknown := check_labels(samples, run):
        known = "numbers" if run.config.is_regression else ", ".join(run.classes)
        return None, [f"no score: label {', '.join(unknown)} is unknown to the run ({known})"]
    labelled = [samples.samples[row] for row in rows]
    fresh = ~were_seen(labelled, training, tuple(inference.lacking), store)
    notes = []
    if not fresh.all():
        notes = [
            f"{(~fresh).sum():,} of {len(rows):,} labelled samples trained this run and do not count in a score; "
            f"for them its scores out of fold are in {run.leaderboard_file}"
        ]
    if left_out := sum(sample.label in samples.left_out for sample in samples):
        notes.append(f"{counted(left_out, 'label')} of classes that the run left out do not count in a score")
    if not training:
        notes.append(f"{run.config.data} is gone: samples that trained the run would make the score too high")
    if not fresh.any():
        return None, notes
    rows, predictions = rows[fresh], inference.predictions
    targets = targets_of([str(samples.samples[row].label) for row in rows], run.classes, run.config.task)
    values = evaluate(targets, predictions.chosen[rows][None], predictions.probabilities[rows][None])
    return convert(values, Scores), notes if targets.numeric else [*notes, *absent_note(targets)]


def were_seen(
    samples: Sequence[Sample], training: Sequence[Sample], modalities: Sequence[str], store: Cache
) -> np.ndarray:
    """(N,) bool, whether some training sample has the same contents in all `modalities` of the head, which for a table
    alone are those of text and image."""
    modalities = modalities or MODALITIES
    with store.index(writes=False) as index:
        pairs = [
            list(zip(*(store.content_keys(part, name, index=index).keys.tolist() for name in modalities), strict=True))
            for part in (samples, training)
        ]
    known = set(pairs[1]) - {(b"",) * len(modalities)}
    return np.array([pair in known for pair in pairs[0]], bool)


def targets_of(labels: Sequence[str], classes: Sequence[str], task: str) -> Targets:
    """The targets of N label cells over all C classes of a run."""
    if task == REGRESSION:
        return Targets(tuple(classes), np.array([float(label) for label in labels])[:, None])
    multilabel = task == MULTILABEL
    cells = [classes_in(label, multilabel) for label in labels]
    matrix = np.array([[name in cell for name in classes] for cell in cells], bool).reshape(-1, len(classes))
    return Targets(tuple(classes), matrix, multilabel, task == ORDINAL)
