"""Graphs: the steps of `mmfeat submit` from vectors to decision, as one torch module that can be exported.

K final heads run as the stack they are; standardisation, temperature, logit adjustment or thresholds, and the blend of
an ensemble are inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfeat.baselines.basis import ABSENT
from mmfeat.baselines.linear import LinearHead
from mmfeat.baselines.neighbours import STEPS, TEMPERATURE, NeighbourHead
from mmfeat.evaluation.blending import LEAST
from mmfeat.evaluation.decisions import Decision
from mmfeat.heads.data import pooled_tokens
from mmfeat.heads.layers import Batch, Fusion
from mmfeat.runs.entry import Rule

LEAST_LOGIT = float(np.log(1e-6))  # smallest logit of a stacked member, as in `mmfeat.evaluation.blending`
Given = Sequence[tuple[Tensor, Tensor]]  # (values, mask) of each port


@dataclass(frozen=True)
class Seen:
    """Which ports a head sees: for each modality a list of encoders, each the ports of its plain and augmented views;
    `tokens` a list of ports for each modality; "pooled" stands for attention to pooled vectors."""

    vectors: Mapping[str, list[list[int]]]
    tokens: Mapping[str, list[int]]
    attend: str = ""

    @property
    def views(self) -> int:
        """Number of augmented views beside the plain view."""
        return max(len(ports) for own in self.vectors.values() for ports in own) - 1

    def of_view(self, given: Given, view: int) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """(B, D) vectors and (B,) masks of each modality; the plain picture replaces a missing view."""
        return {name: [_in_view(given, ports, view) for ports in own] for name, own in self.vectors.items()}


def _in_view(given: Given, ports: list[int], view: int) -> tuple[Tensor, Tensor]:
    plain, there = given[ports[0]]
    if view == 0 or view >= len(ports):
        return plain, there
    values, seen = given[ports[view]]
    return torch.where(seen.unsqueeze(-1), values, plain), there


class FusionPart(nn.Module):
    """K heads of one fusion: inputs -> (K, B, C) logits, the mean over views."""

    def __init__(self, seen: Seen, fusion: Fusion, heads: int) -> None:
        super().__init__()
        self.seen, self.fusion, self.heads = seen, fusion.eval(), heads

    def forward(self, given: Given) -> Tensor:
        return torch.stack([self._of_view(given, view) for view in range(self.seen.views + 1)]).mean(0)

    def _of_view(self, given: Given, view: int) -> Tensor:
        found = self.seen.of_view(given, view)
        vectors = {name: [self._each(values) for values, _ in own] for name, own in found.items()}
        masks: dict[str, list[Tensor | None]] = {
            name: [self._each(mask) for _, mask in own] for name, own in found.items()
        }
        tokens = {
            name: [(self._each(given[port][0]), self._each(given[port][1])) for port in own]
            for name, own in self.seen.tokens.items()
        }
        if self.seen.attend == "pooled":
            tokens = pooled_tokens(vectors, masks)
        return self.fusion(Batch(vectors, masks, tokens))

    def _each(self, values: Tensor) -> Tensor:
        return values.unsqueeze(0).expand(self.heads, *values.shape)


class BaselinePart(nn.Module):
    """A baseline on concatenated standardised vectors: inputs -> (1, B, C) logits, the mean over views."""

    mean: Tensor
    std: Tensor

    def __init__(self, seen: Seen, mean: np.ndarray, std: np.ndarray) -> None:
        super().__init__()
        self.seen = seen
        self.register_buffer("mean", torch.from_numpy(np.array(mean)))
        self.register_buffer("std", torch.from_numpy(np.array(std)))

    def forward(self, given: Given) -> Tensor:
        scores = [self.scored(self._scaled(given, view)) for view in range(self.seen.views + 1)]
        return torch.stack(scores).mean(0)[None]

    def scored(self, scaled: Tensor) -> Tensor:
        """(B, D) standardised vectors, 0 for a missing vector -> (B, C) logits."""
        raise NotImplementedError

    def _scaled(self, given: Given, view: int) -> Tensor:
        found = [pair for own in self.seen.of_view(given, view).values() for pair in own]
        there = torch.cat([mask.unsqueeze(-1).expand(values.shape) for values, mask in found], -1)
        values = torch.cat([values for values, _ in found], -1)
        return torch.where(there, (values - self.mean) / self.std, 0.0)


class LinearPart(BaselinePart):
    """Ridge, logistic regression or SVM."""

    coefficients: Tensor
    intercepts: Tensor

    def __init__(self, seen: Seen, head: LinearHead) -> None:
        super().__init__(seen, head.scaler.mean, head.scaler.std)
        self.columns, self.logistic = head.columns, head.kind == "logistic" and not head.columns.multilabel
        self.register_buffer("coefficients", torch.from_numpy(np.array(head.coefficients, np.float32)))
        self.register_buffer("intercepts", torch.from_numpy(np.array(head.intercepts, np.float32)))

    def scored(self, scaled: Tensor) -> Tensor:
        scores = scaled @ self.coefficients + self.intercepts
        if self.columns.paired:
            scores = torch.cat([-scores / 2, scores / 2], -1)
        constant = self.columns.multilabel or not any(self.columns.learned)
        floor = torch.zeros_like(scaled[:, :1]) if constant else scores.amin(-1, keepdim=True)
        place, found = 0, []
        for learned, everywhere in zip(self.columns.learned, self.columns.everywhere, strict=True):
            if learned:
                found.append(scores[:, place : place + 1])
                place += 1
            elif everywhere:
                found.append(torch.full_like(floor, ABSENT if self.columns.multilabel else 0.0))
            else:
                found.append(floor - ABSENT)
        logits = torch.cat(found, -1)
        return F.log_softmax(logits, -1) if self.logistic else logits


class NeighbourPart(BaselinePart):
    """The nearest training samples, whose vectors are in the graph."""

    known: Tensor
    votes: Tensor
    prior: Tensor

    def __init__(self, seen: Seen, head: NeighbourHead) -> None:
        super().__init__(seen, head.scaler.mean, head.scaler.std)
        self.multilabel, self.by_similarity = head.multilabel, head.by_similarity
        self.count = min(head.neighbours, len(head.vectors))
        self.register_buffer("known", torch.from_numpy(head.vectors.astype(np.float32)))
        self.register_buffer("votes", torch.from_numpy(head.votes.astype(np.float32)))
        self.register_buffer("prior", torch.from_numpy(np.array(head.prior, np.float32)))

    def scored(self, scaled: Tensor) -> Tensor:
        unit = scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp_min(1e-12)
        products = unit @ self.known.T
        _, numbers = torch.topk(torch.round(products * STEPS), self.count, dim=-1)  # topk of onnxruntime is stable
        values = products.gather(-1, numbers)
        most = values.amax(-1, keepdim=True)
        counts = torch.exp((values - most) / TEMPERATURE) if self.by_similarity else torch.ones_like(values)
        counts = torch.where(most == 0, 0.0, counts)
        votes = (counts[..., None, None] * self.votes[numbers]).sum(1)
        shares = (votes[..., 0] + self.prior) / (votes.sum(-1) + 1)
        logs = torch.log(shares) - (torch.log1p(-shares) if self.multilabel else 0)
        return logs.clamp(-ABSENT, ABSENT)


class PriorPart(nn.Module):
    """The same logits for every sample."""

    logits: Tensor

    def __init__(self, logits: np.ndarray) -> None:
        super().__init__()
        self.register_buffer("logits", torch.from_numpy(np.array(logits, np.float32)))

    def forward(self, given: Given) -> Tensor:
        return (torch.zeros_like(given[0][1], dtype=torch.float32).unsqueeze(-1) + self.logits)[None]


class Member(nn.Module):
    """The final heads of an entry together: inputs -> (B, C) logits at temperature 1, as `Decision` scales them."""

    def __init__(self, parts: Sequence[nn.Module], decision: Decision) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.temperature, self.multilabel = decision.temperature, decision.multilabel

    def forward(self, given: Given) -> Tensor:
        logits = torch.cat([part(given) for part in self.parts]) / self.temperature
        if len(logits) == 1:
            return logits[0]
        return log_mean(probabilities(logits, self.multilabel).mean(0), self.multilabel)


class Blend(nn.Module):
    """An ensemble of members: the weighted mean of their probabilities, or a stacking of their logits."""

    weights: Tensor
    stacking: Tensor
    intercept: Tensor

    def __init__(self, members: Sequence[Member], rule: Rule, decision: Decision) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.temperature, self.multilabel = decision.temperature, decision.multilabel
        self.stacks = rule.weights is None
        names = ("stacking", "intercept") if self.stacks else ("weights",)
        for name in names:
            self.register_buffer(name, torch.tensor(getattr(rule, name), dtype=torch.float32))

    def forward(self, given: Given) -> Tensor:
        found = torch.stack([probabilities(member(given), self.multilabel) for member in self.members])
        if not self.stacks:
            weights = self.weights / self.weights.sum()
            return log_mean((weights[:, None, None] * found).sum(0), self.multilabel) / self.temperature
        logs = found.clamp_min(LEAST).log()
        if self.multilabel:
            inputs = (logs - (1 - found).clamp_min(LEAST).log()).clamp(LEAST_LOGIT, -LEAST_LOGIT)
        else:
            inputs = logs.clamp_min(LEAST_LOGIT)
        beside = torch.cat(list(inputs.unbind(0)), -1)
        return (inputs.mean(0) + beside @ self.stacking + self.intercept) / self.temperature


class HeadGraph(nn.Module):
    """`inputs`: vectors and mask of each port in turn -> (B, C) probabilities and (B, C) bool choices
    of classes."""

    offsets: Tensor

    def __init__(self, scaled: nn.Module, decision: Decision) -> None:
        super().__init__()
        self.scaled, self.multilabel = scaled, decision.multilabel
        self.register_buffer("offsets", torch.tensor(decision.offsets, dtype=torch.float32))

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        scaled = self.scaled(list(zip(inputs[::2], inputs[1::2], strict=True)))
        adjusted = scaled - self.offsets
        classes = torch.arange(adjusted.shape[-1])
        chosen = adjusted > 0 if self.multilabel else adjusted.argmax(-1, keepdim=True) == classes
        return probabilities(scaled, self.multilabel), chosen


def probabilities(scaled: Tensor, multilabel: bool) -> Tensor:
    """(..., C) probabilities of logits at temperature 1."""
    return scaled.sigmoid() if multilabel else scaled.softmax(-1)


def log_mean(mean: Tensor, multilabel: bool) -> Tensor:
    """(B, C) logits of mean probabilities."""
    if not multilabel:
        return mean.clamp_min(LEAST).log()
    return mean.clamp_min(LEAST).log() - (1 - mean).clamp_min(LEAST).log()
