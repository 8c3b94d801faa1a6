"""What the torch families share: a loaded tower, a batch through it, and one line when loading fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.layers import Network, capture
from mmfeat.encoders.spec import Encoder, EncoderSpec, Values
from mmfeat.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


def stack(batch: list[Tensor]) -> Tensor:
    """B prepared tensors of one shape as one."""
    import torch

    return torch.stack(batch)


@dataclass(frozen=True)
class TorchTower:
    """A loaded tower in float32: `specs` are what is asked of it, `module` the model that holds its parameters.

    `prepare` makes a model input of one text or RGB picture, `collate` the inputs of a forward pass of B of them.
    `keep` tells which of (B, T) tokens are no padding, None: all. `stand_in` gives inputs for a pass that begins at a
    later layer, whose tokens lie where a (B, T) mask says; None for images, where one blank picture serves.
    """

    specs: tuple[EncoderSpec, ...]
    module: Module
    network: Network
    prepare: Callable[[Any], Any]
    collate: Callable[[list[Any]], Any] = stack
    keep: Callable[[Any], Tensor | None] = lambda inputs: None
    stand_in: Callable[[Tensor], Any] | None = None

    def encoder(self, device: str) -> Encoder:
        """The frozen encoder: all values of `specs` from one forward pass, in their arithmetic."""
        import torch

        dtype = getattr(torch, self.specs[0].arithmetic)  # outputs of one tower share it
        self.module.to(device=device, dtype=dtype)
        points = {spec: self.network.point(spec) for spec in self.specs if spec.output != "pooled"}

        def embed(batch: list[Any]) -> list[Values]:
            inputs = to_device(self.collate(batch), device, dtype)
            with torch.inference_mode(), capture(list(points.values())) as captured:
                pooled = self.network.forward(inputs)
            seen = dict(zip(points, captured, strict=True))
            kept = self.keep(inputs) if points else None
            return [to_rows(seen[spec], kept) if spec in seen else to_numpy(pooled) for spec in self.specs]

        return Encoder(self.specs, self.prepare, embed)

    def reference(self) -> Callable[[Any], np.ndarray]:
        """The plain forward pass over one text or picture, in float32: (D) or (T, D)."""
        spec = self.specs[0]

        def encode(content: Any) -> np.ndarray:
            inputs = self.collate([self.prepare(content)])
            values = plain_call(self.network, spec, inputs)
            kept = self.keep(inputs) if spec.output != "pooled" else None
            return values if kept is None else values[kept[0].numpy()]

        return encode

    def asked_for(self, specs: list[EncoderSpec]) -> TorchTower:
        """The same tower, asked for other outputs."""
        return replace(self, specs=tuple(specs))


def to_device(inputs: Any, device: str, dtype: Any) -> Any:
    """A tensor, or several by name, where and as the model computes; whole numbers stay such."""
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device, dtype) for name, value in inputs.items()}
    return inputs.to(device=device, dtype=dtype if inputs.is_floating_point() else None)


def plain_call(network: Network, spec: EncoderSpec, inputs: Any) -> np.ndarray:
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
