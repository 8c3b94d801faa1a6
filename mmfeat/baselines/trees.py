"""Baselines of trees on the first principal components: random forest and boosting of LightGBM (Ke et al. 2017).

Trees split on one column at a time. A single column of an embedding says little; its principal components say more,
and few of them cost less. Fitted trees are kept as LightGBM's text model. Runs of version 0.1.0 hold plain arrays of
trees, which `SavedTrees` evaluates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfeat.baselines.basis import Basis, Matrix, Scaler, from_probabilities
from mmfeat.samples.labels import Targets

NEEDS_LIGHTGBM = ("forest", "boosting")
COMPONENTS = 32
FOREST_TREES = 100
FOREST_LEAVES = (3, 15)  # smallest number of samples in a leaf
BOOSTING_STEPS = (5, 10, 15, 20, 30, 40, 50, 60, 80, 100)  # a step adds one tree for each class
REPEATABLE = {  # settings that give the same trees on every machine, with one thread a fold
    "num_threads": 1, "deterministic": True, "force_row_wise": True, "verbosity": -1, "feature_pre_filter": False
}  # fmt: skip
FOREST = {
    "boosting": "rf", "num_leaves": 255, "bagging_freq": 1, "bagging_fraction": 0.632, "feature_fraction_bynode": 0.2
}  # fmt: skip
BOOSTING = {"boosting": "gbdt", "learning_rate": 0.1, "num_leaves": 7, "max_bin": 63, "lambda_l2": 1.0}


@dataclass(frozen=True)
class Components:
    """The projection of standardised vectors on the first principal components of the weighted training rows."""

    scaler: Scaler
    centre: np.ndarray
    vectors: np.ndarray

    @classmethod
    def of(cls, basis: Basis) -> Components:
        return cls(basis.scaler, basis.centre, np.ascontiguousarray(basis.vectors[:, :COMPONENTS]))

    def apply(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, P) float32 components of the vectors at `rows`; one column of zeros where nothing varies."""
        components = self.scaler.apply(matrix, rows, lambda scaled: (scaled - self.centre) @ self.vectors)
        return components if components.shape[1] else np.zeros((len(rows), 1), dtype=np.float32)

    def tensors(self) -> dict[str, np.ndarray]:
        """The arrays that `restore` takes."""
        scaling = {"mean": self.scaler.mean, "std": self.scaler.std}
        return {**scaling, "centre": self.centre, "components": self.vectors}

    @classmethod
    def restore(cls, tensors: dict[str, np.ndarray]) -> Components:
        return cls(Scaler(tensors["mean"], tensors["std"]), tensors["centre"], tensors["components"])


@dataclass(frozen=True)
class TreeHead:
    """Boosters over the `known` classes, which some but not all training rows have; the rest get their `prior` (C,).

    `models` are LightGBM's texts: one for all known classes, or one a class where multi-label. The first `rounds`
    rounds of each model count.
    """

    components: Components
    models: tuple[str, ...]
    rounds: int
    known: tuple[int, ...]
    prior: np.ndarray
    multilabel: bool

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64 log-probabilities, or log-odds where multi-label."""
        return next(self.stages(self.components.apply(matrix, rows), [self.rounds]))

    def stages(self, inputs: np.ndarray, rounds: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield the (n, C) logits of (n, P) components after each of these numbers of rounds."""
        from lightgbm import Booster

        boosters = [Booster(model_str=model) for model in self.models]
        for count in rounds:
            probabilities = np.repeat(self.prior[None], len(inputs), axis=0)
            if boosters and len(inputs):
                columns = [
                    np.asarray(booster.predict(inputs, num_iteration=count, num_threads=1)) for booster in boosters
                ]
                if not self.multilabel and len(self.known) == 2:  # LightGBM returns only the second of two classes
                    columns = [1 - columns[0], columns[0]]
                probabilities[:, np.array(self.known)] = np.column_stack(columns)
            yield from_probabilities(probabilities, self.multilabel)

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Plain values for JSON, and arrays, in which the texts are bytes; `restore` takes both."""
        config = {"known": list(self.known), "multilabel": self.multilabel, "rounds": self.rounds}
        texts = {f"model.{index}": np.frombuffer(model.encode(), np.uint8) for index, model in enumerate(self.models)}
        return config, {**self.components.tensors(), "prior": self.prior, **texts}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> TreeHead | SavedTrees:
        """The head whose `state` returned these values. Raises `ValueError` where a text is no model of LightGBM."""
        if "threshold" in tensors:
            return SavedTrees.restore(config, tensors)
        components, known = Components.restore(tensors), tuple(config["known"])
        names = [name for name in tensors if name.startswith("model.")]
        models = tuple(tensors[f"model.{index}"].tobytes().decode() for index in range(len(names)))
        for model in models:
            _check_model(model, components.vectors.shape[1] or 1, 1 if config["multilabel"] else len(known))
        return cls(components, models, int(config["rounds"]), known, tensors["prior"], bool(config["multilabel"]))


@dataclass(frozen=True)
class SavedTrees:
    """Trees that version 0.1.0 saved, as arrays over the nodes of all trees, one tree after the other.

    `first` (T,) are the indices of the roots. A sample goes left where its feature is <= threshold. A leaf is its own
    left and right child; other children come after their parents, so every path ends. `values` (nodes, K) are read at
    leaves: shares of the classes in a forest, scores to be added to `start` (K,) in boosting.
    """

    components: Components
    nodes: dict[str, np.ndarray]
    prior: np.ndarray
    config: dict[str, Any]

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64 log-probabilities, or log-odds where multi-label."""
        inputs, known = self.components.apply(matrix, rows), np.array(self.config["known"], dtype=int)
        probabilities = np.repeat(self.prior[None], len(inputs), axis=0)
        if len(known):
            total = sum((self._leaf_values(inputs, root) for root in self.nodes["first"]), np.zeros(1))
            probabilities[:, known] = self._boosted(total) if self.config["boosting"] else self._voted(total, known)
        return from_probabilities(probabilities, self.config["multilabel"])

    def _leaf_values(self, inputs: np.ndarray, root: int) -> np.ndarray:
        rows, node = np.arange(len(inputs)), np.full(len(inputs), root, dtype=np.int64)
        feature, threshold, left, right = (self.nodes[name] for name in ("feature", "threshold", "left", "right"))
        while True:
            child = np.where(inputs[rows, feature[node]] <= threshold[node], left[node], right[node])
            if np.array_equal(child, node):
                return self.nodes["values"][node]
            node = child

    def _voted(self, total: np.ndarray, known: np.ndarray) -> np.ndarray:
        """(n, K) mean of the trees' shares, with the prior as one more tree, so that no share is 0."""
        return (total + self.prior[known]) / (len(self.nodes["first"]) + 1)

    def _boosted(self, total: np.ndarray) -> np.ndarray:
        scores = total + self.nodes["start"]
        if self.config["multilabel"]:
            return np.exp(-np.logaddexp(0, -scores))
        if scores.shape[1] == 1:
            scores = np.concatenate([np.zeros_like(scores), scores], axis=1)
        return np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Plain values for JSON, and arrays, as version 0.1.0 saved them."""
        return self.config, {**self.components.tensors(), **self.nodes, "prior": self.prior}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> SavedTrees:
        """The trees of a run of version 0.1.0. Raises `ValueError` for trees with a path that does not end."""
        names = ("first", "feature", "threshold", "left", "right", "values", "start")
        nodes = {name: tensors[name] for name in names}
        numbers = np.arange(len(nodes["left"]))
        if (nodes["left"] < numbers).any() or (nodes["right"] < numbers).any() or (nodes["first"] < 0).any():
            raise ValueError("trees whose children come before their parents; the file was changed")
        return cls(Components.restore(tensors), nodes, tensors["prior"], config)


@dataclass(frozen=True)
class TreeData:
    """The training rows of trees: their components `inputs` (n, P), labels, sample weights and class weights."""

    components: Components
    inputs: np.ndarray
    targets: Targets
    weights: np.ndarray
    class_weights: np.ndarray
    prior: np.ndarray
    seed: int

    @property
    def known(self) -> np.ndarray:
        """Indices of the classes that some but not all samples have; the only column of numbers."""
        if self.targets.numeric:
            return np.zeros(1, int)
        some, everywhere = self.targets.matrix.any(axis=0), self.targets.matrix.all(axis=0)
        return np.flatnonzero(some & ~everywhere)


def forest(data: TreeData, leaf: int) -> TreeHead:
    """A random forest (Breiman 2001) with at least `leaf` samples in a leaf."""
    return _fitted(data, {**FOREST, "min_data_in_leaf": leaf}, FOREST_TREES)


def boosted(data: TreeData, rounds: int) -> TreeHead:
    """Gradient boosting (Friedman 2001) with one tree for each class in a round."""
    return _fitted(data, BOOSTING, rounds)


def _fitted(data: TreeData, settings: dict[str, Any], rounds: int) -> TreeHead:
    """Fit one booster over the known classes, or one a class where multi-label, with class weights on positives."""
    import lightgbm

    matrix, known = data.targets.matrix[:, data.known], tuple(data.known.tolist())
    problems: list[tuple[np.ndarray, np.ndarray]] = []
    if data.targets.multilabel:
        weights = np.where(matrix, np.asarray(data.class_weights)[data.known], 1.0)
        problems = list(zip(matrix.T.astype(int), weights.T, strict=True))
    elif data.targets.numeric:
        problems = [(matrix[:, 0], data.weights)]
    elif matrix.size:
        problems = [(matrix.argmax(axis=1), data.weights)]
    several = not data.targets.multilabel and len(known) > 2
    alone = "regression" if data.targets.numeric else "binary"
    objective = {"objective": "multiclass", "num_class": len(known)} if several else {"objective": alone}
    params = {**REPEATABLE, **settings, **objective, "seed": data.seed % 2**31}
    models = tuple(
        lightgbm.train(params, lightgbm.Dataset(data.inputs, labels, weight=weight), rounds).model_to_string()
        for labels, weight in problems
    )
    return TreeHead(data.components, models, rounds, known, data.prior, data.targets.multilabel)


def _check_model(text: str, width: int, classes: int) -> None:
    """Raise `ValueError` for a text that LightGBM might crash on: no model of (n, width) inputs for so many classes."""
    header = dict(re.findall(r"^(\w+)=(\d+)$", text[:4096], flags=re.MULTILINE))
    outputs = classes if classes > 2 else 1
    if not text.startswith("tree\n") or header.get("max_feature_idx") != str(width - 1):
        raise ValueError("no model of LightGBM over these components; the file was changed")
    if header.get("num_class") != str(outputs):
        raise ValueError(f"a model of LightGBM for {header.get('num_class')} outputs instead of {outputs}")
