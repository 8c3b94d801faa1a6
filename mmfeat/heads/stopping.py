"""When a head has learned enough, and when it should learn more slowly."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from mmfeat.heads.settings import HeadSettings

FACTOR = 0.5  # of the learning rate on a plateau
PLATEAU = 1  # epochs without a better score that are borne
THRESHOLD = 1e-4  # relative, what counts as better for the learning rate


@dataclass
class Stopper:
    """Early stopping on a validation score, higher is better, and torch's ReduceLROnPlateau(factor 0.5, patience 1).

    `scale` multiplies the learning rate of the next epoch. A head without validation rows replays `replay`, the
    scales of its epochs.
    """

    settings: HeadSettings
    replay: tuple[float, ...] | None = None
    best: float = -math.inf
    best_epoch: int = -1
    scale: float = 1.0
    done: bool = False
    _plateau_best: float = field(default=-math.inf, repr=False)
    _bad: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        if self.replay:
            self.scale = self.replay[0]

    def update(self, epoch: int, score: float) -> bool:
        """Take the score of a finished epoch; whether its weights are the best so far."""
        if self.replay is not None:
            self.done = epoch + 1 >= len(self.replay)
            self.scale = self.scale if self.done else self.replay[epoch + 1]
            self.best_epoch = epoch
            return self.done
        self._reduce(score)
        better = score > self.best + self.settings.min_delta
        if better:
            self.best, self.best_epoch = score, epoch
        self.done = epoch - self.best_epoch >= self.settings.patience or epoch + 1 >= self.settings.epochs
        return better

    def _reduce(self, score: float) -> None:
        if math.isinf(self._plateau_best) or score > self._plateau_best + THRESHOLD * abs(self._plateau_best):
            self._plateau_best, self._bad = score, 0
        else:
            self._bad += 1
        if self._bad > PLATEAU:
            self.scale, self._bad = self.scale * FACTOR, 0
