"""A tower's own forward pass from its n-th last layer on: what comes before is left out, and its result is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmfeat.encoders.layers import capture, from_rows, given_to
from mmfeat.encoders.torch_tower import TorchTower, to_device
from mmfeat.errors import EncoderError

TOLERANCE = 1e-4  # of a vector's largest value, where that is above 1


class Resumed:
    """(B, T, D) input of the n-th last layer and (B, T) which tokens are there -> (B, D).

    The model's own code runs, so pooling, norms and masks are the library's. Layers before pass on what they get; one
    blank picture, or token ids that nobody looks at, go the way up to the layer where the given input comes in. The
    tower is good for nothing else afterwards.
    """

    def __init__(self, tower: TorchTower, count: int, device: str) -> None:
        self.tower, self.layout = tower, tower.network.layout
        self.blank = None if tower.stand_in else to_device(_blank(tower), device, torch.float32)
        first, shapes = tower.network.layers[-count], []
        self.shape: torch.Size | None = None
        if self.blank is not None:
            hook = first.register_forward_pre_hook(
                lambda _, args, kwargs: shapes.append(given_to(args, kwargs).shape), with_kwargs=True
            )
            with torch.no_grad():
                tower.network.forward(self.blank)
            hook.remove()
            self.shape = shapes[0]
        for layer in tower.network.layers[:-count]:
            layer.forward = _pass_on
        first.register_forward_pre_hook(self._give, with_kwargs=True)
        self.given: Tensor | None = None

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        self.given = hidden if self.shape is None else from_rows(hidden, self.shape, self.layout)
        inputs = self.blank if self.tower.stand_in is None else self.tower.stand_in(mask)
        return self.tower.network.forward(inputs)

    def _give(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.given, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): self.given}


def why_not_resumed(tower: TorchTower, count: int, contents: list[Any], device: str) -> str:
    """Why the tower cannot begin at its n-th last layer, found out on some texts or pictures; "" if it can.

    Compares both ways in float32. The tower is used up.
    """
    try:
        point = tower.network.point(tower.specs[0])
        inputs = to_device(tower.collate([tower.prepare(content) for content in contents]), device, torch.float32)
        tower.module.to(device)
        with torch.no_grad():
            with capture([point]) as captured:
                whole = tower.network.forward(inputs)
            hidden, kept = captured[0], tower.keep(inputs)
            kept = hidden.new_ones(hidden.shape[:2], dtype=torch.bool) if kept is None else kept
            longest = int(kept.sum(1).max())
            resumed = Resumed(tower, count, device)(hidden[:, :longest], kept[:, :longest])
    except EncoderError as error:
        return str(error)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:  # a model of another make
        return f"its forward pass cannot begin there ({' '.join(str(error).split())[:120]})"
    apart = (whole - resumed).abs().max() / whole.abs().max().clamp_min(1)
    return "" if apart <= TOLERANCE else f"beginning there changes its vectors by {float(apart):.1g}"


def _blank(tower: TorchTower) -> Any:
    from PIL import Image

    return tower.collate([tower.prepare(Image.new("RGB", (64, 64)))])


def blank_inputs(tower: TorchTower) -> Any:
    """The inputs of a forward pass over one empty text or black picture."""
    return _blank(tower) if tower.stand_in is None else tower.collate([tower.prepare("")])


def _pass_on(value: Any, *args: Any, **kwargs: Any) -> Any:
    return value
