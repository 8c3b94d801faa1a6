"""Jobs: descriptions of heads to train together, which any thread, process or machine can carry out.

An `Engine` runs jobs side by side; the local one on the cores or the GPU of this machine.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias, cast

import numpy as np

from mmfeat.baselines.basis import Basis, make_basis
from mmfeat.baselines.fit import Baseline, TrainingRows, fit, refit, restore
from mmfeat.cache.features import Features, MappedBlock
from mmfeat.heads.data import HeadData
from mmfeat.heads.layers import Shape
from mmfeat.heads.registry import BASELINES, NEEDS_TOKENS, ZERO_SHOT, load_fusion
from mmfeat.heads.stack import (
    FusionType,
    Member,
    one_torch_thread,
    predict_module,
    predict_stack,
    stack_of,
    train_stack,
)
from mmfeat.heads.tokens import CompactTokens
from mmfeat.heads.training import class_weights
from mmfeat.samples.labels import Targets
from mmfeat.system.hardware import cpu_count, keep_freed_memory
from mmfeat.system.wording import Advance, ignore

CPU_ROWS = 320  # rows in one step of a stack on a CPU; steps of fewer rows spend their time in Python
CPU_STACK = (5, 8)  # fewest and most heads of a stack on a CPU; more heads do not fit into a core's cache
LARGEST_STACK = 256
MEMORY_SHARE = 0.5  # share of the device's free memory that a stack may take
KEPT_BASIS = 2**24  # most numbers in a training matrix whose basis is kept
Predict: TypeAlias = Callable[[HeadData], list[np.ndarray]]
UNTRAINED = ("prior", ZERO_SHOT)  # baselines that see no vector of a training sample
COPIES = 8  # copies of the parameters in training: gradients, two moments, the best epoch, temporary tensors


@dataclass(frozen=True)
class Job:
    """Members to train as one stack, and the sets of rows to predict with each member."""

    head: str
    modality: str
    members: tuple[Member, ...]
    predict: tuple[tuple[np.ndarray, ...], ...]
    setting: Mapping[str, float] | None = None  # the chosen setting of a baseline to fit again
    products: str = "float32"  # arithmetic of linear layers in training
    keep: bool = False  # return `config` and `tensors`, from which the heads can be restored


@dataclass(frozen=True)
class Fitted:
    """A trained member: (n, C) logits for each set of rows, the history, and the values that restore the head."""

    logits: tuple[np.ndarray, ...]
    history: list[dict[str, float]]
    best_epoch: int
    seconds: float
    setting: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, np.ndarray] = field(default_factory=dict)


class Workbench:
    """The features and targets of a sweep, prepared once for each modality.

    `attend` says whether cross-attention reads "tokens" or "pooled" vectors.
    """

    def __init__(self, features: Features, targets: Targets, device: str, attend: str) -> None:
        self.features, self.targets, self.device, self.attend = features, targets, device, attend
        self._data: dict[tuple[str, str], HeadData] = {}
        self._tokens: dict[str, CompactTokens] = {}
        self._bases: dict[bytes, Basis] = {}
        self._locks: defaultdict[object, threading.Lock] = defaultdict(threading.Lock)  # a lock for each key

    def data(self, head: str, modality: str) -> HeadData:
        """The input of heads of this name, with (compact) tokens only for cross-attention."""
        key = (modality, self.attend if head == NEEDS_TOKENS else "")
        with self._locks[key]:
            if key not in self._data:
                data = HeadData(self.features, modality, self.device, key[1])
                self._data[key] = data.compacted(self._compact) if key[1] == "tokens" else data
            return self._data[key]

    def _compact(self, block: MappedBlock) -> CompactTokens:
        with self._locks[block.name]:
            if block.name not in self._tokens:
                self._tokens[block.name] = CompactTokens(block, self.device)
            return self._tokens[block.name]

    def basis(self, job: Job, member: Member, weights: np.ndarray) -> Basis:
        """The basis that all baselines of one fold share; a small basis is kept."""
        data = self.data(job.head, job.modality)
        rows = member.standard
        if len(rows) * data.width > KEPT_BASIS:
            return make_basis(View(data), self.targets, rows, weights)
        key = job.modality.encode() + rows.tobytes() + weights.tobytes()
        with self._locks[key]:
            if key not in self._bases:
                self._bases[key] = make_basis(View(data), self.targets, rows, weights)
            return self._bases[key]


def run_job(job: Job, bench: Workbench, advance: Advance = ignore) -> list[Fitted]:
    """Train all members of the job and predict with them."""
    data = bench.data(job.head, job.modality)
    if job.head in BASELINES:
        return _run_baselines(job, data, bench, advance)
    return _run_stack(job, data, bench.targets, advance)


def stack_size(head: str, data: HeadData, classes: int, batch_size: int) -> int:
    """The number of heads of this kind to train together: few on a CPU, as many as fit on a GPU."""
    if head in BASELINES:
        return 1
    if not data.device.startswith("cuda"):
        return min(max(CPU_ROWS // batch_size, CPU_STACK[0]), CPU_STACK[1])
    import torch

    free = torch.cuda.mem_get_info(data.device)[0]
    return max(1, min(LARGEST_STACK, int(MEMORY_SHARE * free / training_bytes(head, data, classes, batch_size))))


def training_bytes(head: str, data: HeadData, classes: int, batch_size: int) -> int:
    """Estimate the bytes of a head that trains in a stack; tokens count raw, normed, projected and attended."""
    parameters = count_parameters(load_fusion(head), data.shape, classes)
    activations = batch_size * (8 * (data.width + parameters // max(data.width, 1)) + data.token_values // 2)
    return 4 * COPIES * (parameters + activations)


def count_parameters(fusion: FusionType, shape: Shape, classes: int) -> int:
    """The number of parameters of one head."""
    import torch

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in fusion(1, shape, classes).parameters())


def restore_heads(
    head: str, config: Mapping[str, Any], heads: Sequence[Mapping[str, np.ndarray]], classes: int, data: HeadData
) -> Predict:
    """A function from data of the shape of `data` to (N, C) logits of all samples, for each of some saved heads."""
    if head in BASELINES:
        models = [restore(head, dict(config), dict(tensors)) for tensors in heads]
        return lambda data: [_baseline_logits(model, data, np.arange(len(data))) for model in models]
    module = stack_of(load_fusion(head), classes, data, heads)

    def predict(data: HeadData) -> list[np.ndarray]:
        with one_torch_thread():
            return predict_module(module, data, [np.arange(len(data))] * len(heads))

    return predict


def _run_stack(job: Job, data: HeadData, targets: Targets, advance: Advance) -> list[Fitted]:
    start = time.thread_time()
    fusion = load_fusion(job.head)
    trained = train_stack(fusion, data, targets, job.members, advance, job.products)
    heads = [member.tensors for member in trained]
    sets: list[Sequence[np.ndarray]] = []
    for number in range(len(job.predict[0])):
        rows = [wanted[number] for wanted in job.predict]
        known = [head.validation for head in trained]  # what ended the training
        if all(x is not None and each is m.validation for x, each, m in zip(known, rows, job.members, strict=True)):
            sets.append(cast("list[np.ndarray]", known))
        else:
            sets.append(predict_stack(fusion, len(targets.classes), data, heads, rows))
    seconds = (time.thread_time() - start) / len(trained)
    return [
        Fitted(
            tuple(logits[index] for logits in sets),
            member.history,
            member.best_epoch,
            seconds,
            tensors={name: x.numpy() for name, x in data.expanded(member.tensors).items()} if job.keep else {},
        )
        for index, member in enumerate(trained)
    ]


def _run_baselines(job: Job, data: HeadData, bench: Workbench, advance: Advance) -> list[Fitted]:
    """Choose the setting of each member on its parts, and train it on the whole fold."""
    fitted = []
    for member, wanted in zip(job.members, job.predict, strict=True):
        start, training = time.thread_time(), _training(job, data, bench, member)
        chosen = job.setting
        model = fit(job.head, training, member.parts) if chosen is None else refit(job.head, training, chosen)
        logits = tuple(
            model.unseen[rows]
            if model.unseen is not None and rows is member.validation
            else _baseline_logits(model, data, rows)
            for rows in wanted
        )
        config, tensors = model.state() if job.keep else ({}, {})
        seconds = time.thread_time() - start
        fitted.append(Fitted(logits, model.curve, -1, seconds, dict(model.setting), config, tensors))
        advance(1)
    return fitted


def _training(job: Job, data: HeadData, bench: Workbench, member: Member) -> TrainingRows:
    """The rows on which a baseline trains, with the basis that all baselines on these rows share."""
    weights = class_weights(bench.targets.take(member.standard), member.settings.class_weights)
    basis = bench.basis(job, member, weights) if job.head not in UNTRAINED else None
    return TrainingRows(
        View(data),
        bench.targets,
        member.standard,
        weights,
        member.entropy[0],
        basis,
        data.classes,
        *data.layout,
        groups=member.groups,
        views=[View(data, view) for view in range(1, data.views + 1)],
    )


@dataclass(frozen=True)
class View:
    """The `Matrix` of one view: (N, D) vectors of all samples, all encoders side by side."""

    data: HeadData
    view: int = 0

    @property
    def width(self) -> int:
        return self.data.width

    def __len__(self) -> int:
        return len(self.data)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32, NaN where a vector is missing."""
        return self.data.rows(rows, self.view)


def _baseline_logits(model: Baseline, data: HeadData, rows: np.ndarray) -> np.ndarray:
    """(n, C) logits, the mean over the plain photos and their augmented views."""
    return np.mean([model.logits(View(data, view), rows) for view in range(data.views + 1)], axis=0)


class Engine(Protocol):
    """Runs jobs side by side; `bench` is this process's view of the features."""

    bench: Workbench

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[list[Fitted]]: ...
    def close(self) -> None: ...


class LocalEngine:
    """One job a CPU core, or all on one GPU.

    A job uses one thread (see `one_torch_thread`, which holds around all of them), so sums do not depend on the number
    of workers.
    """

    def __init__(self, features: Features, targets: Targets, device: str, attend: str, workers: int = 0) -> None:
        import torch

        self.bench = Workbench(features, targets, device, attend)
        self.stopped = False
        keep_freed_memory(arenas=1)
        workers = (workers or cpu_count()) if device == "cpu" else 1
        self._pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[list[Fitted]]:
        """The results in the order of the jobs."""
        return [future.result() for future in self._submit(jobs, advance)]

    def close(self) -> None:
        """Drop jobs that wait; a job that runs ends with its epoch."""
        self.stopped = True
        self._pool.shutdown(cancel_futures=True)

    def _submit(self, jobs: Sequence[Job], advance: Advance) -> list[Future[list[Fitted]]]:
        return [self._pool.submit(run_job, job, self.bench, partial(self._advance, advance)) for job in jobs]

    def _advance(self, advance: Advance, steps: int, note: str = "") -> None:
        if self.stopped:
            raise KeyboardInterrupt
        advance(steps, note)
