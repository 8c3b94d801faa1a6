"""Settings of stage 2, saved in the run, the words of `--unfreeze`, and the arguments of `finetune_heads`."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfeat.errors import ConfigError, RunError
from mmfeat.heads.registry import MONITORS, HeadSettings, flag
from mmfeat.system.files import no_such_data
from mmfeat.system.hardware import resolve_dtype

if TYPE_CHECKING:
    from mmfeat.runs.run import Run


ALL = -1  # the number of layers that stands for the whole tower
EVERY_TOWER = "all"  # the name that stands for every tower which the head sees
EARLY = "early"  # the name of early fusion
PATHS = ("auto", "cached", "full")
SCHEDULES = ("plateau", "cosine", "constant")
AMP = ("auto", "none", "bfloat16", "float16")


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of the second stage; dropout, loss and class weights come from the head's first stage.

    `unfreeze` names towers (a modality, family or tower, as in `--outputs`) and how many of their last layers learn.
    AdamW reaches its learning rates at the end of `warmup`, a share of all steps; a layer with d layers behind it
    learns with lr_encoder * layer_decay ** d. `clip_norm` bounds the norm of all gradients together (0: no bound).
    """

    unfreeze: tuple[tuple[str, int], ...] = (("text", 1),)
    projection: bool = False
    path: str = "auto"
    lr_encoder: float = 5e-6
    lr_attention: float = 1e-5
    lr_head: float = 3e-4
    layer_decay: float = 1.0
    weight_decay: float = 0.05
    warmup: float = 0.1
    schedule: str = "plateau"
    clip_norm: float = 1.0
    batch_size: int = 16
    accumulate: int = 1
    epochs: int = 5
    patience: int = 2
    monitor: str = "macro-f1"
    amp: str = "auto"
    gradient_checkpointing: bool = False
    gradual: bool = False
    augment: bool = False
    lora: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "unfreeze", tuple((name, int(count)) for name, count in self.unfreeze))
        for name, known in (("path", PATHS), ("schedule", SCHEDULES), ("amp", AMP), ("monitor", MONITORS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: use one of {', '.join(known)}")
        for name in ("lr_encoder", "lr_attention", "lr_head", "layer_decay"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: a number above 0")
        for name in ("clip_norm", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: a number not below 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"--warmup {self.warmup}: a share of the steps from 0 to below 1")
        for name, least in (("batch_size", 2), ("accumulate", 1), ("epochs", 1), ("patience", 1), ("lora", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: at least {least}")

    def of_head(self, settings: HeadSettings) -> HeadSettings:
        """The settings of the stage-1 head with the rates, batch size and stopping of stage 2."""
        return replace(
            settings,
            learning_rate=self.lr_head,
            attention_learning_rate=self.lr_attention,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
            epochs=self.epochs,
            patience=self.patience,
            monitor=self.monitor,
        )

    def arithmetic(self, device: str) -> str:
        """The arithmetic of autocast on a device, "none" without autocast. `auto` is bfloat16 on a GPU that has it, and
        none elsewhere: autocast gains little on a CPU."""
        if self.amp != "auto":
            return self.amp
        dtype = resolve_dtype("auto", device) if device.startswith("cuda") else "float32"
        return "none" if dtype == "float32" else dtype

    @property
    def label(self) -> str:
        """The part of the run's name that says what moves, as in `text1-image2`."""
        if self.unfreeze == ((EVERY_TOWER, ALL),):
            return EVERY_TOWER
        named = [f"{name.replace('.', '-')}{'-all' if count == ALL else count}" for name, count in self.unfreeze]
        return "-".join(named) or "frozen"


def path_in_words(path: str, reason: str) -> str:
    return "from its cached prefix" if path == "cached" else f"in full passes ({reason})"


def parse_unfreeze(text: str) -> tuple[tuple[str, int], ...]:
    """Parse `--unfreeze`: `text:1,image:all` -> (("text", 1), ("image", ALL)). `all` stands for every layer of every
    tower that the head sees, `none` for nothing."""
    if text.strip() == "none":
        return ()
    if text.strip() == EVERY_TOWER:
        return ((EVERY_TOWER, ALL),)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    matches = [re.fullmatch(r"([\w.-]+):(all|[1-9]\d*)", part) for part in parts]
    if not parts or not all(matches):
        raise ConfigError(f"--unfreeze {text}: write NAME:LAYERS, as in text:1,image:2 or text:all, or all, or none")
    pairs = [(match[1], ALL if match[2] == "all" else int(match[2])) for match in matches if match]
    if len({name for name, _ in pairs}) < len(pairs):
        raise ConfigError(f"--unfreeze {text}: a name occurs twice")
    return tuple(pairs)


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
