"""The arguments of `finetune_heads`: those of a call, and those that a run of stage 2 was made with."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfeat.errors import ConfigError, RunError
from mmfeat.finetune.settings import EARLY, FinetuneSettings
from mmfeat.runs.run import Run
from mmfeat.system.files import no_such_data


@dataclass(frozen=True)
class FinetuneArguments:
    """The arguments of `finetune_heads` that say what is trained, from which run, and where the new run is written."""

    settings: FinetuneSettings
    run: str | Path | None = None
    heads: str | Path = "heads"
    out: str | Path = "heads"
    data: str | Path | None = None
    cache: str | Path | None = None
    fusion: str | None = None
    head: str | None = None
    modalities: str | None = None
    seeds: int | None = None
    views: int | None = None

    def __post_init__(self) -> None:
        if self.data is not None and not Path(self.data).exists():
            raise no_such_data(self.data)
        if self.fusion not in (None, EARLY):
            raise ConfigError(f"--fusion {self.fusion}: stage 2 takes the run's heads (name one with --head), or early")
        for name, value, least in (("seeds", self.seeds, 1), ("views", self.views, 0)):
            if value is not None and value < least:
                raise ConfigError(f"--{name} {value}: at least {least}")


def finetune_arguments(run: Run) -> dict[str, Any]:
    """The arguments that make this run again, without `heads` and `out`. The parent lies where the run recorded it,
    beside the run if an older run has no record."""
    config, parents = run.config, Path(os.path.normpath(run.folder.parent / run.record.parents))
    try:
        if config.finetune is None or config.stage_1 is None:
            raise ValueError("no second stage")
        return {
            "run": parents / str(config.parent),
            "data": config.data,
            "cache": config.cache,
            "settings": FinetuneSettings(**config.finetune),
            "fusion": EARLY if config.fusion == EARLY else None,
            "head": config.stage_1.head,
            "modalities": config.stage_1.modality,
            "seeds": config.protocol.seeds,
            "views": config.views,
        }
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise RunError(f"{run.folder}: its run.json does not say how it was made ({error!r}); train it anew") from error
