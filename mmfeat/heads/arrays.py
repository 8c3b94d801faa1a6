"""What `FusionClassifier` takes from arrays: blocks of a matrix, order and copies of samples, held-out samples."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np

from mmfeat.cache.features import Block, Features
from mmfeat.errors import ParameterError
from mmfeat.evaluation.splits import deal
from mmfeat.samples.dataset import MODALITIES
from mmfeat.samples.labels import Targets
from mmfeat.samples.table_columns import TABLE

FEWEST = 4  # fewest samples of a class that is held out; samples of smaller classes only train
FEWEST_HELD_OUT = 50  # fewest held-out rows; early stopping on fewer rows costs more than training for all epochs
COPIES = 8  # copies of a sample of mean weight, where weights are no whole numbers

Widths: TypeAlias = "Mapping[str, int] | Sequence[tuple[str, int]] | None"


def blocks_of(X: np.ndarray, widths: Widths) -> Features:
    """The columns of (n, d) `X` as a block an encoder. Raises `ParameterError` where `widths` does not fit."""
    blocks = []
    for number, (modality, columns) in enumerate(_cuts(widths, X.shape[1])):
        vectors = np.array(X[:, columns])
        gaps = np.isnan(vectors)
        mask = ~gaps.all(1)
        if modality != TABLE and (partly := gaps.any(1) & mask).any():
            warnings.warn(
                f"columns {columns.start} to {columns.stop - 1} ({modality}): {partly.sum()} rows are NaN in some "
                "columns only, and count as lacking this part",
                stacklevel=4,
            )
            mask &= ~partly
        blocks.append(Block(f"{modality}-{number}", modality, vectors, mask))
    return Features(tuple(map(str, range(len(X)))), tuple(blocks))


def _cuts(widths: Widths, columns: int) -> Iterator[tuple[str, slice]]:
    """Yield the modality and columns of each encoder."""
    given: Any = {"text": columns} if widths is None else widths
    try:
        pairs = [(modality, width) for modality, width in (given.items() if is_a(given, Mapping) else given)]
    except (TypeError, ValueError):
        what = "name each encoder's columns, as in {'image': 1024, 'text': 384}, or in a list of such pairs"
        raise ParameterError(f"widths {widths!r}: {what}") from None
    for modality, width in pairs:
        fits = is_a(modality, str) and is_a(width, Integral) and modality in (*MODALITIES, TABLE)
        if not fits or width < (1 if modality == TABLE else 2):
            raise ParameterError(
                f"widths: {modality!r} with n_features = {width!r}; name 'text' or 'image' and 2 columns or more "
                "(layer norm leaves nothing of a single one), or 'table'"
            )
    if (total := sum(width for _, width in pairs)) != columns:
        raise ParameterError(f"widths add up to {total}, X has {columns} columns; name each encoder's columns")
    start = 0
    for modality, width in pairs:
        yield modality, slice(start, start + int(width))
        start += int(width)


def is_a(value: Any, kind: type) -> bool:
    """Whether a parameter is of a kind; a bool is no number."""
    return isinstance(value, kind) and not isinstance(value, bool)


def canonical_order(features: Features, targets: Targets) -> np.ndarray:
    """(n,) row numbers by label and then by content: the same samples, in whatever order rows and encoders came."""
    rows = np.hstack([block.vectors for block in sorted(features.blocks, key=lambda block: block.modality)])
    by_content = np.argsort(rows.view(f"V{rows.strides[0]}").ravel(), kind="stable")
    labels = np.unique(targets.matrix, axis=0, return_inverse=True)[1].reshape(-1)
    return by_content[np.argsort(labels[by_content], kind="stable")]


def copies_of(weights: np.ndarray) -> np.ndarray:
    """(n,) how often each sample counts. Whole numbers stay; else the mean is COPIES, rounded so that sums over
    neighbours, and so over samples of one class, are kept."""
    if not (weights % 1).any() and weights.sum() < COPIES * len(weights):
        return weights.astype(np.int64)
    return np.diff(np.rint(np.cumsum(weights) * (COPIES / weights.mean())), prepend=0).astype(np.int64)


def hold_out(targets: Targets, fraction: float, seeds: int, seed: int) -> list[np.ndarray]:
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
