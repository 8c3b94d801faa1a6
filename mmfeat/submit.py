"""Submission: a prediction for every unlabelled sample, in the order of its list, checked before it is written."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mmfeat.cache import Cache
from mmfeat.errors import SubmissionError
from mmfeat.extract import Extraction, extract_samples
from mmfeat.extractor import ExtractSettings
from mmfeat.files import csv_text, write_atomic
from mmfeat.hardware import resolve_device
from mmfeat.predictor import predict_entry, towers_of, widths_of
from mmfeat.progress import Progress
from mmfeat.remote import absolute
from mmfeat.runs import Run, best_run, checked_towers, hash_data, read_run
from mmfeat.samples import MODALITIES, SampleSet, read_samples
from mmfeat.scoring import names_of
from mmfeat.targets import SEPARATOR

HEADER = ("guid", "tag")
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Submission:
    """What was written, by which head of which run. `predicted` and `trained` map label -> share."""

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


def write_submission(
    run: str | Path | None = None,
    *,
    data: str | Path | None = None,
    out: str | Path = "submission.csv",
    heads: str | Path = "heads",
    head: str | None = None,
    modalities: str | None = None,
    cache: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    device: str = "auto",
    workers: int = 0,
    progress: Progress | None = None,
) -> Submission:
    """Predict the unlabelled samples of `data` (the run's own by default) and write `guid,tag` rows.

    Features that are missing are extracted first with the run's own encoders. Raises `RunError`
    where the encoders or the cache are not those of the run, `SubmissionError` where the file would
    be wrong.
    """
    path = _checked_out(out)
    chosen = read_run(Path(run)) if run else best_run(Path(heads), str(data) if data else None, head, modalities)
    entry = chosen.entry(head, modalities)
    _check_apart(path, Path(data or chosen.config["data"]))
    everything = read_samples(data or chosen.config["data"], columns or chosen.config["columns"])
    samples = _unlabelled(everything, chosen)
    towers = checked_towers(chosen, towers_of(chosen, entry))
    cache = cache or chosen.config["cache"]
    extraction = extract_samples(
        samples, towers, cache=cache, settings=ExtractSettings(device, workers), progress=progress
    )
    store = Cache(cache, samples.name)
    features = store.load(samples.samples, [tower.spec for tower in towers])
    features = features.widened(widths_of(chosen, entry))
    choices, probabilities = predict_entry(chosen, entry, features, resolve_device(device), samples.samples)
    if not np.isfinite(probabilities).all():
        raise SubmissionError(f"{chosen.folder}: its head gives no finite predictions; train it again")
    labels = [names_of(choice, chosen.classes) for choice in choices]
    rows = list(zip(features.ids, labels, strict=True))
    check_rows(rows, features.ids, chosen.classes, chosen.config["task"] == "multilabel")
    write_atomic(path, csv_text(HEADER, rows).encode())
    seen = np.any(list(features.masks.values()), axis=0)
    return Submission(
        path=path,
        data=everything.source,
        run=chosen,
        head=entry["head"],
        modalities=entry["modalities"],
        rows=len(rows),
        predicted=_shares(Counter(name for _, label in rows for name in label.split(SEPARATOR) if name), len(rows)),
        trained=_shares(chosen.config["class_counts"], chosen.config["labelled"]),
        extraction=extraction,
        data_changed=_data_changed(everything, chosen, store),
        without_features=[id for id, there in zip(features.ids, seen, strict=True) if not there],
    )


def check_rows(rows: Rows, ids: Sequence[str], classes: Sequence[str], multilabel: bool = False) -> None:
    """Every id once and in order, no empties, only known labels; raises `SubmissionError` otherwise.

    Labels of `multilabel` rows are `a|b`, or a lone `|`.
    """
    if [id for id, _ in rows] != list(ids) or len(set(ids)) != len(ids):
        raise SubmissionError(
            f"{len(rows)} rows do not name the {len(ids)} samples once each and in order; nothing was written"
        )
    for id, label in rows:
        names = label.split(SEPARATOR) if multilabel and label != SEPARATOR else [label]
        if not set(names) <= {*classes, *([SEPARATOR] if multilabel else [])}:
            raise SubmissionError(f"sample {id} would get the label {label!r}, which is none of {', '.join(classes)}")


def _checked_out(out: str | Path) -> Path:
    """Where to write: a new file or a plain one, behind a link too; never a device, a pipe or a folder."""
    path = Path(os.path.realpath(out)) if Path(out).is_symlink() else Path(out)
    if not str(out) or (path.exists() and not path.is_file()):
        raise SubmissionError(f"--out {out}: not a file that can be written; name a file, as in --out submission.csv")
    return path


def _check_apart(path: Path, data: Path) -> None:
    """A submission never takes the place of the data: its list has the labels."""
    target, source = path.resolve(), data.resolve()
    if target == source or (source.is_dir() and source in target.parents):
        raise SubmissionError(f"--out {path}: this would overwrite the data in {data}; name a file elsewhere")


def _data_changed(samples: SampleSet, run: Run, store: Cache) -> bool:
    """Whether the labelled samples the run was trained on are different by now."""
    if absolute(samples.source) != run.config["data"]:
        return False
    keys = {modality: store.content_keys(samples.labelled, modality) for modality in MODALITIES}
    return hash_data(samples.labelled, keys) != run.config["data_hash"]


def _unlabelled(samples: SampleSet, run: Run) -> SampleSet:
    """The samples to predict; the data may not know labels that the run does not."""
    known = {*run.classes, ""} if run.config["task"] == "multilabel" else set(run.classes)
    cells = [label.split(SEPARATOR) if "" in known else [label] for label in samples.classes]
    if unknown := {name.strip() for cell in cells for name in cell} - known:
        raise SubmissionError(
            f"{samples.source}: label {', '.join(sorted(unknown))} is unknown to {run.folder} "
            f"({', '.join(run.classes)}); train heads on this data first"
        )
    if not samples.unlabelled:
        raise SubmissionError(f"{samples.source}: every sample has a label; there is nothing to predict")
    return replace(samples, samples=samples.unlabelled)


def _shares(counts: Mapping[str, int], total: int) -> dict[str, float]:
    return {name: count / total for name, count in sorted(counts.items())}
