"""LoRA (Hu et al., ICLR 2022) through peft: low-rank adapters in the moving layers instead of their own weights."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfeat.encoders.torch_tower import TorchTower
from mmfeat.errors import ConfigError

FIXED_FACTOR = ".lora_A."  # of the two; interpolation scales the other, which is 0 at first


def adapted_layers(tower: TorchTower, depths: Mapping[str, int]) -> dict[str, int]:
    """Name -> depth of the linear layers among the moving parameters. Raises `ConfigError` where LoRA cannot work.

    torch's own attention, as in CLIP and torchvision, multiplies with bare parameters: it has no such layers.
    """
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise ConfigError("--lora needs peft; install it with pip install 'mmfeat[lora]'") from error
    owners = {name.rpartition(".")[0]: depth for name, depth in depths.items()}
    found = {name: depth for name, depth in owners.items() if type(tower.module.get_submodule(name)) is nn.Linear}
    if not found:
        raise ConfigError(f"--lora: no linear layer moves in {tower.specs[0].name}; unfreeze without --lora")
    return found


def adapt(
    tower: TorchTower, depths: Mapping[str, int], rank: int
) -> tuple[dict[str, int], Callable[[], dict[str, Tensor]]]:
    """Put adapters beside the linear layers among the moving parameters.

    Returns name -> depth of the adapters, and a function that gives the tower's own parameters with the adapters
    merged in, so that nobody who uses the result needs peft. First weights do not depend on torch's global state.
    """
    linear = adapted_layers(tower, depths)
    from peft import LoraConfig, inject_adapter_in_model

    whole_names = "|".join(map(re.escape, linear))  # a list would also match the ends of other names
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=whole_names), tower.module)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, parameter in tower.module.named_parameters():
        owner, is_adapter, _ = name.partition(".lora_")
        parameter.requires_grad_(False)
        if is_adapter:
            found[name] = linear[owner]
            if FIXED_FACTOR in name:
                drawn = torch.empty(parameter.shape)  # on the CPU, as the generator
                parameter.data.copy_(nn.init.kaiming_uniform_(drawn, math.sqrt(5), generator=generator))
    return found, lambda: {f"{name}.weight": _merged(tower.module.get_submodule(name)) for name in linear}


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """The weight of one of peft's layers as a plain one."""
    return layer.base_layer.weight + layer.get_delta_weight("default")
