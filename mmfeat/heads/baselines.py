"""scikit-learn baselines behind the head interface."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.features import Features
from mmfeat.files import write_atomic
from mmfeat.heads.settings import HeadSettings, class_weights
from mmfeat.metrics import macro_f1

# Strong to weak L2; chosen on the validation part of the training fold.
LOGISTIC_C = (1e-4, 1e-3, 1e-2, 1e-1)
MAX_ITERATIONS = 500
# A plain description of numbers; skops asks all the same.
TRUSTED_TYPES = ("numpy.dtype",)


def logistic_candidates(weights: dict[int, float], seed: int) -> dict[str, Any]:
    """Logistic regression at each strength of L2 regularisation."""
    from sklearn.linear_model import LogisticRegression

    return {
        f"C={strength:g}": LogisticRegression(
            C=strength, class_weight=weights, max_iter=MAX_ITERATIONS, random_state=seed
        )
        for strength in LOGISTIC_C
    }


class SklearnHead:
    """The best of some candidate estimators by validation macro-F1, fitted again on train + validation.

    Features of all encoders stand side by side, standardised on the training fold; what is missing is
    the mean.
    """

    suffix = ".skops"

    def __init__(
        self,
        candidates: Callable[[dict[int, float], int], dict[str, Any]],
        settings: HeadSettings,
        classes: int,
    ) -> None:
        self.candidates, self.settings, self.classes = candidates, settings, classes
        self.model: Any = None
        self.history: list[dict[str, Any]] = []

    def fit(self, train: Features, labels: np.ndarray, validation: Features, validation_labels: np.ndarray) -> None:
        x, x_validation = _matrix(train), _matrix(validation)
        weights = class_weights(labels, self.classes, self.settings.class_weights)
        candidates = self.candidates(dict(enumerate(weights.tolist())), self.settings.seed)
        scores = {}
        for name, estimator in candidates.items():
            predicted = _fitted(estimator, x, labels).predict(x_validation)
            scores[name] = macro_f1(validation_labels, predicted, self.classes)
        chosen = max(scores, key=lambda name: scores[name])
        self.history = [{"setting": name, "validation_macro_f1": score} for name, score in scores.items()]
        both = np.concatenate([x, x_validation]), np.concatenate([labels, validation_labels])
        self.model = _fitted(candidates[chosen], *both)

    def predict_proba(self, features: Features) -> np.ndarray:
        """(N, C) probabilities, 0 for a class that the training fold did not have."""
        probabilities = np.zeros((len(features), self.classes))
        probabilities[:, self.model.classes_] = self.model.predict_proba(_matrix(features))
        return probabilities

    def save(self, path: Path) -> dict[str, Any]:
        """Write the fitted pipeline with skops."""
        import skops.io

        write_atomic(path, skops.io.dumps(self.model))
        return {"history": self.history}

    def load(self, path: Path, config: dict[str, Any]) -> None:
        """Read it back; skops refuses types that are not scikit-learn's or named here."""
        import skops.io

        self.model = skops.io.load(path, trusted=list(TRUSTED_TYPES))


def _matrix(features: Features) -> np.ndarray:
    """(N, sum of D) float32, NaN where missing."""
    return np.concatenate([block.vectors.astype(np.float32) for block in features.blocks], axis=1)


def _fitted(estimator: Any, x: np.ndarray, labels: np.ndarray) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    missing_is_mean = SimpleImputer(strategy="constant", fill_value=0.0, keep_empty_features=True)
    # Fold-sized matrices: waking a second BLAS thread costs several times what it saves.
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.simplefilter("ignore", RuntimeWarning)  # a column that is missing everywhere
        return make_pipeline(StandardScaler(), missing_is_mean, estimator).fit(x, labels)
