"""AdamW and early stopping for a stack of heads, each with its own learning rates, weight decay and patience."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmfeat.heads.settings import HeadSettings

FACTOR = 0.5  # multiplies the learning rate on a plateau
PLATEAU = 1  # patience: epochs without a better score before the learning rate falls
THRESHOLD = 1e-4  # relative improvement that counts as better for the learning rate
BETAS = (0.9, 0.999)
EPSILON = 1e-8
VECTOR = 16  # numbers that the kernel takes at once; a remainder rounds otherwise, so no head may become one


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
        """Record the score of a finished epoch and return whether the weights of that epoch are the best so far."""
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


class StackedAdamW:
    """torch's AdamW (Loshchilov and Hutter, ICLR 2019) for parameters with the heads in front.

    `rates` are (K,) learning rates for each parameter, `decay` is (K,). On a CPU torch's fused kernel takes one head
    after the other, which stays in its cache; elsewhere all heads take each operation together, with rates on
    the device of the parameters, so that a step waits for no copy.
    """

    def __init__(self, parameters: Sequence[Tensor], rates: Sequence[Tensor], decay: Tensor) -> None:
        self.parameters = list(parameters)
        device = self.parameters[0].device
        dtype = torch.float64 if device.type == "cpu" else torch.float32  # Apple's GPU has no float64
        self.rates, self.decay = [rate.to(dtype).to(device) for rate in rates], decay.to(dtype).to(device)
        self.first = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.second = [torch.zeros_like(parameter) for parameter in self.parameters]
        self.steps = 0
        self._groups: tuple[Tensor, list[tuple[int | None, list[int], float, float]]] | None = None

    def keep(self, heads: Tensor, parameters: Sequence[Tensor]) -> None:
        """Continue with these heads of the stack, whose `parameters` were cut already."""
        self.parameters = list(parameters)
        self.first, self.second = [x[heads] for x in self.first], [x[heads] for x in self.second]
        self.rates, self.decay = [rate[heads] for rate in self.rates], self.decay[heads]
        self._groups = None

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], scale: Tensor) -> None:
        """Make one step; `scale` (K,), on the device of `decay`, multiplies the learning rates."""
        self.steps += 1
        (self._fused if self.parameters[0].device.type == "cpu" else self._together)(gradients, scale)

    def _fused(self, gradients: Sequence[Tensor], scale: Tensor) -> None:
        from torch.optim.adamw import adamw

        options: dict[str, Any] = {"beta1": BETAS[0], "beta2": BETAS[1], "eps": EPSILON}
        options |= {"fused": True, "amsgrad": False, "maximize": False}
        everything = self._tensors(gradients)
        for head, numbers, rate, decay in self._alike(scale):
            parameters, slopes, first, second = (
                [x[number] if head is None else x[number][head] for number in numbers] for x in everything
            )
            steps = list(torch.full((len(numbers),), float(self.steps - 1)).unbind())
            adamw(parameters, slopes, first, second, [], steps, lr=rate, weight_decay=decay, **options)

    def _alike(self, scale: Tensor) -> list[tuple[int | None, list[int], float, float]]:
        """Calls of the kernel, (head, indices of parameters, rate, decay); head None stands for all heads where their
        rates and decays do not differ."""
        if self._groups is None or not torch.equal(scale, self._groups[0]):
            rates = torch.stack([rate * scale for rate in self.rates], 1).tolist()
            decays = self.decay.tolist()
            same = all(line == rates[0] for line in rates) and len(set(decays)) == 1
            whole = {number for number, x in enumerate(self.parameters) if same and x[0].numel() % VECTOR == 0}
            groups: list[tuple[int | None, list[int], float, float]] = []
            for head, (line, decay) in enumerate(zip(rates, decays, strict=True)):
                for rate in dict.fromkeys(line):
                    numbers = [number for number, other in enumerate(line) if other == rate]
                    together = [number for number in numbers if number in whole]
                    if together and head == 0:
                        groups.append((None, together, rate, decay))
                    if alone := [number for number in numbers if number not in whole]:
                        groups.append((head, alone, rate, decay))
            self._groups = scale.clone(), groups
        return self._groups[1]

    def _tensors(self, gradients: Sequence[Tensor]) -> list[list[Tensor]]:
        return [[parameter.detach() for parameter in self.parameters], list(gradients), self.first, self.second]

    def _together(self, gradients: Sequence[Tensor], scale: Tensor) -> None:
        first_correction, second_correction = (1 - beta**self.steps for beta in BETAS)
        for parameter, gradient, first, second, rate in zip(*self._tensors(gradients), self.rates, strict=True):
            shape = (-1, *[1] * (parameter.dim() - 1))
            rate, decay = (rate * scale).view(shape), self.decay.view(shape)
            first.lerp_(gradient, 1 - BETAS[0])
            second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
            size = (second / second_correction).sqrt_().add_(EPSILON)
            parameter.mul_(1 - rate * decay).sub_((first / size).mul_(rate / first_correction))
