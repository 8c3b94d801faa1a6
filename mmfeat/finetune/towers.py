"""Moving towers: encoders that learn together with the head, from cached prefixes or from texts and photos. The pixels
of early fusion are a tower without parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from mmfeat.finetune.inputs import SIDE, PartialInputs, PrefixReader, SampleReader, pixels
from mmfeat.finetune.processes import Team
from mmfeat.finetune.settings import ALL, FinetuneSettings
from mmfeat.finetune.tower_plan import Slot, TowerPlan
from mmfeat.finetune.unfreeze import Resumed, adapt, blank_inputs, moving_parameters
from mmfeat.samples.dataset import Sample
from mmfeat.samples.photos import Decoding


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
    """A tower without parameters whose vectors are the pixels of photos."""
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
