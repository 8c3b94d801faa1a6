"""Data parallel training: several processes share the work of the encoders and stay one and the same training.

Each process embeds its part of a batch; the vectors of all parts are put together, and every process then runs the
small head on the whole batch. So batch normalisation sees what it would see in one process, and N processes give what
one gives, up to rounding. The first process's numbers decide wherever rounding could part them. Processes are those of
torchrun, `accelerate launch` or Ray Train.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed

PATIENCE = timedelta(hours=24)  # the first process extracts while the others wait


@dataclass(frozen=True)
class Team:
    """Process number `rank` of `size`, on its `device`."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def part(self, positions: np.ndarray) -> np.ndarray:
        """The positions in a batch that this process embeds."""
        return positions[self.rank :: self.size]

    def whole(self, rows: Tensor) -> Tensor:
        """(B, ...) of all processes, of which each has filled its part and left zeros elsewhere."""
        return rows if self.size == 1 else _Sum.apply(rows)

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Gradients of the parts -> those of the whole batch, in place."""
        for gradient in gradients if self.size > 1 else ():
            distributed.all_reduce(gradient)

    def agreed(self, values: Sequence[float]) -> list[float]:
        """The numbers of the first process."""
        return self.shared({"": torch.tensor(values, dtype=torch.float64)})[""].tolist()

    def shared(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the first process, where the others have tensors of the same shapes."""
        if self.size == 1:
            return dict(tensors)
        found = {}
        for name in sorted(tensors):
            there = tensors[name].detach().to(self.device, copy=True).contiguous()
            distributed.broadcast(there, 0)
            found[name] = there.to(tensors[name].device)
        return {name: found[name] for name in tensors}

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            distributed.barrier()


class _Sum(torch.autograd.Function):
    """The sum over processes. Every process has the same loss of it, so the gradient is each one's own."""

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
    """The team that the environment or Ray tells of; this process alone where neither does."""
    on_gpu = device.startswith("cuda")
    if distributed.is_available() and distributed.is_initialized():  # by Ray Train
        yield Team(distributed.get_rank(), distributed.get_world_size(), device)
        return
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield Team(device=device)
        return
    if on_gpu:
        torch.cuda.set_device(device)  # nccl takes the current one
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    try:
        yield Team(distributed.get_rank(), size, device)
    finally:
        distributed.destroy_process_group()


def own_device(device: str) -> str:
    """The GPU of this process among those of its machine."""
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and "WORLD_SIZE" in os.environ else device
