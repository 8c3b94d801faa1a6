"""FusionClassifier keeps scikit-learn's rules, and learns what the heads behind it learn."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from mmfeat.errors import ConfigError, HeadError, RunError
from mmfeat.heads.arrays import COPIES, FEWEST_HELD_OUT, copies_of, hold_out
from mmfeat.heads.classifier import FusionClassifier

WIDTHS = {"image": 12, "text": 10}
TRAIN, TEST = np.arange(500), np.arange(500, 700)
NAMES = np.array(["a", "b", "c"])
DOCS = Path(__file__).parents[2] / "docs" / "python.md"


def toy(missing: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Image tells class c from the others, text tells class a: only both tell all three."""
    rng = np.random.default_rng(7)
    numbers = rng.integers(0, 3, 700)
    image, text = rng.standard_normal((700, 12)), rng.standard_normal((700, 10))
    image[:, 0] += 6 * (numbers == 2)
    text[:, 0] += 6 * (numbers == 0)
    for part in (image, text):
        part[rng.random(700) < missing] = np.nan
    return np.hstack([image, text]), NAMES[numbers]


def quick(**parameters: Any) -> FusionClassifier:
    return FusionClassifier(
        **{"widths": WIDTHS, "epochs": 6, "batch_size": 32, "learning_rate": 3e-3, "device": "cpu", **parameters}
    )


def fitted(**parameters: Any) -> FusionClassifier:
    X, y = toy()
    return quick(**parameters).fit(X[TRAIN], y[TRAIN])


@parametrize_with_checks([FusionClassifier(epochs=3, batch_size=16, seeds=2, device="cpu")])
def test_keeps_the_rules_of_scikit_learn(estimator: FusionClassifier, check: Any) -> None:
    check(estimator)


def test_learns_and_needs_both_modalities() -> None:
    """As tests/heads/test_fusions.py holds of every fusion."""
    X, y = toy()
    assert fitted().score(X[TEST], y[TEST]) > 0.9
    for columns, widths in ((slice(0, 12), {"image": 12}), (slice(12, 22), None)):
        alone = quick(widths=widths).fit(X[TRAIN, columns], y[TRAIN])
        assert 0.5 < alone.score(X[TEST, columns], y[TEST]) < 0.85


def test_widths_cut_the_columns_in_their_order() -> None:
    """Text may stand first, and be two encoders: the head is the same as on columns in another order."""
    X, y = toy()
    whole = quick(widths=[("image", 12), ("text", 4), ("text", 6)]).fit(X[TRAIN], y[TRAIN])
    order = np.r_[12:22, 0:12]
    moved = quick(widths=[("text", 4), ("text", 6), ("image", 12)]).fit(X[TRAIN][:, order], y[TRAIN])
    np.testing.assert_array_equal(whole.predict_proba(X[TEST]), moved.predict_proba(X[TEST][:, order]))


@pytest.mark.parametrize("fusion", ["concat", "cross-attention"])
def test_missing_parts_train_and_predict(fusion: str) -> None:
    X, y = toy(missing=0.2)
    classifier = quick(fusion=fusion).fit(X[TRAIN], y[TRAIN])
    probabilities = classifier.predict_proba(X[TEST])
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert classifier.score(X[TEST], y[TEST]) > 0.65
    gone = X[TEST].copy()
    gone[:, :12] = np.nan
    assert np.isfinite(classifier.predict_proba(gone)).all()


def test_a_part_with_a_gap_is_missing_as_a_whole() -> None:
    X, y = toy()
    gap, whole = X.copy(), X.copy()
    gap[3, 15], whole[3, 12:] = np.nan, np.nan
    with pytest.warns(UserWarning, match=r"columns 12 to 21 \(text\): 1 rows are NaN in some columns only"):
        classifier = quick().fit(gap, y)
    np.testing.assert_array_equal(classifier.predict_proba(whole), quick().fit(whole, y).predict_proba(whole))


def test_the_order_of_samples_makes_no_difference() -> None:
    X, y = toy(missing=0.1)
    order = np.random.default_rng(1).permutation(len(X))
    first, other = (quick().fit(X[rows], y[rows]).predict_proba(X) for rows in (slice(None), order))
    np.testing.assert_array_equal(first, other)


def test_a_weight_counts_as_copies_of_a_sample() -> None:
    """Whole weights equal repeated samples, and any weights move what is learned; see also scikit-learn's own check."""
    X, y = toy()
    X, y = X[:90], y[:90]
    weights = np.random.default_rng(2).integers(0, 4, 90)
    repeated = quick().fit(np.repeat(X, weights, 0), np.repeat(y, weights)).predict_proba(X)
    np.testing.assert_array_equal(quick().fit(X, y, weights).predict_proba(X), repeated)
    fractions = np.random.default_rng(2).random(800)
    copies = copies_of(fractions)
    assert copies.sum() == COPIES * 800
    assert abs(copies[:400].sum() - COPIES * 800 * fractions[:400].sum() / fractions.sum()) <= 1
    X, y = imbalanced()
    plain, favoured = (
        quick(class_weights="none", widths={"text": 22}).fit(X, y, np.where(y, weight, 0.1)) for weight in (0.1, 0.7)
    )
    assert favoured.predict_proba(X)[:, 1].mean() > 2 * plain.predict_proba(X)[:, 1].mean()
    with pytest.raises(ValueError, match="Negative"):
        quick(widths=None).fit(X, y, -np.ones(len(X)))


@pytest.mark.parametrize("kind", ["pandas", "nullable", "polars", "float16"])
def test_frames_and_half_precision_give_what_arrays_give(kind: str) -> None:
    import pandas as pd

    X, y = toy(missing=0.1)
    X = X.astype(np.float16)
    table: Any = pd.DataFrame(X.astype(np.float32), columns=[f"x{number}" for number in range(22)])
    labels: Any = pd.Series(y, dtype="category")
    if kind == "nullable":
        table, labels = table.astype("Float32"), pd.Series(y, dtype="string")
    if kind == "polars":
        polars = pytest.importorskip("polars")
        table, labels = polars.DataFrame(dict(table)), polars.Series(y)
    if kind == "float16":
        table = X
    classifier = quick().fit(table, labels)
    np.testing.assert_array_equal(
        classifier.predict_proba(table), quick().fit(X.astype(float), y).predict_proba(X.astype(float))
    )
    names = getattr(classifier, "feature_names_in_", np.array([])).tolist()
    assert names == ([] if kind == "float16" else list(table.columns))


def test_a_sample_does_not_notice_its_neighbours() -> None:
    X, _ = toy()
    classifier = fitted(seeds=2)
    one_by_one = np.concatenate([classifier.predict_proba(row[None]) for row in X[TEST][:20]])
    np.testing.assert_allclose(classifier.predict_proba(X[TEST])[:20], one_by_one, rtol=0, atol=1e-12)


def test_a_seed_fixes_everything_and_touches_nothing_else() -> None:
    import torch

    X, _ = toy()
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first = fitted().predict_proba(X)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    np.testing.assert_array_equal(np.random.get_state()[1], states[1])
    torch.manual_seed(5)
    np.testing.assert_array_equal(first, clone(fitted()).fit(*(part[TRAIN] for part in toy())).predict_proba(X))
    for fraction in (0.125, 0.0):  # also where no part is drawn
        one, two = (fitted(validation_fraction=fraction, random_state=seed).predict_proba(X) for seed in (1, 2))
        assert not np.array_equal(one, two)


def test_seeds_are_averaged() -> None:
    X, _ = toy()
    classifier = fitted(seeds=3)
    together = classifier.predict_proba(X[TEST])
    heads = classifier.heads_
    alone = []
    for head in heads:
        classifier.heads_ = [head]
        alone.append(classifier.predict_proba(X[TEST]))
    assert np.ptp(alone, axis=0).max() > 1e-3
    np.testing.assert_allclose(together, np.mean(alone, axis=0), rtol=0, atol=1e-12)


def test_predictions_agree_with_scores_and_probabilities() -> None:
    X, y = toy()
    classifier = fitted()
    predicted = classifier.predict(X)
    np.testing.assert_array_equal(predicted, NAMES[classifier.predict_proba(X).argmax(1)])
    adjusted = fitted(logit_adjustment=1.0)
    np.testing.assert_array_equal(adjusted.predict(X), NAMES[adjusted.decision_function(X).argmax(1)])
    two = quick().fit(X[y != "b"], y[y != "b"])
    np.testing.assert_array_equal(two.predict(X), np.where(two.decision_function(X) > 0, "c", "a"))


def imbalanced() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    y = (rng.random(900) < 0.08).astype(int)
    X = rng.standard_normal((900, 22))
    X[:, :4] += 0.8 * y[:, None]
    return X, y


def test_logit_adjustment_favours_the_rare_class_and_leaves_probabilities() -> None:
    X, y = imbalanced()
    plain, adjusted, chosen = (
        quick(class_weights="none", logit_adjustment=strength).fit(X, y) for strength in (None, 1.0, "auto")
    )
    np.testing.assert_array_equal(plain.predict_proba(X), adjusted.predict_proba(X))
    assert adjusted.predict(X).sum() > plain.predict(X).sum() + 20
    assert plain.decision_.strength == 0
    assert chosen.decision_.strength > 0
    np.testing.assert_array_equal(chosen.predict_proba(X), plain.predict_proba(X))


def test_a_held_out_part_stops_the_training_and_a_small_one_is_not_held_out() -> None:
    X, y = toy()
    kept = fitted(epochs=40, patience=2)
    assert len(kept.history_[0]) < 40
    assert kept.decision_.temperature != 1
    small = quick(epochs=9, patience=1).fit(X[:60], y[:60])
    assert len(small.history_[0]) == 9
    assert small.decision_.temperature == 1
    assert quick(epochs=4, learning_rate=1e-3).fit(X[:60], y[:60]).score(X[TEST], y[TEST]) > 0.8
    with pytest.warns(UserWarning, match="no held-out samples"):
        quick(logit_adjustment="auto").fit(X[:60], y[:60])


def test_held_out_parts_are_stratified_different_and_spare_tiny_classes() -> None:
    from mmfeat.samples.labels import read_targets

    labels = ["a"] * 600 + ["b"] * 180 + ["rare"] * 3
    targets = read_targets(labels)
    parts = hold_out(targets, 0.125, 3, seed=1)
    assert len(np.unique(np.concatenate(parts))) == sum(map(len, parts))
    for part in parts:
        counts = targets.take(part).matrix.sum(0)
        assert abs(counts[0] - 75) <= 1
        assert abs(counts[1] - 22.5) <= 1
        assert counts[2] == 0
    few = read_targets(labels[400:])
    assert [len(part) for part in hold_out(few, 0.125, 2, seed=1)] == [0, 0]
    assert len(few) * 0.125 < FEWEST_HELD_OUT


def test_two_samples_are_enough() -> None:
    X, _ = toy()
    assert set(quick(seeds=2).fit(X[:2], [1, 0]).predict(X[:2])) <= {0, 1}


def test_several_classes_a_sample() -> None:
    X, _ = toy()
    Y = np.column_stack([X[:, 0] > 2, X[:, 12] > 2, X[:, 0] + X[:, 12] > 3]).astype(int)
    classifier = quick(logit_adjustment="auto").fit(X[TRAIN], Y[TRAIN])
    assert (classifier.predict(X[TEST]) == Y[TEST]).mean() > 0.9
    np.testing.assert_array_equal(classifier.predict(X), classifier.decision_function(X) > 0)
    probabilities = classifier.predict_proba(X)
    assert probabilities.shape == (700, 3)
    assert probabilities.sum(1).max() > 1.5


def test_grid_search_in_a_pipeline() -> None:
    X, y = toy(missing=0.1)
    pipeline = make_pipeline(StandardScaler(), quick(epochs=3))
    grid = {"fusionclassifier__learning_rate": [1e-6, 3e-3]}
    search = GridSearchCV(pipeline, grid, cv=3, scoring="f1_macro").fit(X, y)
    assert search.best_params_ == {"fusionclassifier__learning_rate": 3e-3}
    assert (
        search.best_score_ > cross_val_score(clone(pipeline).set_params(**{next(iter(grid)): 1e-6}), X, y, cv=3).max()
    )


@pytest.mark.parametrize("labels", [NAMES, np.array([3, 5, 9]), np.array([True, False, True])], ids=str)
def test_saved_classifiers_predict_the_same(labels: np.ndarray, tmp_path: Path) -> None:
    import pandas as pd

    X, y = toy()
    table = pd.DataFrame(X, columns=[f"x{number}" for number in range(22)])
    y = labels[np.searchsorted(NAMES, y)]
    classifier = quick(seeds=2, widths=list(WIDTHS.items()), random_state=np.random.RandomState(1)).fit(table, y)
    classifier.save(tmp_path / "head.safetensors")
    again = FusionClassifier.load(tmp_path / "head.safetensors")
    for method in ("predict", "predict_proba", "decision_function"):
        for other in (again, pickle.loads(pickle.dumps(classifier))):  # noqa: S301
            np.testing.assert_array_equal(getattr(other, method)(table), getattr(classifier, method)(table))
    assert again.predict(table).dtype == y.dtype
    assert again.history_ == classifier.history_
    assert clone(again).fit(table, y).score(table, y) > 0.6
    with pytest.raises(ValueError, match="feature names"):
        again.predict(table.rename(columns={"x0": "other"}))


def test_what_is_no_saved_classifier_gets_one_line(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    path = tmp_path / "head.safetensors"
    fitted().save(path)
    whole, tensors = path.read_bytes(), load_file(path)
    flipped = whole[:-1] + bytes([whole[-1] ^ 1])
    other_state = whole.replace(b'batch_size\\": 32', b'batch_size\\": 33')
    renamed = whole.replace(b".weight", b".weighs")  # torch tells of that in several lines
    for broken in (
        b"torn",
        whole[: len(whole) // 2],
        whole.replace(b"offsets", b"offzets"),
        flipped,
        other_state,
        renamed,
    ):
        assert broken != whole
        path.write_bytes(broken)
        with pytest.raises(RunError, match=r"not a saved FusionClassifier.*; fit and save it again$"):
            FusionClassifier.load(path)
    save_file(tensors, path)
    with pytest.raises(RunError, match="not a saved FusionClassifier"):
        FusionClassifier.load(path)
    with pytest.raises(RunError, match="not a saved FusionClassifier"):
        FusionClassifier.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"fusion": "nope"}, "fusion 'nope': use one of late, concat"),
        ({"fusion": ["concat"]}, r"fusion \['concat'\]: use one of late, concat"),
        ({"seeds": 0}, "seeds 0: a whole number, at least 1"),
        ({"seeds": True}, "seeds True: a whole number, at least 1"),
        ({"validation_fraction": "a"}, "validation_fraction 'a': a share from 0 to below 1"),
        ({"epochs": 2.5}, "^epochs 2.5: a whole number"),
        ({"batch_size": 16.0}, "^batch_size 16.0: a whole number"),
        ({"patience": None}, "^patience None: a whole number"),
        ({"learning_rate": "1e-3"}, "^learning_rate '1e-3': a number"),
        ({"dropout": [0.5]}, r"^dropout \[0.5\]: a number"),
        ({"loss": ["focal"]}, r"^loss \['focal'\]: use one of"),
        ({"device": None}, "^device None: use auto, cpu"),
        ({"random_state": -1}, "^random_state -1: a whole number from 0"),
        ({"logit_adjustment": [1]}, r"logit_adjustment \[1\]: use None"),
        ({"widths": 16}, "^widths 16: name each encoder's columns, as in"),
        ({"widths": [("text",)]}, "name each encoder's columns, as in"),
        ({"widths": {"text": 22.0}}, "widths: 'text' with n_features = 22.0"),
        ({"validation_fraction": 1.0}, "validation_fraction 1.0: a share from 0 to below 1"),
        ({"logit_adjustment": "nope"}, "logit_adjustment 'nope': use None, a number or 'auto'"),
        ({"logit_adjustment": float("nan")}, "logit_adjustment nan"),
        ({"learning_rate": -1.0}, "^learning_rate -1.0: a number above 0"),
        ({"batch_size": 1}, "^batch_size 1: at least 2"),
        ({"device": "nope"}, "^device nope: use one of auto"),
        ({"widths": {"sound": 22}}, "widths: 'sound' with n_features = 22; name 'text' or 'image'"),
        ({"widths": {"text": 20}}, "widths add up to 20, X has 22 columns"),
        ({"widths": [("text", 21), ("image", 1)]}, "widths: 'image' with n_features = 1; name .* 2 columns or more"),
    ],
)
def test_wrong_parameters_get_one_line(parameters: dict[str, Any], message: str) -> None:
    X, y = toy()
    with pytest.raises(ValueError, match=message) as caught:
        quick(**parameters).fit(X, y)
    assert isinstance(caught.value, ConfigError)


def test_numbers_of_numpy_are_numbers() -> None:
    X, y = toy()
    own = {"epochs": np.int64(3), "batch_size": np.int32(32), "dropout": np.float64(0.25), "seeds": np.int8(1)}
    own |= {
        "validation_fraction": np.float32(0.125),
        "learning_rate": np.float64(1e-3),
        "widths": {"text": np.int64(22)},
    }
    plain = {name: value.item() for name, value in own.items() if name != "widths"}
    one, two = (quick(**values).fit(X, y).predict_proba(X) for values in (own, {**plain, "widths": {"text": 22}}))
    np.testing.assert_array_equal(one, two)


def test_wrong_arrays_get_one_line() -> None:
    X, y = toy()
    with pytest.raises(ValueError, match=r"y has 1 class \(a\)"):
        quick().fit(X, ["a"] * 700)
    with pytest.raises(ValueError, match="infinity"):
        quick().fit(np.where(X > 3, np.inf, X), y)
    with pytest.raises(HeadError, match="diverged; lower learning_rate"):
        quick(learning_rate=1e30).fit(X, y)


def test_the_example_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    section = DOCS.read_text().split("## FusionClassifier")[1].split("\n## ")[0]
    (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    namespace: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as for a part that is too small to choose by
        exec(code, namespace)
    assert namespace["search"].score(namespace["X_test"], namespace["y_test"]) > 0.85
    assert (tmp_path / "gated.safetensors").is_file()


FORK = """
import os, sys
from mmfeat import FusionClassifier
FusionClassifier("gated")
print(*{"torch", "typer", "rich", "click", "h5py"} & set(sys.modules), flush=True)
import torch
torch.set_num_threads(2)
FusionClassifier(epochs=1, device="cpu").fit([[0.0, 1], [1, 0]] * 20, [0, 1] * 20)
torch.ones(1 << 20).exp()  # large enough for two threads
if not (child := os.fork()):
    torch.ones(1 << 20).exp()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_it_loads_torch_when_it_fits_and_a_process_that_forks_then_computes_on() -> None:
    """By itself OpenMP waits in the child for threads that only its parent has, for ever."""
    answer = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=60)
    assert answer.stdout == "\n7\n", answer.stderr
