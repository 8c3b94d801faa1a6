"""A fusion module behind the head interface: training with early stopping, prediction, files."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfeat.features import Features
from mmfeat.files import write_atomic
from mmfeat.heads.inputs import FusionModule
from mmfeat.heads.settings import HeadSettings, class_weights
from mmfeat.metrics import macro_f1

PREDICT_ROWS = 8192
ModuleType = Callable[[list[int], int, float], FusionModule]  # (widths, classes, dropout)


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread: batches are small, a second thread mostly waits, and sums come out alike on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class TorchHead:
    """One fusion module. `module_type(widths, classes, dropout)` builds it."""

    suffix = ".safetensors"

    def __init__(self, module_type: ModuleType, settings: HeadSettings, classes: int, device: str = "cpu") -> None:
        self.module_type, self.settings, self.classes, self.device = module_type, settings, classes, device
        self.module: FusionModule | None = None
        self.history: list[dict[str, float]] = []

    def fit(self, train: Features, labels: np.ndarray, validation: Features, validation_labels: np.ndarray) -> None:
        """Train until macro-F1 on `validation` stops rising; keeps the weights of the best epoch."""
        with one_thread(), torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            self.module = self._build([block.vectors.shape[1] for block in train.blocks])
            inputs = self._tensors(train)
            self.module.standardise_on(*inputs)
            self._train(inputs, torch.as_tensor(labels, device=self.device), validation, validation_labels)

    def predict_proba(self, features: Features) -> np.ndarray:
        """(N, C) probabilities."""
        assert self.module is not None, "fit or load the head first"
        self.module.eval()
        vectors, masks = self._tensors(features)
        with one_thread(), torch.inference_mode():
            pieces = [
                self.module(
                    [x[start : start + PREDICT_ROWS] for x in vectors],
                    [m[start : start + PREDICT_ROWS] for m in masks],
                )
                for start in range(0, len(features), PREDICT_ROWS)
            ]
            return torch.cat(pieces).float().cpu().double().softmax(-1).numpy()

    def save(self, path: Path) -> dict[str, Any]:
        """Write the weights to `path` and return what rebuilds the module."""
        from safetensors.torch import save

        assert self.module is not None, "fit the head first"
        write_atomic(path, save({name: value.contiguous() for name, value in self.module.state_dict().items()}))
        return {"widths": self.module.widths, "history": self.history}

    def load(self, path: Path, config: dict[str, Any]) -> None:
        """Rebuild from `config` and load the weights strictly."""
        from safetensors.torch import load_file

        self.module = self._build(config["widths"])
        self.module.load_state_dict(load_file(path, device=self.device))

    def _build(self, widths: list[int]) -> FusionModule:
        return self.module_type(widths, self.classes, self.settings.dropout)

    def _tensors(self, features: Features) -> tuple[list[Tensor], list[Tensor]]:
        """Missing rows become zeros here, so that no NaN meets a gradient; their mask stays."""
        vectors = [np.nan_to_num(block.vectors.astype(np.float32)) for block in features.blocks]
        return (
            [torch.from_numpy(x).to(self.device) for x in vectors],
            [torch.from_numpy(block.mask).to(self.device) for block in features.blocks],
        )

    def _train(
        self,
        inputs: tuple[list[Tensor], list[Tensor]],
        labels: Tensor,
        validation: Features,
        expected: np.ndarray,
    ) -> None:
        assert self.module is not None
        settings = self.settings
        weights = class_weights(labels.cpu().numpy(), self.classes, settings.class_weights)
        loss_weights = torch.tensor(weights, dtype=torch.float32, device=self.device)
        optimiser = torch.optim.AdamW(
            self.module.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, "max", factor=0.5, patience=1)
        best, best_state, waited = -1.0, copy.deepcopy(self.module.state_dict()), 0
        self.history = []
        for epoch in range(settings.epochs):
            loss = self._epoch(inputs, labels, loss_weights, optimiser)
            predicted = self.predict_proba(validation).argmax(-1)
            score = macro_f1(expected, predicted, self.classes)
            schedule.step(score)
            self.history.append({"epoch": epoch, "loss": loss, "validation_macro_f1": score})
            if score > best + settings.min_delta:
                best, best_state, waited = score, copy.deepcopy(self.module.state_dict()), 0
            elif (waited := waited + 1) >= settings.patience:
                break
        self.module.load_state_dict(best_state)

    def _epoch(
        self,
        inputs: tuple[list[Tensor], list[Tensor]],
        labels: Tensor,
        loss_weights: Tensor,
        optimiser: torch.optim.Optimizer,
    ) -> float:
        """One pass in random order; returns the mean loss."""
        assert self.module is not None
        self.module.train()
        vectors, masks = inputs
        batches = [rows for rows in torch.randperm(len(labels)).split(self.settings.batch_size) if len(rows) > 1]
        total = 0.0
        for rows in batches:
            logits = self.module([x[rows] for x in vectors], [m[rows] for m in masks])
            loss = F.cross_entropy(logits, labels[rows], weight=loss_weights)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            total += loss.item()
        return total / max(len(batches), 1)
