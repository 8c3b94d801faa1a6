"""Texts of equal length together, for the models in which padding changes a vector (FNet, Funnel, ConvBERT, CANINE)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mmfeat.encoders.layers import Network, Point, capture
from mmfeat.encoders.torch_tower import TorchTower
from mmfeat.encoders.weights import one_line
from mmfeat.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

LETTERS = "abcdefghijklmnopqrstuvwxyz" * 3  # more tokens than one chunk of Reformer
TOLERANCE = 1e-5  # largest difference, as a share of the largest value


def without_padding(asked: str, tower: TorchTower) -> TorchTower:
    """The tower, or one that encodes texts of equal length together where a trial shows that padding changes a vector.

    Such a tower gives no prefixes, since a forward pass over several lengths has no one input of a layer. Its `prepare`
    raises `ValueError` for a text of fewer tokens than the model takes. Raises `EncoderError` for a model that cannot
    encode a text, or encodes one differently at each call.
    """
    import torch

    short, long = _shortest(asked, tower), tower.prepare(" ".join(LETTERS))
    least = _tokens(tower, short)
    if least > _tokens(tower, tower.prepare("")):
        tower = replace(tower, prepare=_Longer(tower, least))
    try:
        alone = torch.cat([_vectors(tower, [short]), _vectors(tower, [long])])
        together, again = _vectors(tower, [short, long]), _vectors(tower, [long])
    except Exception as error:  # each model has errors of its own
        raise _failed(asked, tower, error) from error
    if _are_equal(alone, together):
        return tower
    if not _are_equal(alone[1:], again):
        raise EncoderError(f"{asked}: the model gives another vector of a text at each call; use another checkpoint")
    tokens = torch.nn.Identity()
    wanted = any(spec.output == "tokens" for spec in tower.specs)
    forward = ByLength(tower.network.forward, tower.keep, tower.network.tokens, tokens if wanted else None)
    return replace(tower, network=Network(forward, (), Point(tokens)))


@dataclass(frozen=True)
class ByLength:
    """A forward pass over a padded batch, (B, T) tensors by name, that gives each text the vector it has alone.

    `keep` gives the (B, T) mask of tokens. With `tokens`, an empty module, the tokens (B, T, D) at `point` pass it.
    """

    forward: Callable[[Any], Tensor]
    keep: Callable[[Any], Tensor | None]
    point: Point
    tokens: Module | None

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        import torch

        mask = self.keep(inputs)
        assert mask is not None
        order, vectors, rows = [], [], []
        for length in mask.sum(1).unique():
            chosen = (mask.sum(1) == length).nonzero().flatten()
            columns = mask[chosen[0]]  # padding is on one side, so texts of one length have the same columns
            part = {name: cut(value[chosen], columns) for name, value in inputs.items()}
            with capture([self.point] if self.tokens else []) as captured:
                vectors.append(self.forward(part))
            order.append(chosen)
            rows += [(chosen, columns, values) for values in captured]
        if self.tokens:
            tokens = rows[0][2].new_zeros(*mask.shape, rows[0][2].shape[-1])
            for chosen, columns, values in rows:
                tokens[chosen[:, None], columns.nonzero().flatten()] = values
            self.tokens(tokens)
        return torch.cat(vectors)[torch.cat(order).argsort()]


def cut(values: Tensor, columns: Tensor) -> Tensor:
    """The columns of tensors (B, T), of which some models have others beside them."""
    return values[:, columns] if values.ndim > 1 and values.shape[1] == len(columns) else values


def _are_equal(one: Tensor, other: Tensor) -> bool:
    return float((one - other).abs().max()) <= TOLERANCE * max(1.0, float(one.abs().max()))


def _shortest(asked: str, tower: TorchTower) -> Any:
    """The input of the shortest text that the model can encode: some take no empty text, or none of a few tokens."""
    for count in range(len(LETTERS)):
        prepared = tower.prepare(" ".join(LETTERS[:count]))
        try:
            _vectors(tower, [prepared])
            return prepared
        except Exception as error:  # each model has errors of its own
            failure = error
    raise _failed(asked, tower, failure) from failure


def _failed(asked: str, tower: TorchTower, error: Exception) -> EncoderError:
    reason = one_line(error)
    kind = type(tower.module).__name__
    return EncoderError(f"{asked}: {kind} cannot encode a text ({reason}); use another checkpoint")


def _vectors(tower: TorchTower, batch: list[Any]) -> Tensor:
    import torch

    with torch.no_grad():
        return tower.network.forward(tower.collate(batch)).float()


def _tokens(tower: TorchTower, prepared: Any) -> int:
    """The number of tokens of an input; 0 where an encoder has no mask of tokens."""
    try:
        kept = tower.keep(tower.collate([prepared]))
    except (KeyError, AttributeError):
        return 0
    return 0 if kept is None else int(kept.sum())


@dataclass(frozen=True)
class _Longer:
    """The `prepare` of a tower, for texts of at least so many tokens."""

    tower: TorchTower
    least: int

    def __call__(self, text: str) -> Any:
        prepared = self.tower.prepare(text)
        if _tokens(self.tower, prepared) < self.least:
            raise ValueError(f"the model takes {self.least} tokens or more")
        return prepared
