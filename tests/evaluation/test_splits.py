import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mmfeat.errors import DataError, RunError
from mmfeat.evaluation.protocol import has_splits, load_splits, read_groups, save_splits
from mmfeat.evaluation.splits import TEST, TRAIN, VALIDATION, Splits, deal, make_folds, make_holdout
from mmfeat.samples.labels import Targets, read_targets

RNG = np.random.default_rng(3)
LABELS = np.array(["a"] * 120 + ["b"] * 60 + ["c"] * 20)[RNG.permutation(200)]
TARGETS = read_targets(LABELS.tolist())
IDS = [f"s{number}" for number in range(200)]
GROUPS = np.arange(200)
FOURS = GROUPS // 4


def make(groups: np.ndarray = GROUPS, folds: int = 5, seed: int = 42, repeats: int = 3) -> Splits:
    return make_folds(TARGETS, IDS, groups, folds, seed, repeats)


def all_folds(splits: Splits, repeats: int = 3) -> list[tuple[np.ndarray, ...]]:
    found = [splits.fold(number, repeat) for number in range(len(splits)) for repeat in range(repeats)]
    return [(fold.train, fold.validation, fold.test) for fold in found]


def assert_groups_whole(splits: Splits, groups: np.ndarray) -> None:
    for fold in all_folds(splits):
        parts = [set(groups[rows]) for rows in fold]
        assert sum(map(len, parts)) == len(set(groups))


def test_every_sample_is_tested_once_and_never_trained_on_or_selected_on_then() -> None:
    splits = make()
    assert sorted(np.concatenate([splits.fold(number, 0).test for number in range(5)])) == list(range(200))
    assert splits.tested.tolist() == list(range(200))
    for fold in all_folds(splits):
        assert sorted(np.concatenate(fold)) == list(range(200))
    for number in range(5):
        assert len({tuple(splits.fold(number, repeat).test) for repeat in range(8)}) == 1


def test_each_repeat_validates_on_an_eighth_of_its_own() -> None:
    splits = make()
    for number in range(5):
        parts = [splits.fold(number, repeat).validation for repeat in range(3)]
        assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts))
        assert all(18 <= len(part) <= 22 for part in parts)  # of 160
        assert all(set(LABELS[part]) == {"a", "b", "c"} for part in parts)


def test_more_repeats_change_nothing_for_the_ones_before_and_then_begin_again() -> None:
    few, many = make(repeats=2), make(repeats=20)
    for number in range(5):
        assert (few.parts(number), many.parts(number)) == (2, 8)
        for repeat in range(2):
            assert few.fold(number, repeat).validation.tolist() == many.fold(number, repeat).validation.tolist()
        assert many.fold(number, 8).validation.tolist() == many.fold(number, 0).validation.tolist()
        assert len(many.fold(number, 5).train) > 130
    assert set(np.unique(few.roles)) == {TRAIN, TEST, f"{VALIDATION}-1", f"{VALIDATION}-2"}


def test_classes_are_spread_evenly() -> None:
    for _, _, test in all_folds(make()):
        for name, count in zip(*np.unique(LABELS[test], return_counts=True), strict=True):
            assert abs(count - (name == LABELS).sum() / 5) <= 1
        assert 38 <= len(test) <= 42


def test_duplicates_stay_on_one_side() -> None:
    assert_groups_whole(make(FOURS), FOURS)
    for shares in ((8, 1, 1), (8, 2)):
        assert_groups_whole(make_holdout(TARGETS, IDS, FOURS, shares), FOURS)


def test_classes_stay_even_with_groups() -> None:
    for _, _, test in all_folds(make(FOURS)):
        counts = TARGETS.take(test).matrix.sum(axis=0)
        assert (abs(counts - [24, 12, 4]) <= [4, 4, 3]).all()
        assert 36 <= len(test) <= 44


def test_a_giant_group_does_not_take_the_small_side() -> None:
    groups = np.where(GROUPS < 80, 0, GROUPS)
    train, validation, test = all_folds(make_holdout(TARGETS, IDS, groups), 1)[0]
    assert set(range(80)) <= set(train)
    assert abs(len(test) - 20) <= 3
    assert abs(len(validation) - 20) <= 3


def test_a_seed_fixes_them() -> None:
    np.testing.assert_array_equal(make(FOURS).roles, make(FOURS).roles)
    assert (make(FOURS).roles != make(FOURS, seed=1).roles).any()
    assert (make_holdout(TARGETS, IDS, GROUPS).roles != make_holdout(TARGETS, IDS, GROUPS, seed=1).roles).any()


def test_folds_are_the_same_on_every_processor() -> None:
    """BLAS adds in another order on each processor; OPENBLAS_CORETYPE asks for the order of an old one."""
    script = (
        "import numpy as np; from mmfeat.evaluation.splits import deal; rng = np.random.default_rng(0);"
        "parts = deal(rng.integers(0, 3, 4000), rng.integers(0, 2000, 4000), [1] * 5, 42); print(parts.tolist())"
    )
    printed = {
        subprocess.run([sys.executable, "-c", script], env={**os.environ, **asked}, capture_output=True).stdout
        for asked in ({}, {"OPENBLAS_CORETYPE": "Prescott"})
    }
    assert len(printed) == 1
    assert printed != {b""}


def test_a_holdout_has_the_shares_in_each_class() -> None:
    train, validation, test = all_folds(make_holdout(TARGETS, IDS, GROUPS), 1)[0]
    assert (len(train), len(validation), len(test)) == (160, 20, 20)
    for rows in (validation, test):
        assert TARGETS.take(rows).matrix.sum(axis=0).tolist() == [12, 6, 2]


def test_a_holdout_without_validation_selects_on_the_training_part() -> None:
    splits = make_holdout(TARGETS, IDS, GROUPS, (8, 2), repeats=3)
    folds = all_folds(splits)
    assert [len(test) for _, _, test in folds] == [40, 40, 40]
    assert [len(np.intersect1d(test, validation)) for _, validation, test in folds] == [0, 0, 0]
    assert len(set.union(*(set(validation) for _, validation, _ in folds))) == sum(len(part[1]) for part in folds) == 60


@pytest.mark.parametrize("shares", [(8,), (8, 0), (8, -1, 1), (1, 1, 1, 1), (8, float("nan")), ()])
def test_shares_that_mean_nothing_are_refused(shares: tuple[float, ...]) -> None:
    with pytest.raises(DataError, match="train:validation:test, as 8:1:1"):
        make_holdout(TARGETS, IDS, GROUPS, shares)


def test_rare_classes_are_everywhere() -> None:
    """Three samples of a class are enough for all three sides of a holdout, five for five folds."""
    labels = ["a"] * 92 + ["rare"] * 5 + ["rarest"] * 3
    targets = read_targets(labels)
    for rows in all_folds(make_holdout(targets, IDS[:100], GROUPS[:100]), 1)[0]:
        assert targets.take(rows).matrix.any(axis=0).all()
    folds = make_folds(read_targets(labels[:97]), IDS[:97], GROUPS[:97])
    assert all((np.array(labels)[test] == "rare").sum() == 1 for _, _, test in all_folds(folds))


def multilabel(count: int = 600) -> Targets:
    matrix = np.random.default_rng(0).random((count, 4)) < [0.5, 0.3, 0.05, 0.03]
    return Targets(("a", "b", "c", "d"), matrix, True)


@pytest.mark.parametrize("groups", [np.arange(600), np.arange(600) // 3], ids=["alone", "grouped"])
def test_rare_multilabel_classes_are_spread_evenly(groups: np.ndarray) -> None:
    targets = multilabel()
    for _, validation, test in all_folds(make_folds(targets, [str(n) for n in range(600)], groups)):
        counts = targets.take(test).matrix.sum(axis=0)
        assert (abs(counts - targets.matrix.sum(axis=0) / 5) <= [20, 16, 5, 3]).all()
        assert counts.all()
        assert targets.take(validation).matrix.any(axis=0)[:3].all()


def test_a_multilabel_class_needs_samples_with_and_without_it() -> None:
    matrix = multilabel().matrix.copy()
    ids = [str(number) for number in range(600)]
    matrix[:, 3] = np.arange(600) < 3
    with pytest.raises(DataError, match="--folds 5: class 'd' has 3 samples, each fold needs 1"):
        make_folds(Targets(("a", "b", "c", "d"), matrix, True), ids, np.arange(600))
    matrix[:, 3] = np.arange(600) >= 3
    with pytest.raises(DataError, match="the absence of class 'd' has 3 samples"):
        make_folds(Targets(("a", "b", "c", "d"), matrix, True), ids, np.arange(600))


def test_saved_folds_come_back_for_the_same_samples_in_any_order(tmp_path: Path) -> None:
    splits = make()
    assert not has_splits(tmp_path)
    save_splits(splits, tmp_path, LABELS.tolist())
    assert has_splits(tmp_path)
    loaded = load_splits(tmp_path, IDS)
    np.testing.assert_array_equal(loaded.roles, splits.roles)
    assert loaded.names == splits.names
    np.testing.assert_array_equal(load_splits(tmp_path, IDS[::-1]).roles, splits.roles[::-1])
    assert (tmp_path / "folds.csv").read_text().splitlines()[0] == "id,fold0,fold1,fold2,fold3,fold4"


@pytest.mark.parametrize("shares", [(8, 1, 1), (8, 2)])
def test_a_saved_holdout_comes_back(tmp_path: Path, shares: tuple[int, ...]) -> None:
    splits = make_holdout(TARGETS, IDS, FOURS, shares)
    save_splits(splits, tmp_path, LABELS.tolist())
    assert has_splits(tmp_path)
    assert not (tmp_path / "folds.csv").exists()
    np.testing.assert_array_equal(load_splits(tmp_path, IDS[::-1]).roles, splits.roles[::-1])
    counts = {}
    for name in ("train", "val", "test"):
        header, *rows = list(csv.reader((tmp_path / f"{name}_split.csv").open()))
        assert header[:2] == ["guid", "tag"]
        assert all(row[1] == LABELS[IDS.index(row[0])] for row in rows)
        counts[name] = len(rows)
    total = sum(shares)
    assert abs(counts["train"] - 200 * shares[0] / total) <= 4
    assert abs(counts["test"] - 200 * shares[-1] / total) <= 4
    assert (counts["val"] == 0) == (len(shares) == 2)


def write_holdout(folder: Path, train: str, val: str | None, test: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, content in (("train", train), ("val", val), ("test", test)):
        if content is not None:
            (folder / f"{name}_split.csv").write_text(content)
    return folder


@pytest.mark.parametrize("kind", ["folds", "holdout", "own part"])
def test_saved_groups_come_back(tmp_path: Path, kind: str) -> None:
    groups = np.where(GROUPS < 80, FOURS, GROUPS)
    shares = {"holdout": (8, 1, 1), "own part": (8, 2)}
    splits = make(groups) if kind == "folds" else make_holdout(TARGETS, IDS, groups, shares[kind])
    save_splits(splits, tmp_path, LABELS.tolist())
    loaded = load_splits(tmp_path, IDS[::-1])
    assert loaded.roles.tolist() == splits.roles[::-1].tolist()
    for found in (loaded.groups, read_groups(tmp_path, IDS[::-1])):
        assert found is not None
        assert (found[:, None] == found).tolist() == (groups[::-1, None] == groups[::-1]).tolist()


def test_splits_without_groups_name_none(tmp_path: Path) -> None:
    save_splits(make(), tmp_path, LABELS.tolist())
    assert "group" not in (tmp_path / "folds.csv").read_text().splitlines()[0]
    assert load_splits(tmp_path, IDS).groups is None


def test_a_holdout_made_elsewhere_is_read(tmp_path: Path) -> None:
    folder = write_holdout(tmp_path, 'id,text,tag\n4,"x, y",a\n2,,b\n', "GUID,tag\n1,a\n", "3,a\n5,b\n")
    fold = load_splits(folder, ["1", "2", "3", "4", "5"]).fold(0, 7)
    assert [rows.tolist() for rows in (fold.train, fold.validation, fold.test)] == [[1, 3], [0], [2, 4]]


def test_a_holdout_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write_holdout(tmp_path / "one", "1,a\n2,b\n", "3,a\n", "4,b\n")
    with pytest.raises(RunError, match=r"4 samples, the data has 5 .*\(1 have no fold, 0 are gone\)"):
        load_splits(folder, list("12345"))
    write_holdout(folder, "1,a\n2,b\n", "3,a\n", "2,b\n4,b\n")
    with pytest.raises(RunError, match="an id stands on two lines"):
        load_splits(folder, list("1234"))
    folder = write_holdout(tmp_path / "two", "1,a\n2,b\n", None, "3,b\n")
    with pytest.raises(RunError, match="each fold needs train, validation and test rows, 'holdout' has not"):
        load_splits(folder, list("123"))
    (folder / "test_split.csv").unlink()
    with pytest.raises(RunError, match=r"test_split\.csv: no saved splits"):
        load_splits(folder, list("12"))


def test_plain_folds_and_those_of_former_runs_are_read(tmp_path: Path) -> None:
    rows = ["1,test,train,train", "2,train,test,train", "3,validation,validation,validation", "4,train,train,train"]
    for header, width in (("id,one,two", 3), ("id,one,two,final", 4)):
        lines = [header, *(",".join(row.split(",")[:width]) for row in rows)]
        (tmp_path / "folds.csv").write_text("\n".join(lines))
        splits = load_splits(tmp_path, list("4123"))
        assert splits.names == ("one", "two")
        assert splits.tested.tolist() == [1, 2]
        fold = splits.fold(1, 2)
        assert [part.tolist() for part in (fold.train, fold.validation, fold.test)] == [[0, 1], [3], [2]]


def test_splits_of_other_samples_are_refused(tmp_path: Path) -> None:
    save_splits(make(), tmp_path, LABELS.tolist())
    with pytest.raises(RunError, match=r"200 samples, the data has 199 labelled ones \(0 have no fold, 1 are gone\)"):
        load_splits(tmp_path, IDS[1:])
    with pytest.raises(RunError, match=r"no saved splits.*--split-dir is a run folder"):
        load_splits(tmp_path / "nowhere", IDS)


def test_damaged_folds_are_refused(tmp_path: Path) -> None:
    save_splits(make(), tmp_path, LABELS.tolist())
    path = tmp_path / "folds.csv"
    good = path.read_text()
    header, first, *rest = good.splitlines()
    cases = [
        (good.replace(VALIDATION, "maybe"), "cells must be train, validation or test"),
        (good.replace(f"{VALIDATION}-1", f"{VALIDATION}-123456789"), "'validation-123456789' is no role"),
        (good.replace(f"{VALIDATION}-1", TRAIN), "each fold needs train, validation and test rows, 'fold0' has not"),
        (good.replace(TEST, TRAIN), "each fold needs train, validation and test rows"),
        (good + first, "an id stands on two lines"),
        ("\n".join([header, first.rpartition(",")[0], *rest]), "one cell a fold"),
        (
            "\n".join([header, "s0,test,test,train,train,train", *good.splitlines()[2:]]),
            "1 samples are test in several",
        ),
        (header, "one cell a fold"),
        ("", "one cell a fold"),
    ]
    for content, message in cases:
        path.write_text(content)
        with pytest.raises(RunError, match=message):
            load_splits(tmp_path, IDS)


def test_too_many_or_few_folds() -> None:
    with pytest.raises(DataError, match="--folds 21: class 'c' has 20 samples, each fold needs 1; use fewer folds"):
        make(folds=21)
    with pytest.raises(DataError, match=r"--folds 1: .*use 2 folds or more"):
        make(folds=1)


def test_tiny_classes_still_split() -> None:
    splits = make_folds(read_targets(["a"] * 6 + ["b"] * 4), IDS[:10], np.arange(10), 2, 0)
    assert all(len(rows) for fold in all_folds(splits) for rows in fold)
    assert (splits.roles == TEST).sum() == 10


def test_a_class_of_one_text_cannot_be_split() -> None:
    groups = np.where(LABELS == "c", 1000, GROUPS)
    with pytest.raises(DataError, match=r"class 'c' has only 1 group of different texts and photos.*or --no-group"):
        make(groups)
    with pytest.raises(DataError, match="class 'a' has only 1 group"):
        make(np.zeros(200, int))
    with pytest.raises(DataError, match=r"class 'c' has only 1 group .* a holdout; .*or --no-group"):
        make_holdout(TARGETS, IDS, groups)


def test_a_hundred_thousand_samples_are_dealt_in_a_moment() -> None:
    rng = np.random.default_rng(0)
    strata, groups = rng.integers(0, 3, 100_000), rng.integers(0, 95_000, 100_000)
    start = time.monotonic()
    parts = deal(strata, groups, [1] * 5, 0)
    assert time.monotonic() - start < 30
    assert np.ptp(np.bincount(parts)) <= 3
    assert len(np.unique(np.stack([groups, parts]), axis=1).T) == len(np.unique(groups))
