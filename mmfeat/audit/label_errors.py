"""Label errors and the noise ceiling, from labels and the out-of-fold probabilities of a run.

A head that is unsure doubts good labels, too. What it would doubt were no label wrong is estimated on labels drawn from
its own probabilities (parametric bootstrap), and only what is above that counts.

Confident learning (Northcutt, Jiang and Chuang, 2021): the confident class of a sample is a class whose probability
is above the average probability of that class over samples with its label. A confident class other than the label
makes the label a likely error; counts of (label, confident class) estimate the joint distribution of given and true
labels. Results equal cleanlab's (filter "confident_learning").
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.errors import RunError
from mmfeat.evaluation.metrics import Score, percentiles
from mmfeat.runs.entry import Entry, RunConfig
from mmfeat.runs.run import Run, comparable_runs, find_run
from mmfeat.samples.labels import Targets

DRAWS = 200
NULLS = 100  # draws of labels from the probabilities
PLANTED = 0.05  # share of labels that are changed to see where they rank
TOLERANCE = 1e-6  # a probability above the threshold less this tolerance counts as confident, as in cleanlab
NUMBERS = "no label errors: {} predicts numbers; mmfeat report shows its largest errors"
NO_RUN = "none"  # value of --run


@dataclass(frozen=True)
class LabelErrors:
    """Likely label errors, the surest first: `rows` (E,) and the `suggested` class indices (E,)."""

    rows: np.ndarray
    suggested: np.ndarray


@dataclass(frozen=True)
class Noise:
    """Noise of labels, above what labels drawn from the head's own probabilities would show.

    `claimed`: whether there is more than in 97.5 % of such draws; else the other fields mean nothing. `joint` (C, C) is
    the share of samples by given label (rows) and true label (columns). `wrong` is the share of wrong labels,
    `by_class` the share for each given label. `accuracy` and `macro_f1` are the scores of a perfect classifier against
    these labels. Intervals are 95 % bootstrap percentiles over samples.
    """

    claimed: bool
    joint: np.ndarray
    wrong: Score
    by_class: tuple[Score, ...]
    accuracy: Score
    macro_f1: Score


def find_label_errors(labels: np.ndarray, probabilities: np.ndarray) -> LabelErrors:
    """Likely errors among labels (N,), given as class indices, by out-of-fold probabilities (N, C).

    Errors are sorted by the margin p(suggested) - p(given). A label that is the likeliest class is never an error.
    """
    labels, probabilities = _checked(labels, probabilities)
    best = probabilities.argmax(axis=1) if len(labels) else labels
    guess = _guesses(labels, probabilities, best, np.ones(len(labels)))
    given = _of(probabilities, labels)
    rows = np.flatnonzero((guess >= 0) & (guess != labels) & (given < _of(probabilities, best)))
    margin = _of(probabilities[rows], guess[rows]) - given[rows]
    order = np.argsort(-margin, kind="stable")
    return LabelErrors(rows[order], guess[rows][order])


def estimate_noise(
    labels: np.ndarray, probabilities: np.ndarray, seed: int = 42, draws: int = DRAWS, floor: float = 0.0
) -> Noise:
    """Estimate the share of wrong labels (N,) and the ceiling of scores from out-of-fold probabilities (N, C).

    Of the probabilities, `floor` is what the head allows for labels that are wrong at random, spread over the classes:
    labels are drawn without it.
    """
    labels, probabilities = _checked(labels, probabilities)
    if not len(labels):
        raise ValueError("no sample has a label and a prediction; there is no noise to estimate")
    best = probabilities.argmax(axis=1)
    random = np.random.default_rng(seed)
    sure = np.maximum(probabilities - min(floor / probabilities.shape[1], probabilities.min()), 0)
    ends = np.cumsum(sure / np.maximum(sure.sum(1, keepdims=True), TOLERANCE), axis=1)
    once, nulls = np.ones(len(labels)), []
    for _ in range(NULLS):
        given = (random.random((len(labels), 1)) > ends[:, :-1]).sum(1)
        nulls.append(_joint(given, probabilities, best, once))
    doubted = _joint(labels, probabilities, best, once)
    claimed = 1 - np.trace(doubted) > np.percentile([1 - np.trace(null) for null in nulls], 97.5)
    null = np.mean(nulls, axis=0)
    joint = _above(doubted, null)
    drawn = []
    for _ in range(draws):
        weights = np.bincount(random.integers(len(labels), size=len(labels)), minlength=len(labels))
        drawn.append(_measures(_above(_joint(labels, probabilities, best, weights.astype(np.float64)), null)))
    columns = zip(_measures(joint).tolist(), np.array(drawn).T, strict=True)
    scores = [_score(value, column[np.isfinite(column)]) for value, column in columns]
    accuracy, macro_f1, wrong, *by_class = scores
    return Noise(bool(claimed), joint, wrong, tuple(by_class), accuracy, macro_f1)


def planted_found(labels: np.ndarray, probabilities: np.ndarray, seed: int = 42, draws: int = 20) -> float:
    """The share of labels changed at random that stand among as many first label errors; `PLANTED` is chance."""
    labels, probabilities = _checked(labels, probabilities)
    random, width, found = np.random.default_rng(seed), probabilities.shape[1], []
    count = max(1, round(PLANTED * len(labels)))
    for _ in range(draws if len(labels) and width > 1 else 0):
        rows, changed = random.choice(len(labels), count, replace=False), labels.copy()
        changed[rows] = (labels[rows] + random.integers(1, width, count)) % width
        found.append(np.isin(rows, find_label_errors(changed, probabilities).rows[:count]).mean())
    return float(np.mean(found)) if found else 0.0


def _above(joint: np.ndarray, null: np.ndarray) -> np.ndarray:
    """(C, C) the joint distribution less the wrong labels of the null; rows add up to the same shares."""
    above = joint - null
    np.fill_diagonal(above, 0)
    return above + np.diag(joint.sum(1) - above.sum(1))


def _score(value: float, draws: np.ndarray) -> Score:
    """A value with the percentiles of its finite draws; a value that is not finite gives an undefined score."""
    if not np.isfinite(value):
        return Score(None, None, None)
    return percentiles(value, draws) if len(draws) else Score(value, value, value)


def _checked(labels: np.ndarray, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels, probabilities = np.asarray(labels, dtype=int), np.asarray(probabilities, dtype=np.float64)
    if probabilities.ndim != 2 or len(labels) != len(probabilities):
        raise ValueError(f"{len(labels)} labels and probabilities of shape {probabilities.shape}; one row a label")
    if not np.isfinite(probabilities).all():
        raise ValueError("probabilities must be finite; leave out the samples that no fold tests")
    return labels, probabilities


def _of(probabilities: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(N,) the probability of one class of each row."""
    return probabilities[np.arange(len(probabilities)), classes]


def _guesses(labels: np.ndarray, probabilities: np.ndarray, best: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N,) the confident class of each sample, -1 for a sample without one."""
    width = probabilities.shape[1]
    counts = np.bincount(labels, weights, minlength=width)
    sums = np.bincount(labels, weights * _of(probabilities, labels), minlength=width)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1e-9), np.inf)
    confident = probabilities >= thresholds - TOLERANCE
    count = confident.sum(axis=1)
    only = confident.argmax(axis=1) if width else labels
    return np.where(count > 1, best, np.where(count == 1, only, -1))


def _joint(labels: np.ndarray, probabilities: np.ndarray, best: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(C, C) shares by given and true label; rows add up to the shares of the given labels."""
    width = probabilities.shape[1]
    guess = _guesses(labels, probabilities, best, weights)
    sure = guess >= 0
    counts = np.bincount(labels[sure] * width + guess[sure], weights[sure], minlength=width * width)
    joint = counts.reshape(width, width)
    np.fill_diagonal(joint, np.maximum(joint.diagonal(), 1))  # a class without confident samples counts as right
    given = np.bincount(labels, weights, minlength=width)
    return joint / joint.sum(axis=1, keepdims=True) * (given / given.sum())[:, None]


def _measures(joint: np.ndarray) -> np.ndarray:
    """(3 + C,) accuracy and macro-F1 of the true against the given labels, wrong share of all and of each given label.

    The share is NaN for a class without labels. Macro-F1 averages over classes that are given or true.
    """
    given, true, right = joint.sum(axis=1), joint.sum(axis=0), joint.diagonal()
    present = given + true > 0
    f1 = 2 * right[present] / (given + true)[present]
    by_class = np.where(given > 0, 1 - right / np.where(given > 0, given, 1), np.nan)
    return np.clip([right.sum(), f1.mean(), 1 - right.sum(), *by_class], 0, 1)  # less of a null can be below 0


@dataclass(frozen=True)
class Opinions:
    """Out-of-fold probabilities (N, C), means over seeds, of one entry of a run, with ids and labels."""

    run: Run
    entry: Entry
    ids: tuple[str, ...]
    targets: Targets
    probabilities: np.ndarray


@dataclass(frozen=True)
class Suspicion:
    """A label that is likely wrong; in multi-label data `label` and `suggested` are about one class."""

    id: str
    label: str
    suggested: str
    probability: float
    self_confidence: float


def fitting_run(run: str | Path | None, heads: Path, fits: Callable[[RunConfig], bool]) -> tuple[Run | None, str]:
    """(run whose opinions are used, "") or (None, reason).

    Raises `RunError` for a named run on other labels or contents. Without a name, the best run in `heads` on exactly
    these labels and contents is used, as `best_run` has it.
    """
    if run == NO_RUN:
        return None, ""
    if run is not None:
        named = find_run(run, heads)
        if not fits(named.config):
            raise RunError(f"{run}: trained on other labels, texts or photos than these; name another --run, or none")
        return (None, NUMBERS.format(named.folder)) if named.config.is_regression else (named, "")
    try:
        runs = comparable_runs(heads, accept=lambda other: fits(other.config))
    except RunError:
        return None, (
            f"no label errors: no run in {heads} was trained on these labels, texts and photos; "
            "make one with mmfeat heads"
        )
    best = max(reversed(runs), key=lambda other: other.score(None, None))
    return (None, NUMBERS.format(best.folder)) if best.config.is_regression else (best, "")


def read_opinions(run: Run) -> Opinions:
    """Opinions of the run's recommended entry, as in its report, on samples that a fold tests.

    Raises `RunError` for a damaged file.
    """
    entry = run.recommended
    predictions = run.out_of_fold(entry)
    if not predictions.ids:
        raise RunError(f"{run.folder}: no sample was predicted out of fold; train it again, or name another with --run")
    return Opinions(run, entry, predictions.ids, predictions.targets, predictions.probabilities)


def floor_of(run: Run, entry: Entry) -> float:
    """The floor of an entry's decision, and of an ensemble also the mean floor of its members."""
    floors = [other.decision.floor for other in run.leaderboard if other.name in entry.members]
    return entry.decision.floor + (float(np.mean(floors)) if floors else 0.0)


def suspicions(opinions: Opinions) -> list[Suspicion]:
    """Likely label errors, the surest first. In multi-label data each class is judged alone."""
    targets, names = opinions.targets, opinions.targets.classes
    if not targets.multilabel:
        errors = find_label_errors(targets.numbers, opinions.probabilities)
        return _named(opinions, errors, targets.numbers, opinions.probabilities, names)
    suspected = []
    for column, name in enumerate(names):
        labels, probabilities = _of_class(opinions, column)
        errors = find_label_errors(labels, probabilities)
        suspected += _named(opinions, errors, labels, probabilities, (f"not {name}", name))
    return sorted(suspected, key=lambda suspicion: suspicion.self_confidence - suspicion.probability)


def judge_labels(opinions: Opinions, suspected: Sequence[Suspicion], seed: int = 42) -> dict[str, Any]:
    ways = Counter((suspicion.label, suspicion.suggested) for suspicion in suspected)
    return {
        "run": str(opinions.run.folder),
        "data_hash": opinions.run.config.data_hash,
        "head": opinions.entry.head,
        "modalities": opinions.entry.modalities,
        "macro_f1": asdict(opinions.entry.macro_f1),
        "accuracy": asdict(opinions.entry.accuracy),
        "samples": len(opinions.ids),
        "errors": len({suspicion.id for suspicion in suspected}),
        "ways": [{"label": a, "suggested": b, "count": count} for (a, b), count in ways.most_common()],
        "multilabel": opinions.targets.multilabel,
        "noise": _noise(opinions, seed),
    }


def _noise(opinions: Opinions, seed: int) -> dict[str, Any]:
    """Noise of all labels; in multi-label data noise of each class, since there is no joint distribution of all."""
    targets, names = opinions.targets, opinions.targets.classes
    floor = floor_of(opinions.run, opinions.entry)
    if targets.multilabel:
        parts = [_of_class(opinions, column) for column in range(len(names))]
        found = [estimate_noise(*part, seed, floor=floor) for part in parts]
        classes = {name: asdict(noise.wrong) for name, noise in zip(names, found, strict=True) if noise.claimed}
        return {"claimed": bool(classes), "classes": classes}
    noise = estimate_noise(targets.numbers, opinions.probabilities, seed, floor=floor)
    planted = {"share": PLANTED, "found": planted_found(targets.numbers, opinions.probabilities, seed)}
    if not noise.claimed:
        return {"claimed": False, "planted": planted}
    by_class = dict(zip(names, map(asdict, noise.by_class), strict=True))
    overall = {name: asdict(getattr(noise, name)) for name in ("wrong", "accuracy", "macro_f1")}
    return {"claimed": True, "planted": planted, **overall, "classes": by_class, "joint": noise.joint.tolist()}


def _of_class(opinions: Opinions, column: int) -> tuple[np.ndarray, np.ndarray]:
    """One class against the rest: labels (N,) of 0 and 1, and their probabilities (N, 2)."""
    with_it = opinions.probabilities[:, column]
    return opinions.targets.matrix[:, column].astype(int), np.column_stack([1 - with_it, with_it])


def _named(
    opinions: Opinions, errors: LabelErrors, labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str]
) -> list[Suspicion]:
    return [
        Suspicion(
            opinions.ids[row],
            names[labels[row]],
            names[better],
            float(probabilities[row, better]),
            float(probabilities[row, labels[row]]),
        )
        for row, better in zip(errors.rows.tolist(), errors.suggested.tolist(), strict=True)
    ]
