"""A tower made faster by the same numbers up to rounding: its attention everywhere, the rest on a CPU.

Multi-head attention of torch becomes one projection and one fused kernel. In float32 batch norms are folded into the
convolutions before them (torch's `fuse_conv_bn_eval`), and convolutions have their channels last. Linear layers are
products of oneDNN, with weights that lie as the product wants them, and with the GELU behind the layer: on processors
of other makers than Intel, torch's own float32 products by MKL take twice as long.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

CONVOLUTIONS = ("Conv2d", "Conv2dSame")  # the second is timm's, padded as TensorFlow does
NORMS = ("BatchNorm2d", "BatchNormAct2d")  # the second is timm's, with an activation behind the norm
LINEAR = ("Linear", "NonDynamicallyQuantizableLinear")
GELUS = ("GELU", "GELUActivation")  # the second is that of transformers


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
    calls, behind = _watched(module, forward, inputs)
    changes = Changes()
    convolutions = [called for called in calls if isinstance(called, nn.Conv2d)]
    if len(convolutions) > 1 and convolutions[0].weight.dtype == torch.float32:  # a ViT's only one cuts patches
        for convolution in convolutions:
            weight, norm = convolution.weight.detach(), behind.get(convolution)
            if norm is not None and type(norm).__name__ in NORMS:
                weight, bias = _folded(convolution, norm)
                changes.add(convolution, "bias", bias)
                changes.add(norm, "forward", _behind(norm))
            last = weight.detach().contiguous(memory_format=torch.channels_last)
            changes.add(convolution, "weight", nn.Parameter(last, requires_grad=False))
    for called in calls:
        if type(called).__name__ in LINEAR:
            after = behind.get(called)
            fused = type(after).__name__ in GELUS and getattr(after, "approximate", "none") == "none"
            changes.add(called, "forward", _product(called.weight, called.bias, "gelu" if fused else "none"))
            if fused and after is not None:
                changes.add(after, "forward", _unchanged)
        if isinstance(called, FusedAttention):
            attention = called.attention
            changes.add(called, "project", _product(attention.in_proj_weight, attention.in_proj_bias))
    return changes


def _watched(
    module: nn.Module, forward: Callable[[Any], Tensor], inputs: Any
) -> tuple[Counter[Any], dict[Any, nn.Module]]:
    """How often each module is called in a forward pass; for a convolution or linear layer the norm or GELU that alone
    takes the layer's output as it is."""
    calls: Counter[Any] = Counter()
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}  # the tensor is kept, so that no other gets its id
    behind: dict[Any, nn.Module] = {}

    def before(called: nn.Module, given: tuple[Any, ...]) -> None:
        calls[called] += 1
        layer, _, version = made.get(id(given[0]) if given else 0, (None, None, -1))
        if layer is not None and type(called).__name__ in NORMS + GELUS and given[0]._version == version:
            behind[layer] = called

    def after(called: nn.Module, given: Any, output: Any) -> None:
        if type(called).__name__ in CONVOLUTIONS + LINEAR:
            made[id(output)] = called, output, output._version

    hooks = [part.register_forward_pre_hook(before) for part in module.modules()]
    hooks += [part.register_forward_hook(after) for part in module.modules()]
    try:
        forward(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, {layer: after for layer, after in behind.items() if calls[layer] == calls[after] == 1}


def _folded(convolution: Any, norm: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a convolution that does the work of the batch norm behind it, too."""
    statistics = (norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    return fuse_conv_bn_weights(convolution.weight, convolution.bias, *statistics)


def _behind(norm: Any) -> Callable[[Tensor], Tensor]:
    """What a norm does once it has scaled: nothing, or timm's activation."""
    return norm.act.forward if hasattr(norm, "act") else _unchanged


def _unchanged(values: Tensor) -> Tensor:
    return values


def _product(weight: Tensor, bias: Tensor | None, behind: str = "none") -> Callable[[Tensor], Tensor]:
    """A linear layer, and the function behind it, by oneDNN, with a copy of the weight in its own layout."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    bias, form = None if bias is None else bias.detach(), "none" if behind == "gelu" else ""
    return lambda values: torch.ops.mkldnn._linear_pointwise(values, packed, bias, behind, [], form)


class FusedAttention(nn.Module):
    """Self-attention as `nn.MultiheadAttention` computes it: (B, T, D) -> (B, T, D).

    torch's own module transposes every sequence twice, which for short texts costs as much as attention.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention
        self.project = self._projected

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        **rest: Any,
    ) -> tuple[Tensor, Tensor | None]:
        module = self.attention
        odd_mask = key_padding_mask is not None or (attn_mask is not None and attn_mask.ndim != 2)
        if not (query is key is value) or odd_mask or need_weights or query.ndim != 3:
            given = {"key_padding_mask": key_padding_mask, "need_weights": need_weights, "attn_mask": attn_mask}
            return module(query, key, value, **given, **rest)
        heads = self.project(query).unflatten(-1, (3, module.num_heads, module.head_dim))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=_additive(attn_mask, heads))
        return module.out_proj(attended.transpose(1, 2).flatten(2)), None

    def _projected(self, query: Tensor) -> Tensor:
        """(B, T, 3 D) queries, keys and values of (B, T, D), by the product that `project` is until it is replaced."""
        return nn.functional.linear(query, self.attention.in_proj_weight, self.attention.in_proj_bias)


def fuse_attention(module: nn.Module) -> None:
    """Replace each multi-head attention inside `module` by `FusedAttention` where both compute the same."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.MultiheadAttention) and not isinstance(parent, FusedAttention) and _is_plain(child):
                setattr(parent, name, FusedAttention(child))


def _is_plain(attention: nn.MultiheadAttention) -> bool:
    same_width = attention.in_proj_weight is not None
    return same_width and attention.batch_first and attention.bias_k is None and not attention.add_zero_attn


def _additive(mask: Tensor | None, heads: Tensor) -> Tensor | None:
    """A (T, T) mask for the kernel, where True shows a token; in a mask of `nn.MultiheadAttention` True hides it."""
    if mask is None or mask.dtype == torch.bool:
        return None if mask is None else torch.logical_not(mask)
    return mask.to(heads.dtype)
