"""Drift between the samples to predict and the labelled samples of the run: classes, missing values, unknown labels.

The test of drift compares the predicted shares of classes with the shares that the same entry predicts out of fold for
the labelled samples: a classifier's confusion makes predicted shares differ from shares of labels without any drift.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import numpy as np

from mmfeat.errors import DataError, RunError
from mmfeat.prediction.final_heads import Inference
from mmfeat.runs.entry import Entry
from mmfeat.runs.run import Run
from mmfeat.samples.dataset import MODALITIES, PART, Sample, SampleSet, read_samples
from mmfeat.samples.labels import classes_in, number_of
from mmfeat.system.remote import absolute

DRAWS = 9999  # random tables of a permutation test
SEED = 42  # with one seed for all tests, equal counts have equal p-values
SIGNIFICANT = 0.01
LEAST_ROWS = 20  # fewer samples on either side say nothing of a share
LEAST_SHIFT = 0.05  # smallest share of different samples that is reported


def find_drift(
    run: Run, inference: Inference, before: np.ndarray | None, labelled: Sequence[Sample], now: Sequence[Sample]
) -> list[str]:
    """Notes on how the samples `now` differ from the `labelled` samples of the run; `before` (n, C) are the choices out
    of fold for the latter."""
    shifted = ""
    if before is not None and inference.predictions.numeric:
        shifted = number_drift(before, inference.predictions.chosen)
    elif before is not None:
        shifted = label_drift(before, inference.predictions.chosen, run.classes, inference.predictions.multilabel)
    return [*([shifted] if shifted else []), *missing_drift(labelled, now, tuple(inference.lacking))]


def training_set(run: Run, read: SampleSet | None = None) -> SampleSet:
    """The samples that the run's data hold now, none where the data are gone.

    Samples that the caller has `read` already are used if they are the run's data.
    """
    if read is not None and absolute(read.source) == run.config.data:
        return read
    with contextlib.suppress(DataError, OSError):
        return run.config.known(read_samples(run.config.data, run.config.columns))
    return SampleSet(run.config.dataset, run.config.data, ())


def check_labels(samples: SampleSet, run: Run) -> list[str]:
    """The labels in the data that are no classes of the run, sorted; in a regression those that are no numbers."""
    if run.config.is_regression:
        return sorted(label for label in samples.classes if number_of(label) is None)
    multilabel = run.config.is_multilabel
    return sorted(set().union(*(classes_in(label, multilabel) for label in samples.classes)) - set(run.classes))


def out_of_fold_choices(run: Run, entry: Entry) -> np.ndarray | None:
    """(M, C) bool, the choices of the entry for labelled samples, out of fold; in a regression (M, 1) numbers.

    The entry's decision is applied to the mean out-of-fold probabilities over its seeds. None where the file of these
    probabilities is missing or broken.
    """
    try:
        probabilities = run.out_of_fold(entry).probabilities
    except RunError:
        return None
    return entry.decision.choose(entry.decision.logits(probabilities))


def label_drift(before: np.ndarray, now: np.ndarray, classes: Sequence[str], multilabel: bool) -> str:
    """A line where class shares of choices `now` (N, C) and `before` (M, C) differ significantly, else ""."""
    if min(len(before), len(now)) < LEAST_ROWS:
        return ""
    shift = now.mean(0) - before.mean(0)
    if multilabel:  # every class has a test of its own; Bonferroni's correction follows
        columns = zip(before.T, now.T, strict=True)
        p_values = [compare_counts(_yes_no(old), _yes_no(new)) for old, new in columns]
        p, size = min(1.0, min(p_values) * len(classes)), float(np.abs(shift).max())
    else:
        p, size = compare_counts(before.sum(0), now.sum(0)), float(np.abs(shift).sum() / 2)
    if p >= SIGNIFICANT or size < LEAST_SHIFT:
        return ""
    column = int(np.abs(shift).argmax())
    example = f"{classes[column]} {now[:, column].mean():.1%} instead of {before[:, column].mean():.1%}"
    return (
        f"the predictions differ from those for the labelled samples ({example}; "
        f"{'up to ' if multilabel else ''}{size:.0%} of the predictions shifted, p {_shown(p)}): these samples may "
        "come from elsewhere, and the scores of the run may not hold for them"
    )


def number_drift(before: np.ndarray, now: np.ndarray) -> str:
    """A line where predicted numbers `now` (N, 1) are spread otherwise than `before` (M, 1), by the test of Kolmogorov
    and Smirnov, else ""."""
    from scipy.stats import ks_2samp

    if min(len(before), len(now)) < LEAST_ROWS:
        return ""
    size, p = ks_2samp(before[:, 0], now[:, 0])
    if p >= SIGNIFICANT or size < LEAST_SHIFT:
        return ""
    return (
        f"the predictions differ from those for the labelled samples (mean {now.mean():.6g} instead of "
        f"{before.mean():.6g}; p {_shown(p)}): these samples may come from elsewhere, and the scores of the run may "
        "not hold for them"
    )


def missing_drift(before: Sequence[Sample], now: Sequence[Sample], modalities: Sequence[str] = MODALITIES) -> list[str]:
    """A line for each modality whose share of missing values differs significantly between `before` and `now`."""
    lines = []
    for modality in modalities:
        tables = [np.array([getattr(sample, modality) is None for sample in part], bool) for part in (before, now)]
        if min(map(len, tables)) < LEAST_ROWS:
            continue
        shares = [table.mean() for table in tables]
        if abs(shares[1] - shares[0]) < LEAST_SHIFT:
            continue
        p = compare_counts(_yes_no(tables[0]), _yes_no(tables[1]))
        if p < SIGNIFICANT:
            lines.append(
                f"{shares[1]:.1%} of these samples have no {PART[modality]}, but {shares[0]:.1%} of the labelled ones "
                f"(p {_shown(p)}): the scores of the run may not hold for them"
            )
    return lines


def compare_counts(before: np.ndarray, now: np.ndarray) -> float:
    """P-value of the hypothesis that two (C,) vectors of counts are samples of one population.

    The G statistic (likelihood ratio) of the 2 x C table is compared with `DRAWS` tables with the same margins: a
    permutation test, exact up to the draws and valid for rare classes (Patefield, 1981).
    """
    before, now = np.asarray(before, np.int64), np.asarray(now, np.int64)
    both = before + now
    random = np.random.default_rng(SEED)
    drawn = random.multivariate_hypergeometric(both, int(now.sum()), size=DRAWS, method="marginals")
    observed = _g_statistic(now[None], both)[0]
    as_far = int((_g_statistic(drawn, both) >= observed - 1e-9).sum())
    return (1 + as_far) / (1 + DRAWS)


def _g_statistic(now: np.ndarray, both: np.ndarray) -> np.ndarray:
    """(D,) G statistics of D tables: (D, C) counts `now` of one sample, and `both` - `now` of the other sample."""
    total, size = both.sum(), now.sum(1, keepdims=True)
    statistic = np.zeros(len(now))
    for part, whole in ((now, size), (both - now, total - size)):
        expected = both * whole / max(total, 1)
        logs = np.log(np.where(part > 0, part, 1)) - np.log(np.where(part > 0, expected, 1))
        statistic += 2 * (part * logs).sum(1)
    return statistic


def _yes_no(values: np.ndarray) -> np.ndarray:
    return np.array([values.sum(), len(values) - values.sum()])


def _shown(p: float) -> str:
    return f"{p:.4f}".rstrip("0")
