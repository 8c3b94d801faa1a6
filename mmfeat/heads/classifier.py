"""FusionClassifier: a fusion head as a scikit-learn classifier over the columns of a matrix."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, column_or_1d, validate_data

from mmfeat.errors import ConfigError, MmfeatError, ParameterError, RunError
from mmfeat.evaluation.decisions import Decision, fit_decision
from mmfeat.heads.arrays import COPIES, blocks_of, canonical_order, copies_of, hold_out, is_a
from mmfeat.heads.registry import (
    DEFAULTS,
    FUSIONS,
    NEEDS_TOKENS,
    SETTING_TYPES,
    HeadSettings,
    is_fusion,
    load_fusion,
    settings_of,
)
from mmfeat.samples.labels import Targets, indicator
from mmfeat.system.files import write_atomic
from mmfeat.system.hardware import resolve_device

if TYPE_CHECKING:
    from mmfeat.cache.features import Features
    from mmfeat.heads.data import HeadData


class FusionClassifier(ClassifierMixin, BaseEstimator):
    """A fusion head that is trained on the columns of a matrix, with scikit-learn's interface.

    `X` is (n, d): the pooled vectors of one or more encoders side by side, as `widths` says. Vectors are standardised
    and layer-normed, encoder by encoder, so an encoder has two columns at least and should have many. A row with NaN
    in the columns of an encoder lacks this part. `y` holds a class a row (n,), or several as 0 and 1 (n, C). Their
    order makes no difference.

    Parameters
    ----------
    fusion : str
        One of `mmfeat.heads.FUSIONS`; cross-attention attends to the pooled vectors.
    widths : dict or list of (str, int), optional
        How the columns are cut: ("text" or "image", columns) of each encoder in turn, as {"image": 1024, "text": 384}.
        "table" are plain numbers, of which a row may lack some. Without it, all columns are one encoder's of texts.
    seeds : int
        Heads that are trained and predict together; their probabilities are averaged.
    validation_fraction : float
        Share of the samples that each head holds out, stratified, to stop early and to calibrate. With 0, or where
        that would be fewer than 50, heads train on all samples for `epochs`.
    logit_adjustment : None, float or "auto"
        Strength by which `predict` favours rare classes (Menon et al., 2021); "auto" is the one with the best
        macro-F1 on the held-out samples, and 0 with a warning where there are none. Probabilities do not change.
    device : str
        auto, cpu, cuda or mps.
    random_state : int, RandomState or None
        Fixes held-out samples, first weights, order and dropout.
    learning_rate, weight_decay, dropout, label_smoothing, modality_dropout, class_weights, loss, focal_gamma, \
batch_size, epochs, patience
        As in `HeadSettings`. Where parts are missing only when predicting, train with `modality_dropout` above 0.

    Attributes
    ----------
    classes_ : (C,) array
        Classes as in `y`; the column numbers where a sample may have several.
    n_features_in_ : int
        d of the matrix that was fitted.
    feature_names_in_ : (d,) array
        Names of its columns, where they are all strings.
    history_ : list of list of dict
        Loss and validation macro-F1 of each epoch, for each seed.
    decision_ : mmfeat.evaluation.decisions.Decision
        Temperature and offsets, fitted on held-out samples.
    heads_ : list of dict of array
        The weights, for each seed.
    """

    def __init__(
        self,
        fusion: str = "concat",
        *,
        widths: Mapping[str, int] | Sequence[tuple[str, int]] | None = None,
        seeds: int = 1,
        validation_fraction: float = 0.125,
        class_weights: str = DEFAULTS.class_weights,
        learning_rate: float = DEFAULTS.learning_rate,
        weight_decay: float = DEFAULTS.weight_decay,
        dropout: float = DEFAULTS.dropout,
        label_smoothing: float = DEFAULTS.label_smoothing,
        modality_dropout: float = DEFAULTS.modality_dropout,
        loss: str = DEFAULTS.loss,
        focal_gamma: float = DEFAULTS.focal_gamma,
        batch_size: int = DEFAULTS.batch_size,
        epochs: int = DEFAULTS.epochs,
        patience: int = DEFAULTS.patience,
        logit_adjustment: float | str | None = None,
        device: str = "auto",
        random_state: Any = 42,
    ) -> None:
        self.fusion = fusion
        self.widths = widths
        self.seeds = seeds
        self.validation_fraction = validation_fraction
        self.class_weights = class_weights
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.dropout = dropout
        self.label_smoothing = label_smoothing
        self.modality_dropout = modality_dropout
        self.loss = loss
        self.focal_gamma = focal_gamma
        self.batch_size = batch_size
        self.epochs = epochs
        self.patience = patience
        self.logit_adjustment = logit_adjustment
        self.device = device
        self.random_state = random_state

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        tags.classifier_tags.multi_label = True
        # scikit-learn tests the score on points of two columns, of which layer norm leaves only a sign.
        tags.classifier_tags.poor_score = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> FusionClassifier:
        """Train on (n, d) `X` and labels `y`, (n,) or (n, C); a sample of (n,) `sample_weight` 2 counts as two, one of
        0 not at all.

        Raises `ParameterError` (a `ValueError`) for parameters and arrays that do not fit, `HeadError` where a head
        diverges.
        """
        with _errors_name_parameters():
            seed = self._check_parameters()
            X, y = validate_data(
                self, X, y, dtype=np.float32, ensure_all_finite="allow-nan", multi_output=True, order="C"
            )
            weights = _check_sample_weight(sample_weight, X, ensure_non_negative=True)
            if not (counted := weights > 0).all():
                X, y, weights = X[counted], y[counted], weights[counted]
            targets, features = self._read_targets(y), blocks_of(X, self.widths)
            order = canonical_order(features, targets)
            data = self._data(features.take(order), resolve_device(self.device))
            self._train(data, targets.take(order), copies_of(weights[order]), seed)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """(n,) classes, or (n, C) zeros and ones where a sample may have several."""
        chosen = self._decided().choose(self._logits(X))
        return chosen.astype(np.int64) if self.decision_.multilabel else self.classes_[chosen.argmax(1)]

    def predict_proba(self, X: Any) -> np.ndarray:
        """(n, C) calibrated probabilities, the mean over seeds; each row adds up to 1 unless multi-label."""
        return self._decided().probabilities(self._logits(X))

    def decision_function(self, X: Any) -> np.ndarray:
        """Scores that `predict` decides by.

        (n, C) scores, of which the largest decides; for two classes, (n,) scores, above 0 for the second class; where a
        sample may have several classes, (n, C) scores, above 0 for each class of the sample.
        """
        scores = self._decided().scaled(self._logits(X)) - np.array(self.decision_.offsets)
        binary = len(self.classes_) == 2 and not self.decision_.multilabel
        return scores[:, 1] - scores[:, 0] if binary else scores

    def save(self, path: str | Path) -> None:
        """Write the fitted classifier to one safetensors file, without a `random_state` that is no number."""
        from safetensors.numpy import save

        check_is_fitted(self)
        number = self.random_state if isinstance(self.random_state, Integral) else None
        state = {
            "parameters": {**self.get_params(), "random_state": number},
            "classes": [self.classes_.dtype.str, self.classes_.tolist()],
            "features": [self.n_features_in_, getattr(self, "feature_names_in_", np.empty(0)).tolist()],
            "decision": self.decision_.to_json(),
            "history": self.history_,
        }
        tensors = {f"{seed}.{name}": value for seed, head in enumerate(self.heads_) for name, value in head.items()}
        text = json.dumps(state, default=lambda value: value.item())
        write_atomic(Path(path), save(tensors, {"mmfeat": text, "sha256": _checksum(tensors, text)}))

    @classmethod
    def load(cls, path: str | Path) -> FusionClassifier:
        """Read a classifier that `save` wrote, without running code. Raises `RunError` for any other file."""
        from safetensors import safe_open

        try:
            with safe_open(path, "numpy") as file:
                metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text = metadata["mmfeat"]
            if len(metadata) > 1 and metadata["sha256"] != _checksum(tensors, text):  # earlier versions wrote none
                raise ValueError("its content is not what was saved")
            state = json.loads(text)
            return cls(**state["parameters"])._restore(state, tensors)
        except Exception as error:  # safetensors may raise any error for another file
            reason = " ".join(str(error).split())
            raise RunError(f"{path}: not a saved FusionClassifier ({reason}); fit and save it again") from error

    def _restore(self, state: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> FusionClassifier:
        dtype, classes = state["classes"]
        self.classes_ = np.array(classes, dtype)
        self.n_features_in_, names = state["features"]
        if names:
            self.feature_names_in_ = np.array(names, object)
        self.decision_, self.history_ = Decision.from_json(state["decision"]), state["history"]
        self.heads_ = [
            {name.partition(".")[2]: value for name, value in tensors.items() if name.startswith(f"{seed}.")}
            for seed in range(len(self.history_))
        ]
        zeros = np.zeros((1, self.n_features_in_), np.float32)
        self.decision_.choose(self._head_logits(zeros, "cpu"))  # weights, offsets and classes fit together
        return self

    def _check_parameters(self) -> int:
        """A seed drawn by `random_state`. Raises `ParameterError` for a wrong parameter, `widths` aside."""
        adjustment, fraction = self.logit_adjustment, self.validation_fraction
        strength = adjustment is None or (is_a(adjustment, str) and adjustment == "auto")
        strength = strength or (is_a(adjustment, Real) and bool(np.isfinite(float(adjustment or 0))))
        rules = {
            f"fusion {self.fusion!r}: use one of {', '.join(FUSIONS)}": is_fusion(str(self.fusion)),
            f"seeds {self.seeds!r}: a whole number, at least 1": is_a(self.seeds, Integral) and self.seeds >= 1,
            f"validation_fraction {fraction!r}: a share from 0 to below 1": is_a(fraction, Real) and 0 <= fraction < 1,
            f"logit_adjustment {adjustment!r}: use None, a number or 'auto'": strength,
            f"device {self.device!r}: use auto, cpu, cuda or mps": is_a(self.device, str),
        }
        for rule, kept in rules.items():
            if not kept:
                raise ParameterError(rule)
        self._settings()
        try:
            return int(check_random_state(self.random_state).randint(2**31))
        except ValueError as error:
            what = "a whole number from 0 to 4294967295, a numpy RandomState or None"
            raise ParameterError(f"random_state {self.random_state!r}: {what}") from error

    def _settings(self) -> HeadSettings:
        values = {name: value for name, value in self.get_params(deep=False).items() if name in SETTING_TYPES}
        HeadSettings(**values)  # refuses what would be converted below, as 2.5 epochs
        return settings_of(values)

    def _read_targets(self, y: Any) -> Targets:
        check_classification_targets(y)
        if type_of_target(y) == "multilabel-indicator":
            matrix = np.asarray(y.toarray() if hasattr(y, "toarray") else y) > 0
            self.classes_ = np.arange(matrix.shape[1])
            return Targets(tuple(map(str, self.classes_)), matrix, multilabel=True)
        self.classes_, numbers = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        if len(self.classes_) < 2:
            named = f"{len(self.classes_)} class ({', '.join(map(str, self.classes_))})"
            raise ParameterError(f"y has {named}; give samples of two classes or more")
        return Targets(tuple(map(str, self.classes_)), indicator(numbers, len(self.classes_)))

    def _train(self, data: HeadData, targets: Targets, copies: np.ndarray, seed: int) -> None:
        """Train on N samples, of which each counts as its number of (N,) `copies`."""
        from mmfeat.heads.stack import Member, epoch_steps, train_stack

        settings, samples = self._settings(), np.arange(len(targets))
        distinct = hold_out(targets, float(self.validation_fraction), int(self.seeds), seed)
        held_out = [np.repeat(rows, copies[rows]) for rows in distinct]
        trains = [np.repeat(rows, copies[rows]) for rows in (np.setdiff1d(samples, part) for part in distinct)]
        sizes = list(map(len, trains))
        settings = replace(settings, batch_size=min(settings.batch_size, *sizes))
        scaled = copies.sum() >= COPIES * len(copies)
        steps = epoch_steps(max(sizes) // (COPIES if scaled else 1), settings.batch_size)
        replay = None if len(held_out[0]) else (1.0,) * settings.epochs
        members = [
            Member(settings, train, rows, (seed, number), steps, replay)
            for number, (train, rows) in enumerate(zip(trains, held_out, strict=True))
        ]
        trained = train_stack(load_fusion(self.fusion), data, targets, members)
        self.heads_ = [{name: value.numpy() for name, value in head.tensors.items()} for head in trained]
        self.history_ = [head.history for head in trained]
        adjustment = None if self.logit_adjustment == "auto" else float(self.logit_adjustment or 0.0)
        logits, rows = np.concatenate(self._stack_logits(data, held_out)), np.concatenate(held_out)
        if adjustment is None and not len(rows):
            warnings.warn("logit_adjustment='auto' found no held-out samples to choose by; it is 0", stacklevel=3)
        prior = targets.take(np.repeat(samples, copies)).prior
        self.decision_ = fit_decision(logits, targets.take(rows), prior, adjustment, seed)

    def _data(self, features: Features, device: str) -> HeadData:
        from mmfeat.heads.data import HeadData

        return HeadData(features, device=device, tokens="pooled" if self.fusion == NEEDS_TOKENS else "")

    def _decided(self) -> Decision:
        check_is_fitted(self)
        return self.decision_

    def _logits(self, X: Any) -> np.ndarray:
        """(n, C), which `decision_` turns into probabilities and choices."""
        with _errors_name_parameters():
            X = validate_data(self, X, dtype=np.float32, ensure_all_finite="allow-nan", order="C", reset=False)
            return self._head_logits(X, resolve_device(self.device))

    def _head_logits(self, X: np.ndarray, device: str) -> np.ndarray:
        from mmfeat.evaluation.blending import mean_logits

        data = self._data(blocks_of(X, self.widths), device)
        logits = self._stack_logits(data, [np.arange(len(X))] * len(self.heads_))
        return mean_logits(np.stack(logits), self.decision_)

    def _stack_logits(self, data: HeadData, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(n, C) logits of each head on the rows of the head.

        The logits are computed in double precision, so that they do not depend on the other samples of a batch; only
        MPS, which lacks double precision, and attention, which reads tokens as they are stored, use single precision.
        """
        from mmfeat.heads.stack import one_torch_thread, predict_module, stack_of

        module = stack_of(load_fusion(self.fusion), len(self.classes_), data, self.heads_)
        module = module if data.device == "mps" or data.attend else module.double()
        with one_torch_thread():
            return predict_module(module, data, rows)


def _checksum(tensors: Mapping[str, np.ndarray], text: str) -> str:
    """SHA-256 of names, types, shapes and values of the tensors, and of the text beside them."""
    from safetensors.numpy import save

    return hashlib.sha256(save(dict(tensors)) + text.encode()).hexdigest()


@contextmanager
def _errors_name_parameters() -> Iterator[None]:
    """Replace names of command-line flags in error messages by names of parameters."""
    try:
        yield
    except MmfeatError as error:
        message = re.sub(r"--([a-z][a-z-]+)", lambda match: match[1].replace("-", "_"), str(error))
        raise (ParameterError if isinstance(error, ConfigError) else type(error))(message) from error
