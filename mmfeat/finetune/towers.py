"""Moving towers: encoders that learn together with the head, fed by their cached prefix or by the samples. The pixels
of early fusion are a tower without parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmfeat.cache.features import Features
from mmfeat.encoders.layers import Point, capture
from mmfeat.encoders.registry import open_towers
from mmfeat.encoders.torch_tower import TorchTower, to_device
from mmfeat.finetune.inputs import SIDE, InputReader, PrefixReader, Read, SampleReader, pixels
from mmfeat.finetune.processes import Team
from mmfeat.finetune.settings import ALL, FinetuneSettings
from mmfeat.finetune.tower_plan import Slot, TowerPlan
from mmfeat.finetune.unfreeze import Resumed, adapt, blank_inputs, moving_parameters
from mmfeat.samples.dataset import Sample


@dataclass(frozen=True)
class Attended:
    """The point of a forward pass at which the token states (B, T, D) are captured; `kept` gives the mask (B, T) of the
    tokens that are not padding (None: all)."""

    point: Point
    width: int
    kept: Callable[[Any], Tensor | None]


@dataclass
class MovingTower:
    """A tower whose vectors (B, D) are `forward` of the inputs that `reader` gives.

    `parameters` learn, `depths` are their distances from the last layer. `frozen` parameters never change, so models
    share them. `attended` is set where the head looks at the tower's tokens. Pixels are `normed`: the head takes them
    without standardising. `merged` gives the tower's own parameters with LoRA's adapters added.
    """

    slot: Slot
    reader: InputReader
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

    def read(self, rows: np.ndarray, present: np.ndarray, views: np.ndarray) -> Read:
        """Read this process's part of a batch; the mask `present` (B,) says which samples have the modality."""
        places = self.team.part(np.flatnonzero(present))
        return Read(len(rows), places, self.reader.read(rows[places], views[places]) if len(places) else None)

    def vectors(self, read: Read) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Vectors (B, D), zero for samples without the modality, and the tokens (B, T, D) with their mask (B, T) if the
        head looks at tokens."""
        if not len(read.places):
            return self.team.whole(torch.zeros(read.size, self.width, device=self.team.device)), self._no_tokens(read)
        inputs = on_device(read.inputs, self.team.device)
        with capture([self.attended.point] if self.attended else []) as captured:
            pooled = self.forward(inputs)
        places = torch.from_numpy(read.places).to(self.team.device)
        whole = torch.zeros(read.size, self.width, device=self.team.device).index_copy(0, places, pooled.float())
        return self.team.whole(whole), self._tokens(read, places, captured, inputs)

    def _tokens(
        self, read: Read, places: Tensor, captured: Sequence[Tensor], inputs: Any
    ) -> tuple[Tensor, Tensor] | None:
        if self.attended is None:
            return None
        tokens, mask = captured[0].float(), self.attended.kept(inputs)
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool) if mask is None else mask
        whole = tokens.new_zeros(read.size, *tokens.shape[1:]).index_copy(0, places, tokens)
        return whole, mask.new_zeros(read.size, mask.shape[1]).index_copy(0, places, mask)

    def _no_tokens(self, read: Read) -> tuple[Tensor, Tensor] | None:
        if self.attended is None:
            return None
        return (
            torch.zeros(read.size, 0, self.attended.width, device=self.team.device),
            torch.zeros(read.size, 0, dtype=torch.bool, device=self.team.device),
        )


def open_moving_tower(
    plan: TowerPlan,
    features: Features,
    samples: Sequence[Sample],
    settings: FinetuneSettings,
    team: Team,
    attends: bool,
) -> MovingTower:
    """Open the tower and set it up for its path; only parameters that learn have gradients."""
    (tower,), device = open_towers(plan.tower), team.device
    tower.module.to(device)
    reader, forward, trial = _path(plan, tower, features, samples, device)
    seen = partial(forward, on_device(trial, device))
    depths = moving_parameters(tower, seen, plan.count, settings.projection) if plan.count else {}
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


def pixel_tower(slot: Slot, samples: Sequence[Sample], team: Team) -> MovingTower:
    """A tower without parameters that gives the pixels as the vectors of a slot."""
    reader = SampleReader(samples, "image", pixels, torch.stack)
    return MovingTower(slot, reader, lambda inputs: inputs, team, 3 * SIDE * SIDE, normed=True)


def on_device(inputs: Any, device: str) -> Any:
    """Move the inputs of a forward pass to the device; a resumed pass has two, hidden states and mask."""
    if isinstance(inputs, tuple):
        return tuple(to_device(tensor, device, torch.float32) for tensor in inputs)
    return to_device(inputs, device, torch.float32)


def _path(
    plan: TowerPlan, tower: TorchTower, features: Features, samples: Sequence[Sample], device: str
) -> tuple[InputReader, Callable[[Any], Tensor], Any]:
    """The reader of the inputs, the forward pass over them, and inputs of one sample to try the pass on."""
    if plan.path == "full":
        reader = SampleReader(samples, plan.slot.modality, tower.prepare, tower.collate, plan.tower.spec.draft)
        return reader, tower.network.forward, blank_inputs(tower)
    cached = _prefix_reader(plan, features)
    return cached, _from_prefix(Resumed(tower, plan.count, device)), _first_row(cached)


def _attended(plan: TowerPlan, tower: TorchTower, features: Features) -> Attended | None:
    """Where the head's tokens of this tower are captured; None if the head has none. Photos have no padding, and a
    stage of a convolutional network gives fewer positions than it takes, so the mask of a prefix does not fit them."""
    if plan.tokens_name not in features.widths:
        return None
    kept = tower.keep
    if plan.path == "cached":
        kept = _given_mask if plan.slot.modality == "text" else _no_mask
    return Attended(tower.network.tokens, features.widths[plan.tokens_name], kept)


def _given_mask(inputs: Any) -> Any:
    return inputs[1]


def _no_mask(inputs: Any) -> None:
    return None


def _prefix_reader(plan: TowerPlan, features: Features) -> PrefixReader:
    """A reader of the cached prefix, followed by the prefixes of augmented views in their order."""
    source = plan.prefix().fingerprint
    views = [block for block in features.mapped if block.source == source]
    return PrefixReader(sorted(views, key=lambda block: block.view != "none"))


def _first_row(reader: PrefixReader) -> tuple[Tensor, Tensor]:
    return reader.read(np.flatnonzero(reader.blocks[0].mask)[:1], np.zeros(1, np.int64))


def _from_prefix(resumed: Resumed) -> Callable[[Any], Tensor]:
    return lambda inputs: resumed(*inputs)


def _checkpoint_layers(tower: TorchTower, count: int) -> None:
    """Compute the activations within the moving layers twice instead of keeping them in memory.

    Only some libraries have a switch for this, so `forward` of the layers is replaced; the tower was opened for one
    model and serves nothing else, so nothing is restored.
    """
    layers = tower.network.layers if count == ALL else tower.network.layers[-count:]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
