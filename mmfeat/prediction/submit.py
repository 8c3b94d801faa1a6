"""Submission: a prediction for every unlabelled sample, in the order of its list, checked before it is written."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.store import Cache
from mmfeat.errors import DataError, SubmissionError
from mmfeat.extraction.extract import Extraction
from mmfeat.prediction.drift import label_drift, missing_drift, out_of_fold_choices
from mmfeat.prediction.inference import Inference, infer, read_for
from mmfeat.prediction.output_file import NAMES, OutputFormat, checked_target, choose_format, write_prediction_file
from mmfeat.runs.folders import choose_run
from mmfeat.runs.run import Run, data_changed
from mmfeat.samples.dataset import Sample, SampleSet, read_samples
from mmfeat.samples.labels import classes_in
from mmfeat.system.progress import Progress
from mmfeat.system.remote import absolute


@dataclass(frozen=True)
class Submission:
    """What was written, by which head of which run.

    `predicted`, `trained` and `out_of_fold` map label -> share: of the file, of the labelled samples, and of what the
    same head predicts for those out of fold (empty where the run does not tell). `notes` are lines to be told.
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
    notes: list[str] = field(default_factory=list)


def write_submission(
    run: str | Path | None = None,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    heads: str | Path = "heads",
    head: str | None = None,
    modalities: str | None = None,
    cache: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    names: Sequence[str] = NAMES,
    header: bool = True,
    format: str | None = None,
    proba: bool = False,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
) -> Submission:
    """Predict the unlabelled samples of `data` (the run's own by default) and write a row for each.

    The file has the columns `names` under a `header`, and with `proba` a calibrated probability a class; its `format`
    (csv, tsv or jsonl) is that of the suffix of `out` by default; without `out` it is `submission.csv`, or as `format`.
    `columns` names those of the input table. Features that are missing are extracted first with the run's own encoders.
    Raises `RunError` where encoders or cache are not those of the run, `SubmissionError` where the file would be wrong.
    """
    layout = OutputFormat(choose_format(out, format), header, tuple(names), proba)
    out = f"submission.{layout.format}" if out is None else out
    chosen = choose_run(run, heads, data, head, modalities)
    source = data or chosen.config.data
    path = checked_target(out, source, chosen.config.data, chosen.folder)
    layout.check(chosen.classes)
    entry = chosen.entry(head, modalities)
    everything = read_for(source, columns, chosen.config.columns)
    samples = _unlabelled(everything, chosen)
    cache = cache or chosen.config.cache
    found = infer(chosen, entry, samples, cache, device, workers, progress)
    before = out_of_fold_choices(chosen, entry)
    result = Submission(
        path=path,
        data=everything.source,
        run=chosen,
        head=entry.head,
        modalities=entry.modalities,
        rows=len(found.predictions),
        predicted=found.predictions.shares,
        trained=_shares(chosen.results.class_counts, chosen.results.labelled),
        extraction=found.extraction,
        data_changed=_data_changed(everything, chosen, Cache(cache, samples.name)),
        without_features=found.without,
        out_of_fold={} if before is None else dict(zip(chosen.classes, before.mean(0).tolist(), strict=True)),
        notes=[
            *found.notes,
            *find_drift(chosen, found, before, training_samples(chosen, everything), samples.samples),
        ],
    )
    write_prediction_file(path, found.predictions, layout)  # last: an interrupt before leaves no file
    return result


def find_drift(
    run: Run, found: Inference, before: np.ndarray | None, labelled: Sequence[Sample], now: Sequence[Sample]
) -> list[str]:
    """A line for each way in which samples differ from those that the run was trained on."""
    shifted = ""
    if before is not None:
        shifted = label_drift(before, found.predictions.chosen, run.classes, found.predictions.multilabel)
    return [*([shifted] if shifted else []), *missing_drift(labelled, now, tuple(found.lacking))]


def training_samples(run: Run, read: SampleSet | None = None) -> tuple[Sample, ...]:
    """The labelled samples of the run's data, as they are now; none where these are gone. `read` may be they."""
    if read is not None and absolute(read.source) == run.config.data:
        return read.labelled
    with contextlib.suppress(DataError, OSError):
        return read_samples(run.config.data, run.config.columns).labelled
    return ()


def check_labels(samples: SampleSet, run: Run) -> list[str]:
    """Labels of the data that the run does not know."""
    multilabel = run.config.is_multilabel
    return sorted(set().union(*(classes_in(label, multilabel) for label in samples.classes)) - set(run.classes))


def _data_changed(samples: SampleSet, run: Run, store: Cache) -> bool:
    """Whether the labelled samples the run was trained on are different by now."""
    return absolute(samples.source) == run.config.data and data_changed(run, samples.labelled, store)


def _unlabelled(samples: SampleSet, run: Run) -> SampleSet:
    """The samples to predict; the data may not know labels that the run does not."""
    if unknown := check_labels(samples, run):
        raise SubmissionError(
            f"{samples.source}: label {', '.join(unknown)} is unknown to {run.folder} "
            f"({', '.join(run.classes)}); train heads on this data first"
        )
    if not samples.unlabelled:
        raise SubmissionError(f"{samples.source}: every sample has a label; there is nothing to predict")
    return replace(samples, samples=samples.unlabelled)


def _shares(counts: Mapping[str, Any], total: int) -> dict[str, float]:
    return {name: count / total for name, count in sorted(counts.items())}
