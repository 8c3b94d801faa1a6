"""Arguments of `train_heads`, read back from the run that it made."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmfeat.errors import ConfigError, RunError
from mmfeat.evaluation.protocol import Protocol
from mmfeat.heads.registry import BASELINES, Plan
from mmfeat.runs.run import Run


def requests_of(run: Run) -> list[str]:
    """The encoders as the user named them."""
    return list(dict.fromkeys(tower.request for tower in run.towers))


def heads_arguments(run: Run) -> dict[str, Any]:
    """The arguments of `train_heads` but for folders and engines. Raises `RunError` for a run that lacks them."""
    config = run.config
    try:
        if config.pairs is None or config.plan is None:
            raise ValueError("no heads")
        heads = list(dict.fromkeys(head for head, _ in config.pairs))
        return {
            "data": config.data,
            "encoders": requests_of(run),
            "cache": config.cache,
            "options": run.options,
            "columns": config.reading,
            "fusion": [head for head in heads if head not in BASELINES] or ["none"],
            "baselines": [head for head in heads if head in BASELINES] or ["none"],
            "modalities": [config.modalities] if config.modalities else list(dict.fromkeys(m for _, m in config.pairs)),
            "protocol": protocol_of(run),
            "plan": Plan(**{**vars(config.plan), "trials": config.trials}),
            "ensembles": config.ensembles,
            "task": config.task,
            "order": config.order or (),
            "rare": config.rare or "",
            "attend": config.attend,
            "class_names": config.class_names,
            "products": config.products or "float32",
            "templates": config.templates or "openai",
        }
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise RunError(f"{run.folder}: its run.json does not say how it was made ({error!r}); train it anew") from error


def protocol_of(run: Run) -> Protocol:
    """The protocol of the run, with the run's own copy of its splits: groups of another version may be others."""
    return replace(run.config.protocol, split_dir=str(run.folder))
