"""Linear heads minimise what scikit-learn minimises, from memory and from disk alike."""

from __future__ import annotations

import os
import subprocess
import sys
from threading import Thread

import numpy as np
import pytest

from mmfeat.baselines import basis as basis_module
from mmfeat.baselines.basis import LARGE, Basis, eigenpairs, make_basis, one_blas_thread, products
from mmfeat.baselines.linear import OBJECTIVES, TOLERANCE, LinearHead, held_out_paths, linear_path, ridge_left_out
from mmfeat.samples.labels import Targets, indicator

WEIGHTS = np.array([0.6, 1.5, 0.9])


class Rows:
    """A matrix in memory that remembers how many rows were asked for at once."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors, self.width, self.most = vectors, vectors.shape[1], 0

    def __len__(self) -> int:
        return len(self.vectors)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        self.most = max(self.most, len(rows))
        return self.vectors[rows].astype(np.float32)


def problem(count: int = 400, width: int = 30, classes: int = 3, multilabel: bool = False) -> tuple[Rows, Targets]:
    """Correlated columns of very different sizes, unbalanced classes, noise."""
    random = np.random.default_rng(7)
    vectors = random.normal(size=(count, width)) @ random.normal(size=(width, width))
    scores = vectors @ random.normal(size=(width, classes)) / width + random.gumbel(size=(count, classes))
    scores += np.arange(classes)
    matrix = scores > 1.0 if multilabel else indicator(scores.argmax(1), classes)
    scaled = vectors * 10.0 ** random.integers(-2, 3, width) + random.normal(size=width) * 5
    return Rows(scaled.astype(np.float32)), Targets(tuple("abcdef"[:classes]), matrix, multilabel)


def prepared(matrix: Rows, targets: Targets, memory: int = basis_module.MEMORY) -> tuple[Basis, np.ndarray]:
    """The basis of the first three quarters, and these rows standardised in float64."""
    rows = np.arange(len(matrix) * 3 // 4)
    basis = make_basis(matrix, targets, rows, WEIGHTS, memory)
    raw = matrix.vectors[rows].astype(np.float64)
    with np.errstate(invalid="ignore"):
        return basis, (raw - raw.mean(0)) / raw.std(0)


def test_a_large_product_is_that_of_numpy_however_its_factors_lie() -> None:
    random = np.random.default_rng(0)
    rows, few = random.normal(size=(3000, 300)).astype(np.float32), random.normal(size=(9, 300)).astype(np.float32)
    assert few.size * len(rows) > LARGE
    gappy = np.pad(rows, ((0, 0), (0, 5)))[:, :300]
    for left, right in ((rows, few), (few, rows), (rows, few.T.copy().T), (few, gappy), (gappy, few)):
        np.testing.assert_allclose(products(left, right), left @ right.T, atol=1e-4)
    slopes = random.normal(size=(9, 3000)).astype(np.float32)
    for right in (rows.T, gappy.T):
        np.testing.assert_allclose(products(slopes, right), slopes @ right.T, atol=1e-3)


def test_held_rows_lie_without_gaps_where_columns_were_cut() -> None:
    """Products of rows with gaps between them are hundreds of times as slow."""
    matrix, targets = problem()
    constant = Rows(np.column_stack([matrix.vectors, np.ones(len(matrix), np.float32)]))
    basis, scaled = prepared(constant, targets)
    assert basis.held is not None
    assert basis.held.shape == (300, 30)
    assert basis.held.flags.c_contiguous
    centred = np.nan_to_num(scaled[:, :30]) - basis.centre[:30]
    np.testing.assert_allclose(basis.held, centred @ basis.vectors[:30], atol=1e-3)


def sklearn_scores(kind: str, strength: float, x: np.ndarray, targets: Targets) -> tuple[np.ndarray, np.ndarray]:
    """Coefficients and decision values of scikit-learn's own estimator, solved tightly."""
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.svm import LinearSVC

    labels = targets.numbers[: len(x)]
    weights = dict(enumerate(WEIGHTS[: len(targets.classes)]))
    if kind == "ridge":
        model = RidgeClassifier(alpha=strength, class_weight=weights, solver="cholesky").fit(x, labels)
    elif kind == "logistic":
        model = LogisticRegression(C=strength, class_weight=weights, tol=1e-9, max_iter=9000).fit(x, labels)
    else:
        model = LinearSVC(C=strength, tol=1e-9, max_iter=99999, intercept_scaling=300, dual=False)
        model.fit(x, labels, sample_weight=WEIGHTS[labels])
    return model.coef_, model.decision_function(x)


# Relative to the largest value. Ridge is exact up to float32, the others up to where L-BFGS stops: at the tight
# tolerance where float32 products of 500 columns do, which depends on the processor (3e-4 to 8e-4 were seen).
@pytest.mark.parametrize(
    ("kind", "tolerance", "within"),
    [
        ("ridge", TOLERANCE, 1e-5),
        ("logistic", TOLERANCE, 5e-3),
        ("svm", TOLERANCE, 5e-3),
        ("logistic", 1e-6, 1.5e-3),
        ("svm", 1e-6, 1.5e-3),
    ],
)
@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("width", [30, 500])
def test_every_strength_is_what_scikit_learn_finds(
    kind: str, tolerance: float, within: float, classes: int, width: int
) -> None:
    """With more samples than columns and with fewer."""
    matrix, targets = problem(width=width, classes=classes)
    basis, x = prepared(matrix, targets)
    for head in list(linear_path(kind, basis, targets, WEIGHTS, tolerance=tolerance)):
        if kind == "svm" and head.strength < 3e-5:
            continue  # where the penalty rules, it also moves the intercept that LinearSVC penalises
        coefficients, decision = sklearn_scores(kind, head.strength, x, targets)
        scores = head.scores(x.astype(np.float32))
        if classes == 2:
            scores = scores[:, 0]
        elif kind == "logistic":  # the softmax has one intercept too many
            scores, decision = (each - each.mean(1, keepdims=True) for each in (scores, decision))
        assert np.abs(head.coefficients.T - coefficients).max() < within * np.abs(coefficients).max()
        assert np.abs(scores - decision).max() < within * np.abs(decision).max()


def test_ridge_is_exact_where_one_factor_rules_all_columns() -> None:
    """There the rounding errors of float32 eigenvectors are as large as the weakest penalty."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(4000, 1)) + 0.1 * random.normal(size=(4000, 300))
    labels = indicator((vectors @ random.normal(size=(300, 3)) + random.gumbel(size=(4000, 3))).argmax(1), 3)
    matrix, targets = Rows(vectors.astype(np.float32)), Targets(("a", "b", "c"), labels)
    basis, x = prepared(matrix, targets)
    for head in linear_path("ridge", basis, targets, WEIGHTS):
        decision = sklearn_scores("ridge", head.strength, x, targets)[1]
        assert np.abs(head.scores(x.astype(np.float32)) - decision).max() < 1e-5 * np.abs(decision).max()


@pytest.mark.parametrize("width", [30, 500])
def test_ridge_leaves_out_groups_in_closed_form(width: int) -> None:
    """As regressions on the other rows do, with the mean and deviation of all."""
    from sklearn.linear_model import RidgeClassifier

    matrix, targets = problem(width=width)
    basis, x = prepared(matrix, targets)
    groups = np.arange(300)
    groups[[3, 40, 41]], groups[[8, 200]] = 3, 8
    for strength, logits in ridge_left_out(basis, targets, groups, [1e4, 1e2]):
        for left in ([3, 40, 41], [8, 200], [7]):
            kept = np.setdiff1d(np.arange(300), left)
            model = RidgeClassifier(alpha=strength, class_weight=dict(enumerate(WEIGHTS)), solver="cholesky")
            expected = model.fit(x[kept], targets.numbers[kept]).decision_function(x[left])
            np.testing.assert_allclose(logits[left], expected, atol=1e-3)


@pytest.mark.parametrize("memory", [0, basis_module.MEMORY])
@pytest.mark.parametrize("kind", ["logistic", "svm"])
def test_parts_that_are_left_out_are_scored_by_heads_of_the_other_rows(kind: str, memory: int) -> None:
    """The heads of all parts are minimised as one; one part holds a whole class, which its head has not seen."""
    matrix, targets = problem()
    basis = prepared(matrix, targets, memory)[0]
    parts = [np.arange(0, 300, 3), np.flatnonzero(targets.numbers[:300] == 2), np.arange(1, 300, 3)]
    strengths = [1e-3, 1e-2]
    alone = zip(*(held_out_paths(kind, basis, [part], targets, WEIGHTS, strengths) for part in parts), strict=True)
    together = held_out_paths(kind, basis, parts, targets, WEIGHTS, strengths)
    for pairs, singles in zip(together, alone, strict=True):
        for part, (head, logits), ((_, single),) in zip(parts, pairs, singles, strict=True):
            np.testing.assert_allclose(logits, head.logits(matrix, part), atol=1e-4)
            np.testing.assert_allclose(logits, single, atol=3e-3)


def test_logistic_probabilities_are_scikit_learns() -> None:
    from sklearn.linear_model import LogisticRegression

    for classes in (2, 3):
        matrix, targets = problem(classes=classes)
        basis, x = prepared(matrix, targets)
        weights = dict(enumerate(WEIGHTS[:classes]))
        model = LogisticRegression(C=0.01, class_weight=weights, tol=1e-8).fit(x, targets.numbers[: len(x)])
        (head,) = linear_path("logistic", basis, targets, WEIGHTS, [0.01])
        logits = head.logits(matrix, np.arange(len(x)))
        assert np.allclose(np.exp(logits), model.predict_proba(x), atol=2e-4)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_multilabel_is_one_problem_a_class_in_which_positives_weigh_more(kind: str) -> None:
    matrix, targets = problem(multilabel=True)
    basis, x = prepared(matrix, targets)
    strength = OBJECTIVES[kind].strengths[5]
    (head,) = linear_path(kind, basis, targets, WEIGHTS, [strength], tolerance=1e-6)
    logits = head.logits(matrix, np.arange(len(x)))
    for column in range(3):
        alone = Targets(("no", "yes"), indicator(targets.matrix[:, column].astype(int), 2))
        weights = np.array([1.0, WEIGHTS[column]])
        one = make_basis(matrix, alone, np.arange(len(x)), weights)
        (single,) = linear_path(kind, one, alone, weights, [strength], tolerance=1e-6)
        expected = np.diff(single.logits(matrix, np.arange(len(x))), axis=1)[:, 0]
        assert np.allclose(logits[:, column], expected, atol=2e-3)


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("multilabel", [False, True])
def test_rows_from_disk_give_what_rows_in_memory_give(
    kind: str, multilabel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, targets = problem(multilabel=multilabel)
    matrix.vectors[::5, :10] = np.nan
    held, _ = prepared(matrix, targets)
    monkeypatch.setattr(basis_module, "CHUNK", 4 * 30 * 64)
    matrix.most = 0
    streamed, _ = prepared(matrix, targets, memory=0)
    every = np.arange(len(matrix))[::-1]
    pairs = zip(*(linear_path(kind, basis, targets, WEIGHTS) for basis in (held, streamed)), strict=True)
    for one, other in pairs:
        scale = np.abs(one.logits(matrix, every)).max()
        assert np.allclose(one.logits(matrix, every), other.logits(matrix, every), atol=1e-3 * scale)
    assert streamed.held is None
    assert matrix.most == 64
    for name in ("mean", "std"):
        assert np.allclose(getattr(held.scaler, name), getattr(streamed.scaler, name), rtol=1e-5)


@pytest.mark.parametrize("size", [0, 1, 90])
def test_the_largest_eigenvectors_are_scipys(size: int) -> None:
    from scipy.linalg import eigh

    values = np.random.default_rng(size).standard_normal((size, size))
    expected, found = eigh(values @ values.T), eigenpairs(values @ values.T, 40)
    np.testing.assert_allclose(found[0], expected[0][-40:], atol=1e-9)
    np.testing.assert_allclose(np.abs(found[1]), np.abs(expected[1][:, -40:]), atol=1e-9)  # their sign is free


def test_logits_come_in_the_order_asked_for() -> None:
    matrix, targets = problem()
    basis, _ = prepared(matrix, targets)
    (head,) = linear_path("ridge", basis, targets, WEIGHTS, [100.0])
    rows = np.array([17, 3, 399, 3])
    assert np.allclose(head.logits(matrix, rows), head.logits(matrix, np.arange(400))[rows], atol=1e-6)
    assert head.logits(matrix, rows[:0]).shape == (0, 3)


def test_a_missing_vector_is_the_mean_of_those_that_are_there() -> None:
    matrix, targets = problem()
    present = matrix.vectors[:300, 0].copy()[np.arange(300) % 3 != 0]
    matrix.vectors[::3, 0] = np.nan
    basis, _ = prepared(matrix, targets)
    assert np.isclose(basis.scaler.mean[0], present.mean(), rtol=1e-5)
    assert np.isclose(basis.scaler.std[0], present.std(), rtol=1e-5)
    assert basis.scaler.scaled(matrix.rows(np.array([0])))[0, 0] == 0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_columns_that_say_nothing_change_nothing(kind: str) -> None:
    """Constant ones, also large, and ones that no row has."""
    matrix, targets = problem()
    nothing = np.tile(np.float32([0, 1e4, 3e-8, np.nan]), (len(matrix), 1))
    wide = Rows(np.concatenate([matrix.vectors, nothing], axis=1))
    every = np.arange(len(matrix))
    for one, other in zip(
        *(linear_path(kind, prepared(rows, targets)[0], targets, WEIGHTS) for rows in (matrix, wide)), strict=True
    ):
        assert np.allclose(one.logits(matrix, every), other.logits(wide, every), atol=2e-3)
    only = Rows(nothing)
    for head in linear_path(kind, prepared(only, targets)[0], targets, WEIGHTS):
        logits = head.logits(only, every)
        assert np.isfinite(logits).all()
        assert np.allclose(logits, logits[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("present", [[0, 2], [1], [0, 1, 2]])
@pytest.mark.parametrize("multilabel", [False, True])
def test_a_class_without_training_rows_is_never_chosen(kind: str, present: list[int], multilabel: bool) -> None:
    matrix, targets = problem(classes=4, multilabel=multilabel)
    rows = np.flatnonzero(~targets.matrix[:, [n for n in range(4) if n not in present]].any(1))
    weights = np.ones(4)
    basis = make_basis(matrix, targets, rows, weights)
    absent = [number for number in range(4) if number not in present]
    for head in linear_path(kind, basis, targets, weights):
        logits = head.logits(matrix, np.arange(len(matrix)))
        assert np.isfinite(logits).all()
        below = 0 if multilabel else logits[:, present].min(axis=1, keepdims=True)
        assert (logits[:, absent] < below - 20).all()


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_state_restores_the_same_logits(kind: str) -> None:
    import json

    matrix, targets = problem()
    basis, _ = prepared(matrix, targets)
    head = list(linear_path(kind, basis, targets, WEIGHTS))[4]
    config, tensors = head.state()
    again = LinearHead.restore(json.loads(json.dumps(config)), tensors)
    every = np.arange(len(matrix))
    assert np.array_equal(again.logits(matrix, every), head.logits(matrix, every))


def test_one_thread_also_holds_for_a_blas_that_is_loaded_later() -> None:
    """SciPy has one of its own. In a new process, where nobody loaded it."""
    code = (
        "from mmfeat.baselines.basis import one_blas_thread\n"
        "with one_blas_thread():\n"
        "    import scipy.linalg\n"
        "    from threadpoolctl import threadpool_info\n"
        "    print({each['num_threads'] for each in threadpool_info() if each['user_api'] == 'blas'})\n"
    )
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "OMP_NUM_THREADS": "2"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert answer.stdout == "{1}\n"


def test_one_thread_holds_until_the_last_of_several_leaves() -> None:
    import scipy.linalg  # noqa: F401  its BLAS counts, too
    from threadpoolctl import threadpool_info, threadpool_limits

    def blas() -> set[int]:
        return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}

    inside: list[set[int]] = []
    with threadpool_limits(2, user_api="blas"):
        before = blas()
        first = one_blas_thread()
        with one_blas_thread():
            thread = Thread(target=lambda: (first.__enter__(), inside.append(blas())))  # type: ignore[func-returns-value]
            thread.start()
            thread.join()
        inside.append(blas())
        first.__exit__(None, None, None)
        assert inside == [{1}, {1}]
        assert blas() == before
