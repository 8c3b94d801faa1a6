"""A float32 tower made faster for a CPU, by the same numbers up to rounding.

Batch norms are folded into the convolutions before them (torch's `fuse_conv_bn_eval`), convolutions have their channels
last, and linear layers are products of oneDNN with weights that lie as the product wants them: on processors of other
makers than Intel, torch's own products by MKL take twice as long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from mmfeat.encoders.attention import FusedAttention

CONVOLUTIONS = ("Conv2d", "Conv2dSame")  # the second is timm's, padded as TensorFlow does
NORMS = ("BatchNorm2d", "BatchNormAct2d")  # the second is timm's, with an activation behind the norm
LINEAR = (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear)


class Changes:
    """Values of attributes of modules that make a forward pass faster; `swap` sets them, or sets them back."""

    def __init__(self) -> None:
        self._values: list[tuple[nn.Module, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, module: nn.Module, name: str, value: Any) -> None:
        self._values.append((module, name, value))

    def swap(self) -> None:
        """Exchange the values of the modules for those kept here."""
        for number, (module, name, value) in enumerate(self._values):
            own = module.__dict__.get(name, module._parameters.get(name))
            if value is None and name in module.__dict__:
                delattr(module, name)  # the method of the class is behind it
            else:
                setattr(module, name, value)
            self._values[number] = (module, name, own)


def faster(module: nn.Module, forward: Callable[[Any], Tensor], inputs: Any) -> Changes:
    """The changes for a tower whose forward pass runs once over `inputs`, which one sample makes cheapest."""
    calls, pairs = _watched(module, forward, inputs)
    changes = Changes()
    weights: dict[nn.Module, nn.Parameter] = {}
    for convolution, norm in pairs:
        if calls[convolution] == calls[norm] == 1:
            weights[convolution], bias = _folded(convolution, norm)
            changes.add(convolution, "bias", bias)
            changes.add(norm, "forward", _behind(norm))
    convolutions = [called for called in calls if isinstance(called, nn.Conv2d)]
    for convolution in convolutions if len(convolutions) > 1 else ():  # a ViT's only one cuts patches
        weight = weights.get(convolution, convolution.weight).detach()
        last = weight.contiguous(memory_format=torch.channels_last)
        changes.add(convolution, "weight", nn.Parameter(last, requires_grad=False))
    for called in calls:
        if type(called) in LINEAR:
            changes.add(called, "forward", _product(called.weight, called.bias))
        if isinstance(called, FusedAttention):
            attention = called.attention
            changes.add(called, "project", _product(attention.in_proj_weight, attention.in_proj_bias))
    return changes


def _watched(
    module: nn.Module, forward: Callable[[Any], Tensor], inputs: Any
) -> tuple[Counter[Any], list[tuple[Any, Any]]]:
    """How often each module is called in a forward pass, and the norms with the convolution whose output they get."""
    calls: Counter[Any] = Counter()
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}  # the tensor is kept, so that no other gets its id
    pairs: list[tuple[Any, Any]] = []

    def before(called: nn.Module, given: tuple[Any, ...]) -> None:
        calls[called] += 1
        convolution, _, version = made.get(id(given[0]) if given else 0, (None, None, -1))
        if type(called).__name__ in NORMS and convolution is not None and given[0]._version == version:
            pairs.append((convolution, called))

    def after(called: nn.Module, given: Any, output: Any) -> None:
        if type(called).__name__ in CONVOLUTIONS:
            made[id(output)] = called, output, output._version

    hooks = [part.register_forward_pre_hook(before) for part in module.modules()]
    hooks += [part.register_forward_hook(after) for part in module.modules()]
    try:
        forward(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, pairs


def _folded(convolution: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a convolution that does the work of the batch norm behind it, too."""
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    return fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)


def _behind(norm: Any) -> Callable[[Tensor], Tensor]:
    """What a norm does after it has scaled: nothing, or timm's activation."""
    return norm.act if hasattr(norm, "act") else _unchanged


def _unchanged(values: Tensor) -> Tensor:
    return values


def _product(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A linear layer by oneDNN, with a copy of the weight in its own layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return partial(_multiplied, packed, None if bias is None else bias.detach())


def _multiplied(weight: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")
