"""The training of a stack: the random draws, losses, learning rates and early stopping of its heads, and AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfeat.heads.registry import HeadSettings
from mmfeat.samples.labels import Targets
from mmfeat.system.hardware import cpu_count

STEPS_OF_16_BITS = 2**16
DECISIONS = 2**22  # most dropout decisions that a head draws at once; an epoch of a million rows would fill the memory
EFFECTIVE_BETA = 0.999  # beta in the effective number of n samples, (1 - beta^n) / (1 - beta)
FACTOR = 0.5  # factor of the learning rate on a plateau
PLATEAU = 1  # patience of the learning rate: it falls after more epochs than this without a better score
THRESHOLD = 1e-4  # relative improvement that counts as better for the learning rate
BETAS = (0.9, 0.999)
EPSILON = 1e-8
VECTOR = 16  # numbers that the fused kernel takes at once; heads in one call round alike only without a remainder


@dataclass(frozen=True)
class Epoch:
    """Random draws for K heads and some steps of an epoch.

    `rows`, `views` and `dropped` are (K, steps, B), `keep` (K, steps, B, units) are dropout decisions. `views` is None
    for data without augmented views, `dropped` where no head drops modalities.
    """

    rows: Tensor
    keep: Tensor
    views: Tensor | None
    dropped: Tensor | None

    def steps(self) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None, Tensor]]:
        """Yield `rows`, `views`, `dropped` and `keep` of each step."""
        for number in range(self.rows.shape[1]):
            views, dropped = (x[:, number] if x is not None else None for x in (self.views, self.dropped))
            yield self.rows[:, number], views, dropped, self.keep[:, number]


class Draws:
    """The random draws of one head, epoch by epoch: order of samples, dropout, views and lost modalities.

    Batches are cut from an endless sequence of permutations of the training rows. So every batch is full, each sample
    is seen equally often, and batch normalisation never meets a batch of one. A batch larger than the training set
    takes rows repeatedly, so that folds of different sizes fit into one stack.
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
        """(..., units) bool, True with the probability 1 - dropout, rounded to 16 bits."""
        numbers = np.frombuffer(self.random.bytes(2 * int(np.prod(shape)) * self.units), np.uint16)
        return (numbers >= round(self.settings.dropout * STEPS_OF_16_BITS)).reshape(*shape, self.units)

    def views(self, shape: tuple[int, ...], views: int) -> np.ndarray:
        """(...) view numbers: 0 for the plain picture, 1 to `views` for its augmented views."""
        return self.random.integers(0, views + 1, shape)

    def dropped(self, shape: tuple[int, ...], modalities: int) -> np.ndarray:
        """(...) indices of the modality that a sample loses, -1 for none."""
        if not self.settings.modality_dropout:  # a head without this dropout draws no numbers, also in a mixed stack
            return np.full(shape, -1)
        lost = self.random.random(shape) < self.settings.modality_dropout
        return np.where(lost, self.random.integers(0, modalities, shape), -1)


def draw_pieces(draws: Sequence[Draws], steps: int, views: int, modalities: int, device: str) -> Iterator[Epoch]:
    """Yield the next epoch of each head in pieces, whose length does not depend on the number of heads."""
    most = max(1, DECISIONS // max(draws[0].settings.batch_size * draws[0].units, 1))
    for start in range(0, steps, most):
        yield draw_epoch(draws, min(most, steps - start), views, modalities, device)


def draw_epoch(draws: Sequence[Draws], steps: int, views: int, modalities: int, device: str) -> Epoch:
    """Draw the next `steps` steps of each head."""
    rows = np.stack([head.order(steps) for head in draws])
    shape = rows.shape[1:]
    keep = np.empty((*rows.shape, draws[0].units), bool)

    def fill(number: int) -> None:
        keep[number] = draws[number].keep(shape)

    if device == "cpu":
        list(map(fill, range(len(draws))))
    else:  # a GPU would wait for the decisions of hundreds of heads, of which each has a generator
        with ThreadPoolExecutor(cpu_count()) as threads:
            list(threads.map(fill, range(len(draws))))
    drops = modalities > 1 and any(head.settings.modality_dropout for head in draws)
    return Epoch(
        torch.from_numpy(rows).to(device),
        torch.from_numpy(keep).to(device),
        _together([head.views(shape, views) for head in draws], device) if views else None,
        _together([head.dropped(shape, modalities) for head in draws], device) if drops else None,
    )


def _together(arrays: Sequence[np.ndarray], device: str) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(device)


def class_weights(targets: Targets, policy: str) -> np.ndarray:
    """(C,) weights of the classes in the loss, with mean 1 except for frequencies of multi-label targets.

    The `policy` is `inverse` frequency, its square root (`sqrt`), the inverse `effective` number of samples (Cui et
    al., CVPR 2019), or `none`. A weight of multi-label targets multiplies the loss of the samples that have the class.
    The weight of numbers is 1 by their variance, so that the loss has no unit.
    """
    if targets.numeric:
        return 1 / number_scale(targets)[1] ** 2
    present = targets.matrix.sum(0)
    counts = np.maximum(present, 1)
    if policy == "effective":
        weights = (1 - EFFECTIVE_BETA) / (1 - EFFECTIVE_BETA**counts)
    else:
        base = np.maximum(len(targets) - present, 1) if targets.multilabel else len(targets)
        weights = (base / counts) ** {"none": 0.0, "sqrt": 0.5, "inverse": 1.0}[policy]
    return weights if targets.multilabel and policy != "effective" else weights / weights.mean()


def number_scale(targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """(1,) mean and (1,) standard deviation of numbers, in whose units heads learn them; 1 where all are equal."""
    spread = targets.matrix.std(0)
    return targets.prior, np.where(spread > 0, spread, 1.0)


class StackedLoss:
    """The losses of K heads: (K, B, C) logits and (K, B, C) targets -> (K,) weighted means over each head's batch.

    Equal to torch's `cross_entropy(weight=..., label_smoothing=...)` of each head; `focal` multiplies by (1 - p)^gamma
    (Lin et al., ICCV 2017); multi-label targets take the binary form. With the `scales` of numbers, a mean and a
    standard deviation (1,) a head, logits are in these units, and the loss is the squared error.
    """

    def __init__(
        self,
        settings: Sequence[HeadSettings],
        weights: Sequence[np.ndarray],
        multilabel: bool,
        device: str,
        scales: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    ) -> None:
        self.scales = torch.tensor(np.array(scales), dtype=torch.float32, device=device)
        self.weights = torch.tensor(np.stack(weights), dtype=torch.float32, device=device)[:, None]
        self.smoothing = _column([values.label_smoothing for values in settings], device)
        self.gamma = _column([values.focal_gamma for values in settings], device)
        self.focal = settings[0].loss == "focal"
        self.multilabel = multilabel

    def keep(self, heads: Tensor) -> None:
        """Continue with these heads of the stack."""
        self.weights, self.smoothing, self.gamma = (x[heads] for x in (self.weights, self.smoothing, self.gamma))
        self.scales = self.scales[heads] if len(self.scales) else self.scales

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        if len(self.scales):
            mean, spread = self.scales[:, 0, :, None], self.scales[:, 1, :, None]
            return (logits - (targets - mean) / spread).square().mean((1, 2))
        return self._binary(logits, targets) if self.multilabel else self._softmax(logits, targets)

    def _softmax(self, logits: Tensor, targets: Tensor) -> Tensor:
        log_p = F.log_softmax(logits, -1)
        if self.focal:
            log_p = log_p * (1 - log_p.exp()).clamp_min(1e-8) ** self.gamma
        smooth = targets * (1 - self.smoothing) + self.smoothing / logits.shape[-1]
        return -(log_p * smooth * self.weights).sum((1, 2)) / (targets * self.weights).sum((1, 2))

    def _binary(self, logits: Tensor, targets: Tensor) -> Tensor:
        smooth = targets * (1 - self.smoothing) + self.smoothing / 2
        present, absent = F.logsigmoid(logits), F.logsigmoid(-logits)
        if self.focal:
            p = logits.sigmoid()
            present = present * (1 - p).clamp_min(1e-8) ** self.gamma
            absent = absent * p.clamp_min(1e-8) ** self.gamma
        return -(smooth * present * self.weights + (1 - smooth) * absent).mean((1, 2))


def validation_loss(logits: np.ndarray, matrix: np.ndarray, weights: np.ndarray, multilabel: bool) -> float:
    """Weighted cross-entropy of (n, C) logits and (n, C) bool labels, in nats, or squared error of numbers; 0 without
    rows."""
    if not len(matrix):
        return 0.0
    if matrix.dtype != bool:
        return float((weights * (logits - matrix) ** 2).mean())
    if multilabel:
        present, absent = np.logaddexp(0, -logits) * weights, np.logaddexp(0, logits)
        return float(np.where(matrix, present, absent).mean())
    with np.errstate(invalid="ignore"):  # the loss of a diverged head is NaN
        nats = np.logaddexp.reduce(logits, axis=-1) - (logits * matrix).sum(-1)
    row_weights = (matrix * weights).sum(-1)
    return float((nats * row_weights).sum() / row_weights.sum())


def _column(values: Sequence[float], device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


@dataclass
class Stopper:
    """Early stopping on a validation score, higher is better, and torch's ReduceLROnPlateau(factor 0.5, patience 1).

    `scale` multiplies the learning rate of the next epoch. A head without validation rows takes the scale of each
    epoch from `replay`.
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
    """torch's AdamW (Loshchilov and Hutter, ICLR 2019) for parameters with a leading axis of K heads.

    `rates` are (K,) learning rates for each parameter, `decay` is (K,). On a CPU, torch's fused kernel steps one head
    after the other, so that a head stays in the processor's cache. On other devices, each operation covers all heads,
    with rates on the device of the parameters, so that a step waits for no copy.
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
        """Continue with these heads of the stack, of which `parameters` are the parameters."""
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
        """Calls of the kernel, (head, indices of parameters, rate, decay).

        The head is None in a call for all heads, which is made where their rates and decays are equal.
        """
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
