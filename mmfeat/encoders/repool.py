"""Vectors of image models by another pooling than their own, and from the mean of several hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mmfeat.encoders.layers import Network, Point, capture, check_layers, from_rows, rows_of
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.weights import one_line
from mmfeat.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor

TOLERANCE = 1e-4  # largest difference between a normed last state and the model's final sequence


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
    hidden_points = [Point(layer) for layer in network.layers[-spec.layers :]] if spec.layers > 1 else []

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

    points = [Point(layer) for layer in network.layers[-spec.layers :]] if spec.layers > 1 else []
    try:
        with torch.no_grad(), capture([*points, network.tokens]) as seen:
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
    """The error for a model whose layers cannot be averaged."""
    return EncoderError(
        f"--layers {spec.layers}: the layers of {spec.model} give no hidden states of one shape with one norm "
        "behind them, as those of a ViT do; leave it out"
    )


def no_class_token(spec: EncoderSpec) -> EncoderError:
    """The error for a pooling that needs a class token."""
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
