"""The configuration of a run: everything that it was asked for, which gives the run its name."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mmfeat.cache.store import folder_name
from mmfeat.encoders.registry import Tower
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.evaluation.protocol import Protocol
from mmfeat.runs.entry import convert
from mmfeat.system.files import canonical_json

PLACES = ("data", "cache", "columns")  # where a run found its data; they may move, and the run stays the same
TOWERS = ("encoders", "prefixes")


@dataclass(frozen=True)
class RunConfig:
    """What a run was asked for, and the hashes of the data and folds that it was asked about.

    `plan`, `pairs`, `ensembles` and `trials` belong to a sweep of heads; `parent`, `fusion`, `stage_1`, `views`,
    `finetune` and `prefixes` to a second stage. A field of the other kind is None here and absent in `run.json`.
    """

    version: str
    columns: dict[str, str]
    data: str
    cache: str
    dataset: str
    data_hash: str
    folds: tuple[str, ...]
    splits_hash: str
    encoders: tuple[Tower, ...]
    options: EncoderOptions
    task: str
    attend: str
    protocol: Protocol
    pairs: tuple[tuple[str, str], ...] | None = None
    ensembles: bool | None = None
    plan: dict[str, Any] | None = None
    trials: int | None = None
    prefixes: tuple[Tower, ...] | None = None
    parent: str | None = None
    fusion: str | None = None
    stage_1: dict[str, Any] | None = None
    views: int | None = None
    finetune: dict[str, Any] | None = None

    @property
    def is_multilabel(self) -> bool:
        return self.task == "multilabel"

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The encoders and the prefixes."""
        return (*self.encoders, *(self.prefixes or ()))

    def name(self, label: str) -> str:
        """A readable name that differs for every configuration; where data and weights lie does not count."""
        values = self.to_json()
        counted = {name: value for name, value in values.items() if name not in (*PLACES, *TOWERS, "trials")}
        counted |= {name: [tower["spec"] for tower in values[name]] for name in TOWERS if name in values}
        digest = hashlib.sha256(canonical_json(counted).encode()).hexdigest()[:8]
        return f"{folder_name(self.dataset)}-{label}-{digest}"

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads, without the fields that this kind of run lacks."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration in `values`, where others may stand too; raises `ValueError` or `ConfigError`."""
        for name in TOWERS:
            for tower in values.get(name) or ():
                EncoderSpec.from_json(tower["spec"])  # refuses what another version may have added
        return convert(values, cls)
