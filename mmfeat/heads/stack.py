"""Training many heads of one architecture as one stacked model, and predicting with them.

The heads may differ in fold, seed and settings. Each head has its own rows, order, dropout, losses, learning rate and
early stopping; a finished head leaves the stack. A stacked head equals the same head trained alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfeat.errors import HeadError
from mmfeat.evaluation.metrics import headline_name, plain_headline
from mmfeat.heads.data import HeadData
from mmfeat.heads.layers import Fusion, Shape
from mmfeat.heads.registry import ZERO_SHOT, HeadSettings
from mmfeat.heads.training import (
    Draws,
    StackedAdamW,
    StackedLoss,
    Stopper,
    class_weights,
    draw_pieces,
    number_scale,
    validation_loss,
)
from mmfeat.samples.labels import Targets
from mmfeat.system.wording import Advance, ignore

PREDICTED_VALUES = 2**24  # most values of a layer in a forward pass without gradients
WIDEST = 1024  # width of a layer behind narrower inputs
FEWEST_STEPS = 16  # fewest steps of an epoch: small data are passed several times
TOKEN_ROWS = 64  # most samples in a forward pass without gradients where heads read tokens
FusionType = Callable[[int, Shape, int], Fusion]  # (heads, shape, classes) -> a stack of heads


@dataclass(frozen=True)
class Member:
    """A member of a stack: one head to train on the rows `train`, with `steps` batches in an epoch.

    `entropy` seeds all random draws. Vectors are standardised with statistics of the rows `fold`, by default `train`.
    Without validation rows, the head trains for as many epochs as `replay` has scales of the learning rate.
    A baseline trains on `fold`, and chooses its setting on `parts` of it, each left out in turn; samples with the same
    number in `groups` (N,) are near duplicates.
    """

    settings: HeadSettings
    train: np.ndarray
    validation: np.ndarray
    entropy: tuple[int, ...]
    steps: int
    replay: tuple[float, ...] | None = None
    fold: np.ndarray | None = None
    parts: tuple[np.ndarray, ...] = ()
    groups: np.ndarray | None = None

    @property
    def standard(self) -> np.ndarray:
        """The rows whose statistics standardise the vectors."""
        return self.train if self.fold is None else self.fold


@dataclass(frozen=True)
class Trained:
    """One trained head: its tensors on the CPU, a history with one record an epoch, and the (m, C) logits of its
    validation rows, None without any."""

    tensors: dict[str, Tensor]
    history: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = -1
    validation: np.ndarray | None = None


def epoch_steps(rows: int, batch_size: int) -> int:
    """The number of batches in an epoch: those of one pass over all rows, but at least FEWEST_STEPS."""
    return max(FEWEST_STEPS, -(-rows // min(batch_size, rows)))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch on one CPU thread: small batches gain little from a second one, and sums are equal on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_stack(
    fusion: FusionType,
    data: HeadData,
    targets: Targets,
    members: Sequence[Member],
    advance: Advance = ignore,
    products: str = "float32",
) -> list[Trained]:
    """Train all members together; `advance` receives the number of heads that an epoch finished.

    `products` is the arithmetic of the linear layers, float32 or bfloat16; all else is float32.

    All members have the same `steps` and the same settings of `registry.SHARED`. Raises `HeadError` where a head
    diverges.
    """
    stack = _Stack(fusion, data, targets, members, products)
    with one_torch_thread():
        while stack.running:
            finished = stack.epoch()
            advance(finished)
    return [trained for trained in stack.trained if trained is not None]


def predict_stack(
    fusion: FusionType, classes: int, data: HeadData, heads: Sequence[dict[str, Tensor]], rows: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """(n, C) float64 logits of each head on the rows of the head, the mean over the plain and the augmented views."""
    with one_torch_thread():
        return predict_module(stack_of(fusion, classes, data, heads), data, rows)


def stack_of(fusion: FusionType, classes: int, data: HeadData, heads: Sequence[Mapping[str, Any]]) -> Fusion:
    """Trained heads, given as tensors or arrays by name, as one module on the device of the data."""
    module = fusion(len(heads), data.shape, classes)
    stacked = {name: np.stack([np.asarray(head[name]) for head in heads]) for name in heads[0]}
    module.load_state_dict({name: torch.from_numpy(values) for name, values in stacked.items()})
    return module.requires_grad_(False).eval().to(data.device)


def predict_module(module: Fusion, data: HeadData, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(n, C) float64 logits as from `predict_stack`, for heads that are one module already."""
    padded = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.int64)
    if not padded.numel():
        return [np.zeros((0, 0)) for _ in rows]
    for head_rows, line in zip(rows, padded, strict=True):
        line[: len(head_rows)] = torch.from_numpy(head_rows)
    order = data.by_length(padded.to(data.device))
    padded = padded.to(data.device).gather(1, order)
    most = PREDICTED_VALUES if data.device == "cpu" else 16 * PREDICTED_VALUES
    size = max(1, most // (len(rows) * max(data.width, WIDEST)))
    size = min(size, TOKEN_ROWS) if data.attend else size
    module.eval()
    pieces = []
    with torch.inference_mode():
        for piece in padded.split(size, 1):
            views = [torch.full_like(piece, view) if view else None for view in range(data.views + 1)]
            logits = [module(data.batch(piece, view)).cpu() for view in views]  # Apple's GPU has no float64
            pieces.append(torch.stack(logits).double().mean(0))
    found = torch.cat(pieces, 1)
    places = order.cpu().unsqueeze(-1).expand_as(found)
    together = torch.zeros_like(found).scatter_(1, places, found).numpy()
    return [together[head, : len(head_rows)] for head, head_rows in enumerate(rows)]


class _Stack:
    """The training of one stack. `running` holds the member numbers of the heads that are still in the module."""

    def __init__(
        self,
        fusion: FusionType,
        data: HeadData,
        targets: Targets,
        members: Sequence[Member],
        products: str = "float32",
    ) -> None:
        self.targets, self.members = targets, members
        self.running = list(range(len(members)))
        self.trained: list[Trained | None] = [None] * len(members)
        self.histories: list[list[dict[str, float]]] = [[] for _ in members]
        self.seen: list[np.ndarray | None] = [None] * len(members)  # logits of the validation rows at the best epoch
        self.stoppers = [Stopper(member.settings, member.replay) for member in members]
        self.module = fusion(len(members), data.shape, len(targets.classes))
        self.data = data if self.module.unit else data.prepared([member.standard for member in members])
        for head, member in enumerate(members):
            seed = int(np.random.SeedSequence(member.entropy).generate_state(1, np.uint64)[0] >> 1)
            self.module.reset_head(head, torch.Generator().manual_seed(seed))
            self.module.standardise(head, data.statistics(member.standard, self.module.unit))
            if member.settings.init == ZERO_SHOT:
                self.module.start_from(head, _class_vectors(data, targets))
        self.module.to(data.device)
        self.best = {name: value.clone() for name, value in self.module.state_dict().items()}  # of each member
        if products == "bfloat16":
            self.module.round_products()
        self.draws = [Draws(member.entropy, member.train, member.settings, self.module.units) for member in members]
        self.labels = torch.from_numpy(targets.matrix.astype(np.float32)).to(data.device)
        settings = [member.settings for member in members]
        self.weights = [class_weights(targets.take(m.train), m.settings.class_weights) for m in members]
        self.scales = [number_scale(targets.take(m.train)) for m in members] if targets.numeric else []
        self.loss = StackedLoss(settings, self.weights, targets.multilabel, data.device, self.scales)
        self.kept = torch.tensor([1 / (1 - values.dropout) for values in settings], device=data.device)[:, None, None]
        self.optimiser = self._optimiser(settings)

    def _optimiser(self, settings: Sequence[HeadSettings]) -> StackedAdamW:
        slow = self.module.attention_parameters()
        rates = {
            name: torch.tensor([getattr(values, name) for values in settings], dtype=torch.float64)
            for name in ("learning_rate", "attention_learning_rate")
        }
        return StackedAdamW(
            list(self.module.parameters()),
            [
                rates["attention_learning_rate" if name in slow else "learning_rate"]
                for name, _ in self.module.named_parameters()
            ],
            torch.tensor([values.weight_decay for values in settings], dtype=torch.float64),
        )

    def epoch(self) -> int:
        """Train all running heads for an epoch, drop finished heads from the stack and return the number of these."""
        losses = self._train()
        predicted = self._predict_validation()
        scores = [self._scores(number, logits) for number, logits in zip(self.running, predicted, strict=True)]
        better = [index for index in range(len(self.running)) if self._record(index, losses[index], scores[index])]
        if better:
            numbers, indices = self._rows([self.running[index] for index in better]), self._rows(better)
            for name, value in self.module.state_dict().items():
                self.best[name][numbers] = value[indices]
            for index in better:
                self.seen[self.running[index]] = predicted[index]
        done = [index for index, number in enumerate(self.running) if self.stoppers[number].done]
        if done:
            self._finish([self.running[index] for index in done])
            self._keep([index for index in range(len(self.running)) if index not in done])
        return len(done)

    def _train(self) -> list[float]:
        self.module.train()
        steps = self.members[0].steps
        draws = [self.draws[number] for number in self.running]
        pieces = draw_pieces(draws, steps, self.data.views, len(self.data.sources), self.data.device)
        scale = self.optimiser.decay.new_tensor([self.stoppers[number].scale for number in self.running])
        parameters = list(self.module.parameters())
        total = torch.zeros(len(self.running), device=self.data.device)
        for rows, views, dropped, keep in (step for piece in pieces for step in piece.steps()):
            rows = rows.gather(1, self.data.by_length(rows))
            logits = self.module(self.data.batch(rows, views, dropped, keep * self.kept))
            losses = self.loss(logits, self.labels[rows])
            gradients = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
            self.optimiser.step(gradients, scale)
            total += losses.detach()
        return (total / steps).tolist()

    def _predict_validation(self) -> Sequence[np.ndarray | None]:
        """(m, C) logits of the validation rows of each running head, None where no head has any."""
        rows = [self.members[number].validation for number in self.running]
        if not any(map(len, rows)):
            return [None] * len(rows)
        predicted = predict_module(self.module, self.data, rows)
        if not self.scales:
            return predicted
        scales = [self.scales[number] for number in self.running]
        return [logits * spread + mean for logits, (mean, spread) in zip(predicted, scales, strict=True)]

    def _scores(self, number: int, logits: np.ndarray | None) -> dict[str, float]:
        """Score and weighted loss of a member on its validation rows."""
        if logits is None:
            return {}
        return validation_scores(logits, self.targets.take(self.members[number].validation), self.weights[number])

    def _record(self, index: int, loss: float, scores: dict[str, float]) -> bool:
        """Record an epoch of a running head; returns whether its weights are the best so far."""
        number = self.running[index]
        stopper, history, settings = self.stoppers[number], self.histories[number], self.members[number].settings
        if not np.isfinite([loss, *scores.values()]).all():  # where only the last step diverged, the scores show it
            raise HeadError(f"a head diverged; lower --learning-rate (now {settings.learning_rate:g})")
        history.append({"epoch": len(history), "loss": loss, **scores, "scale": stopper.scale})
        by_loss = settings.monitor == "loss"
        name = f"validation_{headline_name(self.targets)}"
        score = -scores.get("validation_loss", 0.0) if by_loss else scores.get(name, 0.0)
        return stopper.update(len(history) - 1, score)

    def _finish(self, numbers: list[int]) -> None:
        """Take the best weights of these members from the device, all in one copy a tensor."""
        rows = self._rows(numbers)
        best = {name: value[rows].cpu() for name, value in self.best.items()}
        for place, number in enumerate(numbers):
            tensors = {name: value[place] for name, value in best.items()}
            if self.scales:
                in_units(tensors, *self.scales[number])
            self.trained[number] = Trained(
                tensors, self.histories[number], self.stoppers[number].best_epoch, self.seen[number]
            )

    def _rows(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.data.device)

    def _keep(self, indices: list[int]) -> None:
        self.running = [self.running[index] for index in indices]
        heads = self._rows(indices)
        self.module.keep_heads(heads)
        self.data.keep_heads(heads)
        self.optimiser.keep(heads, list(self.module.parameters()))
        self.loss.keep(heads)
        self.kept = self.kept[heads]


def _class_vectors(data: HeadData, targets: Targets) -> dict[int, Tensor]:
    """The vectors of the class names, by first column; less their mean where each class has a sigmoid of its own, since
    cosines of one sample with all classes are nearly equal."""
    classes = {start: torch.from_numpy(vectors) for start, vectors in data.classes.items()}
    if not targets.multilabel:
        return classes
    return {start: vectors - vectors.mean(0) for start, vectors in classes.items()}


def in_units(tensors: dict[str, Tensor], mean: np.ndarray, spread: np.ndarray) -> None:
    """Have the last layer of a head, which learned numbers with the mean 0 and the deviation 1, give those of the
    labels: the tensors hold mean and deviation."""
    last = "output" if "output.weight" in tensors else "classifier.output"
    factor, shift = float(spread[0]), float(mean[0])
    tensors[f"{last}.weight"] = tensors[f"{last}.weight"] * factor
    tensors[f"{last}.bias"] = tensors[f"{last}.bias"] * factor + shift


def validation_scores(logits: np.ndarray, targets: Targets, weights: np.ndarray) -> dict[str, float]:
    """Weighted loss, and score of plain choices, of (n, C) logits."""
    return {
        "validation_loss": validation_loss(logits, targets.matrix, weights, targets.multilabel),
        f"validation_{headline_name(targets)}": plain_headline(targets, logits),
    }
