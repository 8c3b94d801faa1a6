"""Balance: the share of each class in all labelled samples and in each part of given splits, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmfeat.metrics import wilson
from mmfeat.targets import classes_in

ALL = "all"


def class_balance(labels: Sequence[str | None], parts: Mapping[str, np.ndarray], multilabel: bool) -> dict[str, Any]:
    """`classes` (names, sorted), `parts`: name -> samples and by class count, share and its 95 % Wilson interval,
    `p`: that differences between the parts are chance (chi-squared; None for fewer than two parts or multi-label).
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
    return {"classes": classes, "parts": tables, "p": None if multilabel else _chi_squared(counts)}


def _shares(cells: Sequence[set[str]], classes: Sequence[str]) -> dict[str, Any]:
    counts = Counter(name for cell in cells for name in cell)
    found = {}
    for name in classes:
        share = counts[name] / max(len(cells), 1)
        low, high = map(float, wilson(share, len(cells)))
        found[name] = {"count": counts[name], "share": share, "low": low, "high": high}
    return {"samples": len(cells), "classes": found}


def _chi_squared(counts: list[list[int]]) -> float | None:
    """P-value of a table of parts by classes."""
    table = np.array(counts)
    if table.ndim != 2 or table.shape[0] < 2 or table.shape[1] < 2:
        return None
    table = table[table.sum(axis=1) > 0][:, table.sum(axis=0) > 0]
    if min(table.shape, default=0) < 2:
        return None
    from scipy.stats import chi2_contingency

    return float(chi2_contingency(table).pvalue)
