"""Records: the command, versions, date, machine, seeds, data, encoders and parent of a training, its trials and
its predictions out of fold.

A trial is one set of settings of one head, as the two files `PATH.json` and `PATH.safetensors`.
A record stands in `run.json` beside the configuration and does not count in the name of the run: the same configuration
on another day is the same run, which keeps its first record. A record names no host, user or process.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import inspect
import io
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.errors import RunError
from mmfeat.evaluation.protocol import read_groups
from mmfeat.runs.entry import Entry, RunConfig, placeless
from mmfeat.samples.labels import MULTILABEL, ORDINAL, REGRESSION, SEPARATOR, Targets, cells_of
from mmfeat.system.files import (
    canonical_json,
    file_sha256,
    make_folder,
    read_json,
    sweep_temporaries,
    write_errors,
    write_json,
)
from mmfeat.system.hardware import cpu_count
from mmfeat.system.locks import writing_in
from mmfeat.system.notebook import Frame, Shown
from mmfeat.system.wording import counted, without_passwords
from mmfeat.version import ENCODING, TRAINING, versions

if TYPE_CHECKING:
    import pyarrow


CHECKSUM = "sha256"  # field of RUN_FILE; what an earlier version wrote lacks it
BEGUN = "begun.json"  # the configuration and record of a run that is not finished
LEFT_OUT = ("progress", "command")  # parameters that are left out of the recorded call
OUT_OF_FOLD = "out_of_fold.csv"
CERTAIN = 0.01  # largest distance from 1 of the sum of a sample's probabilities, which are written rounded


@dataclass(frozen=True)
class Record:
    """The record of a training; a field is empty where an older run lacks it.

    `command` is the command as typed or the Python call, `split_dir` the folder that the splits came from, `parent` the
    run that a second stage started from, and `parents` the folder that holds the parent, relative to the folder that
    holds this run.
    """

    command: str = ""
    started: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, int] = field(default_factory=dict)
    split_dir: str | None = None
    data_hash: str = ""
    splits_hash: str = ""
    fingerprints: dict[str, str] = field(default_factory=dict)
    parent: str | None = None
    parents: str = "."


@dataclass(frozen=True)
class Maker:
    """A call that makes a run and began at `started`, with the facts that `Record` needs beside the configuration."""

    command: str
    device: str = "cpu"
    split_dir: str | None = None
    parents: str = "."
    started: datetime = field(default_factory=partial(datetime.now, timezone.utc))
    clock: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.clock

    def record(self, config: RunConfig) -> Record:
        """Return the record of a run of this configuration that is finished now."""
        return Record(
            command=without_passwords(self.command),
            started=self.started.isoformat(timespec="seconds"),
            seconds=round(self.seconds, 2),
            versions=versions((*ENCODING, *TRAINING)),
            machine=machine(self.device),
            seeds={"seed": config.protocol.seed, "trainings": config.protocol.seeds},
            split_dir=self.split_dir,
            data_hash=config.data_hash,
            splits_hash=config.splits_hash,
            fingerprints={tower.spec.folder_name: tower.spec.fingerprint for tower in config.towers},
            parent=config.parent,
            parents=self.parents,
        )


def machine(device: str) -> dict[str, Any]:
    """Return the facts of this machine that may change a number: device, instruction set, threads and system."""
    import torch

    facts = {
        "device": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "architecture": platform.machine(),
    }
    if device.startswith("cuda"):
        facts["accelerator"] = torch.cuda.get_device_name(device)
    return facts


def written_call(function: Callable[..., Any], given: Mapping[str, Any]) -> str:
    """Write a call with the arguments that differ from the defaults, as in `mmfeat.train_heads(folds=3)`."""
    parameters = inspect.signature(function).parameters
    values = {name: given[name] for name in parameters if name not in LEFT_OUT}
    changed = {name: value for name, value in values.items() if value != parameters[name].default}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in changed.items()}
    return f"mmfeat.{function.__name__}({', '.join(f'{name}={value!r}' for name, value in plain.items())})"


@contextlib.contextmanager
def making(folder: Path, config: RunConfig, maker: Maker) -> Iterator[None]:
    """Keep `begun.json` in `folder` until the training is finished, and the lock that says that it is being written."""
    with write_errors(folder):
        make_folder(folder)
    with writing_in(folder):
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                sweep_temporaries(path)  # files of a killed call
        write_json(folder / BEGUN, {**config.to_json(), "record": asdict(maker.record(config))})
        yield
        (folder / BEGUN).unlink(missing_ok=True)


def read_begun(folder: Path) -> dict[str, Any]:
    """Read the configuration and record of an unfinished run; {} where there is no `begun.json` that can be read."""
    try:
        values = read_json(folder / BEGUN)
        return values if isinstance(values, dict) else {}
    except (OSError, ValueError):
        return {}


def checksum(values: Mapping[str, Any]) -> str:
    """SHA-256 of what a run holds; the paths in it may be edited, since a run may move, and its record is no result."""
    held = {name: value for name, value in placeless(values).items() if name not in (CHECKSUM, "record")}
    return hashlib.sha256(canonical_json(held).encode()).hexdigest()


def read_trial(path: Path) -> dict[str, Any]:
    """Read `PATH.json`, all of a trial but its logits. Raises `RunError` if either file is not what was saved."""
    file = path.with_name(f"{path.name}.safetensors")
    with whole_trial(path):
        values: dict[str, Any] = read_json(path.with_name(f"{path.name}.json"))
        if values.pop("sha256") != trial_checksum(values, file):
            raise ValueError(f"it or {file.name} is not what was saved")
        return values


@contextlib.contextmanager
def whole_trial(path: Path) -> Iterator[None]:
    """Raise any error in reading the trial `path` as a `RunError`."""
    try:
        yield
    except Exception as error:  # safetensors has no exception for a damaged file
        raise RunError(f"{path}.json: not a whole trial ({error}); delete it and run mmfeat heads again") from error


def trial_checksum(record: Mapping[str, Any], file: Path) -> str:
    """SHA-256 of a trial's record and the file of its logits together."""
    return hashlib.sha256(f"{canonical_json(record)}{file_sha256(file)}".encode()).hexdigest()


@dataclass(frozen=True, repr=False)
class OutOfFold(Frame, Shown):
    """Predictions out of fold of one entry, for N samples, C classes and S seeds.

    `chosen` is (S, N, C) bool, the classes that each seed chose; `probabilities` is (N, C), the mean over the seeds;
    near duplicates have the same number in `groups` (N,), which is None where there are none. In a regression both are
    the numbers that are predicted.
    """

    ids: tuple[str, ...]
    targets: Targets
    chosen: np.ndarray
    probabilities: np.ndarray
    groups: np.ndarray | None = None

    def to_arrow(self) -> pyarrow.Table:
        """id, label, predicted (`voted`), right, and the probability of each class, as `p_CLASS`; of a regression the
        numbers."""
        import pyarrow

        if self.targets.numeric:
            numbers = {"label": self.targets.matrix[:, 0], "predicted": self.voted[:, 0]}
            return pyarrow.table({"id": self.ids, **numbers})
        classes = self.targets.classes
        labels, predicted = (cells_of(chosen, classes) for chosen in (self.targets.matrix, self.voted))
        columns = {"id": self.ids, "label": labels, "predicted": predicted, "right": self.right}
        return pyarrow.table(columns | {f"p_{name}": p for name, p in zip(classes, self.probabilities.T, strict=True)})

    def facts(self) -> list[str]:
        right = f"{int(self.right.sum()):,} right"
        return [counted(len(self.ids), "sample"), right, counted(len(self.chosen), "seed")]

    @property
    def voted(self) -> np.ndarray:
        """(N, C) bool: the class that most seeds chose, and of a tie the more probable one; where samples may have
        several classes, every class that at least half of the seeds chose; in a regression their mean (N, 1)."""
        votes = self.chosen.mean(0)
        if self.targets.numeric:
            return votes
        if self.targets.multilabel:
            return votes >= 0.5
        best = (votes + 1e-6 * self.probabilities).argmax(1)
        return best[:, None] == np.arange(votes.shape[1])

    @property
    def right(self) -> np.ndarray:
        """(N,) bool: whether `voted` equals the label of a sample in every class, or is less than the root mean squared
        error away from the number."""
        if self.targets.numeric:
            errors = np.abs(self.voted - self.targets.matrix)[:, 0]
            return errors <= np.sqrt((errors**2).mean())
        return (self.voted == self.targets.matrix).all(1)


def read_out_of_fold(folder: Path, entry: Entry, classes: tuple[str, ...], task: str) -> OutOfFold:
    """Read the predictions of an entry of the run in `folder`; raises `RunError` where they are missing or differ."""
    path = folder / entry.name / OUT_OF_FOLD
    try:
        data = path.read_bytes()
        if entry.predictions and hashlib.sha256(data).hexdigest() != entry.predictions:
            raise ValueError("its content is not what was saved")
        header, *rows = csv.reader(io.StringIO(data.decode(), newline=""))
        if len(rows) != entry.samples:
            raise ValueError(f"{len(rows)} of {entry.samples} samples")
        return replace(read := _parsed(header, rows, classes, task), groups=read_groups(folder, read.ids))
    except (OSError, ValueError, KeyError, IndexError, csv.Error) as error:
        raise RunError(f"{path}: not the predictions of a whole run ({error}); train it again") from error


def _parsed(header: Sequence[str], rows: Sequence[Sequence[str]], classes: tuple[str, ...], task: str) -> OutOfFold:
    if task == REGRESSION:
        return _numbers(header, rows, classes)
    multilabel = task == MULTILABEL
    seeds = sum(name.startswith("predicted_") for name in header[: len(header) - len(classes)])
    if list(header) != ["id", "label", *(f"predicted_{n + 1}" for n in range(seeds)), *(f"p_{c}" for c in classes)]:
        raise ValueError("its columns are others")
    labels, *chosen = (_label_matrix([row[column] for row in rows], classes) for column in range(1, 2 + seeds))
    probabilities = np.array([row[2 + seeds :] for row in rows], dtype=np.float64).reshape(len(rows), len(classes))
    if not np.isfinite(probabilities).all() or (not multilabel and (np.abs(probabilities.sum(1) - 1) > CERTAIN).any()):
        raise ValueError("its probabilities are none")
    targets = Targets(classes, labels, multilabel, task == ORDINAL)
    return OutOfFold(tuple(row[0] for row in rows), targets, np.stack(chosen), probabilities)


def _numbers(header: Sequence[str], rows: Sequence[Sequence[str]], classes: tuple[str, ...]) -> OutOfFold:
    if list(header) != ["id", "label", "predicted_1"]:
        raise ValueError("its columns are others")
    values = np.array([row[1:] for row in rows], dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its numbers are none")
    chosen = values[None, :, 1:]
    return OutOfFold(tuple(row[0] for row in rows), Targets(classes, values[:, :1]), chosen, chosen[0])


def _label_matrix(cells: Sequence[str], classes: tuple[str, ...]) -> np.ndarray:
    """(N, C) bool: the classes in N cells; a class may hold the separator in its name where a sample has one class."""
    column = {name: index for index, name in enumerate(classes)}
    matrix = np.zeros((len(cells), len(classes)), dtype=bool)
    for row, cell in enumerate(cells):
        names = [cell] if cell in column else [name for name in cell.split(SEPARATOR) if name]
        matrix[row, [column[name] for name in names]] = True
    return matrix


def entry_is_whole(folder: Path, entry: Entry) -> bool:
    """Whether the final heads of an entry, their tuned towers and the predictions lie in `folder` with the recorded
    hashes; earlier versions recorded none of predictions."""
    towers = [(tower.file, tower.sha256) for final in entry.final for tower in final.towers]
    saved = [*((final.file, final.sha256) for final in entry.final), *towers]
    saved += [(OUT_OF_FOLD, entry.predictions)] if entry.predictions else []
    files = [(folder / Path(name).name, digest) for name, digest in saved]
    return all(file.is_file() and file_sha256(file) == digest for file, digest in files)
