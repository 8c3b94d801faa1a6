"""The plan of a fine-tuning: which towers move, how many of their layers, and on which path."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mmfeat.encoders.registry import FAMILIES, Tower, open_towers
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.torch_tower import TorchTower
from mmfeat.errors import ConfigError, EncoderError, RunError
from mmfeat.finetune.inputs import content_of
from mmfeat.finetune.processes import Team
from mmfeat.finetune.settings import ALL, EVERY_TOWER, FinetuneSettings, path_in_words
from mmfeat.finetune.unfreeze import adapted_layers, blank_inputs, moving_parameters, why_not_resumed
from mmfeat.heads.data import ORDER
from mmfeat.samples.dataset import Sample

TRIED = 4  # samples on which both paths are compared


@dataclass(frozen=True)
class Slot:
    """Which of the head's inputs a tower gives: the modality and the encoder's number in it."""

    modality: str
    number: int
    name: str  # of the block of cached vectors in whose place it stands


@dataclass(frozen=True)
class TowerPlan:
    """A tower: how many of its last layers learn (0: none), on which path, and why on that one."""

    tower: Tower
    slot: Slot
    count: int
    path: str  # "cached" or "full"
    reason: str = ""

    @property
    def title(self) -> str:
        """For whoever waits."""
        return f"{self.tower.spec.model} {path_in_words(self.path, self.reason)}"

    def prefix(self, view: str = "none") -> EncoderSpec:
        """The spec of what the cached path begins with."""
        return replace(self.tower.spec, output="prefix", layer=self.count, pooling="none", view=view)

    @property
    def tokens_name(self) -> str:
        """The block of its token states, which move with it."""
        return replace(self.tower.spec, output="tokens", pooling="none").folder_name


def plan_towers(
    slots: Sequence[tuple[Tower, Slot]],
    settings: FinetuneSettings,
    samples: Sequence[Sample],
    device: str,
    team: Team,
) -> list[TowerPlan]:
    """The towers that `--unfreeze` names, and with `--augment` those of photos that are torch models.

    Each is on the cached path unless something forbids it; `TowerPlan.reason` says what.
    """
    wanted = _counts(slots, settings)
    plans = []
    for tower, slot in slots:
        count = wanted.get(tower.spec.fingerprint, 0)
        shows_pixels = settings.augment and slot.modality == "image" and _is_torch(tower)
        if count or shows_pixels:
            reason = _reason(tower, count, shows_pixels, settings, samples, device)
            path = "full" if team.agreed([bool(reason)])[0] else "cached"
            plans.append(TowerPlan(tower, slot, count, path, reason))
    return plans


def head_slots(towers: Sequence[Tower], modality: str) -> list[tuple[Tower, Slot]]:
    """The plain pooled towers that a head sees, in its order."""
    found = []
    for name in [each for each in ORDER if modality in ("both", each)]:
        own = [t for t in towers if (t.spec.modality, t.spec.output, t.spec.view) == (name, "pooled", "none")]
        found += [(tower, Slot(name, number, tower.spec.folder_name)) for number, tower in enumerate(own)]
    return found


def _counts(slots: Sequence[tuple[Tower, Slot]], settings: FinetuneSettings) -> dict[str, int]:
    """Fingerprint -> layers."""
    wanted: dict[str, int] = {}
    for name, count in settings.unfreeze:
        named = [tower for tower, _ in slots if name == EVERY_TOWER or name in _names(tower)]
        if not named:
            known = ", ".join(sorted({n for t, _ in slots for n in (t.spec.modality, t.spec.tower)}))
            raise ConfigError(f"--unfreeze {name}: the head sees no such modality, family or tower; it sees {known}")
        named = [tower for tower in named if _is_torch(tower)]
        if not named:
            raise ConfigError(
                f"--unfreeze {name}: no layers that could be trained; extract clip, bert, resnet50 or timm"
            )
        if twice := [tower.spec.tower for tower in named if tower.spec.fingerprint in wanted]:
            raise ConfigError(f"--unfreeze {name}: {twice[0]} is named twice; give each tower one number of layers")
        wanted |= {tower.spec.fingerprint: count for tower in named}
    return wanted


def _names(tower: Tower) -> set[str]:
    return {tower.spec.modality, tower.spec.family, tower.spec.tower}


def _is_torch(tower: Tower) -> bool:
    """Whether it is a model with layers; families of torchvision have no row of their own."""
    family = FAMILIES.get(tower.request.partition(":")[0])
    return family is None or family.open_towers is not None


def _reason(
    tower: Tower, count: int, shows_pixels: bool, settings: FinetuneSettings, samples: Sequence[Sample], device: str
) -> str:
    """Why the tower is on the full path; "" if it is not."""
    (opened,) = open_towers(tower, [tower.spec])
    if count > 0:
        _check_depth(opened, count)
    if settings.lora and count:
        seen = partial(opened.network.forward, blank_inputs(opened))
        adapted_layers(opened, moving_parameters(opened, seen, count, settings.projection))
    if forced := _forced(settings, count, shows_pixels):
        return forced
    reason = _tried(opened, count, samples, device)
    if reason and settings.path == "cached":
        raise EncoderError(f"--path cached: {tower.spec.name}: {reason}; use --path full")
    return reason


def _check_depth(tower: TorchTower, count: int) -> None:
    """A layer that the model does not have is an error on either path."""
    layers, asked = len(tower.network.layers), f"--unfreeze {tower.specs[0].tower}:{count}"
    if not layers:
        raise ConfigError(f"{asked}: no list of layers is known for this model; use {tower.specs[0].tower}:all")
    if count > layers:
        raise ConfigError(f"{asked}: the model has {layers} layers; use 1 to {layers}, or all")


def _forced(settings: FinetuneSettings, count: int, shows_pixels: bool) -> str:
    """Why the whole tower has to run, whatever the model."""
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


def _tried(tower: TorchTower, count: int, samples: Sequence[Sample], device: str) -> str:
    """Why the model cannot begin at that layer, found out on a few samples. The tower is used up."""
    spec = replace(tower.specs[0], output="prefix", layer=count, pooling="none")
    contents: list[Any] = []
    for sample in samples:
        there = sample.text if spec.modality == "text" else sample.image
        if there is not None and len(contents) < TRIED:
            with contextlib.suppress(RunError):  # a broken photo; others will do
                contents.append(content_of(sample, spec.modality))
    return why_not_resumed(tower.asked_for([spec]), count, contents, device) if contents else "no sample to try it on"
