"""A loaded torch tower, and a batch through it, for all torch families; and texts of equal length together, for the
models in which padding changes a vector (FNet, Funnel, ConvBERT, CANINE)."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.layers import Network, Point, capture
from mmfeat.encoders.spec import Encoder, EncoderSpec, Values
from mmfeat.encoders.weights import one_line
from mmfeat.errors import EncoderError
from mmfeat.system.files import canonical_json
from mmfeat.system.hardware import keep_freed_memory
from mmfeat.version import versions

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


LIBRARIES = ("onnxruntime", "openvino")  # that compute an exported tower on a CPU
RUNTIMES = ("auto", "torch", "compile", *LIBRARIES)
EXPORTERS = ("torch", "torchvision", "transformers", "timm", "open_clip_torch", "sentence-transformers", "onnxscript")
LETTERS = "abcdefghijklmnopqrstuvwxyz" * 3  # more tokens than one chunk of Reformer
TOLERANCE = 1e-5  # largest difference, as a share of the largest value


@dataclass(frozen=True)
class Runtime:
    """What computes towers, one of `RUNTIMES`: `auto` is the fastest of those installed, but "compile".

    `folder` is where exported towers are kept, if anywhere; nothing is added to it unless `writes`. `samples` is the
    number that each modality has to encode, on which it depends whether a trial of runtimes pays.
    """

    name: str = "torch"
    folder: Path | None = None
    writes: bool = True
    samples: Mapping[str, int] = field(default_factory=dict)


def export_name(fingerprint: str) -> str:
    """The name of the folder of an exported tower, by its fingerprint and the libraries that make the export."""
    made_by = hashlib.sha256(canonical_json(versions(EXPORTERS)).encode()).hexdigest()
    return f"{fingerprint[:8]}-{made_by[:8]}"


def stack(batch: list[Tensor]) -> Tensor:
    """B prepared tensors of one shape as one tensor."""
    import torch

    return torch.stack(batch)


@dataclass(frozen=True)
class TorchTower:
    """A loaded tower in float32: `specs` are its outputs, `module` is the model that holds its parameters.

    `prepare` makes a model input of one text or RGB picture, `collate` joins B of them for a forward pass. `keep` gives
    the (B, T) mask of tokens that are no padding, or None for all. `stand_in` makes inputs with a given (B, T) mask for
    a pass that begins at a later layer; None for images, where one blank picture serves. `length` gives the length of
    an input, where lengths differ. A `light` tower needs no torch in `prepare`.
    """

    specs: tuple[EncoderSpec, ...]
    module: Module
    network: Network
    prepare: Callable[[Any], Any]
    collate: Callable[[list[Any]], Any] = stack
    keep: Callable[[Any], Tensor | None] = lambda inputs: None
    stand_in: Callable[[Tensor], Any] | None = None
    length: Callable[[Any], int] | None = None
    light: bool = False

    def encoder(self, device: str, runtime: Runtime | None = None) -> Encoder:
        """The frozen encoder: all values of `specs` from one forward pass, in their arithmetic.

        Weights are cast, which on CPUs is far faster than autocast. In half precision convolutions have channels last;
        in float32 they keep the layout of the libraries, so that sums are equal, unless a `runtime` shows another one
        to be faster and right.
        """
        import torch

        from mmfeat.encoders.faster import fuse_attention

        if device == "cpu":
            keep_freed_memory()
        dtype = getattr(torch, self.specs[0].arithmetic)  # all outputs of a tower share the dtype
        fuse_attention(self.module)
        self.module.to(device=device, dtype=dtype)
        if dtype != torch.float32:
            self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        points = {spec: self.network.point(spec) for spec in self.specs if spec.output != "pooled"}
        forward, note = self.network.forward, lambda: ""
        # Hooks see nothing inside a compiled model, so tokens, prefixes and other poolings come from the plain one.
        if runtime is not None and not points and not self.network.hooked:
            compiles = runtime.name == "compile" and dtype != torch.float32
            if device == "cpu" and dtype in (torch.float32, torch.bfloat16) and not compiles:
                from mmfeat.encoders.runtime import FastestPass

                forward = fastest = FastestPass(self, runtime)
                note = lambda: fastest.note  # noqa: E731
            elif runtime.name == "compile":
                check_compiler(device)
                forward = torch.compile(forward)
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

        return Encoder(self.specs, self.prepare, launch, self.length, self.light, note=note)

    def reference(self) -> Callable[[Any], np.ndarray]:
        """The plain forward pass over one text or picture, in float32: (D) or (T, D)."""
        return lambda content: plain_call(self.network, self.specs[0], self.collate([self.prepare(content)]), self.keep)


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Keep float32 exact on CUDA, which rounds to TF32 in convolutions and, by a setting, in matrix products."""
    import torch

    backends: Any = torch.backends
    new = hasattr(backends.cudnn, "conv") and hasattr(backends.cuda.matmul, "fp32_precision")
    switches: list[Any] = [backends.cuda.matmul, backends.cudnn.conv if new else backends.cudnn]
    name, exact = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
    before = [getattr(switch, name) for switch in switches]
    try:
        for switch in switches:
            setattr(switch, name, exact)
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            setattr(switch, name, value)


def check_compiler(device: str) -> None:
    """Raise `EncoderError` where torch cannot make kernels, for which a CPU needs a compiler."""
    if device == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise EncoderError("--runtime compile: torch needs a C++ compiler for that; install g++, or leave it out")


def to_device(inputs: Any, device: str, dtype: Any, non_blocking: bool = False) -> Any:
    """A tensor, or several by name, on a device; floats in `dtype`, whole numbers unchanged."""
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device, dtype, non_blocking) for name, value in inputs.items()}
    wanted = dtype if inputs.is_floating_point() else None
    return inputs.to(device=device, dtype=wanted, non_blocking=non_blocking)


def plain_call(
    network: Network, spec: EncoderSpec, inputs: Any, keep: Callable[[Any], Tensor | None] = lambda inputs: None
) -> np.ndarray:
    """(D) or (T, D) of one sample by a plain forward pass, as a user of the library would run it.

    `keep` gives the (1, T) mask of tokens that are no padding, or None for all.
    """
    import torch

    points = [] if spec.output == "pooled" else [network.point(spec)]
    with torch.no_grad(), capture(points) as captured:
        pooled = network.forward(inputs)
    values = (captured[0] if captured else pooled)[0].numpy()
    kept = keep(inputs) if captured else None
    return values if kept is None else values[kept[0].numpy()]


def as_rows(values: np.ndarray, keep: np.ndarray | None) -> list[np.ndarray]:
    """B arrays (T, D) from (B, T, D): the tokens that the (B, T) mask keeps, or all."""
    return list(values) if keep is None else [row[kept] for row, kept in zip(values, keep, strict=True)]


class Copies:
    """Copies between memory and a device; on CUDA they run beside the kernels of the batch before."""

    def __init__(self, device: str) -> None:
        import torch

        self.device = device
        self.stream = torch.cuda.Stream(device) if device.startswith("cuda") else None

    def to_device(self, inputs: Any, dtype: Any) -> Any:
        """Copy inputs to the device; on CUDA from pinned memory, floats in `dtype`, and in a stream for copies."""
        import torch

        if self.stream is None:
            return to_device(inputs, self.device, dtype)
        with torch.cuda.stream(self.stream):
            copied = to_device(staged(inputs, dtype), self.device, dtype, non_blocking=True)
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        for tensor in copied.values() if isinstance(copied, Mapping) else [copied]:
            tensor.record_stream(computing)  # no later copy may reuse the memory before the kernels have read it
        return copied

    def to_host(self, outputs: list[Tensor | None]) -> Callable[[], list[Tensor | None]]:
        """Start copying tensors to memory, floats in float32; the function waits for them."""
        import torch

        exact = [value if value is None or value.dtype == torch.bool else value.float() for value in outputs]
        copies = [None if value is None else value.to("cpu", non_blocking=self.stream is not None) for value in exact]
        if self.stream is None:
            return lambda: copies
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(self.device))

        def wait() -> list[Tensor | None]:
            done.synchronize()
            return copies

        return wait


def staged(inputs: Any, dtype: Any, pinned: bool = True) -> Any:
    """The inputs in pinned memory, floats in `dtype`: one pass over them, of which a GPU copies half the bytes."""
    import torch

    if isinstance(inputs, Mapping):
        return {name: staged(value, dtype, pinned) for name, value in inputs.items()}
    wanted = dtype if inputs.is_floating_point() else inputs.dtype
    return torch.empty(inputs.shape, dtype=wanted, pin_memory=pinned).copy_(inputs)


def without_padding(asked: str, tower: TorchTower) -> TorchTower:
    """The tower, or one that encodes texts of equal length together where a trial shows that padding changes a vector.

    Such a tower gives no prefixes, since a forward pass over several lengths has no one input of a layer. Its `prepare`
    raises `ValueError` for a text of fewer tokens than the model takes. Raises `EncoderError` for a model that cannot
    encode a text, or encodes one differently at each call.
    """
    import torch

    short, long = _shortest(asked, tower), tower.prepare(" ".join(LETTERS))
    least = _tokens(tower, short)
    if least > _tokens(tower, tower.prepare("")):
        tower = replace(tower, prepare=_longer(tower, least))
    try:
        alone = torch.cat([_vectors(tower, [short]), _vectors(tower, [long])])
        together, again = _vectors(tower, [short, long]), _vectors(tower, [long])
    except Exception as error:  # each model has errors of its own
        raise _failed(asked, tower, error) from error
    if _are_equal(alone, together):
        return tower
    if not _are_equal(alone[1:], again):
        raise EncoderError(f"{asked}: the model gives another vector of a text at each call; use another checkpoint")
    tokens = torch.nn.Identity()
    wanted = any(spec.output == "tokens" for spec in tower.specs)
    forward = ByLength(tower.network.forward, tower.keep, tower.network.tokens, tokens if wanted else None)
    return replace(tower, network=Network(forward, (), Point(tokens)))


@dataclass(frozen=True)
class ByLength:
    """A forward pass over a padded batch, (B, T) tensors by name, that gives each text the vector it has alone.

    `keep` gives the (B, T) mask of tokens. With `tokens`, an empty module, the tokens (B, T, D) at `point` pass it.
    """

    forward: Callable[[Any], Tensor]
    keep: Callable[[Any], Tensor | None]
    point: Point
    tokens: Module | None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        import torch

        mask = self.keep(inputs)
        assert mask is not None
        order, vectors, rows = [], [], []
        for length in mask.sum(1).unique():
            chosen = (mask.sum(1) == length).nonzero().flatten()
            columns = mask[chosen[0]]  # padding is on one side, so texts of one length have the same columns
            part = {name: cut(value[chosen], columns) for name, value in inputs.items()}
            with capture([self.point] if self.tokens else []) as captured:
                vectors.append(self.forward(part))
            order.append(chosen)
            rows += [(chosen, columns, values) for values in captured]
        if self.tokens:
            tokens = rows[0][2].new_zeros(*mask.shape, rows[0][2].shape[-1])
            for chosen, columns, values in rows:
                tokens[chosen[:, None], columns.nonzero().flatten()] = values
            self.tokens(tokens)
        return torch.cat(vectors)[torch.cat(order).argsort()]


def cut(values: Tensor, columns: Tensor) -> Tensor:
    """The columns of tensors (B, T), of which some models have others beside them."""
    return values[:, columns] if values.ndim > 1 and values.shape[1] == len(columns) else values


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= TOLERANCE * max(1.0, float(one.abs().max()))


def _shortest(asked: str, tower: TorchTower) -> Any:
    """The input of the shortest text that the model can encode: some take no empty text, or none of a few tokens."""
    for count in range(len(LETTERS)):
        prepared = tower.prepare(" ".join(LETTERS[:count]))
        try:
            _vectors(tower, [prepared])
            return prepared
        except Exception as error:  # each model has errors of its own
            failure = error
    raise _failed(asked, tower, failure) from failure


def _failed(asked: str, tower: TorchTower, error: Exception) -> EncoderError:
    kind = type(tower.module).__name__
    return EncoderError(f"{asked}: {kind} cannot encode a text ({one_line(error)}); use another checkpoint")


def _vectors(tower: TorchTower, batch: list[Any]) -> Tensor:
    import torch

    with torch.no_grad():
        return tower.network.forward(tower.collate(batch)).float()


def _tokens(tower: TorchTower, prepared: Any) -> int:
    """The number of tokens of an input; 0 where an encoder has no mask of tokens."""
    try:
        kept = tower.keep(tower.collate([prepared]))
    except (KeyError, AttributeError):
        return 0
    return 0 if kept is None else int(kept.sum())


def _longer(tower: TorchTower, least: int) -> Callable[[str], Any]:
    """The `prepare` of a tower, for texts of at least so many tokens."""

    def prepare(text: str) -> Any:
        prepared = tower.prepare(text)
        if _tokens(tower, prepared) < least:
            raise ValueError(f"the model takes {least} tokens or more")
        return prepared

    return prepare
