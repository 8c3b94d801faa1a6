"""The models of stage 2: a fusion head on the vectors of frozen and moving towers, or early fusion, a small
convolutional network on pixels and text."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmfeat.cache.features import Block, Features, MappedBlock
from mmfeat.finetune.inputs import SIDE, PartialInputs, PrefixReader
from mmfeat.finetune.processes import Team
from mmfeat.finetune.towers import MovingTower, Slot, pixel_tower
from mmfeat.heads.data import HeadData
from mmfeat.heads.layers import Batch, Fusion, Shape
from mmfeat.heads.tokens import pooled_tokens
from mmfeat.samples.dataset import Sample
from mmfeat.samples.photos import Decoding

CHANNELS = (16, 32, 64, 128)  # the widths of early fusion's convolutions
PREDICTED_ROWS = 128  # rows in a forward pass without gradients
HEAD = "head."  # the prefix of the head's parameters in a state


class EarlyFusion(Fusion):
    """Early fusion (K = 1): text (1, B, D) becomes a fourth channel beside the pixels (1, B, 3 * SIDE * SIDE), and
    convolutions without an axis of heads turn the four channels into logits (1, B, C)."""

    units = CHANNELS[-1]
    is_stacked = False

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        assert heads == 1  # early fusion is never stacked
        self.channel = nn.Linear(shape.width("text"), SIDE * SIDE)
        self.convolutions = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
                for before, after in itertools.pairwise([4, *CHANNELS])
            )
        )
        self.output = nn.Linear(CHANNELS[-1], classes)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        image, text = vectors["image"][0], vectors["text"][0]
        picture = torch.cat([image.view(-1, 3, SIDE, SIDE), self.channel(text).view(-1, 1, SIDE, SIDE)], 1)
        pooled = self.convolutions(picture).mean((2, 3))
        return self.output(pooled if batch.keep is None else pooled * batch.keep[0])[None]

    def reset_head(self, head: int, generator: torch.Generator) -> None:
        """Draw first weights from the distributions of torch's own layers."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                bound = 1 / math.sqrt(module.weight[0].numel())
                for parameter in module.parameters():
                    drawn = torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator)
                    parameter.data.copy_(drawn)


def widened(shape: Shape, towers: Sequence[MovingTower]) -> Shape:
    """The shape of the head's inputs, with the widths of the moving towers."""
    widths = {modality: list(values) for modality, values in shape.widths.items()}
    for tower in towers:
        widths[tower.slot.modality][tower.slot.number] = tower.width
    return replace(shape, widths={modality: tuple(values) for modality, values in widths.items()})


class TunableModel:
    """A head on the vectors of towers: `data` holds the cached vectors of frozen towers, `towers` are the moving ones.

    `amp` is the arithmetic of the moving towers in training. A batch is (1, B) row numbers, as for a stack of one head.
    """

    def __init__(self, head: Fusion, data: HeadData, towers: Sequence[MovingTower], amp: str = "none") -> None:
        self.head, self.data, self.towers, self.amp = head.to(data.device), data, towers, amp
        self.first = self.state()  # the state before any training

    def encoder_parameters(self) -> dict[str, nn.Parameter]:
        """The towers' parameters that learn, under the names NUMBER_OF_TOWER.NAME."""
        return {f"{number}.{name}": p for number, t in enumerate(self.towers) for name, p in t.parameters.items()}

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**{HEAD + name: p for name, p in self.head.named_parameters()}, **self.encoder_parameters()}

    def state(self) -> dict[str, Tensor]:
        """A copy of every tensor that training changes, including the head's statistics."""
        everything = {
            **{HEAD + name: value for name, value in self.head.state_dict().items()},
            **self.encoder_parameters(),
        }
        return {name: value.detach().clone() for name, value in everything.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state; a tensor that `state` lacks returns to its value before any training."""
        state = {**self.first, **state}
        self.head.load_state_dict({name.removeprefix(HEAD): v for name, v in state.items() if name.startswith(HEAD)})
        for name, parameter in self.encoder_parameters().items():
            parameter.copy_(state[name])

    def load_head(self, saved: Mapping[str, np.ndarray]) -> None:
        """Take over a saved head; the towers return to their values before any training."""
        self.load({HEAD + name: torch.from_numpy(value) for name, value in saved.items()})

    def share_frozen(self, other: TunableModel) -> None:
        """Use the frozen parameters of another model, so that memory holds them once."""
        for tower, first in zip(self.towers, other.towers, strict=True):
            for name, parameter in tower.frozen.items():
                parameter.data = first.frozen[name].data

    def read(self, rows: np.ndarray, views: np.ndarray) -> list[PartialInputs]:
        """Read the inputs of each moving tower for B samples, each sample in a view."""
        masks = [self.data.sources[t.slot.modality][t.slot.number].masks[0] for t in self.towers]
        return [tower.read(rows, mask[rows], views) for tower, mask in zip(self.towers, masks, strict=True)]

    def logits(
        self,
        parts: Sequence[PartialInputs],
        rows: Tensor,
        views: Tensor | None = None,
        dropped: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> Tensor:
        """(1, B, C) logits of the samples `rows` (1, B), whose inputs to the moving towers are `parts`."""
        batch = self.data.batch(rows, views, dropped, keep)
        vectors = {modality: list(tensors) for modality, tensors in batch.vectors.items()}
        tokens = {modality: list(pairs) for modality, pairs in batch.tokens.items()}
        for tower, part in zip(self.towers, parts, strict=True):
            with self._autocast():
                pooled, attended = tower.vectors(part)
            vectors[tower.slot.modality][tower.slot.number] = pooled[None]
            if attended is not None:
                self._place_tokens(tokens, batch, tower, attended)
        if self.data.attend == "pooled":
            tokens = pooled_tokens(vectors, batch.masks)
        inputs = Batch(self._normed(vectors), batch.masks, tokens, batch.keep, normed=True)
        # Early fusion, the one head without a stack, computes in the arithmetic of the towers.
        with nullcontext() if self.head.is_stacked else self._autocast():
            return self.head(inputs).float()

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64 logits of the samples `rows` (n,), the mean over all cached views."""
        self.head.eval()
        out = np.zeros((len(rows), 0))
        order = self._by_length(rows)
        with torch.no_grad():
            for start in range(0, len(rows), PREDICTED_ROWS):
                positions = order[start : start + PREDICTED_ROWS]
                batch = torch.from_numpy(rows[positions][None]).to(self.data.device)
                logits = []
                for view in range(self.data.views + 1):
                    parts = self.read(rows[positions], np.full(len(positions), view))
                    views = torch.full_like(batch, view) if view else None
                    logits.append(self.logits(parts, batch, views)[0].cpu().double())
                mean = torch.stack(logits).mean(0).numpy()
                out = np.zeros((len(rows), mean.shape[1])) if not out.size else out
                out[positions] = mean
        return out

    def _place_tokens(
        self, tokens: dict[str, list[Any]], batch: Batch, tower: MovingTower, attended: tuple[Tensor, Tensor]
    ) -> None:
        """Put the tokens of a moving tower into the batch; a sample that drops the modality has none."""
        assert tower.plan is not None
        modality, (values, present) = tower.slot.modality, attended
        index = [block.name for block in self.data.token_blocks[modality]].index(tower.plan.tokens_name)
        kept = batch.masks[modality][tower.slot.number]
        tokens[modality][index] = values[None], present[None] if kept is None else present[None] & kept.unsqueeze(-1)

    def _by_length(self, rows: np.ndarray) -> np.ndarray:
        """The order of the rows in which texts of equal length share a forward pass, which saves padding."""
        for tower in self.towers:
            if isinstance(tower.reader, PrefixReader) and tower.slot.modality == "text":
                return np.argsort(tower.reader.blocks[0].lengths[rows], kind="stable")
        return np.arange(len(rows))

    def _normed(self, vectors: dict[str, list[Tensor]]) -> dict[str, list[Tensor]]:
        """The vectors standardised with the head's statistics, except those that a tower gives `normed`."""
        inputs: Any = self.head.inputs
        done = {(tower.slot.modality, tower.slot.number) for tower in self.towers if tower.normed}
        return {
            modality: [
                x if (modality, number) in done else given.normed(x)
                for number, (x, given) in enumerate(zip(tensors, inputs[modality], strict=True))
            ]
            for modality, tensors in vectors.items()
        }

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.amp == "none" or not self.head.training:  # validation computes as prediction does, in float32
            return nullcontext()
        return torch.autocast(torch.device(self.data.device).type, getattr(torch, self.amp))


def early_model(
    features: Features,
    samples: Sequence[Sample],
    towers: Sequence[MovingTower],
    decoding: Decoding,
    classes: int,
    team: Team,
    amp: str = "none",
) -> TunableModel:
    """The model of early fusion: pixels replace the vectors of the first photo encoder, whose mask says which photos
    can be read."""
    pooled: list[Block | MappedBlock] = [*features.blocks]
    pooled += [block for block in features.mapped if block.output == "pooled"]
    photos = [block.source for block in pooled if (block.modality, block.view) == ("image", "none")]

    def is_used(block: Block | MappedBlock) -> bool:
        return block.modality == "text" or block.source == photos[0]

    blocks, mapped = tuple(filter(is_used, features.blocks)), tuple(filter(is_used, features.mapped))
    data = HeadData(replace(features, blocks=blocks, mapped=mapped), "both", team.device)
    moving = [*towers, pixel_tower(Slot("image", 0, data.sources["image"][0].name), samples, decoding, team)]
    return TunableModel(EarlyFusion(1, widened(data.shape, moving), classes), data, moving, amp)
