"""Records: how a run came about. Command, versions, date, machine, seeds, data, encoders, parent.

A record stands in `run.json` beside the configuration and has no say in the run's name: the same configuration on
another day is the same run, which keeps its first record. No host, user or process is named.
"""

from __future__ import annotations

import contextlib
import inspect
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mmfeat.runs.entry import RunConfig
from mmfeat.system.files import make_folder, read_json, sweep_temporaries, write_errors, write_json, writing_in
from mmfeat.system.hardware import cpu_count
from mmfeat.system.wording import without_passwords
from mmfeat.version import ENCODING, TRAINING, versions

BEGUN = "begun.json"  # what a run that is not finished was asked for
UNTOLD = ("progress", "command")  # parameters that are no part of what was asked


def _now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class Record:
    """How a run came about; every field is empty where an older run does not say.

    `command` is the command as typed or the Python call, `split_dir` the folder its splits came from, `parent` the run
    of the first stage, and `parents` the folder of that run as seen from the folder that holds this one.
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
    """A call that makes a run: `command` as typed or the Python call, `split_dir` where its splits came from, `parents`
    the folder of the run that it goes on from, as seen from where the new one is written."""

    command: str
    device: str = "cpu"
    split_dir: str | None = None
    parents: str = "."
    started: datetime = field(default_factory=_now)
    clock: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Since the call began."""
        return time.monotonic() - self.clock

    def record(self, config: RunConfig) -> Record:
        """The record of a run of this configuration, as of now."""
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
    """What of this machine may change a number: device, instruction set, threads."""
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
    """`mmfeat.train_heads('tweets', ['hashing'], folds=3)`: a call with what differs from the defaults."""
    parameters = inspect.signature(function).parameters
    told = [name for name in parameters if name not in UNTOLD and given[name] != parameters[name].default]
    values = [f"{name}={_plain(given[name])!r}" for name in told]
    return f"mmfeat.{function.__name__}({', '.join(values)})"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@contextlib.contextmanager
def making(folder: Path, config: RunConfig, maker: Maker) -> Iterator[None]:
    """Note what is being made in `folder`, until it is finished, and that somebody is at work there."""
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
    """What an unfinished run was asked for; {} where nothing that can be read tells."""
    try:
        found = read_json(folder / BEGUN)
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        return {}
