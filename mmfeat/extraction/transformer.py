"""Encoder: frozen encoders as a scikit-learn transformer, from a column of texts or photos to cached vectors."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from mmfeat.encoders.names import listed
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import DataError, ParameterError
from mmfeat.extraction.embed import NothingEncodedError, embed
from mmfeat.extraction.requests import resolve_options
from mmfeat.samples.dataset import MODALITIES


class Encoder(TransformerMixin, BaseEstimator):
    """Vectors of one column of texts or photos, by frozen encoders and through the cache.

    A column is a list, an array, a series, or a frame or an array (n, 1), as `ColumnTransformer` gives it. Its cells
    are those that `mmfeat.embed` takes; the row of a missing or broken one is NaN. Nothing is learnt from the column,
    and the object holds no model: it is cheap to clone, to pickle and to send to other processes.

    Parameters
    ----------
    encoder : str or list of str
        As in `mmfeat.embed`; the vectors of several encoders stand side by side.
    cache : path or None
        The folder of the vectors, so that no content is encoded twice; None writes nothing.
    modality : None, "text" or "image"
        What the column holds; to be named for an encoder that takes both.
    options : EncoderOptions, optional
        What changes the vectors: dtype, pooling, length and so on.
    device : str
        auto, cpu, cuda or mps.

    Attributes
    ----------
    modality_ : str
        "text" or "image".
    n_features_in_, n_features_out_ : int
        1, and the width of the vectors.
    """

    def __init__(
        self,
        encoder: str | Sequence[str] = "hashing",
        *,
        cache: str | Path | None = "cache",
        modality: str | None = None,
        options: EncoderOptions | None = None,
        device: str = "auto",
    ) -> None:
        self.encoder = encoder
        self.cache = cache
        self.modality = modality
        self.options = options
        self.device = device

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array, tags.input_tags.string = False, True
        tags.input_tags.allow_nan = True
        return tags

    def fit(self, X: Any, y: Any = None) -> Encoder:
        """Encode the column into the cache; its width is then known. Raises `ParameterError` for a wrong parameter."""
        self._fit(X)
        return self

    def fit_transform(self, X: Any, y: Any = None, **fit_params: Any) -> np.ndarray:
        """`fit` and `transform` in one pass."""
        return self._fit(X)

    def transform(self, X: Any) -> np.ndarray:
        """(n, d) float32 vectors."""
        check_is_fitted(self)
        cells = _column(X)
        try:
            return self._encode(cells)
        except NothingEncodedError as error:  # in a batch of few rows that is no mistake
            warnings.warn(f"{error}: their rows are NaN", stacklevel=2)
            return np.full((len(cells), self.n_features_out_), np.nan, np.float32)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """(d,) names: the encoder's and the number of the column."""
        check_is_fitted(self)
        stem = re.sub(r"\W+", "_", ",".join(listed(self.encoder))).strip("_")
        return np.array([f"{stem}_{number}" for number in range(self.n_features_out_)], object)

    def _fit(self, X: Any) -> np.ndarray:
        self.modality_ = self._modality()
        vectors = self._encode(_column(X))
        self.n_features_in_, self.n_features_out_ = 1, vectors.shape[1]
        return vectors

    def _encode(self, cells: list[Any]) -> np.ndarray:
        settings: dict[str, Any] = {"cache": self.cache, "options": self.options, "device": self.device}
        settings["texts" if self.modality_ == "text" else "images"] = cells
        return np.asarray(embed(encoder=self.encoder, **settings))

    def _modality(self) -> str:
        """What the column holds, by the parameter or by the encoders, which are looked up; checks the parameters."""
        several = isinstance(self.encoder, Sequence) and all(isinstance(name, str) for name in self.encoder)
        rules = {
            f"encoder {self.encoder!r}: name one, as 'hashing', or several in a list": several and len(self.encoder),
            f"cache {self.cache!r}: name a folder, or None": isinstance(self.cache, str | os.PathLike | None),
            f"modality {self.modality!r}: use 'text', 'image' or None": self.modality in (None, *MODALITIES),
            f"options {self.options!r}: use EncoderOptions(...) or None": isinstance(
                self.options, EncoderOptions | None
            ),
            f"device {self.device!r}: use auto, cpu, cuda or mps": isinstance(self.device, str),
        }
        for rule, kept in rules.items():
            if not kept:
                raise ParameterError(rule)
        options = resolve_options((self.options or EncoderOptions()).cleaned("none"), self.device)
        taken = {tower.spec.modality for tower in describe_encoders(listed(self.encoder), options)}
        if self.modality is None and len(taken) > 1:
            raise ParameterError(f"encoder {self.encoder}: it takes texts and images; say modality='text' or 'image'")
        return self.modality or taken.pop()


def _column(X: Any) -> list[Any]:
    """The cells of a column. Raises `DataError` for several columns and for no list."""
    if hasattr(X, "columns") or hasattr(X, "column_names"):  # a frame, or an Arrow table
        names = list(getattr(X, "column_names", X.columns))
        X = X[names[0]] if len(names) == 1 else np.empty((0, len(names)), object)
    if isinstance(X, np.ndarray) and X.ndim == 2 and X.dtype.kind in "OUST":
        if X.shape[1] != 1:
            raise DataError(f"X has {X.shape[1]} columns; give one, as in frame['text']")
        X = X[:, 0]
    if isinstance(X, str | bytes) or not hasattr(X, "__iter__"):
        raise DataError(f"X is {type(X).__name__} and no list; give a column of texts or photos")
    return list(X.to_pylist() if hasattr(X, "to_pylist") else X)
