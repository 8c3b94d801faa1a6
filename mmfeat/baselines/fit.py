"""Baselines: simple models on standardised vectors, each of which chooses its own setting on validation rows.

All of them are fitted from one `Basis`, which is what costs most: make it once for several of them on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from mmfeat.baselines.basis import (
    Basis,
    Matrix,
    decided,
    from_probabilities,
    log_loss,
    make_basis,
    one_blas_thread,
    sample_weights,
)
from mmfeat.baselines.linear import KINDS, LinearHead, linear_path
from mmfeat.baselines.neighbours import NEIGHBOURS, NeighbourHead, neighbour_head, neighbour_heads
from mmfeat.baselines.trees import BOOSTING_STEPS, FOREST_LEAVES, Components, TreeData, TreeHead, boosted, forest
from mmfeat.errors import HeadError
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.samples.labels import Targets

MAX_ROWS = 50_000  # most training rows that neighbours and trees take
Setting = dict[str, float]


class FittedModel(Protocol):
    """A fitted model of any kind."""

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray: ...
    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]: ...


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline, the `setting` it chose and all it tried (`curve`, in the order tried)."""

    name: str
    setting: Setting
    curve: list[dict[str, float]]
    model: FittedModel

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64 of the samples at `rows`: log-probabilities or margins, all finite."""
        with one_blas_thread():
            return self.model.logits(matrix, rows)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What JSON can hold, and arrays: `restore` takes both."""
        config, tensors = self.model.state()
        return {"setting": self.setting, "curve": self.curve, "model": config}, tensors


@dataclass(frozen=True)
class Lesson:
    """What a baseline learns from: `rows` of all samples, their class weights (C,), and a seed."""

    matrix: Matrix
    targets: Targets
    rows: np.ndarray
    class_weights: np.ndarray
    seed: int
    basis: Basis | None

    @property
    def sampled(self) -> np.ndarray:
        """At most MAX_ROWS of the training rows, of each class its share (multi-label: of all alike)."""
        if len(self.rows) <= MAX_ROWS:
            return np.sort(self.rows)
        shuffled = np.random.default_rng(self.seed).permutation(np.sort(self.rows))
        targets = self.targets.take(shuffled)
        classes = np.zeros(len(shuffled), dtype=int) if targets.multilabel else targets.numbers
        depth = np.empty(len(shuffled))
        for number in np.unique(classes):
            members = np.flatnonzero(classes == number)
            depth[members] = (np.arange(len(members)) + 0.5) / len(members)
        return np.sort(shuffled[np.argsort(depth, kind="stable")[:MAX_ROWS]])

    @property
    def prior(self) -> np.ndarray:
        """(C,) share of each class among the training rows, as they are weighted."""
        targets = self.targets.take(self.rows)
        weights = np.asarray(self.class_weights, dtype=np.float64)
        positive = targets.matrix.sum(axis=0) * weights
        rest = (~targets.matrix).sum(axis=0) if targets.multilabel else positive.sum() - positive
        return positive / (positive + rest)


Candidate = tuple[Setting, np.ndarray, FittedModel]  # with logits (M, C) of the validation rows


@dataclass(frozen=True)
class BaselineFamily:
    """How one kind of baseline tries its candidates, trains with a given setting and is read back."""

    candidates: Callable[[Lesson, np.ndarray], Iterator[Candidate]]
    train: Callable[[Lesson, Setting], FittedModel]
    restore: Callable[[dict[str, Any], dict[str, np.ndarray]], FittedModel]


def fit(
    name: str,
    matrix: Matrix,
    targets: Targets,
    train: np.ndarray,
    validation: np.ndarray,
    class_weights: np.ndarray,
    seed: int,
    basis: Basis | None = None,
) -> Baseline:
    """Train on `train` and choose by macro-F1 on `validation`, then by log-loss; `validation` trains nothing.

    `matrix` and `targets` are of all samples. `class_weights` (C,) weigh the samples of a class in the loss,
    multi-label the positives. `basis` is that of `train` (`make_basis`), made here if left out. Where there are more
    than MAX_ROWS training rows, neighbours and trees take a stratified sample; the setting then says so ("rows").
    """
    lesson = Lesson(matrix, targets, train, class_weights, seed, basis)
    wanted = targets.take(validation).matrix
    best: tuple[tuple[float, float], Setting, FittedModel] | None = None
    curve = []
    with one_blas_thread():
        for setting, logits, model in _family(name).candidates(lesson, validation):
            score = float(macro_f1(wanted, decided(logits, targets.multilabel)))
            loss = log_loss(logits, wanted, targets.multilabel)
            curve.append({**setting, "validation_macro_f1": score, "validation_log_loss": loss})
            rank = (round(score, 9), -round(loss, 9))
            if best is None or rank > best[0]:
                best = rank, setting, model
    assert best is not None, "every family has a candidate"
    return Baseline(name, best[1], curve, best[2])


def refit(
    name: str,
    matrix: Matrix,
    targets: Targets,
    rows: np.ndarray,
    class_weights: np.ndarray,
    setting: Mapping[str, float],
    seed: int,
    basis: Basis | None = None,
) -> Baseline:
    """Train on all `rows` with a `setting` that was chosen before."""
    lesson = Lesson(matrix, targets, rows, class_weights, seed, basis)
    given = {key: value for key, value in setting.items() if key != "rows"}
    with one_blas_thread():
        model = _family(name).train(lesson, given)
    return Baseline(name, _told(lesson, name, given), [], model)


def restore(name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Baseline:
    """The baseline whose `state` this is."""
    model = _family(name).restore(config["model"], dict(tensors))
    return Baseline(name, dict(config["setting"]), list(config["curve"]), model)


def _family(name: str) -> BaselineFamily:
    if name not in BASELINES:
        raise HeadError(f"no baseline {name!r}; use {', '.join(BASELINES)}")
    return BASELINES[name]


def _basis(lesson: Lesson) -> Basis:
    return lesson.basis or make_basis(lesson.matrix, lesson.targets, lesson.rows, lesson.class_weights)


def _told(lesson: Lesson, name: str, setting: Setting) -> Setting:
    """The setting, with the number of rows where they were sampled."""
    whole = len(lesson.rows) <= MAX_ROWS or name not in ("knn", "forest", "boosting")
    return setting if whole else {**setting, "rows": float(MAX_ROWS)}


@dataclass(frozen=True)
class Prior:
    """Says the same of every sample: how frequent the classes are."""

    shares: np.ndarray
    multilabel: bool

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        return from_probabilities(np.repeat(self.shares[None], len(rows), axis=0), self.multilabel)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"multilabel": self.multilabel}, {"shares": self.shares}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Prior:
        return cls(tensors["shares"], config["multilabel"])


def _prior(lesson: Lesson, setting: Setting) -> Prior:
    return Prior(lesson.targets.take(lesson.rows).prior, lesson.targets.multilabel)


def _prior_candidates(lesson: Lesson, validation: np.ndarray) -> Iterator[Candidate]:
    prior = _prior(lesson, {})
    yield {}, prior.logits(lesson.matrix, validation), prior


def _linear_candidates(kind: str, lesson: Lesson, validation: np.ndarray) -> Iterator[Candidate]:
    """All heads first, so that validation vectors are read once."""
    basis = _basis(lesson)
    heads = list(linear_path(kind, basis, lesson.targets, lesson.class_weights))
    each = basis.scaler.apply(
        lesson.matrix, validation, lambda scaled: np.stack([head.scaled_logits(scaled) for head in heads], axis=1)
    )
    for number, head in enumerate(heads):
        yield {KINDS[kind].parameter: head.strength}, each[:, number], head


def _linear(kind: str, lesson: Lesson, setting: Setting) -> LinearHead:
    strength = setting[KINDS[kind].parameter]
    return next(linear_path(kind, _basis(lesson), lesson.targets, lesson.class_weights, [strength]))


def _neighbour(lesson: Lesson) -> NeighbourHead:
    rows = lesson.sampled
    return neighbour_head(_basis(lesson), rows, lesson.targets.take(rows), lesson.class_weights, lesson.prior)


def _neighbour_candidates(lesson: Lesson, validation: np.ndarray) -> Iterator[Candidate]:
    """The nearest are found once, for the most neighbours that are tried."""
    head = replace(_neighbour(lesson), neighbours=max(NEIGHBOURS))
    found = head.found(lesson.matrix, validation)
    for setting, candidate in neighbour_heads(head):
        yield _told(lesson, "knn", setting), candidate.voted(found), candidate


def _neighbours(lesson: Lesson, setting: Setting) -> NeighbourHead:
    return replace(_neighbour(lesson), neighbours=int(setting["k"]), by_similarity=bool(setting["by_similarity"]))


def _tree_data(lesson: Lesson) -> TreeData:
    rows = lesson.sampled
    components, targets = Components.of(_basis(lesson)), lesson.targets.take(rows)
    weights = sample_weights(targets, lesson.class_weights)
    inputs = components.apply(lesson.matrix, rows)
    return TreeData(components, inputs, targets, weights, lesson.class_weights, lesson.prior, lesson.seed)


def _forest_candidates(lesson: Lesson, validation: np.ndarray) -> Iterator[Candidate]:
    data = _tree_data(lesson)
    inputs = data.components.apply(lesson.matrix, validation)
    for leaf in FOREST_LEAVES:
        head = forest(data, leaf)
        (logits,) = head.stages(inputs, [head.rounds])
        yield _told(lesson, "forest", {"leaf": float(leaf)}), logits, head


def _forest(lesson: Lesson, setting: Setting) -> TreeHead:
    return forest(_tree_data(lesson), int(setting["leaf"]))


def _boosting_candidates(lesson: Lesson, validation: np.ndarray) -> Iterator[Candidate]:
    """Fitted once; fewer steps are the beginning of more."""
    data = _tree_data(lesson)
    inputs = data.components.apply(lesson.matrix, validation)
    head = boosted(data, max(BOOSTING_STEPS))
    for steps, logits in zip(BOOSTING_STEPS, head.stages(inputs, BOOSTING_STEPS), strict=True):
        yield _told(lesson, "boosting", {"steps": float(steps)}), logits, replace(head, rounds=steps)


def _boosting(lesson: Lesson, setting: Setting) -> TreeHead:
    return boosted(_tree_data(lesson), int(setting["steps"]))


def _linear_family(kind: str) -> BaselineFamily:
    return BaselineFamily(partial(_linear_candidates, kind), partial(_linear, kind), LinearHead.restore)


BASELINES: dict[str, BaselineFamily] = {
    "prior": BaselineFamily(_prior_candidates, _prior, Prior.restore),
    "knn": BaselineFamily(_neighbour_candidates, _neighbours, NeighbourHead.restore),
    "ridge": _linear_family("ridge"),
    "logistic": _linear_family("logistic"),
    "svm": _linear_family("svm"),
    "forest": BaselineFamily(_forest_candidates, _forest, TreeHead.restore),
    "boosting": BaselineFamily(_boosting_candidates, _boosting, TreeHead.restore),
}
