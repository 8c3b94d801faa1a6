"""Ranking: entries in the order of macro-F1, with paired tests that say which differences are more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmfeat.entries import Entry
from mmfeat.heads import TWINS
from mmfeat.scoring import decide
from mmfeat.statistics import compare_with_best, holm, paired_difference
from mmfeat.trials import Task


def rank(task: Task, entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Best first; each entry tells its difference from the best, p-values, and whether that is a tie.

    An entry on both modalities also tells its `gain`: its difference from the same head on the better single one.
    """
    ordered = sorted(entries, key=lambda entry: -entry.record["macro_f1"]["value"])
    tested = task.splits.tested
    chosen = [decide(task, entry.logits, entry.decisions)[0][:, tested] for entry in ordered]
    behind = compare_with_best(task.targets.take(tested), chosen, 0, task.seed)
    gains = _gains(task, ordered, chosen)
    return [
        {**entry.record, "behind_best": dict(test), "tie": test["tie"], **gains.get(number, {})}
        for number, (entry, test) in enumerate(zip(ordered, behind, strict=True))
    ]


def _gains(task: Task, ordered: Sequence[Entry], chosen: Sequence[np.ndarray]) -> dict[int, dict[str, Any]]:
    """Place of an entry on both modalities -> its gain, p-values adjusted for the number of heads (Holm)."""
    pairs = {}
    for number, entry in enumerate(ordered):
        alone = [place for place, other in enumerate(ordered) if _single(other, entry.record["head"])]
        if entry.record["modalities"] == "both" and alone:
            pairs[number] = alone[0]  # the better one: they are in order
    targets = task.targets.take(task.splits.tested)
    tests = {
        number: vars(paired_difference(targets, chosen[number], chosen[other], task.seed))
        for number, other in pairs.items()
    }
    adjusted = dict(zip(tests, holm([test["p"] for test in tests.values()]).tolist(), strict=True))
    return {
        number: {"gain": {**test, "p_holm": adjusted[number], "over": ordered[pairs[number]].record["modalities"]}}
        for number, test in tests.items()
    }


def _single(entry: Entry, head: str) -> bool:
    return entry.record["head"] in (head, TWINS.get(head)) and entry.record["modalities"] in ("text", "image")
