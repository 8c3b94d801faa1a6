"""Graphs: the steps of `mmfeat submit` from vectors to decision, as one torch module that can be exported.

K final heads run as one stack. The graph includes standardisation, temperature, logit adjustment or thresholds, and
the blend of an ensemble.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfeat.baselines.basis import ABSENT
from mmfeat.baselines.kernel import SHORTEST as SHORT
from mmfeat.baselines.kernel import KernelHead
from mmfeat.baselines.linear import LinearHead
from mmfeat.baselines.neighbours import STEPS, TEMPERATURE, NeighbourHead
from mmfeat.baselines.zero_shot import SCALE, SHORTEST, ZeroShot
from mmfeat.evaluation.blending import LEAST, LEAST_LOGIT
from mmfeat.evaluation.decisions import Decision
from mmfeat.heads.layers import Batch, Fusion
from mmfeat.heads.tokens import pooled_tokens
from mmfeat.runs.entry import Rule

PortValues = Sequence[tuple[Tensor, Tensor]]  # (values, mask) of each port


@dataclass(frozen=True)
class HeadPorts:
    """The indices of the ports that a head reads.

    `vectors` has a list of encoders for each modality, and for each encoder the ports of its plain and augmented views.
    `tokens` has a list of ports for each modality. `attend` is "tokens", "pooled" for pooled vectors, or "".
    """

    vectors: Mapping[str, list[list[int]]]
    tokens: Mapping[str, list[int]]
    attend: str = ""

    @property
    def views(self) -> int:
        """Number of augmented views beside the plain view."""
        return max(len(views) for encoders in self.vectors.values() for views in encoders) - 1

    def of_view(self, given: PortValues, view: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """(B, D) vectors and (B,) masks of each modality; the plain picture replaces a missing view."""
        return {name: [_in_view(given, views, view) for views in encoders] for name, encoders in self.vectors.items()}


def _in_view(given: PortValues, views: list[int], view: int) -> tuple[Tensor, Tensor]:
    plain, mask = given[views[0]]
    if view == 0 or view >= len(views):
        return plain, mask
    values, present = given[views[view]]
    return torch.where(present.unsqueeze(-1), values, plain), mask


class FusionPart(nn.Module):
    """K heads of one fusion: port values -> (K, B, C) logits, the mean over views."""

    def __init__(self, ports: HeadPorts, fusion: Fusion, heads: int) -> None:
        super().__init__()
        self.ports, self.fusion, self.heads = ports, fusion.eval(), heads

    def forward(self, given: PortValues) -> Tensor:
        return torch.stack([self._of_view(given, view) for view in range(self.ports.views + 1)]).mean(0)

    def _of_view(self, given: PortValues, view: int) -> Tensor:
        pairs = self.ports.of_view(given, view)
        vectors = {name: [self._expand(values) for values, _ in encoders] for name, encoders in pairs.items()}
        masks: dict[str, list[Tensor | None]] = {
            name: [self._expand(mask) for _, mask in encoders] for name, encoders in pairs.items()
        }
        tokens = {
            name: [(self._expand(given[port][0]), self._expand(given[port][1])) for port in ports]
            for name, ports in self.ports.tokens.items()
        }
        if self.ports.attend == "pooled":
            tokens = pooled_tokens(vectors, masks)
        return self.fusion(Batch(vectors, masks, tokens))

    def _expand(self, values: Tensor) -> Tensor:
        """(...) -> (K, ...), the same values for each head."""
        return values.unsqueeze(0).expand(self.heads, *values.shape)


class BaselinePart(nn.Module):
    """A baseline on concatenated standardised vectors: port values -> (1, B, C) logits, the mean over views."""

    mean: Tensor
    std: Tensor

    def __init__(self, ports: HeadPorts, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        self.ports = ports
        self.register_buffer("mean", torch.from_numpy(np.array(mean)))
        self.register_buffer("std", torch.from_numpy(np.array(std)))

    def forward(self, given: PortValues) -> Tensor:
        scores = [self.scored(self._scaled(given, view)) for view in range(self.ports.views + 1)]
        return torch.stack(scores).mean(0)[None]

    def scored(self, scaled: Tensor) -> Tensor:
        """(B, D) standardised vectors, 0 for a missing vector -> (B, C) logits."""
        raise NotImplementedError

    def _scaled(self, given: PortValues, view: int) -> Tensor:
        pairs = [pair for encoders in self.ports.of_view(given, view).values() for pair in encoders]
        present = torch.cat([mask.unsqueeze(-1).expand(values.shape) for values, mask in pairs], -1)
        values = torch.cat([values for values, _ in pairs], -1)
        return self.prepared(torch.where(present, (values - self.mean) / self.std, 0.0), present)

    def prepared(self, values: Tensor, present: Tensor) -> Tensor:
        """What `scored` takes, made of (B, D) standardised vectors and of whether each number is there."""
        return values


class LinearPart(BaselinePart):
    """The part of ridge, logistic regression or SVM, as `LinearHead`."""

    coefficients: Tensor
    intercepts: Tensor

    def __init__(self, ports: HeadPorts, head: LinearHead) -> None:
        super().__init__(ports, head.scaler.mean, head.scaler.std)
        self.columns, self.logistic = head.columns, head.kind == "logistic" and not head.columns.multilabel
        self.register_buffer("coefficients", torch.from_numpy(np.array(head.coefficients, np.float32)))
        self.register_buffer("intercepts", torch.from_numpy(np.array(head.intercepts, np.float32)))

    def scored(self, scaled: Tensor) -> Tensor:
        scores = scaled @ self.coefficients + self.intercepts
        if self.columns.paired:
            scores = torch.cat([-scores / 2, scores / 2], -1)
        constant = self.columns.multilabel or not any(self.columns.learned)
        floor = torch.zeros_like(scaled[:, :1]) if constant else scores.amin(-1, keepdim=True)
        column, columns = 0, []
        for learned, everywhere in zip(self.columns.learned, self.columns.everywhere, strict=True):
            if learned:
                columns.append(scores[:, column : column + 1])
                column += 1
            elif everywhere:
                columns.append(torch.full_like(floor, ABSENT if self.columns.multilabel else 0.0))
            else:
                columns.append(floor - ABSENT)
        logits = torch.cat(columns, -1)
        return F.log_softmax(logits, -1) if self.logistic else logits


class KernelPart(LinearPart):
    """The part of kernel logistic regression, as `KernelHead`; the vectors of landmarks are in the graph."""

    centre: Tensor
    landmarks: Tensor

    def __init__(self, ports: HeadPorts, head: KernelHead) -> None:
        super().__init__(ports, head.linear)
        kernel = head.kernel
        self.widths, self.compared = list(kernel.widths), len(kernel.widths) - len(kernel.beside)
        self.inside, self.outside = map(
            torch.from_numpy, (np.flatnonzero(kernel.compared), np.flatnonzero(~kernel.compared))
        )
        for name, values in {**vars(kernel.scaler), "centre": kernel.centre, "landmarks": kernel.landmarks}.items():
            self.register_buffer(name, torch.from_numpy(np.array(values, np.float32)))

    def prepared(self, values: Tensor, present: Tensor) -> Tensor:
        prepared = self._unit(torch.where(present, self._unit(values) - self.centre, 0.0))
        kernels = torch.exp(prepared[:, self.inside] @ self.landmarks.T - self.compared)
        return torch.cat([kernels, values[:, self.outside]], -1)

    def _unit(self, values: Tensor) -> Tensor:
        parts = values.split(self.widths, -1)
        lengths = [torch.linalg.vector_norm(part, dim=-1, keepdim=True) for part in parts]
        units = [part / length.clamp_min(SHORT) for part, length in zip(parts, lengths, strict=True)]
        return torch.cat([torch.where(n > SHORT, unit, 0.0) for unit, n in zip(units, lengths, strict=True)], -1)


class NeighbourPart(BaselinePart):
    """The part of nearest neighbours, as `NeighbourHead`; the vectors of training samples are in the graph."""

    known: Tensor
    votes: Tensor
    prior: Tensor

    def __init__(self, ports: HeadPorts, head: NeighbourHead) -> None:
        super().__init__(ports, head.scaler.mean, head.scaler.std)
        self.multilabel, self.by_similarity = head.multilabel, head.by_similarity
        self.count = min(head.neighbours, len(head.vectors))
        self.register_buffer("known", torch.from_numpy(head.vectors.astype(np.float32)))
        self.register_buffer("votes", torch.from_numpy(head.votes.astype(np.float32)))
        self.register_buffer("prior", torch.from_numpy(np.array(head.prior, np.float32)))

    def scored(self, scaled: Tensor) -> Tensor:
        unit = scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp_min(1e-12)
        products = unit @ self.known.T
        _, indices = torch.topk(torch.round(products * STEPS), self.count, dim=-1)  # onnxruntime's topk is stable
        values = products.gather(-1, indices)
        most = values.amax(-1, keepdim=True)
        counts = torch.exp((values - most) / TEMPERATURE) if self.by_similarity else torch.ones_like(values)
        counts = torch.where(most == 0, 0.0, counts)
        votes = (counts[..., None, None] * self.votes[indices]).sum(1)
        shares = (votes[..., 0] + self.prior) / (votes.sum(-1) + 1)
        logs = torch.log(shares) - (torch.log1p(-shares) if self.multilabel else 0)
        return logs.clamp(-ABSENT, ABSENT)


class ZeroShotPart(BaselinePart):
    """The part of class names, as `ZeroShot`, in float64 since the odds of a sure class need it."""

    def __init__(self, ports: HeadPorts, model: ZeroShot, width: int) -> None:
        super().__init__(ports, np.zeros(width, np.float32), np.ones(width, np.float32))
        self.starts, self.multilabel = list(model.classes), model.multilabel
        for start, classes in model.classes.items():
            self.register_buffer(f"classes_{start}", torch.from_numpy(classes.T.astype(np.float64)))

    def scored(self, scaled: Tensor) -> Tensor:
        cosines, present = [], []
        for start in self.starts:
            classes = getattr(self, f"classes_{start}")
            part = scaled[:, start : start + len(classes)].double()
            length = torch.linalg.vector_norm(part, dim=-1, keepdim=True)
            cosines.append(part / length.clamp_min(SHORTEST) @ classes)
            present.append((length > SHORTEST).double())
        logits = SCALE * torch.stack(cosines).sum(0) / torch.stack(present).sum(0).clamp_min(1)
        if self.multilabel:
            shares = logits.softmax(-1)
            logits = (shares.log() - torch.log1p(-shares)).clamp(-ABSENT, ABSENT)
        return logits.float()


class PriorPart(nn.Module):
    """The part of the prior, with the same logits for every sample."""

    logits: Tensor

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("logits", torch.from_numpy(np.array(logits, np.float32)))

    def forward(self, given: PortValues) -> Tensor:
        return (torch.zeros_like(given[0][1], dtype=torch.float32).unsqueeze(-1) + self.logits)[None]


class EntryPart(nn.Module):
    """The final heads of one entry: port values -> (B, C) scaled logits, the mean over heads."""

    biases: Tensor

    def __init__(self, parts: Sequence[nn.Module], decision: Decision) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.temperature, self.floor, self.multilabel = decision.temperature, decision.floor, decision.multilabel
        self.register_buffer("biases", torch.tensor(decision.shift, dtype=torch.float32))

    def forward(self, given: PortValues) -> Tensor:
        scaled = torch.cat([part(given) for part in self.parts]) / self.temperature + self.biases
        if len(scaled) == 1:
            return scaled[0]
        return log_mean(probabilities(scaled, self.multilabel).mean(0), self.multilabel)


class Blend(nn.Module):
    """An ensemble of entries: the weighted mean of their probabilities, or a stacking of their logits."""

    weights: Tensor
    stacking: Tensor
    intercept: Tensor
    biases: Tensor

    def __init__(self, members: Sequence[EntryPart], rule: Rule, decision: Decision) -> None:
        super().__init__()
        self.members, self.floors = nn.ModuleList(members), [member.floor for member in members]
        self.register_buffer("biases", torch.tensor(decision.shift, dtype=torch.float32))
        self.temperature, self.multilabel = decision.temperature, decision.multilabel
        self.stacks = rule.weights is None
        names = ("stacking", "intercept") if self.stacks else ("weights",)
        for name in names:
            self.register_buffer(name, torch.tensor(getattr(rule, name), dtype=torch.float32))

    def forward(self, given: PortValues) -> Tensor:
        pairs = zip(self.members, self.floors, strict=True)
        shares = torch.stack([probabilities(member(given), self.multilabel, floor) for member, floor in pairs])
        if not self.stacks:
            weights = self.weights / self.weights.sum()
            mean = log_mean((weights[:, None, None] * shares).sum(0), self.multilabel)
            return mean / self.temperature + self.biases
        logs = shares.clamp_min(LEAST).log()
        if self.multilabel:
            inputs = (logs - (1 - shares).clamp_min(LEAST).log()).clamp(LEAST_LOGIT, -LEAST_LOGIT)
        else:
            inputs = logs.clamp_min(LEAST_LOGIT)
        beside = torch.cat(list(inputs.unbind(0)), -1)
        return (inputs.mean(0) + beside @ self.stacking + self.intercept) / self.temperature + self.biases


class HeadGraph(nn.Module):
    """The whole graph: values and mask of each port in turn -> (B, C) probabilities and (B, C) bool choices."""

    offsets: Tensor
    cuts: Tensor | None

    def __init__(self, scaled: nn.Module, decision: Decision) -> None:
        super().__init__()
        self.scaled, self.multilabel, self.floor = scaled, decision.multilabel, decision.floor
        self.register_buffer("offsets", torch.tensor(decision.offsets, dtype=torch.float32))
        self.register_buffer("cuts", None if decision.cuts is None else torch.tensor(decision.cuts))

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        scaled = self.scaled(list(zip(inputs[::2], inputs[1::2], strict=True)))
        shares = probabilities(scaled, self.multilabel, self.floor)
        if self.cuts is not None:
            numbers = torch.arange(scaled.shape[-1])
            expected = (shares * numbers).sum(-1, keepdim=True)
            return shares, (expected > self.cuts).sum(-1, keepdim=True) == numbers
        adjusted = scaled - self.offsets
        classes = torch.arange(adjusted.shape[-1])
        chosen = adjusted > 0 if self.multilabel else adjusted.argmax(-1, keepdim=True) == classes
        return shares, chosen


def probabilities(scaled: Tensor, multilabel: bool, floor: float = 0.0) -> Tensor:
    """(..., C) probabilities of scaled logits, as in `mmfeat.evaluation.decisions.Decision`."""
    shares = scaled.sigmoid() if multilabel else scaled.softmax(-1)
    return (1 - floor) * shares + floor / (2 if multilabel else scaled.shape[-1]) if floor else shares


def log_mean(mean: Tensor, multilabel: bool) -> Tensor:
    """(B, C) logits of mean probabilities, as in `mmfeat.evaluation.blending.blend`."""
    if not multilabel:
        return mean.clamp_min(LEAST).log()
    return mean.clamp_min(LEAST).log() - (1 - mean).clamp_min(LEAST).log()
