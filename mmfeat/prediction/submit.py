"""The submission: a prediction for every unlabelled sample in the order of its list, and notes on drift."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mmfeat.cache.store import Cache
from mmfeat.errors import SubmissionError
from mmfeat.extraction.extract import Extraction, ExtractSettings
from mmfeat.extraction.requests import test_of
from mmfeat.prediction.drift import check_labels, find_drift, out_of_fold_choices, training_set
from mmfeat.prediction.final_heads import Inference, infer, read_for, with_places
from mmfeat.prediction.output_file import (
    NAMES,
    OutputFormat,
    checked_target,
    choose_format,
    names_in,
    spread_of,
    write_prediction_file,
)
from mmfeat.prediction.predict import score, were_seen
from mmfeat.runs.entry import Entry, Scores
from mmfeat.runs.run import Run, choose_run, data_changed
from mmfeat.samples.dataset import Data, SampleSet, name_of
from mmfeat.samples.labels import number_of
from mmfeat.system.remote import absolute
from mmfeat.system.wording import Progress, counted, shown


@dataclass(frozen=True)
class Submission:
    """A written submission, with the run and the head that predicted.

    `scores` are measured where test data have labels.
    `predicted`, `trained` and `out_of_fold` map class -> share: in the file, among the labelled samples, and among the
    out-of-fold predictions of the same head (empty where the run has none); in a regression lowest, mean and highest.
    `notes` are lines for the user.
    """

    path: Path
    data: str
    run: Run
    head: str
    modalities: str
    rows: int
    predicted: Mapping[str, float]
    trained: Mapping[str, float]
    extraction: Extraction
    data_changed: bool = False
    without_features: list[str] = field(default_factory=list)
    out_of_fold: Mapping[str, float] = field(default_factory=dict)
    scores: Scores | None = None
    notes: list[str] = field(default_factory=list)


def write_submission(
    run: str | Path | None = None,
    *,
    data: Data = None,
    out: str | Path | None = None,
    heads: str | Path = "heads",
    head: str | None = None,
    modalities: str | None = None,
    cache: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    encoders: Sequence[str] = (),
    names: Sequence[str] | None = None,
    header: bool = True,
    format: str | None = None,
    proba: bool = False,
    device: str = "auto",
    runtime: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
) -> Submission:
    """Predict the test data that the run's extraction remembers, else the unlabelled samples of `data` (the run's own
    by default), and write a row for each.

    The file has the columns `names` under a `header`, by default those of id and label in the user's table, and with
    `proba` a calibrated probability a class; its `format`
    (csv, tsv or jsonl) follows the suffix of `out` by default; without `out` the file is `submission.FORMAT`. `columns`
    names the columns of the input table, and `encoders` says where weights of the run lie now, if they have moved.
    Missing features are extracted first with the encoders of the run. Raises
    `RunError` where encoders or cache do not match the run, `SubmissionError` where the file would be wrong.
    """
    data = name_of(data)
    output = OutputFormat(choose_format(out, format), header, tuple(names or NAMES), proba)
    out = f"submission.{output.format}" if out is None else out
    chosen = with_places(choose_run(run, heads, data, head, modalities), encoders)
    cache = cache or chosen.config.cache
    test = test_of(cache, chosen.config.data)
    source = data or test or chosen.config.data
    path = checked_target(out, source, chosen.config.data, chosen.folder)
    output.check(chosen.classes)
    entry = chosen.predicting(head, modalities)
    everything = read_for(source, columns, chosen.config)
    is_test = absolute(source) == test  # then a label is for a score, and its row in the file as well
    samples = everything if is_test else _unlabelled(everything, chosen)
    inference = infer(chosen, entry, samples, cache, ExtractSettings(device, workers, runtime=runtime), progress)
    training = training_set(chosen, everything)
    if names is None:
        output = replace(output, names=names_in(everything, training))
        output.check(chosen.classes)
    result = _summary(path, chosen, entry, everything, samples, inference, training, cache)
    if is_test:
        result = _with_test(result, samples, inference, training, cache)
    write_prediction_file(path, inference.predictions, output)  # last, so that an interrupt leaves no file
    return result


def _with_test(
    result: Submission, samples: SampleSet, inference: Inference, training: SampleSet, cache: str | Path
) -> Submission:
    store, notes = Cache(cache, samples.name), list[str]()
    scores, score_notes = score(result.run, samples, inference, training.labelled, store)
    seen = were_seen(samples.samples, training.labelled, tuple(inference.lacking), store)
    if seen.any() and not any(sample.label for sample in samples):
        first = samples.samples[int(seen.argmax())].id
        notes.append(f"{seen.sum():,} of {len(samples):,} samples equal one that trained the run (first: {first})")
    if training.unlabelled:
        waiting, source = counted(len(training.unlabelled), "unlabelled sample"), shown(training.source)
        notes.append(f"the file lacks {waiting} of {source}; mmfeat submit --data {source} predicts what it lacks")
    return replace(result, scores=scores, notes=[*result.notes, *score_notes, *notes])


def _summary(
    path: Path,
    run: Run,
    entry: Entry,
    everything: SampleSet,
    samples: SampleSet,
    inference: Inference,
    training: SampleSet,
    cache: str | Path,
) -> Submission:
    """The submission to be written to `path`, with drift between its samples and the labelled ones of the run."""
    before = out_of_fold_choices(run, entry)
    is_run_data = absolute(everything.source) == run.config.data
    return Submission(
        path=path,
        data=everything.source,
        run=run,
        head=entry.head,
        modalities=entry.modalities,
        rows=len(inference.predictions),
        predicted=inference.predictions.shares,
        trained=_trained(run, training),
        extraction=inference.extraction,
        data_changed=is_run_data and data_changed(run, everything.labelled, Cache(cache, samples.name)),
        without_features=inference.without,
        out_of_fold={} if before is None else replace(inference.predictions, chosen=before).shares,
        notes=[*inference.notes, *find_drift(run, inference, before, training.labelled, samples.samples)],
    )


def _trained(run: Run, training: SampleSet) -> dict[str, float]:
    """Class -> share of the labelled samples; what `spread_of` says of numbers."""
    if run.config.is_regression:
        numbers = [number_of(str(sample.label)) for sample in training.labelled]
        return spread_of(np.array([number for number in numbers if number is not None]))
    return {name: count / run.results.labelled for name, count in sorted(run.results.class_counts.items())}


def _unlabelled(samples: SampleSet, run: Run) -> SampleSet:
    """The unlabelled samples. Raises `SubmissionError` without any, and for a label that is no class of the run."""
    if unknown := check_labels(samples, run):
        raise SubmissionError(
            f"{samples.source}: label {', '.join(unknown)} is unknown to {run.folder} "
            f"({'numbers' if run.config.is_regression else ', '.join(run.classes)}); train heads on this data first"
        )
    if not samples.unlabelled:
        remedy = "name test data with --data, or with mmfeat extract --test"
        raise SubmissionError(f"{samples.source}: every sample has a label; there is nothing to predict; {remedy}")
    return replace(samples, samples=samples.unlabelled)
