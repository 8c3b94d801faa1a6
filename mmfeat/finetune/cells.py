"""Cells, the trainings of stage 2: one for each fold and seed, and a final one for each seed on all samples.

CELLS/fold0-1.safetensors              logits and curves of a finished cell
CELLS/fold0-1.checkpoint.safetensors   the checkpoint of a cell that is being trained
"""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfeat.evaluation.decisions import plain_choice
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.evaluation.splits import Fold
from mmfeat.finetune.model import TunableModel
from mmfeat.finetune.prepare import Experiment
from mmfeat.finetune.processes import Execution
from mmfeat.finetune.settings import EARLY
from mmfeat.finetune.stage_one import StageOne
from mmfeat.finetune.training import Training, TrainingSetup, load, save, tensors_under
from mmfeat.finetune.unfreeze import FIXED_FACTOR
from mmfeat.heads.registry import HeadSettings
from mmfeat.heads.stack import epoch_steps, one_torch_thread
from mmfeat.samples.labels import Targets
from mmfeat.system.wording import Advance

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)  # WiSE-FT (Wortsman et al., CVPR 2022): shares of stage 2 in the weights
TRAIN_ROWS = 1024  # most training rows that the score on training rows is measured on
STAGE_2 = "stage-2"  # the name of the head on the leaderboard, whose cells the problem counts


@dataclass(frozen=True)
class Cell:
    """A training with its name. A final cell has no test rows; its result holds the weights."""

    name: str
    setup: TrainingSetup

    @property
    def is_final(self) -> bool:
        return not len(self.setup.rows.test)

    @property
    def steps(self) -> int:
        return self.setup.finetune.epochs * epoch_steps(len(self.setup.rows.train), self.setup.settings.batch_size)


@dataclass(frozen=True)
class CellResult:
    """The result of a cell: logits (A, n, C) of validation and test rows and macro-F1 (A,) on training rows at each
    of A ALPHAS, and the curves. A final cell has its `state`, and logits of no rows."""

    validation: np.ndarray
    test: np.ndarray
    history: list[dict[str, float]]
    best_epoch: int
    train_scores: list[float]
    seconds: float
    state: Mapping[str, Tensor]


def fold_cells(experiment: Experiment, first: StageOne) -> list[Cell]:
    """The cells of all folds and seeds, fold after fold, in the order of `Problem.cells`."""
    return [
        _cell(experiment, rows, experiment.chosen.folds[fold], (fold, repeat), start)
        for start, (fold, repeat, rows) in zip(first.cells, experiment.problem.cells(STAGE_2), strict=True)
    ]


def final_cells(experiment: Experiment, first: StageOne, replay: tuple[float, ...]) -> list[Cell]:
    """A cell for each seed on all labelled samples, for as many epochs and with the learning rates as in `replay`."""
    problem, nothing = experiment.problem, np.empty(0, np.int64)
    rows = Fold("final", np.arange(len(problem.targets)), nothing, nothing)
    return [
        _cell(experiment, rows, experiment.chosen.best, (len(problem.splits), seed), start, replay)
        for seed, start in enumerate(first.finals)
    ]


def _cell(
    experiment: Experiment, rows: Fold, settings: HeadSettings, numbers: tuple[int, int], start: Mapping[str, Tensor],
    replay: tuple[float, ...] | None = None,
) -> Cell:  # fmt: skip
    """The cell with `numbers` (fold, seed). It starts with the head of stage 1, but early fusion with a random head."""
    finetune, entropy = experiment.settings, (experiment.problem.seed, *numbers, 2)
    head = None if experiment.fusion == EARLY else start
    setup = TrainingSetup(finetune.of_head(settings), finetune, rows, entropy, head, replay)
    return Cell(f"{rows.name}-{numbers[1] + 1}", setup)


class CellRunner:
    """Trains cells side by side, one model a worker; cells that an earlier call finished are only read."""

    def __init__(self, experiment: Experiment, execution: Execution, folder: Path) -> None:
        self.experiment, self.execution, self.folder = experiment, execution, folder
        self.targets: Targets = experiment.problem.targets
        self.models: queue.SimpleQueue[TunableModel] = queue.SimpleQueue()
        self.workers, self.stopped = execution.trainings, False
        self.first: TunableModel | None = None

    def run(self, cells: Sequence[Cell], advance: Advance) -> list[CellResult]:
        """Train the cells and return their results in the same order.

        A cell uses one torch thread, so that sums do not depend on the number of workers.
        """
        missing = [cell for cell in cells if not self._path(cell).exists()]
        advance(sum(cell.steps for cell in cells) - sum(cell.steps for cell in missing))
        while self.models.qsize() < min(self.workers, len(missing)):
            self._add_model()
        pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        with one_torch_thread(), pool:
            futures = [pool.submit(self._train, cell, advance) for cell in missing]
            try:
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                self.stopped = True
                pool.shutdown(cancel_futures=True)
                raise
        self.execution.team.wait()
        return [self._read(cell) for cell in cells]

    def spare_model(self) -> TunableModel:
        """A model that no cell is trained in, whose weights the caller may replace."""
        return self.models.get() if self.models.qsize() else self.experiment.model()

    def _add_model(self) -> None:
        model = self.experiment.model()
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

        def report(steps: int, note: str = "") -> None:
            nonlocal left
            if self.stopped:
                raise KeyboardInterrupt
            left -= steps
            advance(steps, note)

        checkpoint = self.folder / f"{cell.name}.checkpoint.safetensors"
        training = Training(model, cell.setup, self.targets, self.execution, checkpoint)
        best = training.run(report)
        tensors, scores = {}, [0.0] * len(ALPHAS)
        if cell.is_final:
            tensors = {f"state.{name}": value for name, value in best.items()}
        else:
            validation, test, scores = _evaluate(model, training.start, best, cell, self.targets)
            tensors = {"validation": torch.from_numpy(validation), "test": torch.from_numpy(test)}
        record = {
            "history": training.state.history,
            "best_epoch": training.stopper.best_epoch,
            "train_scores": scores,
            "seconds": training.seconds,
        }
        if self.execution.team.leads:
            save(self._path(cell), tensors, record)
            checkpoint.unlink(missing_ok=True)
        advance(left)  # steps that early stopping or an earlier call spared

    def _path(self, cell: Cell) -> Path:
        return self.folder / f"{cell.name}.safetensors"

    def _read(self, cell: Cell) -> CellResult:
        finished = load(self._path(cell))
        assert finished is not None  # this call or an earlier one has trained the cell
        tensors, record = finished
        empty = torch.zeros(len(ALPHAS), 0, len(self.targets.classes))
        return CellResult(
            validation=tensors.get("validation", empty).numpy(),
            test=tensors.get("test", empty).numpy(),
            state=tensors_under("state.", tensors),
            **record,
        )


def blended(first: Mapping[str, Tensor], second: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Interpolate each tensor: (1 - alpha) * first + alpha * second. Of an adapter B A only the factor B, which is 0 in
    stage 1, is interpolated, so the product is alpha * B A."""
    if alpha == 1:
        return dict(second)
    return {
        name: value if FIXED_FACTOR in name else torch.lerp(first[name].to(value), value, alpha)
        for name, value in second.items()
    }


def _evaluate(
    model: TunableModel, start: Mapping[str, Tensor], best: Mapping[str, Tensor], cell: Cell, targets: Targets
) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Logits (A, n, C) of validation and test rows and macro-F1 (A,) of at most TRAIN_ROWS training rows, at A ALPHAS.

    Without a stage 1 there is nothing to interpolate, and the results are the same at every alpha.
    """
    rows = cell.setup.rows
    train = rows.train[np.linspace(0, len(rows.train) - 1, min(TRAIN_ROWS, len(rows.train))).astype(np.int64)]
    validation, test, scores = [], [], []
    for alpha in ALPHAS if cell.setup.start is not None else ALPHAS[-1:]:
        model.load(blended(start, best, alpha))
        validation.append(model.predict(rows.validation).astype(np.float32))
        test.append(model.predict(rows.test).astype(np.float32))
        choice = plain_choice(model.predict(train), targets.multilabel)
        scores.append(float(macro_f1(targets.matrix[train], choice)))
    times = len(ALPHAS) // len(test)
    return np.stack(validation * times), np.stack(test * times), scores * times
