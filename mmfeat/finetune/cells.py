"""Cells, the trainings of a fine-tuning: one for each fold and seed, and a final one for each seed on all samples.

CELLS/fold0-1.safetensors              logits and curves of a finished cell
CELLS/fold0-1.checkpoint.safetensors   the checkpoint of a cell that is being trained
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfeat.evaluation.metrics import macro_f1
from mmfeat.finetune.model import TunableModel
from mmfeat.finetune.processes import Team
from mmfeat.finetune.training import Training, TrainingSetup, load, save
from mmfeat.finetune.unfreeze import FIXED_FACTOR
from mmfeat.heads.stack import epoch_steps, plain_choice
from mmfeat.samples.labels import Targets

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # WiSE-FT (Wortsman et al., CVPR 2022): shares of stage 2 in the weights
TRAIN_ROWS = 1024  # the score on training rows is measured on at most so many
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Cell:
    """A training with its name and test rows; a final cell has no test rows, and its weights are kept."""

    name: str
    setup: TrainingSetup
    test: np.ndarray

    @property
    def is_final(self) -> bool:
        return not len(self.test)

    @property
    def steps(self) -> int:
        """The number of steps in all epochs."""
        return self.setup.finetune.epochs * epoch_steps(len(self.setup.train), self.setup.settings.batch_size)


@dataclass(frozen=True)
class CellResult:
    """The result of a cell: logits (A, n, C) of validation and test rows and macro-F1 on training rows for each of A
    ALPHAS, and the curves; a final cell has its `state` in place of logits."""

    validation: np.ndarray
    test: np.ndarray
    history: list[dict[str, float]]
    best_epoch: int
    train_scores: list[float]
    seconds: float
    state: Mapping[str, Tensor]


class CellRunner:
    """Trains cells side by side, one model a worker; cells that an earlier call finished are only read."""

    def __init__(
        self, make: Callable[[], TunableModel], workers: int, targets: Targets, team: Team, folder: Path, every: float
    ):
        self.targets, self.team, self.folder, self.every = targets, team, folder, every
        self.models: queue.SimpleQueue[TunableModel] = queue.SimpleQueue()
        self.make, self.workers, self.stopped = make, workers, False
        self.first: TunableModel | None = None

    def run(self, cells: Sequence[Cell], advance: Advance) -> list[CellResult]:
        """Train the cells and return their results in the same order.

        A cell uses one torch thread, so that sums do not depend on the number of workers.
        """
        missing = [cell for cell in cells if not self._path(cell).exists()]
        advance(sum(cell.steps for cell in cells) - sum(cell.steps for cell in missing))
        while self.models.qsize() < min(self.workers, len(missing)):
            self._add_model()
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                futures = [pool.submit(self._train, cell, advance) for cell in missing]
                try:
                    for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                        future.result()
                except BaseException:
                    self.stopped = True
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            torch.set_num_threads(before)
        self.team.wait()
        return [self._read(cell) for cell in cells]

    def _add_model(self) -> None:
        model = self.make()
        self.first = self.first or model
        model.share_frozen(self.first)
        self.models.put(model)

    def _train(self, cell: Cell, advance: Advance) -> None:
        model = self.models.get()
        try:
            self._learn(model, cell, advance)
        finally:
            self.models.put(model)

    def _learn(self, model: TunableModel, cell: Cell, advance: Advance) -> None:
        left = cell.steps

        def report(steps: int) -> None:
            nonlocal left
            if self.stopped:
                raise KeyboardInterrupt
            left -= steps
            advance(steps)

        checkpoint = self.folder / f"{cell.name}.checkpoint.safetensors"
        training = Training(model, cell.setup, self.targets, self.team, checkpoint, self.every)
        best = training.run(report)
        tensors, scores = {}, [0.0] * len(ALPHAS)
        if cell.is_final:
            tensors = {f"state.{name}": value for name, value in best.items()}
        else:
            validation, test, scores = _judged(model, training.start, best, cell, self.targets)
            tensors = {"validation": torch.from_numpy(validation), "test": torch.from_numpy(test)}
        record = {
            "history": training.at.history,
            "best_epoch": training.stopper.best_epoch,
            "train_scores": scores,
            "seconds": training.seconds,
        }
        if self.team.leads:
            save(self._path(cell), tensors, record)
            checkpoint.unlink(missing_ok=True)
        advance(left)  # the steps that early stopping, or an earlier call, has spared

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.safetensors"

    def _read(self, cell: Cell) -> CellResult:
        finished = load(self._path(cell))
        assert finished is not None  # this call or an earlier one has trained the cell
        tensors, record = finished
        nothing = np.zeros((len(ALPHAS), 0, len(self.targets.classes)))
        return CellResult(
            tensors["validation"].numpy() if "validation" in tensors else nothing,
            tensors["test"].numpy() if "test" in tensors else nothing,
            record["history"],
            record["best_epoch"],
            record["train_scores"],
            record["seconds"],
            {name.removeprefix("state."): value for name, value in tensors.items() if name.startswith("state.")},
        )


def blended(first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Interpolate each tensor: (1 - alpha) * first + alpha * second. The product B A of an adapter is interpolated by
    its factor B alone, which is 0 in stage 1."""
    if alpha == 1:
        return dict(second)
    return {
        name: value if FIXED_FACTOR in name else torch.lerp(first[name].to(value), value, alpha)
        for name, value in second.items()
    }


def _judged(
    model: TunableModel, start: Mapping[str, Tensor], best: Mapping[str, Tensor], cell: Cell, targets: Targets
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Logits (A, n, C) of validation and test rows and macro-F1 of (some) training rows at each of A ALPHAS; without
    a stage 1 there is nothing to interpolate, and the results are the same at every alpha."""
    setup = cell.setup
    some = setup.train[np.linspace(0, len(setup.train) - 1, min(TRAIN_ROWS, len(setup.train))).astype(np.int64)]
    validation, test, scores = [], [], []
    for alpha in ALPHAS if setup.start is not None else ALPHAS[-1:]:
        model.load(blended(start, best, alpha))
        validation.append(model.predict(setup.validation).astype(np.float32))
        test.append(model.predict(cell.test).astype(np.float32))
        chosen = plain_choice(model.predict(some), targets.multilabel)
        scores.append(float(macro_f1(targets.matrix[some], chosen)))
    times = len(ALPHAS) // len(test)
    return np.stack(validation * times), np.stack(test * times), scores * times
