"""What the torch families share: a loaded tower, a batch through it, and one line when loading fails."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.layers import Network, capture
from mmfeat.encoders.spec import Encoder, EncoderSpec, Values
from mmfeat.errors import EncoderError
from mmfeat.system.hardware import keep_freed_memory

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
    later layer, whose tokens lie where a (B, T) mask says; None for images, where one blank picture serves. `length`
    is that of one input, where they differ.
    """

    specs: tuple[EncoderSpec, ...]
    module: Module
    network: Network
    prepare: Callable[[Any], Any]
    collate: Callable[[list[Any]], Any] = stack
    keep: Callable[[Any], Tensor | None] = lambda inputs: None
    stand_in: Callable[[Tensor], Any] | None = None
    length: Callable[[Any], int] | None = None
    light: bool = False  # `prepare` needs no torch

    def encoder(self, device: str, compiled: bool = False) -> Encoder:
        """The frozen encoder: all values of `specs` from one forward pass, in their arithmetic.

        Weights are cast, which on CPUs is far faster than autocast. In half precision convolutions have their channels
        last; in float32 they sum up as the libraries do.
        """
        import torch

        from mmfeat.encoders.attention import fuse_attention

        if device == "cpu":
            keep_freed_memory()
        dtype = getattr(torch, self.specs[0].arithmetic)  # outputs of one tower share it
        fuse_attention(self.module)
        self.module.to(device=device, dtype=dtype)
        if dtype != torch.float32:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        points = {spec: self.network.point(spec) for spec in self.specs if spec.output != "pooled"}
        # What is compiled cannot be looked into, so tokens and prefixes come from the plain model.
        forward = _compiled(self.network.forward, device) if compiled and not points else self.network.forward
        copies = Copies(device)
        exact = _without_tf32 if device.startswith("cuda") and dtype == torch.float32 else contextlib.nullcontext

        def launch(batch: list[Any]) -> Callable[[], list[Values]]:
            inputs = copies.to_device(self.collate(batch), dtype)
            with exact(), torch.inference_mode(), capture(list(points.values())) as captured:
                pooled = forward(inputs)
            seen = dict(zip(points, captured, strict=True))
            kept = self.keep(inputs) if points else None
            outputs = copies.to_host([*(seen.get(spec, pooled) for spec in self.specs), kept])

            def wait() -> list[Values]:
                *values, mask = outputs()
                keep = None if mask is None else mask.numpy()
                arrays = [value.numpy() for value in values if value is not None]
                asked = zip(self.specs, arrays, strict=True)
                return [array if spec.output == "pooled" else as_rows(array, keep) for spec, array in asked]

            return wait

        return Encoder(self.specs, self.prepare, launch, self.length, self.light)

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


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """On CUDA float32 would be rounded to TF32 in convolutions, and where the user says so in products."""
    import torch

    backends: Any = torch.backends
    new = hasattr(backends.cudnn, "conv") and hasattr(backends.cuda.matmul, "fp32_precision")
    places: list[Any] = [backends.cuda.matmul, backends.cudnn.conv if new else backends.cudnn]
    name, exact = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    before = [getattr(place, name) for place in places]
    try:
        for place in places:
            setattr(place, name, exact)
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            setattr(place, name, value)


def _compiled(forward: Callable[[Any], Tensor], device: str) -> Callable[[Any], Tensor]:
    import torch

    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise EncoderError("--compile: torch needs a C++ compiler for that; install g++, or leave it out")
    return torch.compile(forward)


def to_device(inputs: Any, device: str, dtype: Any, non_blocking: bool = False) -> Any:
    """A tensor, or several by name, where and as the model computes; whole numbers stay such."""
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device, dtype, non_blocking) for name, value in inputs.items()}
    wanted = dtype if inputs.is_floating_point() else None
    return inputs.to(device=device, dtype=wanted, non_blocking=non_blocking)


def plain_call(network: Network, spec: EncoderSpec, inputs: Any) -> np.ndarray:
    """(D) or (T, D): the forward pass over one sample as the library's user would run it."""
    import torch

    points = [] if spec.output == "pooled" else [network.point(spec)]
    with torch.no_grad(), capture(points) as captured:
        pooled = network.forward(inputs)
    return (captured[0] if captured else pooled)[0].numpy()


def as_rows(values: np.ndarray, keep: np.ndarray | None) -> list[np.ndarray]:
    """B arrays (T, D) of (B, T, D): the tokens that the (B, T) mask keeps, or all."""
    return list(values) if keep is None else [row[kept] for row, kept in zip(values, keep, strict=True)]


class Copies:
    """Copies between memory and a device. On CUDA they run beside the kernels of the batch before."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = device
        self.stream = torch.cuda.Stream(device) if device.startswith("cuda") else None

    def to_device(self, inputs: Any, dtype: Any) -> Any:
        """The inputs as `to_device` gives them, from pinned memory and in a stream of their own."""
        import torch

        if self.stream is None:
            return to_device(inputs, self.device, dtype)
        with torch.cuda.stream(self.stream):
            there = to_device(_pinned(inputs), self.device, dtype, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for tensor in there.values() if isinstance(there, Mapping) else [there]:
            tensor.record_stream(computing)  # its memory must not serve the next copy before it was read
        return there

    def to_host(self, outputs: list[Tensor | None]) -> Callable[[], list[Tensor | None]]:
        """Start copying; the function waits for the tensors, in float32 but for masks."""
        import torch

        there = [None if each is None else each if each.dtype == torch.bool else each.float() for each in outputs]
        if self.stream is None:
            found = [None if each is None else each.cpu() for each in there]
            return lambda: found
        copies = [None if each is None else each.to("cpu", non_blocking=True) for each in there]
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))

        def wait() -> list[Tensor | None]:
            done.synchronize()
            return copies

        return wait


def _pinned(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: _pinned(value) for name, value in inputs.items()}
    return inputs.pin_memory()


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
