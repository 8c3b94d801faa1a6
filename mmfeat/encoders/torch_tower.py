"""What the torch families share: a batch through a frozen module, and one line when loading fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import EncoderError

if TYPE_CHECKING:
    import torch


def embedder(
    module: torch.nn.Module, forward: Callable[[Any], Any], spec: EncoderSpec, device: str
) -> Callable[[list[Any]], np.ndarray]:
    """A function from B prepared tensors of one shape to (B, D) float32, in the spec's arithmetic."""
    import torch

    dtype = getattr(torch, spec.arithmetic)
    module.to(device=device, dtype=dtype)

    def embed(batch: list[Any]) -> np.ndarray:
        inputs = torch.stack(batch).to(device)
        with torch.inference_mode():
            output = forward(inputs.to(dtype) if inputs.is_floating_point() else inputs)
        return to_numpy(output)

    return embed


def to_numpy(output: torch.Tensor) -> np.ndarray:
    """(B, D) float32 on the CPU."""
    return output.float().cpu().numpy()


@contextlib.contextmanager
def load_errors(asked: str) -> Iterator[None]:
    """One line for weights that do not fit their model or cannot be read."""
    try:
        yield
    except EncoderError:
        raise
    except Exception as error:  # loaders raise whatever their file formats raise
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        if "weights_only" in reason:  # torch's advice is to load it unsafely
            reason = "not a plain state dict, or not whole"
        raise EncoderError(
            f"{asked}: cannot be loaded ({reason}); check the path and that the weights are complete"
        ) from error
