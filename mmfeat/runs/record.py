"""Records: the command, versions, date, machine, seeds, data, encoders and parent of a training, and its trials.

A trial is one set of settings of one head, as the two files `PATH.json` and `PATH.safetensors`.
A record stands in `run.json` beside the configuration and does not count in the name of the run: the same configuration
on another day is the same run, which keeps its first record. A record names no host, user or process.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from mmfeat.errors import RunError
from mmfeat.runs.entry import RunConfig, placeless
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
from mmfeat.system.wording import without_passwords
from mmfeat.version import ENCODING, TRAINING, versions

CHECKSUM = "sha256"  # field of RUN_FILE; what an earlier version wrote lacks it
BEGUN = "begun.json"  # the configuration and record of a run that is not finished
LEFT_OUT = ("progress", "command")  # parameters that are left out of the recorded call


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
