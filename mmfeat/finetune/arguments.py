from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mmfeat.errors import ConfigError, RunError
from mmfeat.runs.run import Run


def finetune_arguments(run: Run) -> dict[str, Any]:
    """What `finetune_heads` was called with, beside places and engines; the parent is where the run has it."""
    from mmfeat.finetune.settings import FinetuneSettings

    config = run.config
    try:
        if config.finetune is None or config.stage_1 is None:
            raise ValueError("no second stage")
        early = config.fusion == "early"
        return {
            "run": _parent(run),
            "data": config.data,
            "cache": config.cache,
            "settings": FinetuneSettings(**config.finetune),
            "fusion": "early" if early else None,
            "head": config.stage_1["head"],
            "modalities": config.stage_1["modality"],
            "seeds": config.protocol.seeds,
            "views": config.views,
        }
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise RunError(f"{run.folder}: its run.json does not say how it was made ({error!r}); train it anew") from error


def _parent(run: Run) -> Path:
    """Of an older run, which has no record of the place, it lies beside it."""
    return Path(os.path.normpath(run.folder.parent / run.record.parents)) / str(run.config.parent)
