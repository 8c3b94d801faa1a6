"""Conflicts: groups of twins whose labels disagree."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfeat.audit.twins import Twins
from mmfeat.evaluation.metrics import wilson
from mmfeat.samples.labels import classes_in


@dataclass(frozen=True)
class Conflicts:
    """Group numbers whose samples have different labels, by whether equal contents already disagree."""

    exact: np.ndarray
    near: np.ndarray
    counts: dict[str, Any]


def find_conflicts(twins: Twins, labels: np.ndarray) -> Conflicts:
    """Groups of near twins that disagree; `labels` (N,) are numbers of label cells, -1 without label.

    The counts say how many pairs of twins there are among labelled samples, and how many of those disagree.
    """
    disagreeing = _disagreeing(twins.near, labels)
    unequal = _disagreeing(twins.exact, labels)
    exact = np.unique(twins.near[np.isin(twins.exact, unequal) & (twins.exact >= 0)])
    near = np.setdiff1d(disagreeing, exact)
    samples = (labels >= 0) & (twins.near >= 0)
    pairs, differing, alone = _pairs(twins.near[samples], labels[samples])
    counts = {
        "groups": len(exact) + len(near),
        "exact_groups": len(exact),
        "samples": int(np.isin(twins.near[samples], disagreeing).sum()),
        "pairs": pairs,
        "disagreeing_pairs": differing,
        "wrong": _wrong(differing / max(pairs, 1), alone, int(labels.max(initial=-1)) + 1),
    }
    return Conflicts(exact, near, counts)


def _wrong(share: float, alone: float, classes: int) -> dict[str, float] | None:
    """The share of wrong labels that this share of unlike pairs comes from, with a 95 % interval; None without pairs.

    `alone` is how many pairs that have nothing to do with each other tell as much. If each label errs alone, with
    chance e and as often towards each other class, two labels of one content are alike with (1 - e)^2 + e^2 / (C - 1).
    No head is asked.
    """
    if not alone or classes < 2:
        return None
    shares = (share, *wilson(share, alone))
    return dict(zip(("value", "low", "high"), (_error_rate(float(each), classes) for each in shares), strict=True))


def _error_rate(unlike: float, classes: int) -> float:
    """Beyond what chance alone gives the equation has no solution, and labels say nothing."""
    factor = classes / (classes - 1)
    return (1 - math.sqrt(max(0.0, 1 - factor * unlike))) / factor


def _disagreeing(groups: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The groups with more than one label."""
    there = (groups >= 0) & (labels >= 0)
    distinct = np.unique(np.column_stack([groups[there], labels[there]]), axis=0)
    found, count = np.unique(distinct[:, 0], return_counts=True)
    return found[count > 1]


def _pairs(groups: np.ndarray, labels: np.ndarray) -> tuple[int, int, float]:
    """How many pairs of samples share a group, how many of them have different labels, and how many independent pairs
    they are worth: the pairs of a group share samples, so a group counts as one of its weight (Kish, 1965)."""
    sizes = np.unique(groups, return_counts=True)[1]
    alike = np.unique(np.column_stack([groups, labels]), axis=0, return_counts=True)[1]
    by_group, same = (counts * (counts - 1) // 2 for counts in (sizes, alike))
    total = int(by_group.sum())
    return total, total - int(same.sum()), total**2 / max(int((by_group**2).sum()), 1)


ALL = "all"
DRAWS = 9999


def class_balance(labels: Sequence[str | None], parts: Mapping[str, np.ndarray], multilabel: bool) -> dict[str, Any]:
    """`classes` (names, sorted), `parts`: name -> samples and by class count, share and its 95 % Wilson interval,
    `p`: that differences between the parts are chance (a permutation test, which holds for rare classes too; None for
    fewer than two parts or multi-label).
    """
    names = [classes_in(label, multilabel) for label in labels]
    classes = sorted(set().union(*names)) if names else []
    labelled = [row for row, label in enumerate(labels) if label is not None]
    members = {
        ALL: labelled,
        **{name: [row for row in rows.tolist() if labels[row] is not None] for name, rows in parts.items()},
    }
    tables = {part: _shares([names[row] for row in rows], classes) for part, rows in members.items()}
    counts = [[table["classes"][name]["count"] for name in classes] for part, table in tables.items() if part != ALL]
    return {"classes": classes, "parts": tables, "p": None if multilabel else _chance(counts)}


def _shares(cells: Sequence[set[str]], classes: Sequence[str]) -> dict[str, Any]:
    counts = Counter(name for cell in cells for name in cell)
    found = {}
    for name in classes:
        share = counts[name] / max(len(cells), 1)
        low, high = map(float, wilson(share, len(cells)))
        found[name] = {"count": counts[name], "share": share, "low": low, "high": high}
    return {"samples": len(cells), "classes": found}


def _chance(counts: list[list[int]], seed: int = 42) -> float | None:
    """P-value of a table of parts by classes: chi-squared against `DRAWS` tables with the same margins, for with few
    samples a class its distribution is not the one of the books."""
    table = np.array(counts)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 2:
        return None
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    if min(table.shape, default=0) < 2:
        return None
    from scipy.stats import random_table

    rows, columns = table.sum(1), table.sum(0)
    expected = np.outer(rows, columns) / table.sum()
    drawn = random_table(rows, columns, seed=seed).rvs(DRAWS)
    found, chance = (((each - expected) ** 2 / expected).sum((-2, -1)) for each in (table, drawn))
    return float((1 + (chance >= found - 1e-9).sum()) / (1 + DRAWS))
