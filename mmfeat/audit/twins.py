"""Twins: samples whose text, photo or both are, or nearly are, those of another, as arrays of group numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mmfeat.audit.texts import is_bare
from mmfeat.samples.dataset import Sample
from mmfeat.samples.duplicates import EQUAL_PHOTO, EQUAL_TEXT, NEAR_PHOTO, NEAR_TEXT, duplicate_links, linked_groups

PAIR = "pair"
RULES = {"text": (EQUAL_TEXT, NEAR_TEXT), "image": (EQUAL_PHOTO, NEAR_PHOTO)}


@dataclass(frozen=True)
class Twins:
    """Group numbers (N,) of samples with equal content, and of samples with near content, which hold whole groups of
    equal ones; -1 for a sample that has no twin."""

    exact: np.ndarray
    near: np.ndarray

    @property
    def counts(self) -> dict[str, int]:
        """Groups, the samples in them, those of equal contents, and the largest group."""
        sizes = np.bincount(self.near[self.near >= 0])
        return {
            "groups": int((sizes > 0).sum()),
            "samples": int(sizes.sum()),
            "exact_samples": int((self.exact >= 0).sum()),
            "exact_surplus": int((self.exact >= 0).sum() - len(np.unique(self.exact[self.exact >= 0]))),
            "largest": int(sizes.max(initial=0)),
        }

    def kind(self, row: int) -> str:
        """Whether a sample equals one of its group, or is only near them."""
        return "exact" if self.exact[row] >= 0 else "near"


def find_twins(
    samples: Sequence[Sample], image_keys: np.ndarray, image_hashes: tuple[np.ndarray, np.ndarray]
) -> dict[str, Twins]:
    """Twins in text (after cleaning), in photo, and in the pair of both; arguments as `duplicate_links`.

    A pair has a twin where text and photo both have theirs in one and the same sample; two missing or emptied texts,
    or two missing photos, are as good as equal there.
    """
    unwritten = np.array([is_bare(sample.text) for sample in samples], bool)
    written = [replace(sample, text=None) if bare else sample for sample, bare in zip(samples, unwritten, strict=True)]
    links = duplicate_links(written, image_keys, image_hashes)
    found = {}
    for modality, (equal, near) in RULES.items():
        exact = linked_groups([links[equal]], len(samples))
        found[modality] = Twins(_shared(exact), _shared(linked_groups([links[equal], links[near]], len(samples))))
    blank = np.array([sample.image is None for sample in samples], bool)
    found[PAIR] = Twins(
        _both(found["text"].exact, found["image"].exact, unwritten, blank),
        _both(found["text"].near, found["image"].near, unwritten, blank),
    )
    return found


def twins_within(
    rows: np.ndarray, samples: Sequence[Sample], image_keys: np.ndarray, image_hashes: tuple[np.ndarray, np.ndarray]
) -> dict[str, Twins]:
    """Twins among some rows alone, as arrays over all samples: nobody is near another through one that is not there.

    It is what folds are made of: through a sample without label two labelled ones are not joined.
    """
    hashes, known = image_hashes
    found = find_twins([samples[row] for row in rows.tolist()], image_keys[rows], (hashes[rows], known[rows]))
    return {
        modality: Twins(*(_spread(groups, rows, len(samples)) for groups in (each.exact, each.near)))
        for modality, each in found.items()
    }


def _shared(groups: np.ndarray) -> np.ndarray:
    """The group numbers, -1 for a group of one."""
    return np.where(np.bincount(groups)[groups] > 1, groups, -1)


def _both(text: np.ndarray, image: np.ndarray, unwritten: np.ndarray, blank: np.ndarray) -> np.ndarray:
    """Groups of samples that are in one group by text and in one by photo."""
    alone = np.arange(len(text)) + len(text)  # a number that nobody shares
    sides = [
        np.where(unwritten, -1, np.where(text >= 0, text, alone)),
        np.where(blank, -1, np.where(image >= 0, image, alone)),
    ]
    groups = np.unique(np.column_stack(sides), axis=0, return_inverse=True)[1].reshape(-1)
    return np.where(unwritten & blank, -1, _shared(groups))


def _spread(groups: np.ndarray, rows: np.ndarray, count: int) -> np.ndarray:
    """(count,) the groups at their rows, -1 elsewhere."""
    found = np.full(count, -1)
    found[rows] = groups
    return found
