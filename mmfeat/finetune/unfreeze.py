"""The parts of a tower that learn: parameters by name and depth, adapters (LoRA), and the forward pass that begins at
the n-th last layer, from cached hidden states."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module

from mmfeat.encoders.layers import capture, from_rows, given_to
from mmfeat.encoders.torch_tower import TorchTower, to_device
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.finetune.settings import ALL
from mmfeat.version import install_command

TOLERANCE = 1e-4  # largest difference of vectors between both paths, as a share of max(1, largest value)
FIXED_FACTOR = ".lora_A."  # stands in the names of the factor A of adapters B A; interpolation scales B, 0 at first


def moving_parameters(tower: TorchTower, forward: Callable[[], Tensor], count: int, projection: bool) -> dict[str, int]:
    """The parameters that learn, with their depths: 0 in the last layer and behind it, 1 in the one before, and so on.

    `forward` is a pass over any input, from the `count`-th last layer or from the start. Only parameters that the
    gradient of `forward` reaches take part in the vector. Among these learn the last `count` layers, the norms behind
    the layers, and with `projection` everything else behind the layers; with ALL, every parameter. The running
    statistics of norms are no parameters and stay as they are.
    """
    reached, layers = _reached(tower.module, forward), tower.network.layers[::-1]
    in_layers = {name: depth for depth, layer in enumerate(layers) for name in _names(tower.module, layer)}
    depths = {**dict.fromkeys(_behind(tower, forward), 0), **in_layers}
    if count == ALL:
        return {name: depths.get(name, len(layers)) for name in reached}

    def moves(name: str) -> bool:
        is_chosen = name in in_layers or projection or _is_norm(tower.module, name)
        return is_chosen and depths.get(name, count) < count

    return {name: depths[name] for name in reached if moves(name)}


def _reached(module: Module, forward: Callable[[], Tensor]) -> list[str]:
    """Names of the parameters that the gradient of `forward` reaches, in the order of the module."""
    names = dict(module.named_parameters())
    module.requires_grad_(True)
    total = forward().float().sum()
    gradients: tuple[Tensor | None, ...] = (None,) * len(names)
    if total.requires_grad:  # False if nothing with parameters follows the last layer
        gradients = torch.autograd.grad(total, list(names.values()), allow_unused=True)
    module.requires_grad_(False)
    return [name for name, gradient in zip(names, gradients, strict=True) if gradient is not None]


def _behind(tower: TorchTower, forward: Callable[[], Tensor]) -> list[str]:
    """Names of the parameters behind the last layer, norms and projections, which a gradient reaches that is stopped at
    the last layer."""
    if not tower.network.layers:
        return []
    hook = tower.network.layers[-1].register_forward_hook(lambda _, inputs, output: _detached(output))
    try:
        return _reached(tower.module, forward)
    finally:
        hook.remove()


def _detached(output: Any) -> Any:
    """The output of a layer without gradients; beside tensors, a layer may give None and plain values."""
    if isinstance(output, Mapping):
        return type(output)(**{name: _detached(value) for name, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(map(_detached, output))
    return output.detach() if isinstance(output, Tensor) else output


def _names(module: Module, layer: Module) -> list[str]:
    identities = {id(parameter) for parameter in layer.parameters()}
    return [name for name, parameter in module.named_parameters() if id(parameter) in identities]


def _is_norm(module: Module, name: str) -> bool:
    return "norm" in type(module.get_submodule(name.rpartition(".")[0])).__name__.lower()


class Resumed:
    """A forward pass that begins at the `count`-th last layer: states (B, T, D) and mask (B, T) -> vectors (B, D).

    The code of the model runs, so pooling, norms and masks are the library's. A blank picture, or token ids that no
    layer looks at, pass through the earlier layers unchanged, and a hook at the `count`-th last layer replaces them by
    the hidden states. The earlier layers get another `forward`, because a hook can change the inputs and outputs of a
    layer but not keep the layer from computing. After each pass the layers are as before.
    """

    def __init__(self, tower: TorchTower, count: int, device: str) -> None:
        self.tower, self.layout = tower, tower.network.layout
        self.blank = None if tower.stand_in else to_device(blank_inputs(tower), device, torch.float32)
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
        self.skipped, self.first = tower.network.layers[:-count], first
        self.states: Tensor | None = None

    def __call__(self, hidden: Tensor, mask: Tensor) -> Tensor:
        self.states = hidden if self.shape is None else from_rows(hidden, self.shape, self.layout)
        inputs = self.blank if self.tower.stand_in is None else self.tower.stand_in(mask)
        with self._shortened():
            return self.tower.network.forward(inputs)

    @contextmanager
    def _shortened(self) -> Iterator[None]:
        """Within the context the skipped layers return their inputs, and the layer after them takes the states."""
        hook = self.first.register_forward_pre_hook(self._give, with_kwargs=True)
        before = [vars(layer).get("forward") for layer in self.skipped]
        for layer in self.skipped:
            layer.forward = lambda inputs, *args, **kwargs: inputs
        try:
            yield
        finally:
            hook.remove()
            for layer, forward in zip(self.skipped, before, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward

    def _give(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self.states, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): self.states}


def why_not_resumed(tower: TorchTower, count: int, contents: list[Any], device: str) -> str:
    """The reason why the forward pass of a tower cannot begin at the `count`-th last layer, "" if it can.

    Both passes over some texts or pictures are compared in float32.
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
    # A model that is built in another way may raise any of these.
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
        return "its layers cannot be run one by one, as those of a plain transformer"
    apart = (whole - resumed).abs().max() / whole.abs().max().clamp_min(1)
    return "" if apart <= TOLERANCE else f"beginning there changes its vectors by {float(apart):.1g}"


def blank_inputs(tower: TorchTower) -> Any:
    """Inputs of a forward pass over one empty text or black picture."""
    from PIL import Image

    return tower.collate([tower.prepare("a b c d" if tower.stand_in else Image.new("RGB", (64, 64)))])


def adapted_layers(tower: TorchTower, depths: Mapping[str, int]) -> dict[str, int]:
    """The linear layers among the moving parameters, by name, with their depths. Raises `ConfigError` where LoRA cannot
    work: torch's own attention, as in CLIP and torchvision, multiplies with bare parameters and has no linear layers.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"--lora needs peft; {install_command('lora')}") from error
    owners = {name.rpartition(".")[0]: depth for name, depth in depths.items()}
    linear = {name: depth for name, depth in owners.items() if type(tower.module.get_submodule(name)) is nn.Linear}
    if not linear:
        raise ConfigError(f"--lora: no linear layer moves in {tower.specs[0].name}; unfreeze without --lora")
    return linear


def adapt(
    tower: TorchTower, depths: Mapping[str, int], rank: int
) -> tuple[dict[str, int], Callable[[], dict[str, Tensor]]]:
    """Put adapters beside the linear layers among the moving parameters.

    Returns the depths of the adapters by name, and a function that computes the weights of the adapted layers with the
    adapters merged in, so that prediction needs no peft. First weights do not depend on torch's global state.
    """
    linear = adapted_layers(tower, depths)
    from peft import LoraConfig, inject_adapter_in_model

    # peft compares an expression with whole names, but the names in a list with the ends of names.
    whole_names = "|".join(map(re.escape, linear))
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=whole_names), tower.module)
    generator = torch.Generator().manual_seed(0)
    adapters = {}
    for name, parameter in tower.module.named_parameters():
        owner, is_adapter, _ = name.partition(".lora_")
        parameter.requires_grad_(False)
        if is_adapter:
            adapters[name] = linear[owner]
            if FIXED_FACTOR in name:
                drawn = torch.empty(parameter.shape)  # the generator draws on the CPU
                parameter.data.copy_(nn.init.kaiming_uniform_(drawn, math.sqrt(5), generator=generator))
    return adapters, lambda: {f"{name}.weight": _merged(tower.module.get_submodule(name)) for name in linear}


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """The weight of an adapted layer: W + B A * alpha / rank."""
    return layer.base_layer.weight + layer.get_delta_weight("default")
