"""Groups of near duplicates in folds: they stay whole, folds stay even, and a group that weighs much is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmfeat.evaluation.protocol import Protocol, protocol_splits
from mmfeat.evaluation.splits import Splits
from mmfeat.samples.dataset import Sample
from mmfeat.samples.keys import ContentKeys
from mmfeat.samples.labels import read_targets
from mmfeat.system.wording import Silent

WORDS = ["".join(letters) for letters in np.random.default_rng(0).choice(list("abcdefghij"), (400, 6))]
LONG = " ".join(WORDS[:60])
Split = Callable[[list[str], Protocol], tuple[Splits, tuple[str, ...]]]


@pytest.fixture
def split(tmp_path: Path) -> Split:
    def split(texts: list[str], protocol: Protocol) -> tuple[Splits, tuple[str, ...]]:
        samples = [Sample(str(row), text, label="ab"[row % 2]) for row, text in enumerate(texts)]
        images = ContentKeys(np.zeros(len(texts), "S32"), np.zeros(len(texts), bool), ("",) * len(texts))
        targets = read_targets([str(sample.label) for sample in samples])
        splits, _, notes = protocol_splits(samples, targets, images, tmp_path, protocol, Silent())
        return splits, notes

    return split


def own_texts(count: int) -> list[str]:
    rng = np.random.default_rng(1)
    return [" ".join(rng.choice(WORDS, 12)) for _ in range(count)]


def sizes(splits: Splits) -> np.ndarray:
    return (splits.roles == "test").sum(axis=0)


def test_a_phrase_that_hundreds_write_leaves_the_folds_even(split: Split) -> None:
    splits, notes = split([*own_texts(492), *["as pictured"] * 232, *["see the photos"] * 76], Protocol())
    assert sizes(splits).tolist() == [160] * 5
    assert notes == ()


@pytest.mark.parametrize("count", [17, 250])
def test_a_large_group_is_told_with_its_reason(split: Split, count: int) -> None:
    splits, notes = split([*own_texts(800 - count), *[LONG] * count], Protocol())
    assert len(np.unique(splits.roles[-count:], axis=0)) == 1
    assert notes[0] == (
        f"1 group of near duplicates larger than a tenth of a fold; the largest has {count} of 800 samples, "
        f"by equal text: {LONG[:59]}…"
    )
    each = sizes(splits)
    assert (each.max() > 176 or each.min() < 144) == (count == 250) == (len(notes) == 2)
    if count == 250:
        listed = ", ".join(map(str, each.tolist()))
        assert notes[1] == f"folds test {listed} samples, not 160: groups of near duplicates stay whole (or --no-group)"


def test_groups_of_a_tenth_of_a_fold_and_ungrouped_folds_need_no_word(split: Split) -> None:
    assert split([*own_texts(784), *[LONG] * 16], Protocol())[1] == ()
    splits, notes = split([*own_texts(550), *[LONG] * 250], Protocol(grouped=False))
    assert (sizes(splits).tolist(), notes) == ([160] * 5, ())


def test_a_holdout_that_a_group_fills_is_told(split: Split) -> None:
    splits, notes = split([*own_texts(100), *[LONG] * 300], Protocol("holdout", shares=(1, 1, 1)))
    assert len(np.unique(splits.roles[-300:], axis=0)) == 1
    assert len(notes) == 2
    assert notes[1].startswith(f"the holdout tests {sizes(splits)[0]} samples, not 133: ")
