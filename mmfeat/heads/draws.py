"""Everything random in the training of one head, drawn on the CPU from its own seed.

So a head does not depend on its neighbours in the stack, nor on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmfeat.heads.settings import HeadSettings

STEPS_OF_16_BITS = 2**16
DECISIONS = 2**22  # of dropout that a head draws at once: those for a million rows would fill the memory


@dataclass(frozen=True)
class Epoch:
    """The draws of an epoch, or of a piece of it, for K heads: (K, steps, B) each, `keep` (K, steps, B, units) dropout
    decisions."""

    rows: Tensor
    keep: Tensor
    views: Tensor | None
    dropped: Tensor | None

    def steps(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, Tensor]]:
        """rows, views, dropped and keep of each step."""
        for number in range(self.rows.shape[1]):
            views, dropped = (x[:, number] if x is not None else None for x in (self.views, self.dropped))
            yield self.rows[:, number], views, dropped, self.keep[:, number]


class Draws:
    """One head's order of samples, dropout, views and lost modalities, epoch by epoch.

    Every batch is full: an epoch is `steps` batches from an endless row of permutations of the training rows, so each
    sample is seen equally often and batch normalisation never meets a rest of one. Where there are fewer rows than a
    batch takes, it takes them more than once, so that folds of different sizes still make one stack.
    """

    def __init__(self, entropy: Sequence[int], rows: np.ndarray, settings: HeadSettings, units: int) -> None:
        self.random = np.random.default_rng(entropy)
        self.rows, self.settings, self.units = rows, settings, units
        self.waiting = np.empty(0, np.int64)

    def order(self, steps: int) -> np.ndarray:
        """(steps, B) row numbers."""
        size = self.settings.batch_size
        passes = -(-max(steps * size - len(self.waiting), 0) // len(self.rows))
        self.waiting = np.concatenate([self.waiting, *(self.random.permutation(self.rows) for _ in range(passes))])
        taken, self.waiting = np.split(self.waiting, [steps * size])
        return taken.reshape(steps, size)

    def keep(self, shape: tuple[int, ...]) -> np.ndarray:
        """(..., units) bool, True with the probability of being kept, to 16 bits."""
        numbers = np.frombuffer(self.random.bytes(2 * int(np.prod(shape)) * self.units), np.uint16)
        return (numbers >= round(self.settings.dropout * STEPS_OF_16_BITS)).reshape(*shape, self.units)

    def views(self, shape: tuple[int, ...], views: int) -> np.ndarray:
        """Which of the plain picture (0) and its `views` augmented views each sample shows."""
        return self.random.integers(0, views + 1, shape)

    def dropped(self, shape: tuple[int, ...], modalities: int) -> np.ndarray:
        """The number of the modality that a sample loses, -1 for none."""
        if not self.settings.modality_dropout:  # draws nothing, whatever the neighbours in the stack do
            return np.full(shape, -1)
        lost = self.random.random(shape) < self.settings.modality_dropout
        return np.where(lost, self.random.integers(0, modalities, shape), -1)


def draw_pieces(draws: Sequence[Draws], steps: int, views: int, modalities: int, device: str) -> Iterator[Epoch]:
    """The next epoch of each head in pieces; how long they are does not depend on how many heads there are."""
    most = max(1, DECISIONS // max(draws[0].settings.batch_size * draws[0].units, 1))
    for start in range(0, steps, most):
        yield draw_epoch(draws, min(most, steps - start), views, modalities, device)


def draw_epoch(draws: Sequence[Draws], steps: int, views: int, modalities: int, device: str) -> Epoch:
    """The next `steps` of each head."""
    rows = [each.order(steps) for each in draws]
    shape = rows[0].shape
    drops = modalities > 1 and any(each.settings.modality_dropout for each in draws)
    return Epoch(
        _together(rows, device),
        _together([each.keep(shape) for each in draws], device),
        _together([each.views(shape, views) for each in draws], device) if views else None,
        _together([each.dropped(shape, modalities) for each in draws], device) if drops else None,
    )


def _together(arrays: Sequence[np.ndarray], device: str) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)
