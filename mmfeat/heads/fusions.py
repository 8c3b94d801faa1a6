"""The fusions: late, concat, gated, film, film-concat, cross-attention and linear. Each fusion maps the image vector i
and the text vector t of a sample to logits.

All fusions but late and linear end in the same classifier, MLP(x) = 256 -> 64 -> classes with batch normalisation and
dropout. The docstring of a fusion that compares the modalities says what it does with a single modality.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfeat.baselines.zero_shot import SCALE
from mmfeat.heads.layers import Batch, Classifier, Fusion, LayerNorm, Linear, Scalar, Shape, Stacked

HIDDEN = (256, 64)  # widths of the classifier's hidden layers, except for the late fusion
LATE_WIDTH = 512
GATED_WIDTH = 256  # width to which both modalities are projected where their widths differ
GATE_WIDTH = 64
GENERATOR_WIDTH = 64
TOKEN_WIDTH = 128
ATTENTION_HEADS = 8
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
    first projected to 256. A single modality is weighed against zeros.
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
        self.gate = Linear(heads, GATE_WIDTH, 1)
        self.classifier = Classifier(heads, width, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        alike = [self.projections[m](x) if m in self.projections else x for m, x in vectors.items()]
        gate = self.gate(F.relu(self.gate_hidden(torch.cat(alike, -1)))).sigmoid()
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
    """FiLM, MLP([m(i; t); t]): the text t modulates the features of the image i. A single modality modulates itself."""

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        modulated, condition = next(iter(shape.widths)), list(shape.widths)[-1]
        self.modulation = Modulation(heads, shape.width(condition), shape.width(modulated))
        self.classifier = Classifier(heads, shape.total, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        image, *text = vectors.values()
        modulated = self.modulation(image, text[0] if text else image)
        return self.classifier(torch.cat([modulated, *text], -1), batch.keep)


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
    """The tokens of all sources of a modality in one sequence: layer-normed and projected to 128, source by source."""

    def __init__(self, heads: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.projections = nn.ModuleList(Linear(heads, width, TOKEN_WIDTH) for width in widths)

    def forward(self, sources: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """[(K, B, T, D) and (K, B, T)] -> (K, B, sum of T, 128) and (K, B, sum of T)."""
        values = [
            projection(F.layer_norm(x, x.shape[-1:]))
            for projection, (x, _) in zip(self.projections, sources, strict=True)
        ]
        return torch.cat(values, 2), torch.cat([mask for _, mask in sources], 2)


class Attention(Stacked):
    """Multi-head attention of 8 heads (Vaswani et al., 2017), then the layer-normed mean over the present queries.

    An additional, learned key stands for "nothing"; a sample without any token attends to that key alone.
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

    def forward(self, queries: Tensor, present: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """(K, B, T, 128), (K, B, T), (K, B, P, 128), (K, B, P) -> (K, B, 128)."""
        heads, batch = mask.shape[:2]
        keys = torch.cat([self.nothing.expand(-1, batch, -1, -1), keys], 2)
        mask = F.pad(mask, (1, 0), value=True).flatten(0, 1)[:, None, None]
        key, value = self.key_value(keys).chunk(2, -1)
        attended = F.scaled_dot_product_attention(
            _split(self.query(queries)), _split(key), _split(value), attn_mask=mask
        )
        attended = self.output(attended.transpose(1, 2).reshape(heads, batch, -1, TOKEN_WIDTH)) * present.unsqueeze(-1)
        return self.norm(attended.sum(2) / present.sum(2, keepdim=True).clamp_min(1))


class CrossAttention(Fusion):
    """Cross-attention, MLP([i; t; sigmoid(s) A]): A (128) is the attention of text to image tokens, s a learned gate.

    The fusion needs tokens of both modalities; the tokens of a single modality attend to themselves.
    """

    units = sum(HIDDEN)

    def __init__(self, heads: int, shape: Shape, classes: int) -> None:
        super().__init__(heads, shape)
        self.tokens = nn.ModuleDict({m: TokenInput(heads, widths) for m, widths in shape.tokens.items()})
        self.attention = Attention(heads)
        self.gate = Scalar(heads, CLOSED)
        self.classifier = Classifier(heads, shape.total + TOKEN_WIDTH, classes, HIDDEN)

    def fuse(self, vectors: dict[str, Tensor], batch: Batch) -> Tensor:
        sequences = {modality: module(batch.tokens[modality]) for modality, module in self.tokens.items()}
        image, *text = sequences.values()
        attended = self.attention(*(text[0] if text else image), *image) * self.gate.value.sigmoid()
        return self.classifier(torch.cat([*vectors.values(), attended], -1), batch.keep)

    def attention_parameters(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.split(".")[0] in ("tokens", "attention", "gate")}


def _split(x: Tensor) -> Tensor:
    """(K, B, T, 128) -> (K * B, 8, T, 16)."""
    return x.flatten(0, 1).unflatten(-1, (ATTENTION_HEADS, -1)).transpose(1, 2)
