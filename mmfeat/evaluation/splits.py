"""Splits: which labelled samples train, validate and test in each fold.

Test rows are only ever scored. Stopping times, settings and temperatures are selected on validation rows, for which
each repeat of the training, with its own seed, holds out another part of the rest.
Samples of one group stay on one side of every split: a head must not be scored on samples that it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mmfeat.errors import DataError
from mmfeat.samples.labels import (
    FOLDS,
    RARE_REMEDY,
    REGRESSION,
    TEST,
    TRAIN,
    VALIDATION,
    Targets,
    looks_numeric,
    some_counts,
)
from mmfeat.system.wording import counted

REPEATS, SEED = 3, 42
QUANTILES = 10  # strata of numbers
INNER_PARTS = 3  # parts of a fold's training rows, each left out in turn, on which baselines choose a setting
ENOUGH = 20_000  # training rows whose validation part is large enough to choose a setting
VALIDATION_PARTS = 8  # number of parts of a fold's training rows; each repeat holds out one part
HOLDOUT = "holdout"  # the name of the only fold of a holdout
HOLDOUT_SHARES = (8, 1, 1)


@dataclass(frozen=True)
class Fold:
    """The row numbers of one fold for one repeat."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Splits:
    """Roles (N, F) of N samples (rows) in F folds (columns).

    A role is `train`, `test`, `validation` (in every repeat), or `validation-1`, `validation-2` and so on, which
    validates in the repeat of that number, counted from 1, and trains in the others. Samples with the same number in
    `groups` (N,) are near duplicates; None: each sample stands for itself.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    roles: np.ndarray
    groups: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def tested(self) -> np.ndarray:
        """Numbers of the rows that some fold tests, ascending."""
        return np.flatnonzero((self.roles == TEST).any(axis=1))

    @property
    def tested_groups(self) -> np.ndarray | None:
        """The groups of the rows that some fold tests."""
        return None if self.groups is None else self.groups[self.tested]

    def parts(self, fold: int) -> int:
        """The number of repeats that have their own validation part; 0 where all repeats share one part."""
        return max(int(role.partition("-")[2] or 0) for role in np.unique(self.roles[:, fold]).tolist())

    @property
    def training_sizes(self) -> list[int]:
        """The numbers of training rows in every fold, with every validation part."""
        return [
            len(self.fold(fold, repeat).train)
            for fold in range(len(self))
            for repeat in range(max(1, self.parts(fold)))
        ]

    def fold(self, fold: int, repeat: int) -> Fold:
        """The rows of one fold for one repeat, both counted from 0; repeats beyond the parts begin again."""
        if (fold, repeat) not in self._folds:
            column, parts = self.roles[:, fold], self.parts(fold)
            role = f"{VALIDATION}-{repeat % parts + 1}" if parts else VALIDATION
            validates, tests = (column == VALIDATION) | (column == role), column == TEST
            rows = (np.flatnonzero(mask) for mask in (~validates & ~tests, validates, tests))
            self._folds[fold, repeat] = Fold(self.names[fold], *rows)
        return self._folds[fold, repeat]

    def inner(self, fold: int, repeat: int, targets: Targets, seed: int) -> tuple[np.ndarray, ...]:
        """Parts of a fold's rows but for its test rows, of which a model leaves out each in turn to choose a setting.

        They keep groups whole. Where the validation part is given or large, it is the only one.
        """
        rows = self.fold(fold, repeat)
        whole = np.union1d(rows.train, rows.validation)
        if not self.parts(fold) or len(whole) > ENOUGH:
            return (rows.validation,)
        groups = np.arange(len(targets)) if self.groups is None else self.groups
        part = deal(_strata(targets)[whole], groups[whole], [1] * INNER_PARTS, seed)
        return tuple(whole[part == number] for number in range(INNER_PARTS) if (part == number).any())

    @cached_property
    def _folds(self) -> dict[tuple[int, int], Fold]:
        return {}


def check_folds(targets: Targets, groups: np.ndarray, folds: int) -> None:
    """Raise `DataError` for fewer than 2 folds, and where a class has fewer groups (N,) than there are folds."""
    if folds < 2:
        raise DataError(f"--folds {folds}: each fold is tested by a head that the others train; use 2 folds or more")
    _check_counts(targets, groups, folds, f"--folds {folds}", "each fold needs 1", "use fewer folds (at least 2)")


def make_folds(
    targets: Targets,
    ids: Sequence[str],
    groups: np.ndarray,
    folds: int = FOLDS,
    seed: int = SEED,
    repeats: int = REPEATS,
) -> Splits:
    """Make stratified folds that keep groups (N,) whole; each repeat validates on another eighth of a fold's rest.

    More repeats leave the roles in earlier repeats as they are. Raises `DataError` where a class has too few samples.
    """
    check_folds(targets, groups, folds)
    strata = _strata(targets)
    tests = deal(strata, groups, [1] * folds, seed)
    roles = np.full((len(targets), folds), TRAIN, dtype="U12")
    for column in range(folds):
        roles[tests == column, column] = TEST
        _add_parts(roles[:, column], targets, strata, groups, repeats, seed)
    return _checked(Splits(tuple(ids), tuple(f"fold{number}" for number in range(folds)), roles, groups), targets)


def make_holdout(
    targets: Targets,
    ids: Sequence[str],
    groups: np.ndarray,
    shares: Sequence[float] = HOLDOUT_SHARES,
    seed: int = SEED,
    repeats: int = REPEATS,
) -> Splits:
    """Make one stratified fold that keeps groups (N,) whole. Raises `DataError` where a class has too few samples.

    `shares` are the sizes of train, validation and test, as (8, 1, 1), or of train and test, as (8, 2). In the second
    case each repeat validates on a part of the training share, as in folds, so that nothing is selected on test rows.
    """
    if len(shares) not in (2, 3) or not all(0 < share < float("inf") for share in shares):
        written = ":".join(map(str, shares))
        raise DataError(f"a holdout of {written}: write train:validation:test, as 8:1:1, or train:test, as 8:2")
    _check_counts(targets, groups, 3, "a holdout", "training, validation and test need 1 each", "label more of it")
    strata = _strata(targets)
    names = np.array([TRAIN, TEST] if len(shares) == 2 else [TRAIN, VALIDATION, TEST], dtype="U12")
    roles = names[deal(strata, groups, shares, seed)][:, None]
    if len(shares) == 2:
        _add_parts(roles[:, 0], targets, strata, groups, repeats, seed)
    return _checked(Splits(tuple(ids), (HOLDOUT,), roles, groups), targets)


def make_given(
    parts: Sequence[str],
    targets: Targets,
    ids: Sequence[str],
    groups: np.ndarray,
    seed: int = SEED,
    repeats: int = REPEATS,
) -> Splits:
    """Make one fold of the parts (N,) of the user's own split.

    Of training, validation and test data, test data are scored. Without one of the two, the other one is scored, and
    each repeat validates on a part of the training data that keeps groups (N,) whole.
    """
    roles = np.array(parts, dtype="U12")
    if not {VALIDATION, TEST} <= {*parts}:
        roles[roles == VALIDATION] = TEST
        _add_parts(roles, targets, _strata(targets), groups, repeats, seed)
    return _checked(Splits(tuple(ids), (HOLDOUT,), roles[:, None], groups), targets)


def deal(strata: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """Assign a part number (N,) to each sample: groups (N,) stay whole, strata (N,) are spread by the parts' shares.

    Groups of several samples are assigned first; samples alone in their group then even out each stratum, so that a
    stratum of at least as many such samples as parts is in all parts (Adams' method of apportionment). Takes seconds
    for a million samples, for which scikit-learn's StratifiedGroupKFold takes many minutes.
    """
    rng = np.random.default_rng(seed)
    share = np.asarray(shares, dtype=float) / sum(shares)
    strata, groups = (np.unique(values, return_inverse=True)[1].reshape(-1) for values in (strata, groups))
    parts, have = _deal_joined(strata, groups, share, rng)
    alone = rng.permutation(np.flatnonzero(parts < 0))
    counts = np.bincount(strata[alone], minlength=have.shape[1])
    by_stratum = np.split(alone[np.argsort(strata[alone], kind="stable")], np.cumsum(counts)[:-1])
    for stratum in np.argsort(counts, kind="stable"):
        parts[by_stratum[stratum]] = chosen = _level(have, int(stratum), int(counts[stratum]), share, rng)
        have[:, stratum] += np.bincount(chosen, minlength=len(share))
    return parts


def _deal_joined(
    strata: np.ndarray, groups: np.ndarray, share: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Part numbers (N,), -1 for samples alone in their group, and the counts so far (parts, strata).

    Larger groups come first; a group goes to the part with the least of its strata among parts with enough room.
    """
    parts, sizes, totals = np.full(len(strata), -1), np.bincount(groups), np.bincount(strata)
    have = np.zeros((len(share), len(totals)))
    rows_by_group, ends = np.argsort(groups, kind="stable"), np.cumsum(sizes)
    joined = rng.permutation(np.flatnonzero(sizes > 1))
    for group in joined[np.argsort(-sizes[joined], kind="stable")]:
        rows = rows_by_group[ends[group] - sizes[group] : ends[group]]
        present, counts = np.unique(strata[rows], return_counts=True)
        fill = (have[:, present] / share[:, None] * (counts / totals[present])).sum(axis=1)
        fill = fill.round(9)  # equally full parts tie on every machine, whatever the order of its sums
        overflow = np.maximum((have.sum(axis=1) + len(rows)) / (share * len(strata)), 1)
        part = np.lexsort((rng.random(len(share)), fill, overflow))[0]
        have[part, present] += counts
        parts[rows] = part
    return parts, have


def _level(have: np.ndarray, stratum: int, count: int, share: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(count,) part numbers that level the counts `have` (parts, strata) in one stratum; emptier parts win ties."""
    start = have[:, stratum].astype(int)
    stop = np.maximum(start, np.floor((start.sum() + count) * share).astype(int) + 1)
    part = np.repeat(np.arange(len(share)), stop - start)
    level = np.concatenate([np.arange(low, high) for low, high in zip(start, stop, strict=True)])
    size = (have.sum(axis=1) / share)[part]
    return part[np.lexsort((rng.random(len(part)), size, level / share[part]))[:count]]


def _strata(targets: Targets) -> np.ndarray:
    """(N,) the stratum of each sample: its class, or for multi-label its rarest class, C for a sample without one; of
    numbers the tenth that they are in."""
    if targets.numeric:
        bins = min(QUANTILES, max(1, len(targets) // QUANTILES))
        ends = np.quantile(targets.matrix, np.arange(1, bins) / bins)
        return np.searchsorted(ends, targets.matrix[:, 0], side="right")
    if not targets.multilabel:
        return targets.numbers
    counts = np.where(targets.matrix, targets.matrix.sum(axis=0), len(targets) + 1)
    return np.where(targets.matrix.any(axis=1), counts.argmin(axis=1), len(targets.classes))


def _add_parts(
    roles: np.ndarray, targets: Targets, strata: np.ndarray, groups: np.ndarray, repeats: int, seed: int
) -> None:
    """Mark in the `roles` (N,) of one fold the part of the training rows on which each repeat validates.

    There are `VALIDATION_PARTS` parts, or fewer where the smallest class has fewer groups.
    """
    rest = np.flatnonzero(roles == TRAIN)
    smallest = min(len(np.unique(groups[rest[has]])) for _, has in _sides(targets.take(rest)))
    parts = max(2, min(VALIDATION_PARTS, smallest))
    part = deal(strata[rest], groups[rest], [1] * parts, seed)
    for number in range(max(1, min(repeats, parts))):
        roles[rest[part == number]] = f"{VALIDATION}-{number + 1}"


def _sides(targets: Targets) -> list[tuple[str, np.ndarray]]:
    """The name and the rows (N,) bool of each class that every part of a split needs; all rows of numbers."""
    if targets.numeric:
        return [("the label", np.ones(len(targets), bool))]
    return [(f"class {name!r}", has) for name, has in zip(targets.classes, targets.matrix.T, strict=True)]


def rare_classes(targets: Targets, groups: np.ndarray, needed: int) -> dict[str, int]:
    """The number of samples of each class that is in too few `groups` (N,): fewer than `needed`, or than the three that
    train, validate and test. In multi-label data its absence is counted, too."""
    sides = [] if targets.numeric else list(zip(targets.classes, targets.matrix.T, strict=True))
    least = max(needed, 3)
    return {
        name: int(has.sum())
        for name, has in sides
        if any(len(np.unique(groups[part])) < least for part in ((has, ~has) if targets.multilabel else (has,)))
    }


def _check_counts(targets: Targets, groups: np.ndarray, needed: int, what: str, why: str, remedy: str) -> None:
    """Raise `DataError` where a class, or for multi-label its absence, has fewer samples than folds or roles."""
    sides = _sides(targets)
    if targets.multilabel:
        sides += [(f"the absence of {side}", ~has) for side, has in sides]
    name, has = min(sides, key=lambda side: side[1].sum())
    if has.sum() < needed:
        rare = rare_classes(targets, np.arange(len(targets)), needed)
        listed = f" (too few: {some_counts(rare)})" if len(rare) > 1 else ""
        raise DataError(
            f"{what}: {name} has {counted(int(has.sum()), 'sample')}, {why}{listed}; "
            f"{remedy if has.sum() > 1 else 'label more of it'}, correct the label if it is a typo, or {RARE_REMEDY}"
            + (f"; or are the labels numbers to predict? --task {REGRESSION}" if looks_numeric(targets.classes) else "")
        )
    for name, has in sides:
        if (count := len(np.unique(groups[has]))) < max(needed, 3):  # groups to train, validate and test with
            raise DataError(
                f"{name} has only {counted(count, 'group')} of different texts and photos, too few for "
                f"{what}; {remedy}, {RARE_REMEDY}, or --no-group to let equal ones stand on both sides"
            )


def _checked(splits: Splits, targets: Targets) -> Splits:
    """The splits. Raises `DataError` where a fold trains on one class, or validates or tests on no row."""
    for number in range(len(splits)):
        for repeat in range(splits.parts(number) or 1):
            fold = splits.fold(number, repeat)
            trains = targets.matrix[fold.train]
            if not len(fold.validation) or not len(fold.test) or (trains == trains[:1]).all():
                raise DataError(
                    f"{fold.name} would train on one {'number' if targets.numeric else 'class'}, or validate or test "
                    "on nothing; label more samples"
                )
    return splits
