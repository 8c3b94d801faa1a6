"""How heads are trained one after the other: the loop that is usually written, and skorch. Nothing here is mmfeat's."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Batches: TypeAlias = "Iterator[tuple[Tensor, Tensor]]"


@dataclass(frozen=True)
class Recipe:
    """How one head is trained, alike for every way."""

    batch_size: int
    epochs: int
    learning_rate: float
    weight_decay: float
    dropout: float


@dataclass(frozen=True)
class Cell:
    """One head's samples: (n, D) float32 and (n,) class numbers, standardised once with the training statistics."""

    x: Tensor
    y: Tensor
    validation_x: Tensor
    validation_y: Tensor
    seed: int

    @classmethod
    def of(cls, vectors: np.ndarray, numbers: np.ndarray, train: np.ndarray, validation: np.ndarray, seed: int) -> Cell:
        """The cell of some rows of all samples."""
        mean, std = vectors[train].mean(0), vectors[train].std(0)
        x, held = (torch.from_numpy((vectors[rows] - mean) / std) for rows in (train, validation))
        return cls(x, torch.from_numpy(numbers[train]), held, torch.from_numpy(numbers[validation]), seed)

    @property
    def class_weights(self) -> Tensor:
        """(C,) square root of the inverse frequencies, with mean 1."""
        weights = self.y.bincount().float().rsqrt()
        return weights / weights.mean()

    def to(self, device: str) -> Cell:
        """The same on the device."""
        x, y, held, answers = (part.to(device) for part in (self.x, self.y, self.validation_x, self.validation_y))
        return Cell(x, y, held, answers, self.seed)


def make_head(inputs: int, classes: int, dropout: float) -> nn.Sequential:
    """inputs -> 256 -> 64 -> classes."""
    hidden = []
    for wide, narrow in ((inputs, 256), (256, 64)):
        hidden += [nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*hidden, nn.Linear(64, classes))


def train_with_loader(cell: Cell, recipe: Recipe, device: str) -> float:
    """Validation macro-F1 of the best epoch; batches come from a shuffling DataLoader."""
    pinned = device != "cpu"
    dataset = TensorDataset(cell.x, cell.y)
    loader = DataLoader(dataset, batch_size=recipe.batch_size, shuffle=True, pin_memory=pinned)

    def batches() -> Batches:
        for x, y in loader:
            yield x.to(device, non_blocking=pinned), y.to(device, non_blocking=pinned)

    return _train(cell.to(device), recipe, device, batches)


def train_by_index(cell: Cell, recipe: Recipe, device: str) -> float:
    """The same without a loader: all samples lie on the device, a batch is what a permutation picks of them."""
    there = cell.to(device)

    def batches() -> Batches:
        for rows in torch.randperm(len(there.y), device=device).split(recipe.batch_size):
            yield there.x[rows], there.y[rows]

    return _train(there, recipe, device, batches)


def _train(cell: Cell, recipe: Recipe, device: str, batches: Callable[[], Batches]) -> float:
    torch.manual_seed(cell.seed)
    weights = cell.class_weights
    model = make_head(cell.x.shape[1], len(weights), recipe.dropout).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", factor=0.5, patience=1)
    criterion = nn.CrossEntropyLoss(weight=weights)
    best, state = -1.0, None
    for _ in range(recipe.epochs):
        model.train()
        for x, y in batches():
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
        score = _macro_f1(model, cell)
        scheduler.step(score)
        if score > best:
            best, state = score, copy.deepcopy(model.state_dict())
    assert state is not None, "a first epoch is the best so far"
    return best


@torch.no_grad()
def _macro_f1(model: nn.Module, cell: Cell) -> float:
    model.eval()
    predicted = model(cell.validation_x).argmax(1)
    return float(f1_score(cell.validation_y.cpu(), predicted.cpu(), average="macro"))


def train_with_skorch(cell: Cell, recipe: Recipe, device: str) -> float:
    """Validation macro-F1 after the last epoch of skorch's classifier, which has its own defaults otherwise."""
    from skorch import NeuralNetClassifier
    from skorch.dataset import Dataset
    from skorch.helper import predefined_split

    torch.manual_seed(cell.seed)
    weights = cell.class_weights
    settings: dict[str, Any] = {
        "criterion": nn.CrossEntropyLoss,
        "criterion__weight": weights,
        "optimizer": torch.optim.AdamW,
        "optimizer__weight_decay": recipe.weight_decay,
        "lr": recipe.learning_rate,
        "max_epochs": recipe.epochs,
        "batch_size": recipe.batch_size,
        "iterator_train__shuffle": True,
        "train_split": predefined_split(Dataset(cell.validation_x, cell.validation_y)),
        "device": device,
        "verbose": 0,
    }
    net = NeuralNetClassifier(make_head(cell.x.shape[1], len(weights), recipe.dropout), **settings)
    net.fit(cell.x, cell.y)
    return float(f1_score(cell.validation_y, net.predict(cell.validation_x), average="macro"))


def skorch_is_there() -> bool:
    """Whether skorch can be imported."""
    from importlib.util import find_spec

    return find_spec("skorch") is not None
