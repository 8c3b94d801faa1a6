"""Movers: towers that learn with the head, from their cached prefix or from the samples, and the pixels of early
fusion, which have nothing to learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmfeat.encoders import EncoderSpec, TorchTower, Tower, open_towers
from mmfeat.encoders.layers import Point, capture
from mmfeat.encoders.torch_tower import to_device
from mmfeat.errors import ConfigError
from mmfeat.features import Features
from mmfeat.finetune.lora import adapt
from mmfeat.finetune.readers import SIDE, PrefixReader, Read, Reader, SampleReader, pixels
from mmfeat.finetune.resume import Resumed, blank_inputs
from mmfeat.finetune.settings import ALL, FinetuneSettings
from mmfeat.finetune.team import Team
from mmfeat.finetune.unfreeze import moving_parameters
from mmfeat.samples import Sample


@dataclass(frozen=True)
class Slot:
    """Which of the head's inputs a mover gives: the modality and the encoder's number in it."""

    modality: str
    number: int
    name: str  # of the block of cached vectors in whose place it stands


@dataclass(frozen=True)
class Part:
    """One tower of the plan: how many of its last layers learn (0: none), on which path, and why on that one."""

    tower: Tower
    slot: Slot
    count: int
    path: str  # "cached" or "full"
    reason: str = ""

    @property
    def way(self) -> str:
        """The path in words."""
        return "from its cached prefix" if self.path == "cached" else f"in full passes ({self.reason})"

    def prefix(self, view: str = "none") -> EncoderSpec:
        """The spec of what the cached path begins with."""
        return replace(self.tower.spec, output="prefix", layer=self.count, pooling="none", view=view)

    @property
    def tokens_name(self) -> str:
        """The block of its token states, which move with it."""
        return replace(self.tower.spec, output="tokens", pooling="none").folder_name


@dataclass
class Mover:
    """Inputs from `reader`, then `forward` -> (B, D); `parameters` learn, `depths` tells how deep each lies.

    `attends` is where tokens can be seen, if the head looks at them. Pixels are `normed`: the head takes them as they
    are.
    """

    slot: Slot
    reader: Reader
    forward: Callable[[Any], Tensor]
    team: Team
    device: str
    width: int
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    module: nn.Module | None = None
    part: Part | None = None
    attends: Point | None = None
    normed: bool = False
    merged: Callable[[], dict[str, Tensor]] | None = None  # of adapters: what they make of the tower's own parameters

    def read(self, rows: np.ndarray, there: np.ndarray, views: np.ndarray) -> Read:
        """This process's part of a batch; `there` (B,) says which samples have anything to read."""
        places = self.team.part(np.flatnonzero(there))
        return Read(len(rows), places, self.reader.read(rows[places], views[places]) if len(places) else None)

    def vectors(self, read: Read) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """(B, D), zero where there is nothing, and the tokens (B, T, D) with their mask if the head looks at them."""
        if not len(read.places):
            return self.team.whole(torch.zeros(read.size, self.width, device=self.device)), self._no_tokens(read)
        inputs = on_device(read.inputs, self.device)
        with capture([self.attends] if self.attends else []) as captured:
            pooled = self.forward(inputs)
        places = torch.from_numpy(read.places).to(self.device)
        whole = torch.zeros(read.size, self.width, device=self.device).index_copy(0, places, pooled.float())
        return self.team.whole(whole), self._tokens(read, places, captured, inputs)

    def _tokens(
        self, read: Read, places: Tensor, captured: Sequence[Tensor], inputs: Any
    ) -> tuple[Tensor, Tensor] | None:
        if self.attends is None:
            return None
        tokens = captured[0].float()
        mask = tokens.new_ones(tokens.shape[:2], dtype=torch.bool)
        if self.slot.modality == "text":  # photos have no padding, and fewer positions behind a stage than before
            mask = inputs[1]
        whole = tokens.new_zeros(read.size, *tokens.shape[1:]).index_copy(0, places, tokens)
        return whole, mask.new_zeros(read.size, mask.shape[1]).index_copy(0, places, mask)

    def _no_tokens(self, read: Read) -> tuple[Tensor, Tensor] | None:
        if self.attends is None:
            return None
        return (
            torch.zeros(read.size, 0, self.width, device=self.device),
            torch.zeros(read.size, 0, dtype=torch.bool, device=self.device),
        )


def make_mover(
    part: Part,
    features: Features,
    samples: Sequence[Sample],
    settings: FinetuneSettings,
    team: Team,
    device: str,
    attends: bool,
) -> Mover:
    """Open the tower and set it up for its path; only what learns has gradients."""
    (tower,) = open_towers(part.tower)
    tower.module.to(device)
    if attends and part.path == "full":
        raise ConfigError(
            "--head cross-attention looks at tokens, which move on the cached path alone; leave out --path"
        )
    reader: Reader
    forward: Callable[[Any], Tensor]
    if part.path == "cached":
        reader = _prefix_reader(part, features)
        forward = _at_once(Resumed(tower, part.count, device))
        trial = _first_row(reader)
    else:
        reader = SampleReader(samples, part.slot.modality, tower.prepare, tower.collate)
        forward = tower.network.forward
        trial = blank_inputs(tower)
    seen = partial(forward, on_device(trial, device))
    depths = moving_parameters(tower, seen, part.count, settings.projection) if part.count else {}
    merged = None
    if settings.lora and part.count:
        depths, merged = adapt(tower, depths, settings.lora)
    parameters = {name: value for name, value in tower.module.named_parameters() if name in depths}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    if settings.gradient_checkpointing and part.count:
        _checkpoint_layers(tower, part.count)
    width = features.widths[part.slot.name]
    return Mover(
        part.slot, reader, forward if part.count else torch.no_grad()(forward), team, device, width,
        parameters, depths, tower.module, part, tower.network.tokens if attends else None, merged=merged,
    )  # fmt: skip


def make_pixels(slot: Slot, samples: Sequence[Sample], team: Team, device: str) -> Mover:
    """The pixels themselves as the vectors of a slot."""
    reader = SampleReader(samples, "image", pixels, torch.stack)
    return Mover(slot, reader, lambda inputs: inputs, team, device, 3 * SIDE * SIDE, normed=True)


def on_device(inputs: Any, device: str) -> Any:
    """The inputs of a forward pass, those of a resumed one too, which are two."""
    if isinstance(inputs, tuple):
        return tuple(to_device(each, device, torch.float32) for each in inputs)
    return to_device(inputs, device, torch.float32)


def _prefix_reader(part: Part, features: Features) -> PrefixReader:
    """The cached prefix, and behind it those of augmented views in their order."""
    source = part.prefix().fingerprint
    views = [block for block in features.mapped if block.source == source]
    return PrefixReader(sorted(views, key=lambda block: block.view != "none"))


def _first_row(reader: PrefixReader) -> tuple[Tensor, Tensor]:
    return reader.read(np.flatnonzero(reader.blocks[0].mask)[:1], np.zeros(1, np.int64))


def _at_once(resumed: Resumed) -> Callable[[Any], Tensor]:
    return lambda inputs: resumed(*inputs)


def _checkpoint_layers(tower: TorchTower, count: int) -> None:
    """Compute what happens within the moving layers twice instead of keeping it in memory."""
    layers = tower.network.layers if count == ALL else tower.network.layers[-count:]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
