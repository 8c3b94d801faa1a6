"""Baselines against what they stand for: scikit-learn's own estimators, fitted and searched as its documentation shows,
and AutoGluon on frozen embeddings where it is installed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import numpy as np
from synthetic import WIDTHS, make_samples, make_splits
from table import Row, measured

from mmfeat.baselines.basis import one_blas_thread
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.heads.jobs import LocalEngine
from mmfeat.heads.registry import HeadSettings
from mmfeat.heads.stack import one_torch_thread
from mmfeat.samples.labels import indicator
from mmfeat.sweep.problem import Problem
from mmfeat.sweep.trials import HeadTrainer
from mmfeat.system.wording import ignore

VALUES = np.logspace(-4, 2, 7)  # of the regularisation, from which each way chooses on the validation rows


def rows(small: bool) -> Iterator[Row]:
    """CPU seconds of one fold with its choice of strength, 2,560 + 640 rows; and macro-F1 on the test rows."""
    samples, widths = (300, {"image": 32, "text": 16}) if small else (4000, WIDTHS)
    made, splits = make_samples(samples, widths), make_splits(samples, 1)
    problem = Problem(splits.ids, made.targets, splits, 1, 42)
    fold, numbers = splits.fold(0, 0), made.targets.numbers
    for head, fit in estimators().items():
        start = time.process_time()
        with one_torch_thread(), one_blas_thread():
            engine = LocalEngine(made.features, made.targets, "cpu", "tokens")
            (outcome,) = HeadTrainer(problem, engine, head, "both").run([HeadSettings()], ignore)
            engine.close()
            ours = time.process_time() - start
            start = time.process_time()
            found = fit(made.vectors, numbers, fold.train, fold.validation)(made.vectors[fold.test])
            theirs = time.process_time() - start
        matrix = made.targets.matrix[fold.test]
        own = macro_f1(matrix, indicator(outcome.logits[0][fold.test].argmax(1), 3))
        note = f"macro-F1 {own:.3f}, scikit-learn {macro_f1(matrix, indicator(found, 3)):.3f}"
        yield measured(f"{head} against scikit-learn, CPU time", theirs / ours, "x", least=1.0, note=note)
    if find_spec("autogluon") is None:
        yield Row("AutoGluon, frozen embeddings", "not installed")


def estimators() -> dict[str, Callable[..., Callable[[np.ndarray], np.ndarray]]]:
    """Name of a baseline -> a function that fits scikit-learn's estimator and returns its prediction."""
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.metrics import f1_score
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    makers: dict[str, list[Callable[[], object]]] = {
        "knn": [lambda k=k: KNeighborsClassifier(k, metric="cosine") for k in (1, 3, 5, 10, 20, 50)],
        "ridge": [lambda a=a: RidgeClassifier(1e4 * a, class_weight="balanced") for a in VALUES],
        "logistic": [lambda c=c: LogisticRegression(C=c, class_weight="balanced", max_iter=200) for c in VALUES],
        "svm": [lambda c=c: LinearSVC(C=c, class_weight="balanced") for c in VALUES[:4]],
    }

    def best_of(made: list[Callable[[], object]]) -> Callable[..., Callable[[np.ndarray], np.ndarray]]:
        def fit(
            x: np.ndarray, y: np.ndarray, train: np.ndarray, validation: np.ndarray
        ) -> Callable[[np.ndarray], np.ndarray]:
            models = [make_pipeline(StandardScaler(), make()).fit(x[train], y[train]) for make in made]
            scores = [f1_score(y[validation], model.predict(x[validation]), average="macro") for model in models]
            return models[int(np.argmax(scores))].predict

        return fit

    return {name: best_of(made) for name, made in makers.items()}
