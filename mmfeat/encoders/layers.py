"""The layers of a model, the values between layers during one forward pass, and vectors that are pooled from them in
another way than the model does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.weights import one_line
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
TOLERANCE = 1e-4  # largest difference between a normed last state and the model's final sequence


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


def hidden_states(layers: Sequence[Module], spec: EncoderSpec) -> list[Point]:
    """The points of the hidden states whose mean the spec takes, none where it takes the model's own final states."""
    return [Point(layer) for layer in layers[-spec.layers :]] if spec.layers > 1 else []


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


def repooled(network: Network, spec: EncoderSpec) -> Network:
    """The network with the pooling and the number of layers that `spec` asks for.

    The model itself runs. Where its tokens are seen, a hook replaces the final sequence by the mean of the last
    hidden states, each behind the model's norm, and for another pooling by rows that all equal the pooled vector: the
    model's own pooling gives such a vector unchanged, and what the model has behind it (norm, projection) follows. Only
    a model that pools by attention is left there: the vector is the pooled states. `cls+mean` runs what is behind the
    pooling over twice the rows.
    """
    names = [] if spec.pooling in ("tower", "none") else spec.pooling.split("+")
    if not names and spec.layers == 1:
        return network
    if "cls" in names and not network.classed:
        raise no_class_token(spec)
    check_layers(spec, len(network.layers))
    hidden_points = hidden_states(network.layers, spec)

    def forward(inputs: Any) -> Tensor:
        import torch

        given: list[Tensor] = []  # holds the states that the model pools

        def change(value: Tensor) -> Tensor:
            rows = rows_of(value, network.tokens.layout)
            rows = torch.stack([network.norm(state) for state in hidden]).mean(0) if hidden_points else rows
            parts = {"cls": rows[:, :1], "mean": rows[:, network.prefix :].mean(1, keepdim=True)}
            given[:] = [torch.cat([parts[name].expand_as(rows) for name in names]) if names else rows]
            return from_rows(given[0], (len(given[0]), *value.shape[1:]), network.tokens.layout)

        with capture(hidden_points) as hidden, _replaced(network.tokens, change):
            vectors = network.forward(inputs)
        if names and network.attends:
            vectors = given[0][:, 0]
        return torch.cat(vectors.chunk(len(names) or 1), 1)

    return replace(network, forward=forward, hooked=True)


def try_out(network: Network, spec: EncoderSpec, inputs: Any) -> None:
    """Run the network once; raises `EncoderError` where its layers are not what `spec` needs of them."""
    import torch

    try:
        with torch.no_grad(), capture([*hidden_states(network.layers, spec), network.tokens]) as seen:
            network.forward(inputs)
        *hidden, final = seen
    # A model of any library may raise any of these for a picture or a layer that does not suit it.
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError, AttributeError) as error:
        reason = one_line(error)
        raise EncoderError(
            f"{spec.model}: it cannot run so ({reason}); leave out --layers and --image-pooling"
        ) from error
    alike = all(state.shape == final.shape for state in hidden)
    if hidden and not (alike and torch.allclose(network.norm(hidden[-1]), final, atol=TOLERANCE, rtol=TOLERANCE)):
        raise no_hidden_states(spec)


def no_hidden_states(spec: EncoderSpec) -> EncoderError:
    return EncoderError(
        f"--layers {spec.layers}: the layers of {spec.model} give no hidden states of one shape with one norm "
        "behind them, as those of a ViT do; leave it out"
    )


def no_class_token(spec: EncoderSpec) -> EncoderError:
    return EncoderError(f"--image-pooling {spec.pooling}: {spec.model} has no class token; use mean or model")


@contextlib.contextmanager
def _replaced(point: Point, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the context the value at a point of the forward pass is `change` of it."""
    if point.side == "output":
        hook = point.module.register_forward_hook(lambda _, args, output: change(output))
    else:
        hook = point.module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        hook.remove()


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
