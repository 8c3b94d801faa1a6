"""Moving towers: which encoders learn together with the head, how many of their layers, and their forward pass, from
cached prefixes or from texts and photos. The pixels of early fusion are a tower without parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmfeat.cache.features import Features
from mmfeat.encoders.layers import Point, capture
from mmfeat.encoders.registry import Tower, is_torch, open_towers
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.torch_tower import TorchTower, to_device
from mmfeat.errors import ConfigError, EncoderError, RunError
from mmfeat.extraction.requests import Request, extraction_of
from mmfeat.finetune.inputs import SIDE, PartialInputs, PrefixReader, SampleReader, content_of, pixels
from mmfeat.finetune.processes import Team
from mmfeat.finetune.settings import ALL, EVERY_TOWER, FinetuneSettings, path_in_words
from mmfeat.finetune.unfreeze import Resumed, adapt, adapted_layers, blank_inputs, moving_parameters, why_not_resumed
from mmfeat.heads.data import ORDER
from mmfeat.samples.contents import view_name
from mmfeat.samples.dataset import Sample
from mmfeat.samples.photo_cells import Photos
from mmfeat.samples.photos import Decoding
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


@dataclass(frozen=True)
class Attended:
    """The tokens of a tower that a head attends to: states (B, T, D) are captured at `point` of the forward pass, and
    `kept` maps the inputs to the mask (B, T) of tokens that are not padding (None: all)."""

    point: Point
    width: int
    kept: Callable[[Any], Tensor | None]


@dataclass
class MovingTower:
    """A tower whose vectors (B, D) are `forward` of the inputs that `reader` gives.

    `parameters` learn, `depths` are their distances from the last layer. `frozen` parameters never change, so models
    share them. `attended` is set where the head looks at the tower's tokens. The head does not standardise vectors that
    are `normed`, as pixels are. `merged` computes the weights of the adapted layers with LoRA's adapters added.
    """

    slot: Slot
    reader: PrefixReader | SampleReader
    forward: Callable[[Any], Tensor]
    team: Team
    width: int
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    frozen: dict[str, nn.Parameter] = field(default_factory=dict)
    plan: TowerPlan | None = None
    attended: Attended | None = None
    normed: bool = False
    merged: Callable[[], dict[str, Tensor]] | None = None

    def read(self, rows: np.ndarray, present: np.ndarray, views: np.ndarray) -> PartialInputs:
        """Read this process's part of a batch; the mask `present` (B,) says which samples have the modality."""
        positions = self.team.part(np.flatnonzero(present))
        inputs = self.reader.read(rows[positions], views[positions]) if len(positions) else None
        return PartialInputs(len(rows), positions, inputs)

    def vectors(self, part: PartialInputs) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Compute vectors (B, D), zero for samples without the modality, and where the head looks at tokens, the tokens
        (B, T, D) with their mask (B, T)."""
        vectors = torch.zeros(part.size, self.width, device=self.team.device)
        if not len(part.positions):
            width = self.attended.width if self.attended else 0
            no_tokens = vectors.new_zeros(part.size, 0, width), vectors.new_zeros(part.size, 0, dtype=torch.bool)
            return self.team.whole(vectors), no_tokens if self.attended else None
        inputs = on_device(part.inputs, self.team.device)
        with capture([self.attended.point] if self.attended else []) as captured:
            pooled = self.forward(inputs)
        positions = torch.from_numpy(part.positions).to(self.team.device)
        vectors = self.team.whole(vectors.index_copy(0, positions, pooled.float()))
        if self.attended is None:
            return vectors, None
        tokens, kept = captured[0].float(), self.attended.kept(inputs)
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if kept is None else kept
        all_tokens = tokens.new_zeros(part.size, *tokens.shape[1:]).index_copy(0, positions, tokens)
        return vectors, (all_tokens, mask.new_zeros(part.size, mask.shape[1]).index_copy(0, positions, mask))


def open_moving_tower(
    plan: TowerPlan,
    features: Features,
    samples: Sequence[Sample],
    settings: FinetuneSettings,
    team: Team,
    attends: bool,
) -> MovingTower:
    """Open a tower as planned; only parameters that learn have gradients, and tokens are captured if the head `attends`
    to tokens."""
    (tower,), device = open_towers(plan.tower), team.device
    tower.module.to(device)
    reader, forward, trial = _path(plan, tower, features, samples, device)
    trial_pass = partial(forward, on_device(trial, device))
    depths = moving_parameters(tower, trial_pass, plan.count, settings.projection) if plan.count else {}
    merged = None
    if settings.lora and plan.count:
        depths, merged = adapt(tower, depths, settings.lora)
    everything = dict(tower.module.named_parameters())
    parameters = {name: value for name, value in everything.items() if name in depths}
    frozen = {name: value for name, value in everything.items() if name not in depths}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    if settings.gradient_checkpointing and plan.count:
        _checkpoint_layers(tower, plan.count)
    return MovingTower(
        plan.slot, reader, forward if plan.count else torch.no_grad()(forward), team,
        features.widths[plan.slot.name], parameters, depths, frozen, plan,
        _attended(plan, tower, features) if attends else None, merged=merged,
    )  # fmt: skip


def pixel_tower(slot: Slot, samples: Sequence[Sample], decoding: Decoding, team: Team) -> MovingTower:
    reader = SampleReader(samples, "image", pixels, torch.stack, replace(decoding, draft=0))
    return MovingTower(slot, reader, lambda inputs: inputs, team, 3 * SIDE * SIDE, normed=True)


def on_device(inputs: Any, device: str) -> Any:
    """Move the inputs of a forward pass to the device; a resumed pass has two, hidden states and mask."""
    if isinstance(inputs, tuple):
        return tuple(to_device(tensor, device, torch.float32) for tensor in inputs)
    return to_device(inputs, device, torch.float32)


def _path(
    plan: TowerPlan, tower: TorchTower, features: Features, samples: Sequence[Sample], device: str
) -> tuple[PrefixReader | SampleReader, Callable[[Any], Tensor], Any]:
    """The reader of the inputs, the forward pass over them, and inputs of one sample to try the pass on."""
    if plan.path == "full":
        reader = SampleReader(samples, plan.slot.modality, tower.prepare, tower.collate, plan.tower.spec.decoding)
        return reader, tower.network.forward, blank_inputs(tower)
    prefix, resumed = plan.prefix().fingerprint, Resumed(tower, plan.count, device)
    blocks = [block for block in features.mapped if block.source == prefix]
    cached = PrefixReader(sorted(blocks, key=lambda block: block.view != "none"))  # plain samples first
    first = cached.read(np.flatnonzero(cached.blocks[0].mask)[:1], np.zeros(1, np.int64))
    return cached, lambda inputs: resumed(*inputs), first


def _attended(plan: TowerPlan, tower: TorchTower, features: Features) -> Attended | None:
    """The tokens of this tower that the head attends to; None if no tokens of it are cached.

    On the cached path, texts have the mask of their prefix. Photos have no padding, and a stage of a convolutional
    network gives fewer positions than it takes, so that the mask of a prefix would not fit.
    """
    if plan.tokens_name not in features.widths:
        return None
    is_text = plan.slot.modality == "text"
    kept = tower.keep if plan.path == "full" else lambda inputs: inputs[1] if is_text else None
    return Attended(tower.network.tokens, features.widths[plan.tokens_name], kept)


def _checkpoint_layers(tower: TorchTower, count: int) -> None:
    """Compute the activations within the moving layers twice instead of keeping the activations in memory.

    Only some libraries have a switch for gradient checkpointing, so `forward` of the layers is replaced. The tower was
    opened for one model and serves nothing else, so `forward` is not restored.
    """
    layers = tower.network.layers if count == ALL else tower.network.layers[-count:]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
