"""Balance: the share of each class in all labelled samples and in each part of given splits, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfeat.metrics import wilson
from mmfeat.targets import classes_in

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
