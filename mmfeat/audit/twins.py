"""Twins: groups of samples with equal or nearly equal text, photo or both, and conflicts of labels within groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmfeat.audit.texts import is_bare
from mmfeat.evaluation.metrics import wilson
from mmfeat.samples.dataset import Sample
from mmfeat.samples.duplicates import (
    EQUAL_PHOTO,
    EQUAL_TEXT,
    NEAR_PHOTO,
    NEAR_TEXT,
    Look,
    duplicate_links,
    linked_groups,
)

PAIR = "pair"
RULES = {"text": (EQUAL_TEXT, NEAR_TEXT), "image": (EQUAL_PHOTO, NEAR_PHOTO)}


@dataclass(frozen=True)
class Twins:
    """Group numbers (N,) of samples with equal (`exact`) and with near content, -1 for a sample without twin.

    A near group contains whole exact groups.
    """

    exact: np.ndarray
    near: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of groups, of samples in groups, of samples with an exact twin, and the size of the largest group."""
        sizes = np.bincount(self.near[self.near >= 0])
        return {
            "groups": int((sizes > 0).sum()),
            "samples": int(sizes.sum()),
            "exact_samples": int((self.exact >= 0).sum()),
            "exact_surplus": int((self.exact >= 0).sum() - len(np.unique(self.exact[self.exact >= 0]))),
            "largest": int(sizes.max(initial=0)),
        }

    def kind(self, row: int) -> str:
        """ "exact" for a sample with an equal twin, "near" for a sample with near twins only."""
        return "exact" if self.exact[row] >= 0 else "near"


def find_twins(
    samples: Sequence[Sample], image_keys: np.ndarray, image_hashes: tuple[np.ndarray, np.ndarray], look: Look
) -> dict[str, Twins]:
    """Twins by text (after cleaning), by photo, and by the pair of both; arguments as `duplicate_links`.

    Two samples are twins by pair where they are twins by text and by photo, or by one of them where both lack the
    other: a photo, or any text but links and mentions.
    """
    unwritten = np.array([is_bare(sample.text) for sample in samples], bool)
    written = [replace(sample, text=None) if bare else sample for sample, bare in zip(samples, unwritten, strict=True)]
    links = duplicate_links(written, image_keys, image_hashes, look)
    twins = {}
    for modality, (equal, near) in RULES.items():
        exact = linked_groups([links[equal]], len(samples))
        twins[modality] = Twins(_shared(exact), _shared(linked_groups([links[equal], links[near]], len(samples))))
    blank = np.array([sample.image is None for sample in samples], bool)
    twins[PAIR] = Twins(
        _both(twins["text"].exact, twins["image"].exact, unwritten, blank),
        _both(twins["text"].near, twins["image"].near, unwritten, blank),
    )
    return twins


def twins_within(
    rows: np.ndarray,
    samples: Sequence[Sample],
    image_keys: np.ndarray,
    image_hashes: tuple[np.ndarray, np.ndarray],
    look: Look,
) -> dict[str, Twins]:
    """Twins among some rows alone, as arrays over all samples; other rows do not link two of these rows.

    Folds are made of such groups: a sample without label does not join two labelled samples.
    """
    hashes, known = image_hashes
    part = [samples[row] for row in rows.tolist()]
    twins = find_twins(part, image_keys[rows], (hashes[rows], known[rows]), lambda some: look(rows[some]))
    return {
        modality: Twins(*(_spread(groups, rows, len(samples)) for groups in (found.exact, found.near)))
        for modality, found in twins.items()
    }


def _shared(groups: np.ndarray) -> np.ndarray:
    """(N,) the group numbers, -1 for a group of one sample."""
    return np.where(np.bincount(groups)[groups] > 1, groups, -1)


def _both(text: np.ndarray, image: np.ndarray, unwritten: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """(N,) groups of samples that share their group by text and their group by photo."""
    alone = np.arange(len(text)) + len(text)  # (N,) numbers that are unique
    sides = [
        np.where(unwritten, -1, np.where(text >= 0, text, alone)),
        np.where(blank, -1, np.where(image >= 0, image, alone)),
    ]
    groups = np.unique(np.column_stack(sides), axis=0, return_inverse=True)[1].reshape(-1)
    return np.where(unwritten & blank, -1, _shared(groups))


def _spread(groups: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """(count,) the groups at `rows`, -1 at other rows."""
    spread = np.full(count, -1)
    spread[rows] = groups
    return spread


@dataclass(frozen=True)
class Conflicts:
    """Numbers of groups whose samples have different labels: `exact` where equal contents disagree, else `near`."""

    exact: np.ndarray
    near: np.ndarray
    counts: dict[str, Any]


def find_conflicts(twins: Twins, labels: np.ndarray) -> Conflicts:
    """Groups of near twins with different labels; `labels` (N,) are indices of label cells, -1 without label.

    `counts` has the number of pairs of twins among labelled samples, and the number of pairs that disagree.
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
    """The share e of wrong labels, estimated from the share of unlike pairs, with a 95 % interval; None without pairs.

    `alone` is the effective number of independent pairs. If labels err independently with probability e, uniformly over
    the other classes, two labels of one content agree with probability (1 - e)^2 + e^2 / (C - 1). No head is used.
    """
    if not alone or classes < 2:
        return None
    shares = (share, *wilson(share, alone))
    return dict(zip(("value", "low", "high"), (_error_rate(float(unlike), classes) for unlike in shares), strict=True))


def _error_rate(unlike: float, classes: int) -> float:
    """The solution e of the equation of `_wrong`, capped where labels agree no more often than by chance."""
    factor = classes / (classes - 1)
    return (1 - math.sqrt(max(0.0, 1 - factor * unlike))) / factor


def _disagreeing(groups: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The numbers of the groups with more than one label."""
    present = (groups >= 0) & (labels >= 0)
    distinct = np.unique(np.column_stack([groups[present], labels[present]]), axis=0)
    numbers, count = np.unique(distinct[:, 0], return_counts=True)
    return numbers[count > 1]


def _pairs(groups: np.ndarray, labels: np.ndarray) -> tuple[int, int, float]:
    """(pairs of samples that share a group, pairs with different labels, effective number of independent pairs).

    The pairs of a group share samples, so the effective number is (sum w)^2 / sum w^2 over the pairs w of each group
    (Kish, 1965).
    """
    sizes = np.unique(groups, return_counts=True)[1]
    alike = np.unique(np.column_stack([groups, labels]), axis=0, return_counts=True)[1]
    by_group, same = (counts * (counts - 1) // 2 for counts in (sizes, alike))
    total = int(by_group.sum())
    return total, total - int(same.sum()), total**2 / max(int((by_group**2).sum()), 1)
