"""Pictures as model inputs, in two parts: whole numbers on the CPU, everything else on the device.

A library's own evaluation transform is taken apart into resizing and cropping, which Pillow alone does in any process,
and scaling, which a device does for a batch at once. The parts are used only where their result equals that of the
transform exactly; any other transform is called as a whole.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.layers import Network, repooled, try_out
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.torch_tower import TorchTower, stack
from mmfeat.encoders.weights import load_reason, one_line
from mmfeat.errors import EncoderError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor
    from torch.nn import Module


PROBES = ((300, 200), (201, 333), (31, 40), (640, 97))  # width, height: wide, tall, small, a strip


@dataclass(frozen=True)
class Pixels:
    """RGB picture -> (H, W, 3) uint8, with the result of torchvision's Resize and CenterCrop.

    `resize` is the new short side, or (height, width), or None; `crop` is (height, width), or None.
    """

    resize: int | tuple[int, int] | None
    resample: int
    crop: tuple[int, int] | None

    def __call__(self, image: Image.Image) -> np.ndarray:
        size = self._resized(image.width, image.height)
        if size != image.size:
            image = image.resize(size, self.resample)
        return np.asarray(image if self.crop is None else self._cropped(image, *self.crop))

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.resize is None:
            return width, height
        if isinstance(self.resize, tuple):
            return self.resize[1], self.resize[0]
        long = int(self.resize * max(width, height) / min(width, height))
        return (self.resize, long) if width <= height else (long, self.resize)

    def _cropped(self, image: Image.Image, height: int, width: int) -> Image.Image:
        """The middle of a picture; black where the crop is larger than the picture."""
        left, top = _middle(image.width, width), _middle(image.height, height)
        return image.crop((left, top, left + width, top + height))


def _middle(have: int, want: int) -> int:
    return -((want - have) // 2) if want > have else round((have - want) / 2)


@dataclass(frozen=True)
class Scale:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in the arithmetic of `module`.

    In half precision channels stay last in memory, which is faster for convolutions. In float32 the layout is that of
    the libraries, whose sums the result has to equal.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    module: Module
    constants: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict)  # device -> (mean, std)

    def __call__(self, pixels: Tensor) -> Tensor:
        import torch

        if pixels.device not in self.constants:  # kept, as a copy would wait for the kernels of the batch before
            mean, std = (torch.tensor(v, device=pixels.device).view(-1, 1, 1) for v in (self.mean, self.std))
            self.constants[pixels.device] = mean, std
        mean, std = self.constants[pixels.device]
        scaled = pixels.permute(0, 3, 1, 2).float().div_(255).sub_(mean).div_(std)
        dtype = next(self.module.parameters()).dtype
        return scaled.contiguous() if dtype == torch.float32 else scaled.to(dtype)


def image_tower(
    specs: Sequence[EncoderSpec], module: Module, network: Network, transform: Callable[[Any], Tensor]
) -> TorchTower:
    """The tower of an image model, pooled as its pooled spec says; its library's evaluation transform runs in two parts
    if that is exact."""
    blank, parts = _tried(specs[0], transform), _parts(transform, module)
    if (pooled := next((spec for spec in specs if spec.output == "pooled"), None)) is not None:
        other = repooled(network, pooled)
        if other.hooked:
            try_out(network, pooled, stack([blank]))
        network = other
    if parts is None:
        return TorchTower(tuple(specs), module, network, transform)
    pixels, scale = parts
    forward = network.forward
    scaled = replace(network, forward=lambda batch: forward(scale(batch)))
    return TorchTower(tuple(specs), module, scaled, pixels, collate=_stack, light=True)


@contextlib.contextmanager
def size_errors(spec: EncoderSpec, multiple: int = 1) -> Iterator[None]:
    """Raise a one-line `EncoderError` where a model cannot be built for, or cannot see, pictures of the spec's size."""
    height, width = spec.image_size or (0, 0)
    try:
        if height % multiple or width % multiple:
            raise ValueError(f"its patches are {multiple} pixels wide")
        yield
    # A model of any library may raise any of these.
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = one_line(error)
        remedy = f"use multiples of {multiple}" if multiple > 1 else "use another size, or model for its own"
        raise EncoderError(
            f"--image-size {height}x{width}: {spec.model} does not take it ({reason}); {remedy}"
        ) from error


def _tried(spec: EncoderSpec, transform: Callable[[Any], Tensor]) -> Tensor:
    """A blank picture through the transform. Raises `EncoderError` where a configuration made one that fails."""
    from PIL import Image

    try:
        return transform(Image.new("RGB", (64, 64)))
    except Exception as error:  # a configuration may say anything
        raise EncoderError(
            f"{spec.name}: pictures cannot be prepared as its configuration says ({load_reason(error)}); use the files "
            "that came with the weights"
        ) from error


def check_size(spec: EncoderSpec, forward: Callable[[Tensor], Any], multiple: int = 1) -> None:
    """Raise `EncoderError` unless a model takes pictures of the spec's size, and both sides are such multiples."""
    import torch

    channels = json.loads(spec.preprocessing).get("input_size", [3])[0]
    with size_errors(spec, multiple), torch.no_grad():
        forward(torch.zeros(1, channels, *(spec.image_size or (0, 0))))


def _stack(batch: list[np.ndarray]) -> Tensor:
    import torch

    return torch.from_numpy(np.stack(batch))


def _parts(transform: Any, module: Module) -> tuple[Pixels, Scale] | None:
    """The two parts of a transform, or None where the parts give another result on `PROBES`."""
    import torch
    from PIL import Image

    try:
        size, crop, resample, mean, std = _read(transform)
        pixels, scale = Pixels(size, resample, crop), Scale(mean, std, module)
    except (AttributeError, TypeError, ValueError, KeyError):
        return None
    noise = np.random.default_rng(0)
    for width, height in PROBES:
        picture = Image.fromarray(noise.integers(0, 256, (height, width, 3), np.uint8))
        expected, actual = transform(picture), scale(_stack([pixels(picture)]))[0].float()
        if expected.shape != actual.shape or not torch.equal(expected, actual):
            return None
    return pixels, scale


def _read(transform: Any) -> tuple[Any, Any, int, tuple[float, ...], tuple[float, ...]]:
    """(resize, crop, resample, mean, std) of torchvision's preset or a chain of its steps; raises for anything else."""
    if hasattr(transform, "resize_size"):
        size = transform.resize_size
        resize = size[0] if len(size) == 1 else tuple(size)
        crop = transform.crop_size * 2 if len(transform.crop_size) == 1 else transform.crop_size
        return resize, tuple(crop), _resample(transform), tuple(transform.mean), tuple(transform.std)
    named = {type(step).__name__: step for step in transform.transforms}
    resize, crop, normalise = named.get("Resize"), named.get("CenterCrop"), named["Normalize"]
    size = None if resize is None else resize.size
    return (
        size if size is None or isinstance(size, int) else size[0] if len(size) == 1 else tuple(size),
        None if crop is None else tuple(crop.size),
        0 if resize is None else _resample(resize),
        tuple(float(value) for value in normalise.mean),
        tuple(float(value) for value in normalise.std),
    )


def _resample(step: Any) -> int:
    from PIL import Image

    return int(Image.Resampling[step.interpolation.name])
