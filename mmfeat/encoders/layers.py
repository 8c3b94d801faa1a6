"""The layers of a model, and the values between layers during one forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


# Paths at which models keep their layers, in the order of the forward pass; the first path that a model has counts.
_LISTS = (
    "transformer.resblocks",  # open_clip
    "encoder.layers",  # torchvision's ViT
    "encoder.layer",  # BERT inside open_clip
    "trunk_output",  # torchvision's RegNet
    "blocks",
    "stages",
    "layers",
    "block",
    "features",
)
_SERIES = (
    ("layer1", "layer2", "layer3", "layer4"),  # ResNets
    ("s1", "s2", "s3", "s4"),  # timm's RegNet
    ("stage2", "stage3", "stage4", "conv5"),  # ShuffleNet
)


class Point(NamedTuple):
    """A point of a forward pass: the input or the output of a module; `layout` is that of a feature map there."""

    module: Module
    side: str = "output"
    layout: str = "NCHW"  # or "NHWC"


@dataclass(frozen=True)
class Network:
    """A frozen tower: its forward pass (B, ...) -> (B, D), its layers, and the point of its tokens.

    `layout` is that of the feature maps between layers. Of the tokens the first `prefix` are no patches, and with
    `classed` the first is a class token; `norm` stands between the last layer and them (the plain function, without
    hooks). `attends` says that attention
    pools them. A `hooked` forward pass looks into the model by hooks, which a compiler would not see.
    """

    forward: Callable[[Any], Tensor]
    layers: Sequence[Module]
    tokens: Point
    layout: str = "NCHW"
    norm: Callable[[Tensor], Tensor] = lambda states: states
    prefix: int = 0
    classed: bool = False
    attends: bool = False
    hooked: bool = False

    def point(self, spec: EncoderSpec) -> Point:
        """The point that gives the tokens or the prefix of `spec`; raises `EncoderError` if the model lacks it."""
        if spec.output == "tokens":
            return self.tokens
        if not (count := len(self.layers)):
            raise EncoderError(
                f"{spec.name}: no list of layers is known for this model; use tokens, pooled or another one"
            )
        if not 1 <= spec.layer <= count:
            raise EncoderError(f"{spec.name}: the model has {count} layers; use prefix:1 to prefix:{count}")
        return Point(self.layers[-spec.layer], "input", self.layout)


def check_layers(spec: EncoderSpec, count: int) -> None:
    """Raise `EncoderError` unless the model has as many layers, of `count` that are known, as the spec takes."""
    if spec.layers > max(1, count):
        known = f"has {count} layers" if count else "has no list of layers that is known"
        raise EncoderError(f"--layers {spec.layers}: {spec.model} {known}; use no more, or leave it out")


def find_layers(model: Module) -> list[Module]:
    """The transformer blocks or convolutional stages of a model, first to last; empty if their path is unknown."""
    import torch

    for path in _LISTS:
        with contextlib.suppress(AttributeError):
            layers = model.get_submodule(path)
            if isinstance(layers, torch.nn.ModuleList | torch.nn.Sequential):
                return list(layers)
    modules = dict(model.named_children())
    for names in _SERIES:
        if modules.keys() >= set(names):
            return [modules[name] for name in names]
    return []


@contextlib.contextmanager
def capture(points: Sequence[Point]) -> Iterator[list[Tensor]]:
    """Capture (B, T, D) at each point of the forward pass that runs inside the context; removes its hooks."""
    values: list[Any] = [None] * len(points)
    with contextlib.ExitStack() as hooks:
        for number, (module, side, layout) in enumerate(points):

            def keep(
                _: Module, args: Any, kwargs: Any, *output: Any, number: int = number, layout: str = layout
            ) -> None:
                values[number] = rows_of(output[0] if output else given_to(args, kwargs), layout)

            register = module.register_forward_hook if side == "output" else module.register_forward_pre_hook
            hooks.enter_context(register(keep, with_kwargs=True))
        yield values
    if any(value is None for value in values):
        raise EncoderError("this layer takes no part in the forward pass; use another layer or pooled")


def given_to(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The first argument of a call of a layer, positional or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def rows_of(value: Any, layout: str) -> Tensor:
    """(B, T, D) of a sequence or a feature map; a copy, because later layers may work in place."""
    import torch

    value = getattr(value, "last_hidden_state", value)
    if not isinstance(value, torch.Tensor) or value.ndim not in (3, 4):
        raise EncoderError(f"no one sequence or feature map flows here, but {type(value).__name__}; use pooled")
    if value.ndim == 4:
        value = value.flatten(1, 2) if _is_channels_last(value.shape, layout) else value.flatten(2).transpose(1, 2)
    return value.clone(memory_format=torch.contiguous_format)


def from_rows(rows: Tensor, shape: Sequence[int], layout: str) -> Tensor:
    """Values of `shape` from rows (B, T, D): the inverse of what `capture` does to them."""
    if len(shape) == 3:
        return rows
    if _is_channels_last(shape, layout):
        return rows.reshape(len(rows), *shape[1:])
    return rows.transpose(1, 2).reshape(len(rows), *shape[1:])


def _is_channels_last(shape: Sequence[int], layout: str) -> bool:
    """Whether channels are last, as in a part of the layers of some models; feature maps are taken for square."""
    return layout == "NHWC" or shape[1] == shape[2] != shape[3]


def timm_network(model: Any) -> Network:
    """The network of a timm model, whose `forward_features` becomes a module, so that its output can be captured."""
    import torch

    features = torch.nn.Module()
    features.forward = model.forward_features
    layout = "NHWC" if getattr(model, "output_fmt", "") == "NHWC" else "NCHW"

    def forward(images: Tensor) -> Tensor:
        return model.forward_head(features(images))

    return Network(
        forward,
        find_layers(model),
        Point(features, layout=layout),
        layout,
        norm=getattr(model, "norm", torch.nn.Identity()).forward,
        prefix=getattr(model, "num_prefix_tokens", 0),
        classed=getattr(model, "cls_token", None) is not None,
        attends=getattr(model, "attn_pool", None) is not None,
    )
