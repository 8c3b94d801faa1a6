"""Splits: which labelled samples train, validate and test in each fold.

Test rows are only ever scored. What is selected (when to stop, settings, temperature) is selected on validation
rows, and each repeat of the training, with a seed of its own, holds out another part of the rest for that.
Samples of one group stay on one side of every split: a head must not be scored on what it has seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfeat.errors import DataError
from mmfeat.targets import Targets

TRAIN, VALIDATION, TEST = "train", "validation", "test"
FOLDS, REPEATS, SEED = 5, 3, 42
VALIDATION_PARTS = 8
HOLDOUT = "holdout"  # the name of the only fold where a part is held out once
HOLDOUT_SHARES = (8, 1, 1)


@dataclass(frozen=True)
class Fold:
    """Row numbers of one fold as one repeat sees it."""

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Splits:
    """`roles` (N, F): one role for each sample (rows) in each fold (columns).

    `train`, `test`, `validation` (in every repeat), or `validation-1`, `validation-2` and so on: validates in
    the repeat of that number, counted from 1, and trains in the others.
    """

    ids: tuple[str, ...]
    names: tuple[str, ...]
    roles: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @property
    def tested(self) -> np.ndarray:
        """Numbers of the rows that some fold tests, ascending."""
        return np.flatnonzero((self.roles == TEST).any(axis=1))

    def parts(self, fold: int) -> int:
        """How many repeats have a validation part of their own; 0 where all share one."""
        return max(int(role.partition("-")[2] or 0) for role in np.unique(self.roles[:, fold]).tolist())

    def fold(self, fold: int, repeat: int) -> Fold:
        """The rows of one fold for one repeat, both counted from 0; repeats beyond the parts begin again."""
        column, parts = self.roles[:, fold], self.parts(fold)
        own = f"{VALIDATION}-{repeat % parts + 1}" if parts else VALIDATION
        validates, tests = (column == VALIDATION) | (column == own), column == TEST
        rows = (np.flatnonzero(mask) for mask in (~validates & ~tests, validates, tests))
        return Fold(self.names[fold], *rows)


def make_folds(
    targets: Targets,
    ids: Sequence[str],
    groups: np.ndarray,
    folds: int = FOLDS,
    seed: int = SEED,
    repeats: int = REPEATS,
) -> Splits:
    """Stratified folds that keep groups (N,) whole; each repeat validates on another eighth of a fold's rest.

    More repeats change nothing for the ones before. Raises `DataError` where a class has too few samples.
    """
    if folds < 2:
        raise DataError(f"--folds {folds}: each fold is tested by a head that the others train; use 2 folds or more")
    _check_counts(targets, groups, folds, f"--folds {folds}", "each fold needs 1", "use fewer folds (at least 2)")
    strata = _strata(targets)
    tests = deal(strata, groups, [1] * folds, seed)
    roles = np.full((len(targets), folds), TRAIN, dtype="U12")
    for column in range(folds):
        roles[tests == column, column] = TEST
        _add_parts(roles[:, column], targets, strata, groups, repeats, seed)
    return _checked(Splits(tuple(ids), tuple(f"fold{number}" for number in range(folds)), roles), targets)


def make_holdout(
    targets: Targets,
    ids: Sequence[str],
    groups: np.ndarray,
    shares: Sequence[float] = HOLDOUT_SHARES,
    seed: int = SEED,
    repeats: int = REPEATS,
) -> Splits:
    """One fold, stratified, with groups (N,) kept whole. Raises `DataError` where a class has too few samples.

    `shares` are of train, validation and test, as (8, 1, 1), or of train and test, as (8, 2): then each repeat
    validates on a part of the training share, as in folds, so that nothing is selected on test rows.
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
    return _checked(Splits(tuple(ids), (HOLDOUT,), roles), targets)


def deal(strata: np.ndarray, groups: np.ndarray, shares: Sequence[float], seed: int) -> np.ndarray:
    """(N,) part numbers: whole groups (N,), each stratum (N,) spread over the parts by their shares.

    Groups of several go first; samples alone in their group then even out each stratum, so that a stratum of as
    many of them as there are parts is in all parts (Adams' method of apportionment). Takes seconds for a million
    samples, where sklearn's StratifiedGroupKFold takes many minutes.
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

    Larger groups come first; each goes to the part with least of its strata among those that it fits into.
    """
    parts, sizes, totals = np.full(len(strata), -1), np.bincount(groups), np.bincount(strata)
    have = np.zeros((len(share), len(totals)))
    rows_by_group, ends = np.argsort(groups, kind="stable"), np.cumsum(sizes)
    joined = rng.permutation(np.flatnonzero(sizes > 1))
    for group in joined[np.argsort(-sizes[joined], kind="stable")]:
        rows = rows_by_group[ends[group] - sizes[group] : ends[group]]
        found, counts = np.unique(strata[rows], return_counts=True)
        fill = (have[:, found] / share[:, None]) @ (counts / totals[found])
        overflow = np.maximum((have.sum(axis=1) + len(rows)) / (share * len(strata)), 1)
        part = np.lexsort((rng.random(len(share)), fill, overflow))[0]
        have[part, found] += counts
        parts[rows] = part
    return parts, have


def _level(have: np.ndarray, stratum: int, count: int, share: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(count,) part numbers that level `have` (parts, strata) in one stratum; the emptier parts win ties."""
    start = have[:, stratum].astype(int)
    stop = np.maximum(start, np.floor((start.sum() + count) * share).astype(int) + 1)
    part = np.repeat(np.arange(len(share)), stop - start)
    place = np.concatenate([np.arange(low, high) for low, high in zip(start, stop, strict=True)])
    size = (have.sum(axis=1) / share)[part]
    return part[np.lexsort((rng.random(len(part)), size, place / share[part]))[:count]]


def _strata(targets: Targets) -> np.ndarray:
    """(N,) what is spread evenly: the class, or the rarest one a sample has (C for none) where it may have several."""
    if not targets.multilabel:
        return targets.numbers
    counts = np.where(targets.matrix, targets.matrix.sum(axis=0), len(targets) + 1)
    return np.where(targets.matrix.any(axis=1), counts.argmin(axis=1), len(targets.classes))


def _add_parts(
    roles: np.ndarray, targets: Targets, strata: np.ndarray, groups: np.ndarray, repeats: int, seed: int
) -> None:
    """Give each repeat a part of the training rows of one fold (N,) to validate on, fewer than 8 for small classes."""
    rest = np.flatnonzero(roles == TRAIN)
    smallest = min(len(np.unique(groups[rest[has]])) for has in targets.matrix[rest].T)
    parts = max(2, min(VALIDATION_PARTS, smallest))
    part = deal(strata[rest], groups[rest], [1] * parts, seed)
    for number in range(max(1, min(repeats, parts))):
        roles[rest[part == number]] = f"{VALIDATION}-{number + 1}"


def _check_counts(targets: Targets, groups: np.ndarray, needed: int, what: str, why: str, remedy: str) -> None:
    """Each class (and each absence of one, if multi-label) needs as many samples as there are folds or roles."""
    sides = [(f"class {name!r}", has) for name, has in zip(targets.classes, targets.matrix.T, strict=True)]
    if targets.multilabel:
        sides += [(f"the absence of {side}", ~has) for side, has in sides]
    name, has = min(sides, key=lambda side: side[1].sum())
    if has.sum() < needed:
        raise DataError(
            f"{what}: {name} has {has.sum()} samples, {why}; {remedy if has.sum() > 1 else 'label more of it'}, or "
            "correct the label if it is a typo"
        )
    for name, has in sides:
        if (count := len(np.unique(groups[has]))) < max(needed, 3):  # to train, validate and test
            raise DataError(
                f"{name} has only {count} groups of different texts and photos, too few for "
                f"{what}; {remedy}, or --no-group to let equal ones stand on both sides"
            )


def _checked(splits: Splits, targets: Targets) -> Splits:
    for number in range(len(splits)):
        for repeat in range(splits.parts(number) or 1):
            fold = splits.fold(number, repeat)
            trains = targets.matrix[fold.train]
            if not len(fold.validation) or not len(fold.test) or (trains == trains[:1]).all():
                raise DataError(
                    f"{fold.name} would train on one class, or validate or test on nothing; label more samples"
                )
    return splits
