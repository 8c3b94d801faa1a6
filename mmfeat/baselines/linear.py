"""Linear heads: ridge, logistic regression and linear SVM at every strength of L2, from one eigendecomposition.

The objectives are scikit-learn's, on standardised vectors and with class weights as sample weights:
`RidgeClassifier(alpha)`, `LogisticRegression(C)` (two classes and multi-label: one sigmoid a column) and
`LinearSVC(C)` with squared hinge loss, one class against the rest. Only the intercept differs from LinearSVC, which
penalises it; here no intercept is penalised.

Ridge has a closed form in the basis of the eigenvectors. The others are minimised by L-BFGS (Liu and Nocedal
1989) from the strongest penalty to the weakest, each from the solution before it. Coordinates are scaled by the square
root of a fixed curvature (in the manner of Böhning 1992), so that all are about equally steep and few steps suffice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfeat.baselines.basis import ABSENT, Basis, Matrix, Scaler, products
from mmfeat.evaluation.resampling import joined_groups
from mmfeat.samples.labels import Targets

Loss = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
WEAK = (3e1, 1e1, 1e0)  # further strengths of ridge for numbers, of which a few columns may tell all
TOLERANCE = 1e-4  # largest gradient at the end; as the curvature is about 1, the error of logits is about as small
COMPARED = 3e-4  # the same for models that are only compared with others
ITERATIONS = 300
PAIRS = 20  # pairs of step and gradient change that L-BFGS remembers


def _softmax(scores: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, P, K) cross-entropy of (n, P, K) scores, and its slopes; `wanted` (n, 1, K) is 1 in the column of the class,
    else -1."""
    scores = np.asfortranarray(scores)  # whose few classes are added up as columns, in a third of the time
    shifted = scores - scores.max(axis=-1, keepdims=True)
    exponentials = np.exp(shifted)
    total = exponentials.sum(axis=-1, keepdims=True)
    losses = np.where(wanted > 0, np.log(total) - shifted, 0)
    return losses, exponentials / total - (wanted > 0)


def _sigmoid(scores: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    margins = wanted * scores
    losses = np.logaddexp(0, -margins)
    return losses, -wanted * np.exp(-margins - losses)


def _squared_hinge(scores: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    short = np.maximum(1 - wanted * scores, 0)
    return short**2, -2 * wanted * short


def _squared(scores: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (scores - wanted) ** 2 / 2, scores - wanted


@dataclass(frozen=True)
class Objective:
    """A loss with its usual curvature, scikit-learn's name of its strength, and the strengths, strong to weak."""

    losses: Loss
    curvature: float
    parameter: str
    strengths: tuple[float, ...]

    def penalty(self, strength: float) -> float:
        """The factor lambda in: sum of the losses + lambda / 2 * sum of the squared weights."""
        return strength if self.parameter == "alpha" else 1 / strength


OBJECTIVES: dict[str, Objective] = {
    "ridge": Objective(_squared, 1.0, "alpha", (1e6, 3e5, 1e5, 3e4, 1e4, 3e3, 1e3, 3e2, 1e2)),
    "logistic": Objective(_softmax, 0.2, "C", (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
    "svm": Objective(_squared_hinge, 1.5, "C", (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)),
}


@dataclass(frozen=True)
class Columns:
    """The map between C classes and the K columns of a linear model.

    `learned` (C,) marks the classes that some but not all training rows have, `everywhere` (C,) those that all have.
    Two learned classes share one column, whose score is the difference of their logits; three or more, and multi-label
    classes, have a column each. Classes that are not learned get a constant logit. A number has the only column.
    """

    learned: tuple[bool, ...]
    everywhere: tuple[bool, ...]
    multilabel: bool

    @classmethod
    def of(cls, targets: Targets) -> Columns:
        if targets.numeric:
            return cls((True,), (False,), False)
        counts = targets.matrix.sum(axis=0).tolist()
        learned = tuple(0 < count < len(targets) for count in counts)
        return cls(learned, tuple(count == len(targets) for count in counts), targets.multilabel)

    @property
    def paired(self) -> bool:
        return not self.multilabel and sum(self.learned) == 2

    def wanted(self, targets: Targets) -> np.ndarray:
        """(n, K) float64 targets: 1 for the class of a column, -1 for the other classes; numbers as they are."""
        if targets.numeric:
            return targets.matrix
        signs = np.where(targets.matrix[:, np.array(self.learned, dtype=bool)], 1.0, -1.0)
        return signs[:, 1:] if self.paired else signs

    def weights(self, targets: Targets, samples: np.ndarray, class_weights: np.ndarray) -> np.ndarray:
        """(n, 1) sample weights or, multi-label, (n, K): the weight of a class is that of its positives."""
        if not self.multilabel:
            return samples[:, None]
        learned = np.array(self.learned, dtype=bool)
        return np.where(targets.matrix[:, learned], np.asarray(class_weights, dtype=np.float64)[learned], 1.0)

    def logits(self, scores: np.ndarray) -> np.ndarray:
        """(n, K) scores -> (n, C) finite logits."""
        if self.paired:
            scores = np.concatenate([-scores / 2, scores / 2], axis=1)
        floor = np.zeros(len(scores)) if self.multilabel or not any(self.learned) else scores.min(axis=1)
        logits = np.repeat(floor[:, None] - ABSENT, len(self.learned), axis=1)
        logits[:, np.array(self.everywhere, dtype=bool)] = ABSENT if self.multilabel else 0.0
        logits[:, np.array(self.learned, dtype=bool)] = scores
        return logits


@dataclass(frozen=True)
class LinearHead:
    """A linear model: `coefficients` (D, K) float32 and `intercepts` (K,) float64 on standardised vectors."""

    kind: str
    strength: float
    scaler: Scaler
    columns: Columns
    coefficients: np.ndarray
    intercepts: np.ndarray

    def logits(self, matrix: Matrix, rows: np.ndarray) -> np.ndarray:
        """(n, C) float64: log-probabilities of a multi-class logistic regression, else margins."""
        return self.scaler.apply(matrix, rows, self.scaled_logits)

    def scores(self, scaled: np.ndarray) -> np.ndarray:
        """(n, K) float64 scores of (n, D) standardised vectors."""
        return (scaled @ self.coefficients).astype(np.float64) + self.intercepts

    def scaled_logits(self, scaled: np.ndarray) -> np.ndarray:
        """(n, C) float64 logits of (n, D) standardised vectors, as `logits` returns them."""
        return self.of_scores(self.scores(scaled))

    def of_scores(self, scores: np.ndarray) -> np.ndarray:
        """(n, C) float64 logits of (n, K) scores."""
        logits = self.columns.logits(scores)
        if self.kind == "logistic" and not self.columns.multilabel:
            logits -= np.logaddexp.reduce(logits, axis=1, keepdims=True)
        return logits

    def state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Plain values for JSON, and arrays; `restore` takes both."""
        config = {"kind": self.kind, "strength": self.strength, "columns": vars(self.columns)}
        weights = {"coefficients": self.coefficients, "intercepts": self.intercepts}
        return config, {**weights, "mean": self.scaler.mean, "std": self.scaler.std}

    @classmethod
    def restore(cls, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> LinearHead:
        """The head whose `state` returned `config` and `tensors`."""
        saved = config["columns"]
        columns = Columns(tuple(saved["learned"]), tuple(saved["everywhere"]), saved["multilabel"])
        scaler = Scaler(tensors["mean"], tensors["std"])
        weights = tensors["coefficients"], tensors["intercepts"]
        return cls(config["kind"], config["strength"], scaler, columns, *weights)


def linear_path(
    kind: str,
    basis: Basis,
    targets: Targets,
    class_weights: np.ndarray,
    strengths: Sequence[float] | None = None,
    tolerance: float = TOLERANCE,
) -> Iterator[LinearHead]:
    """Yield one head for each of the `strengths`, which go from strong to weak regularisation.

    `targets` holds all samples, `basis.rows` the rows that train.
    """
    everything = np.ones((1, len(basis.rows)), dtype=bool)
    for ((head, _, _),) in _solved(kind, basis, everything, targets, class_weights, strengths, tolerance):
        yield head


def held_out_paths(
    kind: str, basis: Basis, parts: Sequence[np.ndarray], targets: Targets, class_weights: np.ndarray,
    strengths: Sequence[float] | None = None,
) -> Iterator[list[tuple[LinearHead, np.ndarray]]]:  # fmt: skip
    """Yield for each of the strengths a head of the rows of the basis without each of the `parts`, ascending row
    numbers, and its logits (m, C) of the part.

    The heads of parts that leave the same classes are minimised together, so that a pass over the rows serves them all.
    """
    kept = np.array([~np.isin(basis.rows, part) for part in parts])
    alike: dict[Columns, list[int]] = {}
    for number, mask in enumerate(kept):
        alike.setdefault(Columns.of(targets.take(basis.rows[mask])), []).append(number)
    paths = [
        _solved(kind, basis, kept[numbers], targets, class_weights, strengths, COMPARED) for numbers in alike.values()
    ]
    order = np.argsort(list(itertools.chain(*alike.values())))
    for solved in zip(*paths, strict=True):
        found = list(itertools.chain(*solved))
        heads, coordinates, intercepts = zip(*(found[place] for place in order), strict=True)
        directions = basis.directions(np.concatenate(coordinates, axis=1))
        scores = np.concatenate([products(chunk, directions.T).astype(np.float64) for _, chunk in basis.chunks()])
        by_part = np.split(scores, np.cumsum([one.shape[1] for one in coordinates])[:-1], axis=1)
        yield [
            (head, head.of_scores(own[~mask] + shift))
            for head, own, mask, shift in zip(heads, by_part, kept, intercepts, strict=True)
        ]


def ridge_left_out(
    basis: Basis, targets: Targets, groups: np.ndarray, strengths: Sequence[float] | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """Yield each strength of ridge regression with the logits (n, C) of each of the n rows of the basis, which is held,
    by a regression on the rows of the other `groups` (n,).

    In closed form: the error of a group that is left out is (I - H)^-1 times its error if it trains, too, where H is
    the group's block of the matrix that makes predictions of labels (Allen, 1974, for single rows).
    """
    assert basis.held is not None, "rows in memory"
    trained, weights, total = targets.take(basis.rows), basis.weights[:, None], basis.weights.sum()
    columns = Columns.of(trained)
    wanted = columns.wanted(trained)
    means = (weights * wanted).sum(axis=0) / total
    moment = basis.coordinates(products((weights * (wanted - means)).astype(np.float32).T, basis.held.T).T)
    joined, of = joined_groups(groups, len(groups))
    members = np.split(joined[np.argsort(of, kind="stable")], np.cumsum(np.bincount(of))[:-1])
    strengths = _strengths("ridge", targets) if strengths is None else strengths
    factors = 1 / (total * basis.values[:, None] + np.asarray(strengths))
    leverages = weights * (1 / total + products(np.square(basis.held), factors.astype(np.float32).T))
    moments = (factors[:, :, None] * moment[:, None]).reshape(len(factors), len(strengths) * wanted.shape[1])
    predicted = products(basis.held, moments.astype(np.float32).T).reshape(len(wanted), len(strengths), wanted.shape[1])
    for number, strength in enumerate(strengths):
        shrunk = factors[:, number]
        error = wanted - means - predicted[:, number]
        left = error / (1 - leverages[:, number, None])
        for rows in members if len(joined) else []:
            block = (1 / total + (basis.held[rows] * shrunk) @ basis.held[rows].T) * weights[rows].T
            left[rows] = np.linalg.solve(np.eye(len(rows)) - block, error[rows])
        yield strength, columns.logits(wanted - left)


def _strengths(kind: str, targets: Targets) -> Sequence[float]:
    return OBJECTIVES[kind].strengths + (WEAK if targets.numeric else ())


def _solved(
    kind: str, basis: Basis, kept: np.ndarray, targets: Targets, class_weights: np.ndarray,
    strengths: Sequence[float] | None, tolerance: float,
) -> Iterator[list[tuple[LinearHead, np.ndarray, np.ndarray]]]:  # fmt: skip
    """Yield for each of the strengths, and for each of P sets of rows `kept` (P, n) that have the same classes, a head
    and its coordinates (r, K) and intercepts (K,) in the basis."""
    strengths = _strengths(kind, targets) if strengths is None else strengths
    trained = targets.take(basis.rows)
    columns = Columns.of(targets.take(basis.rows[kept[0]]))
    wanted = columns.wanted(trained)
    weights = columns.weights(trained, basis.weights, class_weights)
    if not wanted.shape[1]:
        solutions: Any = ([(np.zeros((len(basis.values), 0)), np.zeros(0))] * len(kept) for _ in strengths)
    elif kind == "ridge" and not columns.multilabel:
        solutions = ([solution] for solution in _closed_form(basis, wanted, weights, strengths))
    else:
        solutions = _minima(kind, basis, wanted, weights, kept, strengths, tolerance)
    for strength, found in zip(strengths, solutions, strict=True):
        solved = []
        for coordinates, intercepts in found:
            coefficients = basis.vectors @ coordinates.astype(np.float32)
            shift = basis.centre.astype(np.float64) @ coefficients
            head = LinearHead(kind, strength, basis.scaler, columns, coefficients, intercepts - shift)
            solved.append((head, coordinates, intercepts))
        yield solved


def _closed_form(
    basis: Basis, wanted: np.ndarray, weights: np.ndarray, strengths: Sequence[float]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weighted ridge regression at every strength; because the rows have mean 0, the intercepts are means.

    The basis is rounded, so each solution is corrected once by what it leaves of the normal equations.
    """
    total = weights.sum()
    means = (weights * wanted).sum(axis=0) / total
    goals = np.tile(wanted - means, len(strengths))
    penalties = np.repeat(np.asarray(strengths, np.float64), wanted.shape[1])
    steepness = total * basis.values[:, None] + penalties
    solutions = np.zeros_like(steepness)
    for _ in range(2):
        directions = basis.directions(solutions)
        moment = np.zeros_like(solutions)
        for part, chunk in basis.chunks():
            error = weights[part] * (goals[part] - products(chunk, directions.T))
            moment += basis.coordinates(products(error.astype(np.float32).T, chunk.T).T)
        solutions = solutions + (moment - penalties * solutions) / steepness
    for coordinates in np.split(solutions, len(strengths), axis=1):
        yield coordinates, means


def _minima(
    kind: str,
    basis: Basis,
    wanted: np.ndarray,
    weights: np.ndarray,
    kept: np.ndarray,
    strengths: Sequence[float],
    tolerance: float,
) -> Iterator[list[tuple[np.ndarray, np.ndarray]]]:
    """Coordinates (r, K) and intercepts (K,) for each set of rows `kept` (P, n) that minimise its penalised loss, at
    each strength; the P losses are minimised as one sum."""
    losses, sets = OBJECTIVES[kind].losses, len(kept)
    if kind == "logistic" and (wanted.shape[1] == 1 or weights.shape[1] > 1):
        losses = _sigmoid
    weights = weights[:, None] * kept.T[:, :, None]  # (n, P, 1 or K)
    totals = weights[:, :, 0].sum(axis=0)[:, None]
    shares = weights / totals
    steepness = OBJECTIVES[kind].curvature * np.append(basis.values, 1.0)[:, None, None]  # last is the intercept's row
    solution = np.zeros((len(steepness), sets, wanted.shape[1]))
    for strength in strengths:
        penalties = np.ones_like(solution) * OBJECTIVES[kind].penalty(strength) / totals
        penalties[-1] = 0

        def objective(point: np.ndarray, penalties: np.ndarray = penalties) -> tuple[float, np.ndarray]:
            value, gradient = _loss_and_gradient(basis, losses, point, wanted[:, None], shares)
            return value + float((penalties * point**2).sum()) / 2, gradient + penalties * point

        solution = _minimum(objective, solution, 1 / np.sqrt(steepness + penalties), tolerance)
        yield [(solution[:-1, number], solution[-1, number]) for number in range(sets)]


def _minimum(
    objective: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    scale: np.ndarray,
    tolerance: float,
) -> np.ndarray:
    """The minimum of `objective` (value and gradient) by L-BFGS, from `start`, in units of `scale`."""
    from scipy.optimize import minimize

    def scaled(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = objective(scale * flat.reshape(start.shape))
        return value, (scale * gradient).ravel()

    options = {"maxiter": ITERATIONS, "maxcor": PAIRS, "gtol": tolerance, "ftol": 0.0}
    result = minimize(scaled, (start / scale).ravel(), jac=True, method="L-BFGS-B", options=options)
    return scale * result.x.reshape(start.shape)


def _loss_and_gradient(
    basis: Basis, losses: Loss, point: np.ndarray, wanted: np.ndarray, weights: np.ndarray
) -> tuple[float, np.ndarray]:
    """Weighted loss over all training rows at `point` (r + 1, P, K), and its gradient: products in float32, everything
    else in float64."""
    shape = point.shape[1:]
    directions, value = basis.directions(point[:-1].reshape(len(point) - 1, math.prod(shape))), 0.0
    gradient, intercepts = np.zeros(directions.shape), np.zeros(shape)
    for part, chunk in basis.chunks():
        scores = products(chunk, directions.T).astype(np.float64).reshape(-1, *shape)
        loss, slope = losses(scores + point[-1], wanted[part])
        slope *= weights[part]
        value += float((loss * weights[part]).sum())
        gradient += products(slope.astype(np.float32).reshape(len(slope), -1).T, chunk.T).T
        intercepts += slope.sum(axis=0)
    return value, np.concatenate([basis.coordinates(gradient).reshape(len(point) - 1, *shape), intercepts[None]])
