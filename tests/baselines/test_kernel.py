"""Kernel logistic regression is what its formula says, and scikit-learn's Nyström map with logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from mmfeat.baselines import kernel as kernels
from mmfeat.baselines.fit import TrainingRows, refit
from mmfeat.baselines.kernel import KernelHead, make_kernel
from tests.baselines.test_fit import TEST, TRAIN, Rows, problem

WIDTHS = (8, 16)


@pytest.fixture(autouse=True)
def no_encoder_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "NARROW", 4)


def prepared_by_hand(vectors: np.ndarray) -> np.ndarray:
    """Each encoder to length 1, less the mean of the training rows, to length 1."""
    parts = []
    for part in np.split(vectors.astype(np.float32).astype(np.float64), [8], axis=1):
        unit = part / np.linalg.norm(part, axis=1, keepdims=True)
        centred = unit - np.nanmean(unit[TRAIN], axis=0)
        parts.append(np.nan_to_num(centred / np.linalg.norm(centred, axis=1, keepdims=True)))
    return np.concatenate(parts, axis=1)


def test_it_is_the_kernel_of_the_formula() -> None:
    """Also where the first encoder has no vector: its cosine is then 0."""
    matrix, _ = problem()
    kernel = make_kernel(matrix, WIDTHS, False, TRAIN, TRAIN[:50])
    plain = prepared_by_hand(matrix.vectors)
    expected = np.exp(plain[TEST] @ plain[:50].T - 2)
    found = kernel.kernels(kernel.prepared(matrix.rows(TEST)))
    np.testing.assert_allclose(found, expected, rtol=3e-3)  # landmarks are kept in half precision
    inside = kernel.rows(np.arange(50))
    np.testing.assert_allclose(inside @ inside.T, np.exp(plain[:50] @ plain[:50].T - 2), atol=5e-3)


@pytest.mark.parametrize("strength", kernels.STRENGTHS)
def test_it_is_scikit_learns_logistic_regression_on_the_components(strength: float) -> None:
    matrix, targets = problem()
    weights = np.linspace(0.8, 1.6, 3)
    kernel = make_kernel(matrix, WIDTHS, False, TRAIN, TRAIN)
    head = refit("kernel", TrainingRows(matrix, targets, TRAIN, weights, 5, widths=WIDTHS), {"C": strength})
    theirs = LogisticRegression(C=strength, class_weight=dict(enumerate(weights)), tol=1e-9, max_iter=9000)
    theirs.fit(kernel.rows(TRAIN).astype(np.float64), targets.numbers[TRAIN])
    expected = theirs.predict_log_proba(kernel.rows(TEST).astype(np.float64))
    np.testing.assert_allclose(head.logits(matrix, TEST), expected, atol=5e-3 * np.abs(expected).max())


def test_the_columns_of_a_table_are_standardised_first() -> None:
    matrix, _ = problem()
    scale = np.ones(24)
    scale[8:] = 1000.0 ** np.linspace(-1, 1, 16)
    scaled = Rows(matrix.vectors.astype(np.float64) * scale)
    for widths, table, alike in ((WIDTHS, True, True), (WIDTHS, False, False)):
        found = []
        for rows in (matrix, scaled):
            kernel = make_kernel(rows, widths, table, TRAIN, TRAIN[:50])
            found.append(kernel.kernels(kernel.prepared(rows.rows(TEST))))
        assert np.allclose(*found, rtol=5e-3) == alike


def test_a_narrow_encoder_stands_beside_the_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """As standardised columns, which the head weighs as it weighs components; also after it was saved."""
    matrix, targets = problem()
    monkeypatch.setattr(kernels, "NARROW", 9)
    kernel = make_kernel(matrix, WIDTHS, False, TRAIN, TRAIN)
    narrow, wide = np.split(matrix.rows(np.arange(len(matrix))).astype(np.float64), [8], axis=1)
    beside = np.nan_to_num((narrow - np.nanmean(narrow[TRAIN], 0)) / np.nanstd(narrow[TRAIN], 0) / np.sqrt(8))
    alone = make_kernel(Rows(wide), (16,), False, TRAIN, TRAIN)
    expected = np.concatenate([alone.rows(TEST), beside[TEST]], axis=1)
    np.testing.assert_allclose(kernel.rows(TEST), expected, atol=1e-4)
    head = refit("kernel", TrainingRows(matrix, targets, TRAIN, np.ones(3), 5, widths=WIDTHS), {"C": 1.0}).model
    theirs = LogisticRegression(C=1.0, tol=1e-9, max_iter=9000).fit(kernel.rows(TRAIN), targets.numbers[TRAIN])
    restored = KernelHead.restore(*head.state())
    np.testing.assert_allclose(restored.logits(matrix, TEST), theirs.predict_log_proba(kernel.rows(TEST)), atol=0.02)
