"""The plan of stage 2: which towers move, how many of their layers, on which path, and from which cached prefixes."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.features import Features
from mmfeat.encoders.registry import Tower, is_torch, open_towers
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.torch_tower import TorchTower
from mmfeat.errors import ConfigError, EncoderError, RunError
from mmfeat.extraction.requests import Request, extraction_of
from mmfeat.finetune.inputs import content_of
from mmfeat.finetune.processes import Team
from mmfeat.finetune.settings import ALL, EVERY_TOWER, FinetuneSettings, path_in_words
from mmfeat.finetune.unfreeze import adapted_layers, blank_inputs, moving_parameters, why_not_resumed
from mmfeat.heads.data import ORDER
from mmfeat.samples.contents import view_name
from mmfeat.samples.dataset import Sample
from mmfeat.samples.photo_cells import Photos
from mmfeat.system.wording import counted

TRIED = 4  # samples on which both paths are compared


@dataclass(frozen=True)
class Slot:
    """An input of the head: encoder `number` of a modality, with the `name` of its block of cached vectors, which a
    moving tower replaces."""

    modality: str
    number: int
    name: str


@dataclass(frozen=True)
class TowerPlan:
    """The plan of a tower: its last `count` layers learn (0: none), on the cached or the full `path`. `reason` says why
    the full path is taken, and is "" on the cached path."""

    tower: Tower
    slot: Slot
    count: int
    path: str
    reason: str = ""

    @property
    def title(self) -> str:
        """The tower and its path in words, for a progress bar."""
        return f"{self.tower.spec.model} {path_in_words(self.path, self.reason)}"

    def prefix(self, view: str = "none") -> EncoderSpec:
        """The spec of the prefix: the hidden states that the cached path begins with."""
        return replace(self.tower.spec.of("prefix", self.count), view=view)

    @property
    def tokens_name(self) -> str:
        """The name of the block of the tower's token states, which change with the tower."""
        return self.tower.spec.of("tokens").folder_name


def plan_towers(
    slots: Sequence[tuple[Tower, Slot]], settings: FinetuneSettings, samples: Sequence[Sample], team: Team
) -> list[TowerPlan]:
    """Plan the towers that `--unfreeze` names, and with `--augment` every torch model of photos.

    A tower takes the cached path unless there is a reason against it.
    """
    wanted = _counts(slots, settings)
    plans = []
    for tower, slot in slots:
        count = wanted.get(tower.spec.fingerprint, 0)
        shows_pixels = settings.augment and slot.modality == "image" and is_torch(tower.request)
        if count or shows_pixels:
            if slot.modality == "image" and (many := sum(isinstance(sample.image, Photos) for sample in samples)):
                raise ConfigError(
                    f"{counted(many, 'sample')} of several photos: an encoder that learns takes one; train a run on "
                    "data extracted with --images first, and fine-tune that"
                )
            reason = _full_path_reason(tower, count, shows_pixels, settings, samples, team.device)
            path = "full" if team.agreed([bool(reason)])[0] else "cached"
            plans.append(TowerPlan(tower, slot, count, path, reason))
    return plans


def head_slots(towers: Sequence[Tower], modality: str) -> list[tuple[Tower, Slot]]:
    """The towers whose plain pooled vectors a head sees, in the order of the head's inputs."""
    slots = []
    for name in [name for name in ORDER if modality in ("both", name)]:
        pooled = [t for t in towers if (t.spec.modality, t.spec.output, t.spec.view) == (name, "pooled", "none")]
        slots += [(tower, Slot(name, number, tower.spec.folder_name)) for number, tower in enumerate(pooled)]
    return slots


def prefix_towers(plans: Sequence[TowerPlan], views: int) -> list[Tower]:
    """The prefixes that the cached paths begin with, those of photos also in augmented views 1 to `views`."""
    names = ["none", *(view_name(number) for number in range(1, views + 1))]
    return [
        Tower(plan.tower.request, plan.prefix(view))
        for plan in plans
        if plan.path == "cached"
        for view in (names if plan.slot.modality == "image" else names[:1])
    ]


def check_prefixes(plans: Sequence[TowerPlan], features: Features, request: Request, cache: str | Path) -> None:
    """Raise `RunError` for a sample that has a vector of a tower and no prefix, which could not be computed."""
    masks = features.masks
    for plan in plans:
        if plan.path == "cached":
            lacking = np.flatnonzero(masks[plan.slot.name] & ~masks[plan.prefix().folder_name])
            if len(lacking):
                outputs = (f"{plan.tower.spec.tower}=prefix:{plan.count}",)
                again = extraction_of(replace(request, options=replace(request.options, outputs=outputs)), cache)
                raise RunError(
                    f"sample {features.ids[lacking[0]]}: it has a vector of {plan.tower.spec.name} but no prefix; "
                    f"try it again with {again} --retry-failed, or use --path full"
                )


def _counts(slots: Sequence[tuple[Tower, Slot]], settings: FinetuneSettings) -> dict[str, int]:
    """The number of layers that `--unfreeze` asks for, by the fingerprint of the tower."""
    wanted: dict[str, int] = {}
    for name, count in settings.unfreeze:
        specs = [(tower, tower.spec) for tower, _ in slots]
        named = [tower for tower, spec in specs if name in (EVERY_TOWER, spec.modality, spec.family, spec.tower)]
        if not named:
            known = (
                ", ".join(sorted({label for _, spec in specs for label in (spec.modality, spec.tower)})) or "a table"
            )
            raise ConfigError(f"--unfreeze {name}: the head sees no such modality, family or tower; it sees {known}")
        named = [tower for tower in named if is_torch(tower.request)]
        if not named:
            raise ConfigError(
                f"--unfreeze {name}: no layers that could be trained; extract clip, hf, bert, resnet50 or timm"
            )
        if twice := [tower.spec.tower for tower in named if tower.spec.fingerprint in wanted]:
            raise ConfigError(f"--unfreeze {name}: {twice[0]} is named twice; give each tower one number of layers")
        wanted |= {tower.spec.fingerprint: count for tower in named}
    return wanted


def _full_path_reason(
    tower: Tower, count: int, shows_pixels: bool, settings: FinetuneSettings, samples: Sequence[Sample], device: str
) -> str:
    """The reason why the tower takes the full path, "" for the cached path."""
    (opened,) = open_towers(tower, [tower.spec])
    if count > 0:
        _check_depth(opened, count)
    if settings.lora and count:
        forward = partial(opened.network.forward, blank_inputs(opened))
        adapted_layers(opened, moving_parameters(opened, forward, count, settings.projection))
    if forced := _forced_reason(settings, count, shows_pixels):
        return forced
    reason = _trial_reason(opened, count, samples, device)
    if reason and settings.path == "cached":
        raise EncoderError(f"--path cached: {tower.spec.name}: {reason}; use --path full")
    return reason


def _check_depth(tower: TorchTower, count: int) -> None:
    """Raise `ConfigError` for more layers than the model has, on either path."""
    layers, flag = len(tower.network.layers), f"--unfreeze {tower.specs[0].tower}:{count}"
    if not layers:
        raise ConfigError(f"{flag}: no list of layers is known for this model; use {tower.specs[0].tower}:all")
    if count > layers:
        raise ConfigError(f"{flag}: the model has {layers} layers; use 1 to {layers}, or all")


def _forced_reason(settings: FinetuneSettings, count: int, shows_pixels: bool) -> str:
    """The reason why the settings force the full path for any model, "" if they do not."""
    if settings.path == "full":
        return "--path full"
    if shows_pixels:
        why = "--augment shows other pixels in each epoch"
    elif count == ALL:
        why = "all layers move"
    else:
        return ""
    if settings.path == "cached":
        raise ConfigError(f"--path cached: {why}, so nothing can be cached; leave out --path")
    return why


def _trial_reason(tower: TorchTower, count: int, samples: Sequence[Sample], device: str) -> str:
    """The reason why the model cannot begin at its `count`-th last layer, tried on a few samples; "" if it can."""
    if (layers := tower.specs[0].layers) > count:
        return f"its vector comes from the last {layers} layers"
    spec = tower.specs[0].of("prefix", count)
    contents: list[Any] = []
    for sample in samples:
        content = sample.text if spec.modality == "text" else sample.image
        if content is not None and len(contents) < TRIED:
            with contextlib.suppress(RunError):  # a broken photo is passed over
                contents.append(content_of(sample, spec.modality, decoding=spec.decoding))
    asked = replace(tower, specs=(spec,))
    return why_not_resumed(asked, count, contents, device) if contents else "no sample to try it on"
