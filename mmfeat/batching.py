"""Batches that fit: their size is tried out on a GPU, and halved wherever memory is short."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mmfeat.encoders import Encoder, Values
from mmfeat.errors import EncoderError

# On a CPU the activations of a larger batch leave the processor's caches, and a fixed size gives the same sums twice.
CPU_SIZES = {"image": 16, "text": 32}
PROBED_SIZES = (32, 64, 128, 256, 512)
WORTH_MORE = 1.05  # as fast, for twice the memory


class Batcher:
    """Gives an encoder as much at once as suits the device; `size` 0 has it find out."""

    def __init__(self, encoder: Encoder, device: str, size: int = 0) -> None:
        self.encoder, self.device, self._reason = encoder, device, ""
        self.size = size or (CPU_SIZES[encoder.modality] if device == "cpu" else 0)

    def launch(self, inputs: list[Any]) -> Callable[[], list[Values]]:
        """Start with any number of inputs; the function waits for their values. Nothing is lost where memory is."""
        if not self.size:
            self.size = self._probe(inputs)
        waits: list[Callable[[], list[Values]]] = []
        start = 0
        while start < len(inputs):
            piece = inputs[start : start + self.size]
            if (wait := self._try(piece)) is not None:
                waits.append(wait)
                start += len(piece)
                continue
            if len(piece) == 1:
                raise EncoderError(
                    f"{self.encoder.specs[0].name}: memory is too short for a single sample ({self._reason}); use "
                    "--dtype bfloat16, another --device or a smaller model"
                )
            self.size = -(-len(piece) // 2)
        return lambda: _joined([wait() for wait in waits])

    def _try(self, piece: list[Any]) -> Callable[[], list[Values]] | None:
        """None where there is too little memory."""
        try:
            return self.encoder.launch(piece)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            self._reason = " ".join(str(error).split())[:120]
        self._empty_caches()  # here the failed pass's tensors are gone, in the handler they are not
        return None

    def _probe(self, inputs: list[Any]) -> int:
        """The smallest size beyond which encoding gets no faster, on copies of the longest inputs."""
        best, chosen = 0.0, PROBED_SIZES[0]
        for size in PROBED_SIZES:
            batch = (inputs * -(-size // len(inputs)))[:size]
            seconds = min(self._seconds(batch) for _ in range(2))
            if size / seconds < WORTH_MORE * best or not np.isfinite(seconds):
                break
            best, chosen = size / seconds, size
        return chosen

    def _seconds(self, batch: list[Any]) -> float:
        """How long a batch takes, infinite if it does not fit."""
        start = time.perf_counter()
        wait = self._try(batch)
        if wait is None:
            return float("inf")
        wait()
        return time.perf_counter() - start

    def _empty_caches(self) -> None:
        import torch

        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        if self.device == "mps":
            with contextlib.suppress(RuntimeError):
                torch.mps.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    """CUDA, Apple's and the CPU's allocators have words for it; oneDNN, short of memory, only ever says the last."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "could not create a primitive")
    return isinstance(error, MemoryError) or any(each in str(error) for each in words)


def _joined(parts: list[list[Values]]) -> list[Values]:
    """The values of all pieces, for each output."""
    if len(parts) == 1:
        return parts[0]
    return [
        np.concatenate(values) if isinstance(values[0], np.ndarray) else [row for rows in values for row in rows]
        for values in zip(*parts, strict=True)
    ]
