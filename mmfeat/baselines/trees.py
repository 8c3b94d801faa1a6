"""Baselines of trees, on the first principal components: scikit-learn's random forest and gradient boosting.

Trees split on one column at a time, and the columns of an embedding say little each; its components say more, and
fewer of them cost less. Fitted trees are kept as plain arrays: they load without trusting anybody's objects, and
with any version of scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmfeat.baselines.basis import Basis, Matrix, Scaler, from_probabilities
from mmfeat.samples.labels import Targets

COMPONENTS = 32
FOREST_TREES = 60
FOREST_LEAVES = (3, 15)  # smallest number of samples in a leaf
BOOSTING_STEPS = (5, 10, 15, 20, 30, 40, 50, 60, 80, 100)  # one tree a class each
BOOSTING_RATE = 0.1
BOOSTING_LEAVES = 7
BOOSTING_BINS = 63


@dataclass(frozen=True)
class Components:
    """Standardised vectors on the first principal components of the training rows (weighted as they train)."""

    scaler: Scaler
    centre: np.ndarray
    vectors: np.ndarray

    @classmethod
    def of(cls, basis: Basis) -> Components:
        return cls(basis.scaler, basis.centre, np.ascontiguousarray(basis.vectors[:, :COMPONENTS]))

    def apply(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, P) float32 components of the vectors at `rows`; one column of zeros where nothing varies."""
        found = self.scaler.apply(matrix, rows, lambda scaled: (scaled - self.centre) @ self.vectors)
        return found if found.shape[1] else np.zeros((len(rows), 1), dtype=np.float32)


@dataclass(frozen=True)
class Trees:
    """T trees, the nodes of all of them one after the other; a sample goes left where its feature is <= threshold.

    `first` (T,) are the roots. A leaf is its own left and right; other children come after their parents, so every
    way ends. `values` (nodes, K) count at leaves.
    """

    first: np.ndarray
    feature: np.ndarray
    threshold: np.ndarray
    left: np.ndarray
    right: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        nodes = np.arange(len(self.left))
        if (self.left < nodes).any() or (self.right < nodes).any() or (self.first < 0).any():
            raise ValueError("trees whose children come before their parents; the file was changed")

    def totals(self, inputs: np.ndarray, after: Sequence[int]) -> Iterator[np.ndarray]:
        """(n, K) float64 sums of the leaves' values after so many trees (rising)."""
        rows, total = np.arange(len(inputs)), np.zeros((len(inputs), self.values.shape[1]))
        for number, root in enumerate(self.first, 1):
            node = np.full(len(inputs), root, dtype=np.int64)
            while True:
                lower = inputs[rows, self.feature[node]] <= self.threshold[node]
                child = np.where(lower, self.left[node], self.right[node])
                if np.array_equal(child, node):
                    break
                node = child
            total += self.values[node]
            if number in after:
                yield total.copy()

    def up_to(self, count: int) -> Trees:
        """The first `count` trees."""
        end = self.first[count] if count < len(self.first) else len(self.left)
        arrays = self.feature, self.threshold, self.left, self.right, self.values
        return Trees(self.first[:count], *(array[:end] for array in arrays))


@dataclass(frozen=True)
class TreeHead:
    """Trees over the `known` classes, those that vary among the training rows; `prior` (C,) says the rest.

    A forest's values are shares of the classes in a leaf, those of `boosting` are added to the scores `start` (K,):
    K is 1 for two classes.
    """

    components: Components
    trees: Trees
    start: np.ndarray
    known: tuple[int, ...]
    prior: np.ndarray
    multilabel: bool
    boosting: bool

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64 log-probabilities, or log-odds where multi-label."""
        inputs = self.components.apply(matrix, rows)
        return next(self.stages(inputs, [len(self.trees.first)]))

    def stages(self, inputs: np.ndarray, after: Sequence[int]) -> Iterator[np.ndarray]:
        """The (n, C) logits of (n, P) components after so many trees each."""
        probabilities = np.repeat(self.prior[None], len(inputs), axis=0)
        if not self.known:
            yield from (from_probabilities(probabilities, self.multilabel) for _ in after)
            return
        for count, total in zip(after, self.trees.totals(inputs, after), strict=True):
            found = self._boosted(total) if self.boosting else self._voted(total, count)
            probabilities[:, np.array(self.known)] = found
            yield from_probabilities(probabilities, self.multilabel)

    def _voted(self, total: np.ndarray, count: int) -> np.ndarray:
        """The mean share, with the prior as one more tree: no share is 0."""
        return (total + self.prior[np.array(self.known)]) / (count + 1)

    def _boosted(self, total: np.ndarray) -> np.ndarray:
        scores = total + self.start
        if not self.multilabel and scores.shape[1] == 1:
            scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
        if self.multilabel:
            return np.exp(-np.logaddexp(0, -scores))
        return np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What JSON can hold, and arrays."""
        config = {"known": list(self.known), "multilabel": self.multilabel, "boosting": self.boosting}
        scaling = {"mean": self.components.scaler.mean, "std": self.components.scaler.std}
        inputs = {**scaling, "centre": self.components.centre, "components": self.components.vectors}
        return config, {**inputs, **vars(self.trees), "start": self.start, "prior": self.prior}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> TreeHead:
        """The head whose `state` this is; raises `ValueError` for trees without an end."""
        scaler = Scaler(tensors["mean"], tensors["std"])
        components = Components(scaler, tensors["centre"], tensors["components"])
        trees = Trees(*(tensors[name] for name in Trees.__dataclass_fields__))
        known, kind = tuple(config["known"]), (config["multilabel"], config["boosting"])
        return cls(components, trees, tensors["start"], known, tensors["prior"], *kind)


@dataclass(frozen=True)
class TreeData:
    """Components, labels and sample weights of what trees are fitted on."""

    components: Components
    inputs: np.ndarray
    targets: Targets
    weights: np.ndarray
    class_weights: np.ndarray
    prior: np.ndarray
    seed: int

    @property
    def known(self) -> np.ndarray:
        """Numbers of the classes that some but not all samples have."""
        some, everywhere = self.targets.matrix.any(axis=0), self.targets.matrix.all(axis=0)
        return np.flatnonzero(some & ~everywhere)

    def head(self, trees: list[Trees], start: Any, boosting: bool) -> TreeHead:
        known, multilabel = tuple(self.known.tolist()), self.targets.multilabel
        start = np.asarray(start, dtype=np.float64)
        return TreeHead(self.components, _joined(trees), start, known, self.prior, multilabel, boosting)


def forest(data: TreeData, leaf: int) -> TreeHead:
    """A random forest (Breiman 2001) with at least `leaf` samples in a leaf.

    Class weights do not count where multi-label: there one forest serves all classes.
    """
    from sklearn.ensemble import RandomForestClassifier

    matrix = data.targets.matrix[:, data.known]
    if not matrix.size:
        return data.head([], np.zeros(0), boosting=False)
    labels = matrix.astype(int) if data.targets.multilabel else matrix.argmax(axis=1)
    model = RandomForestClassifier(FOREST_TREES, min_samples_leaf=leaf, random_state=data.seed)
    model.fit(data.inputs, labels.ravel() if labels.shape[1:] == (1,) else labels, sample_weight=data.weights)
    trees = [_shares(estimator.tree_, data.targets.multilabel) for estimator in model.estimators_]
    return data.head(trees, np.zeros(matrix.shape[1]), boosting=False)


def boosted(data: TreeData, steps: int) -> TreeHead:
    """Histogram gradient boosting (Ke et al. 2017).

    Multi-label has one model a class, in which a positive weighs what the class does.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    matrix = data.targets.matrix[:, data.known]
    problems: list[tuple[np.ndarray, np.ndarray]] = []
    if data.targets.multilabel:
        weights = np.where(matrix, np.asarray(data.class_weights)[data.known], 1.0)
        problems = [(each.astype(int), weight) for each, weight in zip(matrix.T, weights.T, strict=True)]
    elif matrix.size:
        problems = [(matrix.argmax(axis=1), data.weights)]
    rounds: list[list[Any]] = [[] for _ in range(steps)]
    start: list[float] = []
    for labels, sample_weight in problems:
        model = HistGradientBoostingClassifier(
            learning_rate=BOOSTING_RATE,
            max_iter=steps,
            max_leaf_nodes=BOOSTING_LEAVES,
            max_bins=BOOSTING_BINS,
            l2_regularization=1.0,
            early_stopping=False,
            random_state=data.seed,
        ).fit(data.inputs, labels, sample_weight=sample_weight)
        start += np.ravel(model._baseline_prediction).tolist()
        for number, predictors in enumerate(model._predictors):
            rounds[number] += predictors
    trees = [_added(each, column, len(start)) for one in rounds for column, each in enumerate(one)]
    return data.head(trees, start, boosting=True)


def boosting_stages(
    head: TreeHead, inputs: np.ndarray, steps: Sequence[int] = BOOSTING_STEPS
) -> Iterator[tuple[int, np.ndarray, TreeHead]]:
    """Number of steps, (n, C) logits and the head cut there, from one head that took the most `steps`."""
    width = len(head.start)
    for count, logits in zip(steps, head.stages(inputs, [count * width for count in steps]), strict=True):
        yield count, logits, replace(head, trees=head.trees.up_to(count * width))


def _shares(tree: Any, multilabel: bool) -> Trees:
    """A tree of a forest: its values are shares of classes, multi-label those of the positives."""
    shares = tree.value / tree.value.sum(axis=2, keepdims=True)
    values = shares[:, :, 1] if multilabel else shares[:, 0]
    return _tree(tree.children_left < 0, tree.feature, tree.threshold, tree.children_left, tree.children_right, values)


def _added(predictor: Any, column: int, columns: int) -> Trees:
    """A tree of a boosting: its values are added to one column of scores."""
    nodes = predictor.nodes
    values = np.zeros((len(nodes), columns))
    values[:, column] = nodes["value"]
    leaf = nodes["is_leaf"].astype(bool)
    return _tree(leaf, nodes["feature_idx"], nodes["num_threshold"], nodes["left"], nodes["right"], values)


def _tree(leaf: np.ndarray, feature: Any, threshold: Any, left: Any, right: Any, values: np.ndarray) -> Trees:
    """One tree, its leaves their own children."""
    nodes = np.arange(len(leaf))
    return Trees(
        first=np.zeros(1, dtype=np.int64),
        feature=np.where(leaf, 0, feature).astype(np.int64),
        threshold=np.where(leaf, 0, threshold).astype(np.float64),
        left=np.where(leaf, nodes, left).astype(np.int64),
        right=np.where(leaf, nodes, right).astype(np.int64),
        values=values.astype(np.float64),
    )


def _joined(trees: list[Trees]) -> Trees:
    """Many trees as one table of nodes."""
    sizes = np.array([len(tree.left) for tree in trees], dtype=np.int64)
    first = np.cumsum(sizes) - sizes
    if not trees:
        none = np.zeros(0, dtype=np.int64)
        return Trees(none, none, np.zeros(0), none, none, np.zeros((0, 0)))
    left, right = (
        np.concatenate([getattr(tree, side) + offset for tree, offset in zip(trees, first, strict=True)])
        for side in ("left", "right")
    )
    rest = {
        name: np.concatenate([getattr(tree, name) for tree in trees]) for name in ("feature", "threshold", "values")
    }
    return Trees(first, rest["feature"], rest["threshold"], left, right, rest["values"])
