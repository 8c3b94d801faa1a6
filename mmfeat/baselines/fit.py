"""Baselines: simple models on standardised vectors, each of which chooses its own setting on validation rows.

All of them are fitted from one `Basis`, the costliest part: make it once for several baselines on the same rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from mmfeat.baselines.basis import (
    Basis,
    Matrix,
    from_probabilities,
    log_loss,
    make_basis,
    one_blas_thread,
    sample_weights,
)
from mmfeat.baselines.kernel import LANDMARKS, STRENGTHS, KernelHead, kernel_path, make_kernel
from mmfeat.baselines.linear import OBJECTIVES, LinearHead, linear_path
from mmfeat.baselines.neighbours import NEIGHBOURS, NeighbourHead, neighbour_head, neighbour_heads
from mmfeat.baselines.trees import BOOSTING_STEPS, FOREST_LEAVES, Components, TreeData, TreeHead, boosted, forest
from mmfeat.baselines.zero_shot import ZeroShot
from mmfeat.errors import HeadError
from mmfeat.evaluation.decisions import calibrate
from mmfeat.evaluation.metrics import headline_name, plain_headline
from mmfeat.samples.labels import Targets

MAX_ROWS = 50_000  # most training rows of trees
MAX_VOTERS = 10_000  # most training rows of neighbours, whose time grows with the product of rows and voters
PATHS = ("logistic", "svm", "kernel")  # baselines that take longer from setting to setting
PATIENCE = 2  # settings without a better score after which a path may end
Setting = dict[str, float]


class FittedModel(Protocol):
    """A fitted model of any family, without the record of how its setting was chosen."""

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray: ...
    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]: ...


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline, its chosen `setting`, the scores of all settings in the order tried (`curve`), and the (M, C)
    logits of the `validation` rows that chose the setting, without augmented views."""

    name: str
    setting: Setting
    curve: list[dict[str, float]]
    model: FittedModel
    validation: np.ndarray | None = None

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64 logits of the samples at `rows`: log-probabilities or margins, all finite."""
        with one_blas_thread():
            return self.model.logits(matrix, rows)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Plain values for JSON, and arrays; `restore` takes both."""
        config, tensors = self.model.state()
        return {"setting": self.setting, "curve": self.curve, "model": config}, tensors


@dataclass(frozen=True)
class TrainingRows:
    """The rows on which a baseline is trained, among all samples of `matrix` and `targets`.

    `class_weights` (C,) weigh the samples of a class in the loss, multi-label the positives. `basis` is the result of
    `make_basis` for these rows, made when needed if None. Of more than MAX_VOTERS rows neighbours, and of more than
    MAX_ROWS rows trees take a stratified sample, which the setting records as "rows". `classes` are the vectors of the
    class names, as `ZeroShot` has them. `widths` are those of the encoders; the last is a table's if `has_table`.
    """

    matrix: Matrix
    targets: Targets
    rows: np.ndarray
    class_weights: np.ndarray
    seed: int
    basis: Basis | None = None
    classes: Mapping[int, np.ndarray] = field(default_factory=dict)
    widths: tuple[int, ...] = ()
    has_table: bool = False

    def sampled(self, most: int) -> np.ndarray:
        """At most so many of the training rows, stratified by class unless multi-label."""
        if len(self.rows) <= most:
            return np.sort(self.rows)
        shuffled = np.random.default_rng(self.seed).permutation(np.sort(self.rows))
        targets = self.targets.take(shuffled)
        alike = targets.multilabel or targets.numeric
        classes = np.zeros(len(shuffled), dtype=int) if alike else targets.numbers
        depth = np.empty(len(shuffled))
        for number in np.unique(classes):
            members = np.flatnonzero(classes == number)
            depth[members] = (np.arange(len(members)) + 0.5) / len(members)
        return np.sort(shuffled[np.argsort(depth, kind="stable")[:most]])

    @property
    def prior(self) -> np.ndarray:
        """(C,) weighted share of each class among the training rows, or their mean number."""
        targets = self.targets.take(self.rows)
        if targets.numeric:
            return targets.prior
        weights = np.asarray(self.class_weights, dtype=np.float64)
        positive = targets.matrix.sum(axis=0) * weights
        rest = (~targets.matrix).sum(axis=0) if targets.multilabel else positive.sum() - positive
        return positive / (positive + rest)


Candidate = tuple[Setting, np.ndarray, FittedModel]  # the array holds logits (M, C) of the validation rows


@dataclass(frozen=True)
class BaselineFamily:
    """The three functions of one family: try all settings, train with a given setting, restore a saved model."""

    candidates: Callable[[TrainingRows, np.ndarray], Iterator[Candidate]]
    train: Callable[[TrainingRows, Setting], FittedModel]
    restore: Callable[[dict[str, Any], dict[str, np.ndarray]], FittedModel]


def fit(name: str, training: TrainingRows, validation: np.ndarray) -> Baseline:
    """Train a baseline, and choose its setting by score less calibrated log-loss (nats) on the rows `validation`.

    Of so few rows either alone is mostly luck. One of PATHS ends where PATIENCE settings brought no better score.
    """
    targets = training.targets.take(validation)
    prior = training.targets.take(training.rows).prior
    name_of_score = f"validation_{headline_name(targets)}"
    best: tuple[float, Setting, FittedModel, np.ndarray] | None = None
    curve, since = [], 0
    with one_blas_thread():
        for setting, logits, model in _family(name).candidates(training, validation):
            score = plain_headline(targets, logits)
            scaled = logits if targets.numeric else calibrate(logits, targets, prior).scaled(logits)
            loss = log_loss(scaled, targets.matrix, targets.multilabel)
            curve.append({**setting, name_of_score: score, "validation_log_loss": loss})
            rank = round(score if targets.numeric else score - loss, 9)
            if best is None or rank > best[0]:
                best, since = (rank, setting, model, logits), 0
            elif (since := since + 1) >= PATIENCE and name in PATHS:
                break
    assert best is not None, "every family has a candidate"
    return Baseline(name, best[1], curve, best[2], best[3])


def refit(name: str, training: TrainingRows, setting: Mapping[str, float]) -> Baseline:
    """Train a baseline with a `setting` that was chosen before."""
    given = {key: value for key, value in setting.items() if key != "rows"}
    with one_blas_thread():
        model = _family(name).train(training, given)
    return Baseline(name, _recorded(training, name, given), [], model)


def restore(name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Baseline:
    """The baseline whose `state` returned `config` and `tensors`."""
    model = _family(name).restore(config["model"], dict(tensors))
    return Baseline(name, dict(config["setting"]), list(config["curve"]), model)


def _family(name: str) -> BaselineFamily:
    if name not in BASELINE_FAMILIES:
        raise HeadError(f"no baseline {name!r}; use {', '.join(BASELINE_FAMILIES)}")
    return BASELINE_FAMILIES[name]


def _basis(training: TrainingRows) -> Basis:
    return training.basis or make_basis(training.matrix, training.targets, training.rows, training.class_weights)


def _recorded(training: TrainingRows, name: str, setting: Setting) -> Setting:
    """The setting, with the number of rows where the rows are a sample."""
    most = {"knn": MAX_VOTERS, "forest": MAX_ROWS, "boosting": MAX_ROWS}.get(name, len(training.rows))
    return {**setting, "rows": float(most)} if most < len(training.rows) else setting


@dataclass(frozen=True)
class Prior:
    """A baseline that predicts the class frequencies, `shares` (C,), for every sample."""

    shares: np.ndarray
    multilabel: bool

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        return from_probabilities(np.repeat(self.shares[None], len(rows), axis=0), self.multilabel)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return {"multilabel": self.multilabel}, {"shares": self.shares}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Prior:
        return cls(tensors["shares"], config["multilabel"])


def _prior(training: TrainingRows, setting: Setting) -> Prior:
    return Prior(training.targets.take(training.rows).prior, training.targets.multilabel)


def _prior_candidates(training: TrainingRows, validation: np.ndarray) -> Iterator[Candidate]:
    prior = _prior(training, {})
    yield {}, prior.logits(training.matrix, validation), prior


def _zero_shot(training: TrainingRows, setting: Setting) -> ZeroShot:
    return ZeroShot(training.classes, training.targets.multilabel)


def _zero_shot_candidates(training: TrainingRows, validation: np.ndarray) -> Iterator[Candidate]:
    model = _zero_shot(training, {})
    yield {}, model.logits(training.matrix, validation), model


def _linear_candidates(kind: str, training: TrainingRows, validation: np.ndarray) -> Iterator[Candidate]:
    """Yield a head for each strength; validation vectors are read once where the training rows are held, too."""
    basis = _basis(training)
    read = partial(basis.scaler.apply, training.matrix, validation)
    held = read(np.asarray) if basis.held is not None else None
    for head in linear_path(kind, basis, training.targets, training.class_weights):
        logits = read(head.scaled_logits) if held is None else head.scaled_logits(held)
        yield {OBJECTIVES[kind].parameter: head.strength}, logits, head


def _linear(kind: str, training: TrainingRows, setting: Setting) -> LinearHead:
    strength = setting[OBJECTIVES[kind].parameter]
    return next(linear_path(kind, _basis(training), training.targets, training.class_weights, [strength]))


def _neighbour(training: TrainingRows) -> NeighbourHead:
    rows = training.sampled(MAX_VOTERS)
    return neighbour_head(_basis(training), rows, training.targets.take(rows), training.class_weights, training.prior)


def _neighbour_candidates(training: TrainingRows, validation: np.ndarray) -> Iterator[Candidate]:
    """Yield a head for each number of neighbours; one search, for the largest number, serves all of them."""
    head = replace(_neighbour(training), neighbours=max(NEIGHBOURS))
    nearest = head.nearest(training.matrix, validation)
    for setting, candidate in neighbour_heads(head):
        yield _recorded(training, "knn", setting), candidate.vote(nearest), candidate


def _neighbours(training: TrainingRows, setting: Setting) -> NeighbourHead:
    return replace(_neighbour(training), neighbours=int(setting["k"]), by_similarity=bool(setting["by_similarity"]))


def _kernel_heads(training: TrainingRows, strengths: Sequence[float]) -> Iterator[KernelHead]:
    widths = training.widths or (training.matrix.width,)
    kernel = make_kernel(training.matrix, widths, training.has_table, training.rows, training.sampled(LANDMARKS))
    return kernel_path(kernel, training.rows, training.targets, training.class_weights, strengths)


def _kernel_candidates(training: TrainingRows, validation: np.ndarray) -> Iterator[Candidate]:
    """Yield a head for each strength; the kernels of validation rows are computed once."""
    known: np.ndarray | None = None
    for head in _kernel_heads(training, STRENGTHS):
        if known is None:
            known = replace(head.kernel, matrix=training.matrix).rows(validation)
        yield {"C": head.linear.strength}, head.linear.scaled_logits(known), head


def _kernel(training: TrainingRows, setting: Setting) -> KernelHead:
    return next(_kernel_heads(training, [setting["C"]]))


def _tree_data(training: TrainingRows) -> TreeData:
    rows = training.sampled(MAX_ROWS)
    components, targets = Components.of(_basis(training)), training.targets.take(rows)
    weights = sample_weights(targets, training.class_weights)
    inputs = components.apply(training.matrix, rows)
    return TreeData(components, inputs, targets, weights, training.class_weights, training.prior, training.seed)


def _forest_candidates(training: TrainingRows, validation: np.ndarray) -> Iterator[Candidate]:
    data = _tree_data(training)
    inputs = data.components.apply(training.matrix, validation)
    for leaf in FOREST_LEAVES:
        head = forest(data, leaf)
        (logits,) = head.stages(inputs, [head.rounds])
        yield _recorded(training, "forest", {"leaf": float(leaf)}), logits, head


def _forest(training: TrainingRows, setting: Setting) -> TreeHead:
    return forest(_tree_data(training), int(setting["leaf"]))


def _boosting_candidates(training: TrainingRows, validation: np.ndarray) -> Iterator[Candidate]:
    """Yield a head for each number of steps; one fit serves all, as its first steps are those of a shorter fit."""
    data = _tree_data(training)
    inputs = data.components.apply(training.matrix, validation)
    head = boosted(data, max(BOOSTING_STEPS))
    for steps, logits in zip(BOOSTING_STEPS, head.stages(inputs, BOOSTING_STEPS), strict=True):
        yield _recorded(training, "boosting", {"steps": float(steps)}), logits, replace(head, rounds=steps)


def _boosting(training: TrainingRows, setting: Setting) -> TreeHead:
    return boosted(_tree_data(training), int(setting["steps"]))


def _linear_family(kind: str) -> BaselineFamily:
    return BaselineFamily(partial(_linear_candidates, kind), partial(_linear, kind), LinearHead.restore)


BASELINE_FAMILIES: dict[str, BaselineFamily] = {
    "prior": BaselineFamily(_prior_candidates, _prior, Prior.restore),
    "knn": BaselineFamily(_neighbour_candidates, _neighbours, NeighbourHead.restore),
    "ridge": _linear_family("ridge"),
    "logistic": _linear_family("logistic"),
    "svm": _linear_family("svm"),
    "kernel": BaselineFamily(_kernel_candidates, _kernel, KernelHead.restore),
    "forest": BaselineFamily(_forest_candidates, _forest, TreeHead.restore),
    "boosting": BaselineFamily(_boosting_candidates, _boosting, TreeHead.restore),
    "zero-shot": BaselineFamily(_zero_shot_candidates, _zero_shot, ZeroShot.restore),
}
