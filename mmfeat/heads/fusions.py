"""The fusions: late, concat, gated, film, film-concat, cross-attention and linear. Each fusion maps the image vector i
and the text vector t of a sample, and the columns of a table as a third vector where there are any, to logits.

All fusions but late and linear end in the same classifier, MLP(x) = 256 -> 64 -> classes with batch normalisation and
dropout. The docstring of a fusion that compares the modalities says what it does with a single modality.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfeat.baselines.zero_shot import SCALE
from mmfeat.heads.layers import Batch, Classifier, Fusion, LayerNorm, Linear, Scalar, Shape, Stacked, Tokens, product
from mmfeat.samples.table_columns import TABLE

HIDDEN = (256, 64)  # widths of the classifier's hidden layers, except for the late fusion
LATE_WIDTH = 512
GATED_WIDTH = 256  # width to which both modalities are projected where their widths differ
GATE_WIDTH = 64
GENERATOR_WIDTH = 64
TOKEN_WIDTH = 128
ATTENTION_HEADS = 8
SHARPNESS = (TOKEN_WIDTH // ATTENTION_HEADS) ** -0.5  # the scale of scaled dot products
Layers: TypeAlias = "list[tuple[Tensor, Tensor]]"  # weights (K, D, W) and biases (K, 1, W), one pair a source
PIECE = 32  # samples of a batch that attend at once on a CPU: their scores fit into a core's cache
CLOSED = -4.0  # first logit of the gate: sigmoid(-4) = 0.018


class Concat(Fusion):
    """Concatenation, MLP([i; t]): the vectors of all modalities side by side, then the classifier."""

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        self.classifier = Classifier(heads, shape.total, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.classifier(torch.cat(list(vectors.values()), -1), batch.keep)


class LinearFusion(Fusion):
    """A linear classifier, W [i; t] + b, on the vectors of all encoders scaled to the length 1 and standardised.

    It can start from class names: its logits are then those of `mmfeat.baselines.zero_shot` where no vector is missing.
    """

    unit = True

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        self.output = Linear(heads, shape.total, classes)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.output(torch.cat(list(vectors.values()), -1))

    @torch.no_grad()
    def start_from(self, head: int, classes: Mapping[int, Tensor]) -> None:
        weight, bias = torch.zeros_like(self.output.weight[head]), torch.zeros_like(self.output.bias[head])
        start = 0
        for given in (module for modality in self.inputs for (module,) in self._inputs(modality)):
            width = given.mean.shape[-1]
            if start in classes:
                scaled = SCALE / len(classes) * classes[start].T
                weight[start : start + width] = given.std[head].T * scaled
                bias += given.mean[head] @ scaled
            start += width
        self.output.weight[head], self.output.bias[head] = weight, bias


class Late(Fusion):
    """Late fusion, W relu(V [P i; Q t]): a linear projection of each modality to 512, joined only afterwards."""

    units = LATE_WIDTH

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        self.projections = nn.ModuleDict({m: Linear(heads, shape.width(m), LATE_WIDTH) for m in shape.widths})
        self.classifier = Classifier(heads, LATE_WIDTH * len(shape.widths), classes, (LATE_WIDTH,), normalised=False)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        projected = [self.projections[modality](x) for modality, x in vectors.items()]
        return self.classifier(torch.cat(projected, -1), batch.keep)


class Gated(Fusion):
    """Gated fusion, MLP(g t + (1 - g) i) with g = sigmoid(W relu(V [i; t])).

    One number g for each sample weighs the text of the sample against its image. Modalities of different widths are
    first projected to 256. A single modality is weighed against zeros, three by the softmax of two numbers and 0.
    """

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        widths = {shape.width(modality) for modality in shape.widths}
        width = GATED_WIDTH if len(widths) > 1 else widths.pop()
        self.projections = nn.ModuleDict(
            {m: Linear(heads, shape.width(m), width) for m in shape.widths if shape.width(m) != width}
        )
        self.gate_hidden = Linear(heads, width * len(shape.widths), GATE_WIDTH)
        self.gate = Linear(heads, GATE_WIDTH, max(1, len(shape.widths) - 1))
        self.classifier = Classifier(heads, width, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        alike = [self.projections[m](x) if m in self.projections else x for m, x in vectors.items()]
        logits = self.gate(F.relu(self.gate_hidden(torch.cat(alike, -1))))
        if len(alike) > 2:
            shares = F.pad(logits, (1, 0)).softmax(-1).unsqueeze(-1)
            return self.classifier((shares * torch.stack(alike, -2)).sum(-2), batch.keep)
        gate = logits.sigmoid()
        image = alike[0] if len(alike) > 1 else torch.zeros_like(alike[0])
        return self.classifier(gate * alike[-1] + (1 - gate) * image, batch.keep)


class Modulation(Stacked):
    """Feature-wise modulation (FiLM; Perez et al., AAAI 2018), (1 + tanh(gamma)) x + beta: factors between 0 and 2.

    gamma and beta are computed from the condition c: [gamma; beta] = W relu(V c), with the hidden width 64.
    """

    def __init__(self, heads: int, condition: int, width: int) -> None:
        super().__init__()
        self.hidden = Linear(heads, condition, GENERATOR_WIDTH)
        self.output = Linear(heads, GENERATOR_WIDTH, 2 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.output(F.relu(self.hidden(condition))).chunk(2, dim=-1)
        return 2 * torch.sigmoid(2 * gamma) * x + beta  # 1 + tanh(gamma); the tanh of torch takes six times as long


class Film(Fusion):
    """FiLM, MLP([m(i; t); t]): the text t modulates the features of the image i; of more modalities, all others
    together modulate the first. A single modality modulates itself."""

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        modulated, *conditions = shape.widths.keys()
        condition = sum(map(shape.width, conditions or [modulated]))
        self.modulation = Modulation(heads, condition, shape.width(modulated))
        self.classifier = Classifier(heads, shape.total, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        image, *others = vectors.values()
        modulated = self.modulation(image, torch.cat(others or [image], -1))
        return self.classifier(torch.cat([modulated, *others], -1), batch.keep)


class FilmConcat(Fusion):
    """FiLM of the concatenation, MLP(m(x; x)) with x = [i; t]: both modalities together modulate both."""

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        self.modulation = Modulation(heads, shape.total, shape.total)
        self.classifier = Classifier(heads, shape.total, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        joined = torch.cat(list(vectors.values()), -1)
        return self.classifier(self.modulation(joined, joined), batch.keep)


class TokenInput(Stacked):
    """The tokens of all sources of a modality in one sequence: layer-normed and projected to 128, source by source.

    The projections are never computed alone. A linear layer behind them is multiplied with their weights first, and a
    weighted mean of projected tokens is the projection of the weighted mean: both leave a smaller product.
    """

    def __init__(self, heads: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(Linear(heads, width, TOKEN_WIDTH) for width in widths)

    def merged(self, weight: Tensor, bias: Tensor) -> Layers:
        """The projection of each source with a layer behind it, of a (K, 128, W) weight and a (K, 1, W) bias."""
        return [(own.weight @ weight, own.bias @ weight + bias) for own in self._linears()]

    def weighted(self, sources: Sequence[Tensor], weights: Tensor) -> Tensor:
        """[(K, B, T, D)] tokens and (K * B, H, sum of T) weights -> (K, B * H, 128), sums of projected tokens."""
        parts = []
        shares = weights.split([x.shape[2] for x in sources], -1)
        for own, x, share in zip(self._linears(), sources, shares, strict=True):
            mean = torch.bmm(share, x.flatten(0, 1)).unflatten(0, x.shape[:2]).flatten(1, 2)
            parts.append(torch.bmm(mean, own.weight) + share.sum(-1).view(len(x), -1, 1) * own.bias)
        return torch.stack(parts).sum(0)

    def _linears(self) -> Iterable[Linear]:
        return cast("Iterable[Linear]", self.projections)


class MeanSoftmax(torch.autograd.Function):
    """Scores (N, T, P) and shares (N, T) -> (N, P), the mean of the softmax over P with the shares as weights.

    torch's own derivative writes and reads (N, T, P) numbers more often, which is most of the time of attention.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, share: Tensor) -> Tensor:
        weights = scores.softmax(-1)
        ctx.save_for_backward(weights, share)
        return torch.bmm(share.unsqueeze(1), weights).squeeze(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        weights, share = ctx.saved_tensors
        slopes = weights * gradient.unsqueeze(1)
        return slopes.addcmul_(weights, slopes.sum(-1, keepdim=True), value=-1).mul_(share.unsqueeze(-1)), None


class Attention(Stacked):
    """Multi-head attention of 8 heads (Vaswani et al., 2017), then the layer-normed mean over the present queries.

    An additional, learned key stands for "nothing"; a sample without any token attends to that key alone. The mean is
    taken of the attention weights, before values are computed, which gives the same and leaves one value a sample.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.query, self.output = (
            Linear(heads, TOKEN_WIDTH, TOKEN_WIDTH),
            Linear(heads, TOKEN_WIDTH, TOKEN_WIDTH),
        )
        self.key_value = Linear(heads, TOKEN_WIDTH, 2 * TOKEN_WIDTH)
        self.nothing = nn.Parameter(torch.zeros(heads, 1, 1, TOKEN_WIDTH))
        self.norm = LayerNorm(heads, TOKEN_WIDTH)

    def layers(self, asking: TokenInput, asked: TokenInput) -> tuple[Layers, Layers, Tensor]:
        """From tokens to queries, from tokens to keys, and the (K, 1, 128) key for nothing."""
        weight, bias = (x.chunk(2, -1)[0] for x in (self.key_value.weight, self.key_value.bias))
        query = asking.merged(self.query.weight * SHARPNESS, self.query.bias * SHARPNESS)
        return query, asked.merged(weight, bias), self.nothing[:, 0] @ weight + bias

    def forward(
        self, layers: tuple[Layers, Layers, Tensor], queries: Tokens, asked: TokenInput, keys: Tokens
    ) -> Tensor:
        """The layers, [(K, B, T, D), (K, B, T)], the input of the keys, [(K, B, P, D), (K, B, P)] -> (K, B, 128)."""
        heads, batch = keys[0][1].shape[:2]
        rounded = self.query.rounded and self.training
        query = _of_heads([_through(x, layer, rounded) for (x, _), layer in zip(queries, layers[0], strict=True)])
        parts = [_through(x, layer, rounded) for (x, _), layer in zip(keys, layers[1], strict=True)]
        key = _of_heads([*parts, layers[2].unsqueeze(1).expand(-1, batch, -1, -1)])
        mask = F.pad(torch.cat([mask for _, mask in keys], 2), (0, 1), value=True).flatten(0, 1)
        if self.training and key.device.type == "cpu" and bool(mask.all()):  # a GPU would wait for the answer
            scores = torch.bmm(query, key.transpose(1, 2))
        else:
            hidden = torch.zeros_like(mask, dtype=key.dtype).masked_fill(~mask, -torch.inf)
            scores = torch.baddbmm(_repeated(hidden).unsqueeze(1), query, key.transpose(1, 2))
        present = torch.cat([mask for _, mask in queries], 2).flatten(0, 1)
        share = present / present.sum(1, keepdim=True).clamp_min(1)
        weights = MeanSoftmax.apply(scores, _repeated(share)).unflatten(0, (-1, ATTENTION_HEADS))
        mean = asked.weighted([x for x, _ in keys], weights[..., :-1])
        mean = mean + weights[..., -1:].reshape(heads, -1, 1) * self.nothing[:, 0]
        value = self.key_value.weight.chunk(2, -1)[1].unflatten(-1, (ATTENTION_HEADS, -1)).transpose(1, 2)
        mean = mean.unflatten(1, (batch, -1)).transpose(1, 2) @ value  # (K, 8, B, 16)
        mean = mean.transpose(1, 2).flatten(2) + self.key_value.bias.chunk(2, -1)[1]
        return self.norm(self.output(mean) * present.any(1).view(heads, batch, 1))


class CrossAttention(Fusion):
    """Cross-attention, MLP([i; t; sigmoid(s) A]): A (128) is the attention of text to image tokens, s a learned gate.

    The fusion needs tokens of text and image; the tokens of a single modality attend to themselves. A table is one more
    token to attend to.
    """

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        widths = dict(shape.tokens)
        if TABLE in shape.widths:
            attended = next(iter(widths), TABLE)
            widths[attended] = *widths.get(attended, ()), shape.width(TABLE)
        self.tokens = nn.ModuleDict({m: TokenInput(heads, of_sources) for m, of_sources in widths.items()})
        self.attention = Attention(heads)
        self.gate = Scalar(heads, CLOSED)
        self.classifier = Classifier(heads, shape.total + TOKEN_WIDTH, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        image, *text = (cast(TokenInput, module) for module in self.tokens.values())
        layers = self.attention.layers(text[0] if text else image, image)
        attended = []
        for piece in self._pieces(vectors, batch):
            keys, *queries = piece.values()
            attended.append(self.attention(layers, queries[0] if queries else keys, image, keys))
        gated = torch.cat(attended, 1) * self.gate.value.sigmoid()
        return self.classifier(torch.cat([*vectors.values(), gated], -1), batch.keep)

    def _pieces(self, vectors: dict[str, Tensor], batch: Batch) -> Iterator[dict[str, Tokens]]:
        """The layer-normed tokens of all samples, in training on a CPU of a few at a time."""
        table = vectors.get(TABLE)
        if not self.training or self.gate.value.device.type != "cpu":
            yield self._normed(batch.tokens, table, batch)
            return
        for start in range(0, next(iter(vectors.values())).shape[1], PIECE):
            piece = slice(start, start + PIECE)
            cut = {name: [_cut(x[:, piece], m[:, piece]) for x, m in sources] for name, sources in batch.tokens.items()}
            yield self._normed(cut, None if table is None else table[:, piece], batch)

    def _normed(self, tokens: Mapping[str, Tokens], table: Tensor | None, batch: Batch) -> dict[str, Tokens]:
        """Layer-normed tokens, and the (K, B, D) table as one more of the sequence that is attended to."""
        normed = {
            name: [(x if batch.compact else F.layer_norm(x, x.shape[-1:]), m) for x, m in sources]
            for name, sources in tokens.items()
        }
        if table is not None:
            here = table.new_ones((*table.shape[:2], 1), dtype=torch.bool)
            normed.setdefault(next(iter(self.tokens)), []).append((table.unsqueeze(2), here))
        return normed

    def attention_parameters(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.split(".")[0] in ("tokens", "attention", "gate")}


def _cut(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """As many columns of the tokens of one source as a sample fills."""
    end = int(F.pad(mask.sum((0, 1)), (1, 0), value=1).nonzero()[-1])
    return x[:, :, :end], mask[:, :, :end]


def _through(x: Tensor, layer: tuple[Tensor, Tensor], rounded: bool) -> Tensor:
    """(K, B, T, D) tokens of a source through its layer, with `rounded` factors -> (K, B, T, 128)."""
    weight, bias = layer
    return product(bias, x.flatten(1, 2), weight, rounded).unflatten(1, x.shape[1:3])


def _of_heads(parts: list[Tensor]) -> Tensor:
    """[(K, B, T, 128)] -> (K * B * 8, sum of T, 16)."""
    split = [x.flatten(0, 1).unflatten(-1, (ATTENTION_HEADS, -1)).transpose(1, 2) for x in parts]
    return torch.cat(split, 2).flatten(0, 1)


def _repeated(x: Tensor) -> Tensor:
    """(K * B, T) -> (K * B * 8, T), the same for each head of attention."""
    return x.unsqueeze(1).expand(-1, ATTENTION_HEADS, -1).flatten(0, 1)
