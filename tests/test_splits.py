from pathlib import Path

import numpy as np
import pytest

from mmfeat.errors import DataError, RunError
from mmfeat.samples import Sample
from mmfeat.splits import FINAL, TEST, VALIDATION, Splits, duplicate_groups, load_splits, make_splits

RNG = np.random.default_rng(3)
LABELS = np.array(["a"] * 120 + ["b"] * 60 + ["c"] * 20)[RNG.permutation(200)]
IDS = [f"s{number}" for number in range(200)]
GROUPS = np.arange(200)


def make(groups: np.ndarray = GROUPS, folds: int = 5, seed: int = 42) -> Splits:
    return make_splits(LABELS, IDS, groups, folds, seed)


def test_every_sample_is_tested_once_and_never_trained_on_then() -> None:
    *folds, final = make().folds
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(200))
    for fold in folds:
        assert sorted([*fold.train, *fold.validation, *fold.test]) == list(range(200))
    assert final.name == FINAL
    assert len(final.test) == 0
    assert sorted([*final.train, *final.validation]) == list(range(200))


def test_classes_are_spread_evenly() -> None:
    for fold in make().folds[:-1]:
        for name, count in zip(*np.unique(LABELS[fold.test], return_counts=True), strict=True):
            assert abs(count - (name == LABELS).sum() / 5) <= 1
        assert set(LABELS[fold.validation]) == {"a", "b", "c"}


def test_duplicates_stay_on_one_side() -> None:
    groups = np.arange(200) // 4
    for fold in make(groups).folds:
        parts = [set(groups[rows]) for rows in (fold.train, fold.validation, fold.test)]
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]


def test_groups_join_equal_texts_and_equal_photos() -> None:
    samples = [
        Sample("0", "Nice http://a.b"),
        Sample("1", "nice"),
        Sample("2", "other"),
        Sample("3", "third"),
        Sample("4", None),
        Sample("5", None),
        Sample("6", "http://x.y"),
        Sample("7", "@z"),
    ]
    keys = np.array([b"p", b"q", b"q", b"r", b"", b"", b"", b""], dtype="S32")
    groups = duplicate_groups(samples, keys)
    assert groups[0] == groups[1] == groups[2]
    assert len(set(groups)) == 6  # missing and emptied texts join nobody


def test_a_seed_fixes_them() -> None:
    np.testing.assert_array_equal(make().roles, make().roles)
    assert (make().roles != make(seed=1).roles).any()


def test_saved_splits_come_back_for_the_same_samples_in_any_order(tmp_path: Path) -> None:
    splits = make()
    splits.save(tmp_path)
    np.testing.assert_array_equal(load_splits(tmp_path, IDS).roles, splits.roles)
    np.testing.assert_array_equal(load_splits(tmp_path, IDS[::-1]).roles, splits.roles[::-1])
    assert (tmp_path / "folds.csv").read_text().splitlines()[0] == "id,fold0,fold1,fold2,fold3,fold4,final"


def test_splits_of_other_samples_are_refused(tmp_path: Path) -> None:
    make().save(tmp_path)
    with pytest.raises(RunError, match=r"200 samples, the data has 199 labelled ones \(0 have no fold, 1 are gone\)"):
        load_splits(tmp_path, IDS[1:])
    with pytest.raises(RunError, match="no saved splits"):
        load_splits(tmp_path / "nowhere", IDS)
    path = tmp_path / "folds.csv"
    path.write_text(path.read_text().replace(VALIDATION, "maybe"))
    with pytest.raises(RunError, match="cells must be train, validation or test"):
        load_splits(tmp_path, IDS)
    make().save(tmp_path)
    path.write_text(path.read_text().replace(VALIDATION, "train"))
    with pytest.raises(RunError, match="each fold needs train, validation and test rows"):
        load_splits(tmp_path, IDS)
    make().save(tmp_path)
    path.write_text(path.read_text() + path.read_text().splitlines()[1])
    with pytest.raises(RunError, match="an id stands on two lines"):
        load_splits(tmp_path, IDS)
    path.write_text("")
    with pytest.raises(RunError):
        load_splits(tmp_path, IDS)


@pytest.mark.parametrize("folds", [1, 21])
def test_too_many_or_few_folds(folds: int) -> None:
    with pytest.raises(DataError, match=f"--folds {folds}: class 'c' has 20 samples, each fold needs 1"):
        make(folds=folds)


def test_one_class_is_no_task() -> None:
    with pytest.raises(DataError, match="only one class"):
        make_splits(np.array(["a"] * 10), IDS[:10], np.arange(10), 2, 0)


def test_tiny_classes_still_split() -> None:
    labels = np.array(["a"] * 6 + ["b"] * 4)
    splits = make_splits(labels, IDS[:10], np.arange(10), 2, 0)
    assert all(len(fold.train) and len(fold.validation) for fold in splits.folds)
    assert (splits.roles[:, :2] == TEST).sum() == 10


def test_a_class_of_one_text_cannot_be_split() -> None:
    groups = np.where(LABELS == "c", 1000, GROUPS)
    with pytest.raises(DataError, match=r"class 'c' has only 1 groups of different texts and photos.*or --no-group"):
        make(groups)
    with pytest.raises(DataError, match="class 'a' has only 1 groups"):
        make(np.zeros(200, int))
