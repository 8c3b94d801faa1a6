"""The plan of a fine-tuning: which towers move, how many of their layers, and on which path."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mmfeat.encoders import Tower, open_towers
from mmfeat.errors import ConfigError, EncoderError, RunError
from mmfeat.finetune.movers import Part, Slot
from mmfeat.finetune.readers import content_of
from mmfeat.finetune.resume import why_not_resumed
from mmfeat.finetune.settings import ALL, FinetuneSettings
from mmfeat.heads.data import ORDER
from mmfeat.samples import Sample

TRIED = 4  # samples on which both paths are compared


def plan_parts(
    towers: Sequence[Tower], modality: str, settings: FinetuneSettings, samples: Sequence[Sample], device: str
) -> list[Part]:
    """The towers that `--unfreeze` names, and with `--augment` every tower of photos.

    Each is on the cached path unless something forbids it; `Part.reason` says what.
    """
    slots = _slots(towers, modality)
    wanted = _counts(slots, settings)
    parts = []
    for tower, slot in slots:
        count = wanted.get(tower.spec.fingerprint, 0)
        sees_pixels = settings.augment and slot.modality == "image"
        if not count and not sees_pixels:
            continue
        reason = _forced(settings, count, sees_pixels)
        if not reason:
            reason = _tried(tower, count, samples, device)
            if reason and settings.path == "cached":
                raise EncoderError(f"--path cached: {tower.spec.name}: {reason}; use --path full")
        parts.append(Part(tower, slot, count, "full" if reason else "cached", reason))
    return parts


def _slots(towers: Sequence[Tower], modality: str) -> list[tuple[Tower, Slot]]:
    """The plain pooled towers that the head sees, in its order."""
    found = []
    for name in [each for each in ORDER if modality in ("both", each)]:
        own = [t for t in towers if (t.spec.modality, t.spec.output, t.spec.view) == (name, "pooled", "none")]
        found += [(tower, Slot(name, number, tower.spec.folder_name)) for number, tower in enumerate(own)]
    return found


def _counts(slots: Sequence[tuple[Tower, Slot]], settings: FinetuneSettings) -> dict[str, int]:
    """Fingerprint -> layers."""
    wanted: dict[str, int] = {}
    for name, count in settings.unfreeze:
        named = [t.spec for t, _ in slots if name in (t.spec.modality, t.spec.family, t.spec.tower)]
        if not named:
            known = ", ".join(sorted({n for t, _ in slots for n in (t.spec.modality, t.spec.tower)}))
            raise ConfigError(f"--unfreeze {name}: the head sees no such modality, family or tower; it sees {known}")
        wanted |= {spec.fingerprint: count for spec in named}
    return wanted


def _forced(settings: FinetuneSettings, count: int, sees_pixels: bool) -> str:
    """Why the whole tower has to run, whatever the model."""
    if settings.path == "full":
        return "--path full"
    if sees_pixels:
        why = "--augment shows other pixels in each epoch"
    elif count == ALL:
        why = "all layers move"
    else:
        return ""
    if settings.path == "cached":
        raise ConfigError(f"--path cached: {why}, so nothing can be cached; leave out --path")
    return why


def _tried(tower: Tower, count: int, samples: Sequence[Sample], device: str) -> str:
    """Why the model cannot begin at that layer; a layer that it does not have is an error."""
    spec = replace(tower.spec, output="prefix", layer=count, pooling="none")
    (opened,) = open_towers(tower, [tower.spec])
    layers = len(opened.network.layers)
    if count > layers > 0:
        raise ConfigError(f"--unfreeze {spec.tower}:{count}: the model has {layers} layers; use 1 to {layers}, or all")
    contents: list[Any] = []
    for sample in samples:
        there = sample.text if spec.modality == "text" else sample.image
        if there is not None and len(contents) < TRIED:
            with contextlib.suppress(RunError):  # a broken photo; others will do
                contents.append(content_of(sample, spec.modality))
    return why_not_resumed(opened.asked_for([spec]), count, contents, device) if contents else "no sample to try it on"
