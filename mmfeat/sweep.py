"""The sweep: every head x modality over the same folds, scored out of fold, ranked with intervals.

Nothing is selected on the data it is scored on: early stopping and regularisation look at a
validation part of each training fold, the score at the predictions for the test parts.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache import Cache, folder_name
from mmfeat.encoders import EncoderOptions, Tower, describe_encoders
from mmfeat.errors import HeadError
from mmfeat.features import Features
from mmfeat.files import canonical_json, write_atomic, write_json
from mmfeat.hardware import resolve_device
from mmfeat.heads import BASELINES, FUSIONS, Head, HeadSettings, make_head, save_head
from mmfeat.metrics import evaluate, paired_difference
from mmfeat.progress import Progress, Silent
from mmfeat.requests import resolve_options
from mmfeat.runs import LEADERBOARD, RUN_FILE, Run, hash_data, read_run, write_run
from mmfeat.samples import MODALITIES, Sample, SampleSet, read_samples
from mmfeat.splits import FINAL, TEST, Splits, duplicate_groups, load_splits, make_splits
from mmfeat.version import __version__

MODALITY_SETS = ("both", "text", "image")
FOLDS = 5
PLACES = ("data", "cache", "columns")  # where a run found things; they may move, and the run stays the same


@dataclass(frozen=True)
class Task:
    """What every head of a sweep is trained and scored on."""

    features: Features
    labels: np.ndarray
    classes: tuple[str, ...]
    splits: Splits
    settings: HeadSettings
    device: str

    @property
    def tested(self) -> np.ndarray:
        """Rows that some fold tests; split files from elsewhere may leave some out."""
        return np.flatnonzero((self.splits.roles == TEST).any(axis=1))


@dataclass(frozen=True)
class Sweep:
    """A run, and whether it was there already."""

    run: Run
    reused: bool
    seconds: float


def train_heads(
    data: str | Path,
    encoders: Sequence[str],
    *,
    cache: str | Path = "cache",
    out: str | Path = "heads",
    options: EncoderOptions | None = None,
    columns: Mapping[str, str] | None = None,
    fusion: Sequence[str] = tuple(FUSIONS),
    baselines: Sequence[str] = tuple(BASELINES),
    modalities: Sequence[str] = MODALITY_SETS,
    folds: int = FOLDS,
    grouped: bool = True,
    split_dir: str | Path | None = None,
    settings: HeadSettings | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Sweep:
    """Train and rank heads on the cached vectors of the labelled samples of `data`.

    The same configuration on the same data and vectors gives the same run folder: it is not trained
    twice. Raises `CacheMissError` where vectors are missing.
    """
    start = time.monotonic()
    samples = read_samples(data, columns)
    options, settings = resolve_options(options or EncoderOptions(), device).pooled_only, settings or HeadSettings()
    towers = describe_encoders(list(encoders), options)
    heads = _checked_heads(fusion, FUSIONS, "--fusion") + _checked_heads(baselines, BASELINES, "--baselines")
    if not heads:
        raise HeadError("no head was asked for; name one with --fusion or --baselines")
    labelled = samples.labelled
    if not labelled:
        raise HeadError(f"{data}: no labelled samples; heads are trained on labels")
    progress = progress or Silent()
    store = Cache(cache, samples.name)
    keys = {modality: store.content_keys(labelled, modality, progress) for modality in MODALITIES}
    splits = _splits(labelled, keys["image"].keys, folds, grouped, split_dir, settings.seed)
    config = {
        "version": __version__,
        "data": os.path.abspath(data),
        "cache": os.path.abspath(cache),
        "columns": dict(columns or {}),
        "dataset": samples.name,
        "data_hash": hash_data(labelled, keys),
        "splits_hash": hashlib.sha256("\n".join(map(",".join, splits.roles.tolist())).encode()).hexdigest(),
        "encoders": [{"request": tower.request, "spec": asdict(tower.spec)} for tower in towers],
        "options": asdict(options),
        "heads": heads,
        "modalities": _checked_modalities(modalities, towers),
        "settings": asdict(settings),
    }
    folder = Path(out) / _run_name(config)
    if (folder / RUN_FILE).exists():
        return Sweep(_reuse(folder, config), True, time.monotonic() - start)
    features = store.load(labelled, [tower.spec for tower in towers], keys)
    task = _task(samples, features, splits, settings, resolve_device(device))
    return Sweep(_sweep(task, config, folder, progress), False, time.monotonic() - start)


def _task(samples: SampleSet, features: Features, splits: Splits, settings: HeadSettings, device: str) -> Task:
    """Labels as class numbers beside the features; an encoder that saw none of the samples is refused."""
    if empty := [block.name for block in features.blocks if not block.mask.any()]:
        names = ", ".join(empty)
        raise HeadError(f"{samples.source}: no labelled sample has a vector of {names}; leave it out of --encoders")
    classes = samples.classes
    labels = np.array([classes.index(str(sample.label)) for sample in samples.labelled])
    return Task(features, labels, classes, splits, settings, device)


def _reuse(folder: Path, config: Mapping[str, Any]) -> Run:
    """The run that is there, told where its data are now, and the latest again: submit goes on with it."""
    run = read_run(folder)
    places = {name: config[name] for name in PLACES}
    if any(run.config[name] != place for name, place in places.items()):
        run = write_run(folder, {**run.config, **places})
    os.utime(folder / RUN_FILE)
    return run


def _sweep(task: Task, config: dict[str, Any], folder: Path, progress: Progress) -> Run:
    """Train every head x modality and write the run."""
    task.splits.save(folder)
    entries, predictions = [], []
    pairs = [(head, modality) for modality in config["modalities"] for head in config["heads"]]
    with progress.task("heads x folds", len(pairs) * len(task.splits.names)) as advance:
        for head, modality in pairs:
            entry, predicted = _cross_validate(task, head, modality, folder / f"{head}-{modality}", advance)
            entries.append(entry)
            predictions.append(predicted)
    leaderboard = _rank(task, entries, predictions)
    write_json(folder / f"{LEADERBOARD}.json", leaderboard)
    write_atomic(folder / f"{LEADERBOARD}.csv", _leaderboard_csv(leaderboard, task.classes).encode())
    counts = np.bincount(task.labels, minlength=len(task.classes)).tolist()
    return write_run(
        folder,
        {
            **config,
            "widths": task.features.widths,
            "classes": list(task.classes),
            "class_counts": dict(zip(task.classes, counts, strict=True)),
            "leaderboard": leaderboard,
        },
    )


def _cross_validate(
    task: Task, name: str, modality: str, folder: Path, advance: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """Fit on every fold and on all data; returns the leaderboard entry and out-of-fold predictions."""
    start = time.monotonic()
    features = task.features.only(modality)
    probabilities = np.zeros((len(task.labels), len(task.classes)))
    for fold in task.splits.folds:
        head: Head = make_head(name, task.settings, len(task.classes), task.device)
        head.fit(
            features.take(fold.train),
            task.labels[fold.train],
            features.take(fold.validation),
            task.labels[fold.validation],
        )
        save_head(head, name, task.settings, len(task.classes), folder, fold.name)
        if fold.name != FINAL:
            probabilities[fold.test] = head.predict_proba(features.take(fold.test))
        advance(1)
    if not np.isfinite(probabilities).all():
        raise HeadError(f"{name} on {modality} diverged; lower --learning-rate (now {task.settings.learning_rate:g})")
    predicted, tested = probabilities.argmax(1), task.tested
    metrics = evaluate(task.labels[tested], predicted[tested], task.classes, task.settings.seed)
    write_json(folder / "metrics.json", metrics)
    write_atomic(folder / "out_of_fold.csv", _predictions_csv(task, probabilities).encode())
    entry = {"head": name, "modalities": modality, **metrics, "seconds": round(time.monotonic() - start, 2)}
    return entry, predicted


def _rank(task: Task, entries: list[dict[str, Any]], predictions: list[np.ndarray]) -> list[dict[str, Any]]:
    """Best first; each entry tells its paired difference from the best and whether that is a tie."""
    order = sorted(range(len(entries)), key=lambda index: -entries[index]["macro_f1"]["value"])
    tested = task.tested
    labels, best = task.labels[tested], predictions[order[0]][tested]
    ranked = []
    for index in order:
        behind = paired_difference(labels, best, predictions[index][tested], len(task.classes), task.settings.seed)
        ranked.append({**entries[index], "behind_best": vars(behind), "tie": behind.low <= 0})
    return ranked


def _checked_heads(names: Sequence[str], known: Mapping[str, Any], flag: str) -> list[str]:
    """Names without repetition; `all` stands for every known one and `none` for nothing."""
    wanted = [each for name in names for each in (known if name == "all" else [name]) if each != "none"]
    if unknown := [name for name in wanted if name not in known]:
        raise HeadError(f"{flag} {','.join(unknown)}: use all, none, or some of {', '.join(known)}")
    return list(dict.fromkeys(wanted))


def _checked_modalities(names: Sequence[str], towers: list[Tower]) -> list[str]:
    """The modality sets that the encoders can serve; with one modality there is no `both`."""
    present = {tower.spec.modality for tower in towers}
    unknown = [name for name in names if name not in MODALITY_SETS]
    if unknown:
        raise HeadError(f"--modalities {','.join(unknown)}: use some of {', '.join(MODALITY_SETS)}")
    usable = [name for name in dict.fromkeys(names) if name in present or (name == "both" and len(present) == 2)]
    if not usable:
        raise HeadError(f"--modalities {','.join(names)}: the encoders give {', '.join(sorted(present))} only")
    return usable


def _splits(
    labelled: Sequence[Sample], image_keys: np.ndarray, folds: int, grouped: bool, split_dir: Any, seed: int
) -> Splits:
    ids = [sample.id for sample in labelled]
    if split_dir is not None:
        return load_splits(Path(split_dir), ids)
    groups = duplicate_groups(labelled, image_keys) if grouped else np.arange(len(ids))
    return make_splits(np.array([sample.label for sample in labelled]), ids, groups, folds, seed)


def _run_name(config: Mapping[str, Any]) -> str:
    """Readable, and different for every configuration. Where the data and weights lie does not count."""
    counted = {key: value for key, value in config.items() if key not in (*PLACES, "encoders")}
    counted["encoders"] = [entry["spec"] for entry in config["encoders"]]
    digest = hashlib.sha256(canonical_json(counted).encode()).hexdigest()[:8]
    return f"{folder_name(config['dataset'])}-{'-'.join(config['heads'])[:60]}-{digest}"


def _leaderboard_csv(leaderboard: list[dict[str, Any]], classes: tuple[str, ...]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    scores = ("macro_f1", "accuracy")
    header = [f"{score}{part}" for score in scores for part in ("", "_low", "_high")]
    writer.writerow(["rank", "head", "modalities", *header, *(f"f1_{name}" for name in classes), "tie", "seconds"])
    for rank, entry in enumerate(leaderboard, 1):
        values = [f"{entry[score][part]:.4f}" for score in scores for part in ("value", "low", "high")]
        by_class = [f"{entry['classes'][name]['f1']['value']:.4f}" for name in classes]
        writer.writerow([rank, entry["head"], entry["modalities"], *values, *by_class, entry["tie"], entry["seconds"]])
    return text.getvalue()


def _predictions_csv(task: Task, probabilities: np.ndarray) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["id", "label", "predicted", *(f"p_{name}" for name in task.classes)])
    for row in task.tested:
        cells = [f"{value:.6f}" for value in probabilities[row]]
        predicted = task.classes[int(probabilities[row].argmax())]
        writer.writerow([task.features.ids[row], task.classes[task.labels[row]], predicted, *cells])
    return text.getvalue()
