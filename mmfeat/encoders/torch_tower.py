"""What the torch families share: a batch through a frozen module, and one line when loading fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.layers import Network, capture
from mmfeat.encoders.spec import EncoderSpec, Values
from mmfeat.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def embedder(
    module: Module,
    network: Network,
    specs: list[EncoderSpec],
    device: str,
    keep: Callable[[Tensor], Tensor | None] = lambda inputs: None,
) -> Callable[[list[Any]], list[Values]]:
    """A function from B prepared tensors of one shape to the values of each spec, all from one forward pass.

    `specs` are of one tower and share its arithmetic. `keep` tells which of (B, T) tokens are no padding, None: all.
    """
    import torch

    dtype = getattr(torch, specs[0].arithmetic)
    module.to(device=device, dtype=dtype)
    points = {spec: network.point(spec) for spec in specs if spec.output != "pooled"}

    def embed(batch: list[Any]) -> list[Values]:
        inputs = torch.stack(batch).to(device)
        with torch.inference_mode(), capture(list(points.values())) as captured:
            pooled = network.forward(inputs.to(dtype) if inputs.is_floating_point() else inputs)
        seen = dict(zip(points, captured, strict=True))
        kept = keep(inputs) if points else None
        return [to_rows(seen[spec], kept) if spec in seen else to_numpy(pooled) for spec in specs]

    return embed


def plain_call(network: Network, spec: EncoderSpec, inputs: Tensor) -> np.ndarray:
    """(D) or (T, D): the forward pass over one sample as the library's user would run it."""
    import torch

    points = [] if spec.output == "pooled" else [network.point(spec)]
    with torch.no_grad(), capture(points) as captured:
        pooled = network.forward(inputs)
    return (captured[0] if captured else pooled)[0].numpy()


def to_numpy(output: Tensor) -> np.ndarray:
    """float32 on the CPU, of the same shape."""
    return output.float().cpu().numpy()


def to_rows(output: Tensor, keep: Tensor | None) -> list[np.ndarray]:
    """B arrays (T, D) float32 of (B, T, D): the tokens that the (B, T) mask keeps, or all."""
    rows = list(to_numpy(output))
    return rows if keep is None else [row[kept] for row, kept in zip(rows, keep.cpu().numpy(), strict=True)]


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
