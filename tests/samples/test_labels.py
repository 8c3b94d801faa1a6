import numpy as np
import pytest

from mmfeat.errors import DataError
from mmfeat.samples.labels import indicator, labels_alike, read_targets


def test_classes_are_sorted_and_each_row_has_its_own() -> None:
    targets = read_targets(["pos", "neg", "pos", "中"])
    assert targets.classes == ("neg", "pos", "中")
    assert targets.numbers.tolist() == [1, 0, 1, 2]
    assert targets.matrix.dtype == bool
    assert (targets.matrix.sum(axis=1) == 1).all()
    assert len(targets) == 4
    np.testing.assert_allclose(targets.prior, [0.25, 0.5, 0.25])


def test_a_bar_is_part_of_a_name_unless_multilabel() -> None:
    assert read_targets(["a|b", "a"]).classes == ("a", "a|b")


def test_a_multilabel_cell_has_several_classes_or_none() -> None:
    targets = read_targets(["b|a", "|", "b", " a | b ", "c|", "b|b"], task="multilabel")
    assert targets.classes == ("a", "b", "c")
    assert targets.matrix.astype(int).tolist() == [[1, 1, 0], [0, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [0, 1, 0]]
    np.testing.assert_allclose(targets.prior, [2 / 6, 4 / 6, 1 / 6])
    with pytest.raises(ValueError, match="use matrix"):
        _ = targets.numbers


def test_one_class_with_and_without_is_a_multilabel_task() -> None:
    assert read_targets(["a", "|"], task="multilabel").classes == ("a",)


@pytest.mark.parametrize("rows", [[2, 0], np.array([2, 0])])
def test_taken_rows_keep_all_classes(rows: list[int]) -> None:
    taken = read_targets(["a", "b", "c"]).take(rows)
    assert (taken.classes, taken.numbers.tolist()) == (("a", "b", "c"), [2, 0])


def test_a_mask_takes_rows() -> None:
    taken = read_targets(["a|b", "b", "|"], task="multilabel").take(np.array([True, False, True]))
    assert (taken.classes, taken.multilabel) == (("a", "b"), True)
    assert taken.matrix.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_an_indicator_has_one_true_where_the_number_says(shape: tuple[int, ...]) -> None:
    numbers = np.random.default_rng(0).integers(0, 4, shape)
    found = indicator(numbers, 4)
    assert found.shape == (*shape, 4)
    np.testing.assert_array_equal(found.argmax(-1), numbers)
    assert (found.sum(-1) == 1).all()


def test_nothing_to_tell_apart_is_refused_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"only one class \(a\) is labelled.*label samples of another"):
        read_targets(["a", "a"])
    with pytest.raises(DataError, match="no sample is labelled"):
        read_targets([])
    with pytest.raises(DataError, match=r"all samples are labelled 'b'.*leave 'b' out"):
        read_targets(["a|b", "b"], task="multilabel")
    with pytest.raises(DataError, match="no sample is labelled with a class"):
        read_targets(["|", "|"], task="multilabel")


def test_labels_that_differ_only_in_spelling_are_told() -> None:
    assert labels_alike(["Joy", "joy", "JOY", "sad", "1", "1.0", "2"]) == [
        "labels differ only in spelling and count as classes of their own: Joy, joy, JOY; 1, 1.0"
    ]
    assert labels_alike(["joy", "sad"]) == []
