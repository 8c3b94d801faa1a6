"""What moves: the parameters of a tower that learn, by name, and how deep each lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from mmfeat.encoders.torch_tower import TorchTower
from mmfeat.finetune.settings import ALL


def moving_parameters(tower: TorchTower, forward: Callable[[], Tensor], count: int, projection: bool) -> dict[str, int]:
    """Name -> depth: 0 in the last layer and behind it, 1 in the one before, and so on.

    `forward` is a pass over anything, from the n-th last layer on or from the start. What its gradient reaches takes
    part in the vector. Of that, the last `count` layers move, norms behind them, and with `projection` all else
    behind them; with ALL, everything. Norms keep their running statistics: those are no parameters.
    """
    reached = _reached(tower.module, forward)
    layers = tower.network.layers[::-1]
    depths = {name: depth for depth, layer in enumerate(layers) for name in _names(tower.module, layer)}
    depths = {**dict.fromkeys(_behind(tower, forward), 0), **depths}
    if count == ALL:
        return {name: depths.get(name, len(layers)) for name in _ordered(tower, reached)}
    last = {name for layer in layers for name in _names(tower.module, layer)}

    def moves(name: str) -> bool:
        is_chosen = name in last or projection or _is_norm(tower.module, name)
        return is_chosen and depths.get(name, count) < count

    return {name: depths[name] for name in _ordered(tower, reached) if moves(name)}


def _reached(module: Module, forward: Callable[[], Tensor]) -> set[str]:
    """Names of the parameters that the gradient of `forward` comes to."""
    names = dict(module.named_parameters())
    module.requires_grad_(True)
    total = forward().float().sum()
    gradients: tuple[Tensor | None, ...] = (None,) * len(names)
    if total.requires_grad:  # nothing may stand behind the last layer
        gradients = torch.autograd.grad(total, list(names.values()), allow_unused=True)
    module.requires_grad_(False)
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is not None}


def _behind(tower: TorchTower, forward: Callable[[], Tensor]) -> set[str]:
    """What the gradient still reaches when it is stopped at the last layer: norms and projections."""
    if not tower.network.layers:
        return set()
    hook = tower.network.layers[-1].register_forward_hook(lambda _, given, output: _detached(output))
    try:
        return _reached(tower.module, forward)
    finally:
        hook.remove()


def _detached(output: Any) -> Any:
    return output.detach() if isinstance(output, Tensor) else type(output)(map(_detached, output))


def _names(module: Module, layer: Module) -> list[str]:
    """Full names of a layer's parameters."""
    own = {id(parameter) for parameter in layer.parameters()}
    return [name for name, parameter in module.named_parameters() if id(parameter) in own]


def _ordered(tower: TorchTower, names: set[str]) -> list[str]:
    return [name for name, _ in tower.module.named_parameters() if name in names]


def _is_norm(module: Module, name: str) -> bool:
    return "norm" in type(module.get_submodule(name.rpartition(".")[0])).__name__.lower()
