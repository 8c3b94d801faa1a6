"""The execution of trainings, in one process or in several that share the work of the encoders (data parallel).

The processes come from torchrun, `accelerate launch` or Ray Train; `train_on_ray` starts them on a Ray cluster.

Each process embeds its part of a batch, the vectors of all parts are put together, and every process runs the small
head on the whole batch. So batch normalisation sees the whole batch, and N processes give the result of one process up
to rounding. Where rounding could make the processes differ, the numbers of the first process decide.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

from mmfeat.errors import MmfeatError
from mmfeat.system.files import read_json, write_json
from mmfeat.system.hardware import cpu_count
from mmfeat.system.ray_cluster import join_cluster, leave_cluster
from mmfeat.system.remote import absolute, is_remote
from mmfeat.system.trust import is_trusted, trust
from mmfeat.system.wording import Progress, Silent

CHECKPOINT_SECONDS = 30.0  # between two checkpoints of a training
PATIENCE = timedelta(hours=24)  # the first process extracts while the others wait
WORKERS = 2  # Ray's processes if no number is given
CPU_SHARE = 0.9  # the share of a core that a process asks for: Ray's own tasks need the rest
SCRATCH = ".ray-train"  # Ray Train's files while it runs, in a folder beside the runs
ANSWER = "answer.json"  # the first process's result, in SCRATCH
PATHS = ("run", "data", "cache", "heads", "out")  # the arguments of a training that are paths


@dataclass(frozen=True)
class Team:
    """The processes that train together, as seen by process number `rank` of `size`, on its `device`."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this process writes the files and prints, which one process of a team does."""
        return self.rank == 0

    def part(self, positions: np.ndarray) -> np.ndarray:
        """The positions in a batch that this process embeds."""
        return positions[self.rank :: self.size]

    def whole(self, rows: Tensor) -> Tensor:
        """The sum (B, ...) over processes; each process gives its part of the rows and zeros elsewhere."""
        return rows if self.size == 1 else _Sum.apply(rows)

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Turn the gradients of each process's part into the gradients of the whole batch, in place."""
        for gradient in gradients if self.size > 1 else ():
            distributed.all_reduce(gradient)

    def agreed(self, values: Sequence[float]) -> list[float]:
        """The numbers of the first process."""
        return self.shared({"": torch.tensor(values, dtype=torch.float64)})[""].tolist()

    def shared(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the first process, where the others have tensors of the same shapes."""
        if self.size == 1:
            return dict(tensors)
        received = {}
        for name in sorted(tensors):
            copy = tensors[name].detach().to(self.device, copy=True).contiguous()
            distributed.broadcast(copy, 0)
            received[name] = copy.to(tensors[name].device)
        return {name: received[name] for name in tensors}

    def wait(self) -> None:
        if self.size > 1:
            distributed.barrier()


@dataclass(frozen=True)
class Execution:
    """The execution of trainings: the team of processes, `workers` trainings side by side on a CPU (0: one a core), the
    seconds between checkpoints, and the progress to report to."""

    team: Team = Team()
    workers: int = 0
    checkpoint_seconds: float = CHECKPOINT_SECONDS
    progress: Progress = field(default_factory=Silent)

    @property
    def trainings(self) -> int:
        """The number of trainings side by side: one on a GPU or in a team of several processes."""
        alone = self.team.size > 1 or self.team.device != "cpu"
        return 1 if alone else self.workers or cpu_count()


class _Sum(torch.autograd.Function):
    """The sum over processes. Every process computes the same loss from the sum, so each part has the gradient of the
    sum."""

    @staticmethod
    def forward(context: Any, rows: Tensor) -> Tensor:
        total = rows.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient


@contextmanager
def joined_team(device: str) -> Iterator[Team]:
    """Join the team that Ray Train or the environment describes; without either, the team is this process alone. Each
    process of a machine uses a GPU of its own."""
    on_gpu = device.startswith("cuda")
    if device == "cuda" and "WORLD_SIZE" in os.environ:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    if distributed.is_available() and distributed.is_initialized():  # Ray Train has joined the processes
        yield Team(distributed.get_rank(), distributed.get_world_size(), device)
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Team(device=device)
        return
    if on_gpu:
        torch.cuda.set_device(device)  # nccl uses the current GPU
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield Team(distributed.get_rank(), size, device)
    finally:
        distributed.destroy_process_group()


def train_on_ray(
    train: Callable[..., Any], arguments: Mapping[str, Any], workers: int, device: str, address: str | None
) -> tuple[Path, bool]:
    """Run `train(**arguments)` in `workers` processes; returns the folder of the run and whether it was there already.

    Raises the error that a process raised; a path in `arguments` may be relative.
    """
    ray, started = join_cluster(address)
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    paths = {name for name in PATHS if arguments.get(name) is not None and not is_remote(arguments[name])}
    arguments = {name: absolute(value) if name in paths else value for name, value in arguments.items()}
    scratch = Path(arguments["out"]) / SCRATCH
    # The cluster's resources decide on GPUs, not those of this machine.
    on_gpu = device.startswith("cuda") or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)
    share = {"GPU": 1.0} if on_gpu else {"CPU": CPU_SHARE}
    scaling = ScalingConfig(num_workers=workers or WORKERS, use_gpu=on_gpu, resources_per_worker=share)
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "train": train,
            "arguments": arguments,
            "on_gpu": on_gpu,
            "answer": str(scratch / ANSWER),
            "trusted": is_trusted(),
        },
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
        scaling_config=scaling,
        run_config=RunConfig(storage_path=str(scratch), name="finetune"),
    )
    try:
        trainer.fit()
        answer = read_json(scratch / ANSWER)
        return Path(answer["folder"]), bool(answer["reused"])
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {}).values()
        raise next((failure for failure in failures if isinstance(failure, MmfeatError)), error) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if started:
            leave_cluster(ray)


def _worker(config: dict[str, Any]) -> None:
    """Train in one process of a team that Ray Train has joined."""
    from ray.train.torch import get_device

    trust(config["trusted"])  # the user's consent to code of a checkpoint belongs to the process
    device = str(get_device()) if config["on_gpu"] else "cpu"
    result = config["train"](**{**config["arguments"], "device": device})
    if result.leads:
        write_json(Path(config["answer"]), {"folder": str(result.run.folder), "reused": result.reused})
