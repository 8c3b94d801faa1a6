"""Baselines: simple models on standardised vectors, each of which chooses its own setting on rows that are left out.

All of them are fitted from one `Basis`, the costliest part: make it once for several baselines on the same rows. It
knows no labels but through the weights of the rows, so it serves also for models of some of these rows.
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
from mmfeat.baselines.kernel import LANDMARKS, STRENGTHS, Kernel, KernelHead, kernel_head, make_kernel
from mmfeat.baselines.linear import OBJECTIVES, LinearHead, held_out_paths, linear_path, ridge_left_out
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
FALL = 0.01  # a score so far below the best one ends a path
Setting = dict[str, float]


class FittedModel(Protocol):
    """A fitted model of any family, without the record of how its setting was chosen."""

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray: ...
    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]: ...


@dataclass(frozen=True)
class Baseline:
    """A fitted baseline, its chosen `setting`, the scores of all settings in the order tried (`curve`), and the (N, C)
    logits of rows that were left out, by models with this setting that had not seen them (`unseen`; others NaN)."""

    name: str
    setting: Setting
    curve: list[dict[str, float]]
    model: FittedModel
    unseen: np.ndarray | None = None

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
    Rows with the same number in `groups` (N,) are near duplicates. `views` are further matrices of the same samples,
    with all of which rows that are left out are predicted.
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
    groups: np.ndarray | None = None
    views: Sequence[Matrix] = ()

    def without(self, part: np.ndarray) -> TrainingRows:
        """The rows but for those at `part`, with the basis of all."""
        return replace(self, rows=np.setdiff1d(self.rows, part))

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


Parts = Sequence[np.ndarray]  # disjoint sets of training rows, to be left out in turn, each with ascending numbers
Candidates = Iterator[tuple[Setting, np.ndarray]]  # the array holds the logits (M, C) of the rows of all parts
Candidate = tuple[Setting, np.ndarray, FittedModel]  # a model of the rows without a part, and its logits of the part


@dataclass(frozen=True)
class BaselineFamily:
    """The functions of one family: compute what all its models share, try all settings on rows that are left out, train
    with a given setting, restore a saved model."""

    prepare: Callable[[TrainingRows], TrainingRows]
    candidates: Callable[[TrainingRows, Parts], Candidates]
    train: Callable[[TrainingRows, Setting], FittedModel]
    restore: Callable[[dict[str, Any], dict[str, np.ndarray]], FittedModel]


def fit(name: str, training: TrainingRows, parts: Parts) -> Baseline:
    """Choose the setting of a baseline by score less calibrated log-loss (nats) on `parts` of the training rows, each
    left out in turn; then train on all of the rows.

    Of so few rows score or log-loss alone is mostly luck. One of PATHS ends where this rank has risen and then
    fallen by FALL.
    """
    held = np.concatenate(parts)
    targets, prior = training.targets.take(held), training.targets.take(training.rows).prior
    name_of_score = f"validation_{headline_name(targets)}"
    best: tuple[float, Setting, np.ndarray] | None = None
    curve, family = [], _family(name)
    with one_blas_thread():
        training = family.prepare(training)
        for given, logits in family.candidates(training, parts):
            setting, score = _recorded(training, name, given), plain_headline(targets, logits)
            scaled = logits if targets.numeric else calibrate(logits, targets, prior).scaled(logits)
            loss = log_loss(scaled, targets.matrix, targets.multilabel)
            curve.append({**setting, name_of_score: score, "validation_log_loss": loss})
            rank = round(score if targets.numeric else score - loss, 9)
            if best is None or rank > best[0]:
                best = rank, setting, logits
            elif rank < best[0] - FALL and name in PATHS and not best[1].items() <= curve[0].items():
                break
        assert best is not None, "every family has a candidate"
        model = family.train(training, best[1])
    unseen = np.full((len(training.targets), best[2].shape[1]), np.nan)
    unseen[held] = best[2]
    return Baseline(name, best[1], curve, model, unseen)


def refit(name: str, training: TrainingRows, setting: Mapping[str, float]) -> Baseline:
    """Train a baseline with a `setting` that was chosen before."""
    given = {key: value for key, value in setting.items() if key != "rows"}
    with one_blas_thread():
        model = _family(name).train(_family(name).prepare(training), given)
    return Baseline(name, _recorded(training, name, given), [], model)


def restore(name: str, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Baseline:
    """The baseline whose `state` returned `config` and `tensors`."""
    model = _family(name).restore(config["model"], dict(tensors))
    return Baseline(name, dict(config["setting"]), list(config["curve"]), model)


def _family(name: str) -> BaselineFamily:
    if name not in BASELINE_FAMILIES:
        raise HeadError(f"no baseline {name!r}; use {', '.join(BASELINE_FAMILIES)}")
    return BASELINE_FAMILIES[name]


def _with_basis(training: TrainingRows) -> TrainingRows:
    return training if training.basis else replace(training, basis=_new_basis(training))


def _new_basis(training: TrainingRows) -> Basis:
    matrix, weights = training.matrix, training.class_weights
    return make_basis(matrix, training.targets, training.rows, weights, standardised=not isinstance(matrix, Kernel))


def _as_they_are(training: TrainingRows) -> TrainingRows:
    return training


def _basis(training: TrainingRows) -> Basis:
    assert training.basis is not None, "prepared rows have a basis"
    return training.basis


def _by_part(
    of_part: Callable[[TrainingRows, np.ndarray], Iterator[Candidate]], training: TrainingRows, parts: Parts
) -> Candidates:
    """Yield each setting with the logits of all parts, the means over all views, by the models without the part."""
    for candidates in zip(*(of_part(training, part) for part in parts), strict=True):
        yield candidates[0][0], _of_parts(training, parts, [(model, plain) for _, plain, model in candidates])


def _of_parts(training: TrainingRows, parts: Parts, models: Sequence[tuple[FittedModel, np.ndarray]]) -> np.ndarray:
    """(M, C) logits of all parts: the means of the plain ones that are given with each model and those of all views."""
    return np.concatenate(
        [
            np.mean([plain, *(model.logits(view, part) for view in training.views)], axis=0)
            for part, (model, plain) in zip(parts, models, strict=True)
        ]
    )


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


def _prior_candidates(training: TrainingRows, part: np.ndarray) -> Iterator[Candidate]:
    prior = _prior(training.without(part), {})
    yield {}, prior.logits(training.matrix, part), prior


def _zero_shot(training: TrainingRows, setting: Setting) -> ZeroShot:
    return ZeroShot(training.classes, training.targets.multilabel)


def _zero_shot_candidates(training: TrainingRows, part: np.ndarray) -> Iterator[Candidate]:
    model = _zero_shot(training, {})
    yield {}, model.logits(training.matrix, part), model


def _linear_candidates(
    kind: str, training: TrainingRows, parts: Parts, strengths: Sequence[float] | None = None
) -> Candidates:
    """Yield the logits of each strength. A ridge regression leaves out each group of near duplicates, in closed form,
    where all rows are left out in turn and lie in memory."""
    basis, parameter = _basis(training), OBJECTIVES[kind].parameter
    closed = kind == "ridge" and not training.targets.multilabel
    if closed and len(parts) > 1 and basis.held is not None and not training.views:
        groups = (np.arange(len(training.targets)) if training.groups is None else training.groups)[basis.rows]
        where = np.searchsorted(basis.rows, np.concatenate(parts))
        for strength, logits in ridge_left_out(basis, training.targets, groups, strengths):
            yield {parameter: strength}, logits[where]
        return
    if closed:
        yield from _by_part(partial(_ridge_part, kind, strengths), training, parts)
        return
    for pairs in held_out_paths(kind, basis, parts, training.targets, training.class_weights, strengths):
        yield {parameter: pairs[0][0].strength}, _of_parts(training, parts, pairs)


def _ridge_part(
    kind: str, strengths: Sequence[float] | None, training: TrainingRows, part: np.ndarray
) -> Iterator[Candidate]:
    """Yield a head for each strength; the closed form needs a basis of the very rows that train."""
    basis = _new_basis(training.without(part))
    scaled = basis.scaler.apply(training.matrix, part, np.asarray)
    for head in linear_path(kind, basis, training.targets, training.class_weights, strengths):
        yield {OBJECTIVES[kind].parameter: head.strength}, head.scaled_logits(scaled), head


def _linear(kind: str, training: TrainingRows, setting: Setting) -> LinearHead:
    strength = setting[OBJECTIVES[kind].parameter]
    return next(linear_path(kind, _basis(training), training.targets, training.class_weights, [strength]))


def _neighbour(training: TrainingRows) -> NeighbourHead:
    rows = training.sampled(MAX_VOTERS)
    return neighbour_head(_basis(training), rows, training.targets.take(rows), training.class_weights, training.prior)


def _neighbour_candidates(training: TrainingRows, part: np.ndarray) -> Iterator[Candidate]:
    """Yield a head for each number of neighbours; one search, for the largest number, serves all of them."""
    head = replace(_neighbour(training.without(part)), neighbours=max(NEIGHBOURS))
    nearest = head.nearest(training.matrix, part)
    for setting, candidate in neighbour_heads(head):
        yield setting, candidate.vote(nearest), candidate


def _neighbours(training: TrainingRows, setting: Setting) -> NeighbourHead:
    return replace(_neighbour(training), neighbours=int(setting["k"]), by_similarity=bool(setting["by_similarity"]))


def _with_kernel(training: TrainingRows) -> TrainingRows:
    """The rows with the components of their kernels in the place of their vectors."""
    widths = training.widths or (training.matrix.width,)
    kernel = make_kernel(training.matrix, widths, training.has_table, training.rows, training.sampled(LANDMARKS))
    views = [replace(kernel, matrix=view) for view in training.views]
    return _with_basis(replace(training, matrix=kernel, basis=None, views=views))


def _kernel_candidates(training: TrainingRows, parts: Parts) -> Candidates:
    """Yield the logits of logistic regression at each strength C, for numbers of ridge, whose alpha is 1 / C."""
    numeric = training.targets.numeric
    kind, given = ("ridge", [1 / strength for strength in STRENGTHS]) if numeric else ("logistic", STRENGTHS)
    for strength, (_, logits) in zip(STRENGTHS, _linear_candidates(kind, training, parts, given), strict=True):
        yield {"C": strength}, logits


def _kernel(training: TrainingRows, setting: Setting) -> KernelHead:
    strength, numeric = setting["C"], training.targets.numeric
    linear = _linear(*(("ridge", training, {"alpha": 1 / strength}) if numeric else ("logistic", training, setting)))
    assert isinstance(training.matrix, Kernel), "prepared rows are kernels"
    return kernel_head(training.matrix, linear, strength)


def _tree_data(training: TrainingRows) -> TreeData:
    rows = training.sampled(MAX_ROWS)
    components, targets = Components.of(_basis(training)), training.targets.take(rows)
    weights = sample_weights(targets, training.class_weights)
    inputs = components.apply(training.matrix, rows)
    return TreeData(components, inputs, targets, weights, training.class_weights, training.prior, training.seed)


def _forest_candidates(training: TrainingRows, part: np.ndarray) -> Iterator[Candidate]:
    data = _tree_data(training.without(part))
    inputs = data.components.apply(training.matrix, part)
    for leaf in FOREST_LEAVES:
        head = forest(data, leaf)
        (logits,) = head.stages(inputs, [head.rounds])
        yield {"leaf": float(leaf)}, logits, head


def _forest(training: TrainingRows, setting: Setting) -> TreeHead:
    return forest(_tree_data(training), int(setting["leaf"]))


def _boosting_candidates(training: TrainingRows, part: np.ndarray) -> Iterator[Candidate]:
    """Yield a head for each number of steps; one fit serves all, as its first steps are those of a shorter fit."""
    data = _tree_data(training.without(part))
    inputs = data.components.apply(training.matrix, part)
    head = boosted(data, max(BOOSTING_STEPS))
    for steps, logits in zip(BOOSTING_STEPS, head.stages(inputs, BOOSTING_STEPS), strict=True):
        yield {"steps": float(steps)}, logits, replace(head, rounds=steps)


def _boosting(training: TrainingRows, setting: Setting) -> TreeHead:
    return boosted(_tree_data(training), int(setting["steps"]))


def _linear_family(kind: str) -> BaselineFamily:
    return BaselineFamily(_with_basis, partial(_linear_candidates, kind), partial(_linear, kind), LinearHead.restore)


BASELINE_FAMILIES: dict[str, BaselineFamily] = {
    "prior": BaselineFamily(_as_they_are, partial(_by_part, _prior_candidates), _prior, Prior.restore),
    "knn": BaselineFamily(_with_basis, partial(_by_part, _neighbour_candidates), _neighbours, NeighbourHead.restore),
    "ridge": _linear_family("ridge"),
    "logistic": _linear_family("logistic"),
    "svm": _linear_family("svm"),
    "kernel": BaselineFamily(_with_kernel, _kernel_candidates, _kernel, KernelHead.restore),
    "forest": BaselineFamily(_with_basis, partial(_by_part, _forest_candidates), _forest, TreeHead.restore),
    "boosting": BaselineFamily(_with_basis, partial(_by_part, _boosting_candidates), _boosting, TreeHead.restore),
    "zero-shot": BaselineFamily(_as_they_are, partial(_by_part, _zero_shot_candidates), _zero_shot, ZeroShot.restore),
}
