"""FusionClassifier: a fusion head as a scikit-learn classifier over the columns of a matrix."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data

from mmfeat.cache.features import Block, Features
from mmfeat.errors import ConfigError, MmfeatError, RunError
from mmfeat.evaluation.decisions import Decision, fit_decision
from mmfeat.evaluation.splits import deal
from mmfeat.heads.registry import DEFAULTS, FUSIONS, NEEDS_TOKENS, SETTING_TYPES, HeadSettings, load_fusion
from mmfeat.samples.dataset import MODALITIES
from mmfeat.samples.labels import Targets, indicator
from mmfeat.samples.table_columns import TABLE
from mmfeat.system.files import write_atomic
from mmfeat.system.hardware import resolve_device

if TYPE_CHECKING:
    from mmfeat.heads.data import HeadData


FEWEST = 4  # fewest samples of a class that is held out; samples of smaller classes only train
FEWEST_HELD_OUT = 50  # fewest held-out rows; early stopping on fewer rows costs more than training for all epochs


class ParameterError(ConfigError, ValueError):
    """A parameter or an array that `FusionClassifier` cannot take; a `ValueError` too, as scikit-learn expects."""


class FusionClassifier(ClassifierMixin, BaseEstimator):
    """A fusion head that is trained on the columns of a matrix, with scikit-learn's interface.

    `X` is (n, d): the pooled vectors of one or more encoders side by side, as `widths` says. Vectors are standardised
    and layer-normed, encoder by encoder, so an encoder has two columns at least and should have many. A row whose
    columns of an encoder are all NaN lacks this part. `y` holds a class a row (n,), or several as 0 and 1 (n, C).

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

    def fit(self, X: Any, y: Any) -> FusionClassifier:
        """Train on (n, d) `X` and labels `y`, (n,) or (n, C).

        Raises `ParameterError` (a `ValueError`) for parameters and arrays that do not fit, `HeadError` where a head
        diverges.
        """
        with _errors_name_parameters():
            self._check_parameters()
            X, y = validate_data(
                self, X, y, dtype=np.float32, ensure_all_finite="allow-nan", multi_output=True, order="C"
            )
            random = check_random_state(self.random_state)
            self._train(self._data(X, resolve_device(self.device)), self._read_targets(y), int(random.randint(2**31)))
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
        scores = -np.array(self._decided().offsets) + self._logits(X) / self.decision_.temperature
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
        write_atomic(Path(path), save(tensors, {"mmfeat": json.dumps(state, default=lambda value: value.item())}))

    @classmethod
    def load(cls, path: str | Path) -> FusionClassifier:
        """Read a classifier that `save` wrote, without running code. Raises `RunError` for any other file."""
        from safetensors import safe_open

        try:
            with safe_open(path, "numpy") as file:
                state = json.loads(file.metadata()["mmfeat"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls(**state["parameters"])._restore(state, tensors)
        except Exception as error:  # safetensors may raise any error for another file
            raise RunError(f"{path}: not a saved FusionClassifier ({error}); fit and save it again") from error

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

    def _check_parameters(self) -> None:
        adjustment, fraction = self.logit_adjustment, self.validation_fraction
        number = isinstance(adjustment, Real) and np.isfinite(float(adjustment))
        rules = {
            f"fusion {self.fusion!r}: use one of {', '.join(FUSIONS)}": self.fusion in FUSIONS,
            f"seeds {self.seeds}: a whole number, at least 1": isinstance(self.seeds, Integral) and self.seeds >= 1,
            f"validation_fraction {fraction}: a share from 0 to below 1": 0 <= fraction < 1,
            f"logit_adjustment {adjustment}: use None, a number or 'auto'": number or adjustment in (None, "auto"),
        }
        for rule, kept in rules.items():
            if not kept:
                raise ParameterError(rule)

    def _cut(self, columns: int) -> list[tuple[str, slice]]:
        """The modality and columns of each encoder. Raises `ParameterError` where `widths` does not fit."""
        widths = {"text": columns} if self.widths is None else self.widths
        pairs = list(widths.items() if isinstance(widths, Mapping) else widths)
        for modality, width in pairs:
            if modality not in (*MODALITIES, TABLE) or width < (1 if modality == TABLE else 2):
                raise ParameterError(
                    f"widths: {modality!r} with n_features = {width}; name 'text' or 'image' and 2 columns or more "
                    "(layer norm leaves nothing of a single one), or 'table'"
                )
        ends = np.cumsum([width for _, width in pairs], dtype=np.int64).tolist()
        if (total := sum(width for _, width in pairs)) != columns:
            raise ParameterError(f"widths add up to {total}, X has {columns} columns; name each encoder's columns")
        return [(modality, slice(end - width, end)) for (modality, width), end in zip(pairs, ends, strict=True)]

    def _read_targets(self, y: Any) -> Targets:
        check_classification_targets(y)
        if type_of_target(y) == "multilabel-indicator":
            matrix = np.asarray(y.toarray() if hasattr(y, "toarray") else y) > 0
            self.classes_ = np.arange(matrix.shape[1])
            return Targets(tuple(map(str, self.classes_)), matrix, multilabel=True)
        self.classes_, numbers = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        if len(self.classes_) < 2:
            raise ParameterError(f"y has 1 class ({self.classes_[0]}); give samples of two classes or more")
        return Targets(tuple(map(str, self.classes_)), indicator(numbers, len(self.classes_)))

    def _train(self, data: HeadData, targets: Targets, seed: int) -> None:
        from mmfeat.heads.stack import Member, epoch_steps, train_stack

        held_out = _hold_out(targets, self.validation_fraction, self.seeds, seed)
        trains = [np.setdiff1d(np.arange(len(targets)), rows) for rows in held_out]
        sizes = list(map(len, trains))
        values = {name: value for name, value in self.get_params(deep=False).items() if name in SETTING_TYPES}
        settings = HeadSettings(**{**values, "batch_size": min(self.batch_size, *sizes)})
        steps = epoch_steps(max(sizes), settings.batch_size)
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
        self.decision_ = fit_decision(logits, targets.take(rows), targets.prior, adjustment, seed)

    def _data(self, X: np.ndarray, device: str) -> HeadData:
        from mmfeat.heads.data import HeadData

        features = _features(X, self._cut(X.shape[1]))
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

        logits = self._stack_logits(self._data(X, device), [np.arange(len(X))] * len(self.heads_))
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


def _features(X: np.ndarray, cuts: Sequence[tuple[str, slice]]) -> Features:
    blocks = []
    for number, (modality, columns) in enumerate(cuts):
        vectors = np.array(X[:, columns])
        gaps = np.isnan(vectors)
        mask = ~gaps.all(1)
        if modality != TABLE and (partly := gaps.any(1) & mask).any():
            raise ParameterError(
                f"columns {columns.start} to {columns.stop - 1} ({modality}): {partly.sum()} rows are NaN in some "
                "columns only; fill these in, or make all columns of a missing part NaN"
            )
        blocks.append(Block(f"{modality}-{number}", modality, vectors, mask))
    return Features(tuple(map(str, range(len(X)))), tuple(blocks))


def _hold_out(targets: Targets, fraction: float, seeds: int, seed: int) -> list[np.ndarray]:
    """Validation rows of each seed, in different parts of the samples for the first 1 / `fraction` seeds.

    All seeds train without validation rows where a part would have fewer than FEWEST_HELD_OUT rows.
    """
    parts = min(seeds, int(1 / fraction)) if fraction else 0
    strata, counts = np.unique(targets.matrix, axis=0, return_inverse=True, return_counts=True)[1:]
    strata = np.where(counts < FEWEST, -1, np.arange(len(counts)))[strata.reshape(-1)]
    rows = np.arange(len(targets)) if targets.multilabel else np.flatnonzero(strata >= 0)
    if parts and len(rows):
        rest = 1 - parts * fraction
        part = deal(strata[rows], rows, [fraction] * parts + [rest] * (rest > 1e-9), seed)
        held_out = [rows[part == number % parts] for number in range(seeds)]
        if min(map(len, held_out)) >= FEWEST_HELD_OUT:
            return held_out
    return [np.empty(0, np.int64)] * seeds


@contextmanager
def _errors_name_parameters() -> Iterator[None]:
    """Replace names of command-line flags in error messages by names of parameters."""
    try:
        yield
    except MmfeatError as error:
        message = re.sub(r"--([a-z][a-z-]+)", lambda match: match[1].replace("-", "_"), str(error))
        raise (ParameterError if isinstance(error, ConfigError) else type(error))(message) from error
