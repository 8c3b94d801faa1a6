"""Every head behind one interface: it learns, survives missing parts, saves, and a seed fixes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmfeat.errors import ConfigError, HeadError, RunError
from mmfeat.features import Block, Features
from mmfeat.heads import HEADS, HeadSettings, load_head, make_head, save_head
from mmfeat.heads.settings import class_weights

SETTINGS = HeadSettings(epochs=8, batch_size=16, learning_rate=3e-3)
LABELS = np.random.default_rng(7).integers(0, 3, 300)


def features(missing: float = 0.0, scale: float = 1.0) -> Features:
    """Text tells classes 0 and 1 apart, image 1 and 2: only both tell all three."""
    rng = np.random.default_rng(8)
    text, image = rng.standard_normal((2, 300, 12))
    text[:, 0] += 6 * (LABELS == 0)
    image[:, 0] += 6 * (LABELS == 2)
    blocks = []
    for name, vectors in (("bert:x", text), ("hog", image)):
        mask = rng.random(300) >= missing
        vectors = np.where(mask[:, None], vectors * scale, np.nan).astype(np.float32)
        blocks.append(Block(name, "text" if name == "bert:x" else "image", vectors, mask))
    return Features(tuple(map(str, range(300))), tuple(blocks))


TRAIN, VALIDATION, TEST = np.arange(180), np.arange(180, 220), np.arange(220, 300)


def fitted(name: str, data: Features, settings: HeadSettings = SETTINGS):
    head = make_head(name, settings, 3)
    head.fit(data.take(TRAIN), LABELS[TRAIN], data.take(VALIDATION), LABELS[VALIDATION])
    return head


def score(head, data: Features) -> float:
    return float((head.predict_proba(data.take(TEST)).argmax(1) == LABELS[TEST]).mean())


@pytest.mark.parametrize("name", HEADS)
def test_learns_and_needs_both_modalities(name: str) -> None:
    data = features()
    assert score(fitted(name, data), data) > 0.9
    for modality in ("text", "image"):
        alone = data.only(modality)
        assert 0.5 < score(fitted(name, alone), alone) < 0.85


@pytest.mark.parametrize("name", HEADS)
def test_missing_parts_train_and_predict(name: str) -> None:
    data = features(missing=0.2)
    probabilities = fitted(name, data).predict_proba(data)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(1), 1.0, atol=1e-6)
    assert score(fitted(name, data), data) > 0.6


@pytest.mark.parametrize("name", HEADS)
def test_a_modality_that_is_missing_everywhere(name: str) -> None:
    data = features()
    image = data.blocks[1]
    gone = Block(image.name, "image", np.full_like(image.vectors, np.nan), np.zeros(300, bool))
    assert np.isfinite(fitted(name, Features(data.ids, (data.blocks[0], gone))).predict_proba(data)).all()


@pytest.mark.parametrize("name", HEADS)
def test_scale_does_not_matter(name: str) -> None:
    """Features are standardised on the training fold."""
    small, large = (fitted(name, features(scale=s)).predict_proba(features(scale=s)) for s in (1.0, 1024.0))
    np.testing.assert_allclose(small, large, atol=0.02)


@pytest.mark.parametrize("name", HEADS)
def test_saved_heads_predict_the_same(name: str, tmp_path: Path) -> None:
    data = features(missing=0.1)
    head = fitted(name, data)
    save_head(head, name, SETTINGS, 3, tmp_path, "fold0")
    np.testing.assert_array_equal(load_head(tmp_path, "fold0").predict_proba(data), head.predict_proba(data))
    assert not [path for path in tmp_path.iterdir() if path.suffix in (".pkl", ".pt", ".joblib")]


@pytest.mark.parametrize("name", HEADS)
def test_a_seed_fixes_everything_and_touches_nothing_else(name: str) -> None:
    import torch

    data = features()
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    first = fitted(name, data).predict_proba(data)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(5)
    np.testing.assert_array_equal(first, fitted(name, data).predict_proba(data))


def test_concat_has_the_published_shape() -> None:
    from mmfeat.heads.concat import Concat

    module = Concat([512, 512], 3, 0.5)
    head = sum(p.numel() for p in module.classifier.parameters())
    assert head == (1024 * 256 + 256) + 2 * 256 + (256 * 64 + 64) + 2 * 64 + (64 * 3 + 3)
    inputs = sum(p.numel() for p in module.inputs.parameters())
    assert inputs == 2 * (2 * 512 + 512)  # LayerNorm, and the embedding for a missing modality


def test_early_stopping_keeps_the_best_epoch() -> None:
    data = features()
    head = fitted("concat", data, HeadSettings(epochs=40, learning_rate=3e-3))
    scores = [epoch["validation_macro_f1"] for epoch in head.history]
    assert len(scores) < 40
    from mmfeat.metrics import macro_f1

    predicted = head.predict_proba(data.take(VALIDATION)).argmax(1)
    kept = macro_f1(LABELS[VALIDATION], predicted, 3)
    assert kept >= max(scores) - 0.001 - 1e-9


def test_a_last_batch_of_one_is_no_error() -> None:
    data = features()
    rows = np.arange(33)
    head = make_head("concat", HeadSettings(epochs=1, batch_size=16), 3)
    head.fit(data.take(rows), LABELS[rows], data.take(VALIDATION), LABELS[VALIDATION])
    assert np.isfinite(head.predict_proba(data)).all()


def test_class_weights() -> None:
    labels = np.array([0] * 90 + [1] * 10)
    np.testing.assert_allclose(class_weights(labels, 2, "none"), [1, 1])
    inverse, root = class_weights(labels, 2, "inverse"), class_weights(labels, 2, "sqrt")
    assert inverse[1] / inverse[0] == pytest.approx(9)
    assert root[1] / root[0] == pytest.approx(3)
    assert inverse.mean() == pytest.approx(root.mean()) == pytest.approx(1)


def test_wrong_names_and_files_get_one_line(tmp_path: Path) -> None:
    with pytest.raises(HeadError, match="no head 'nope'; use concat, logistic"):
        make_head("nope", SETTINGS, 3)
    with pytest.raises(ConfigError, match="--class-weights nope"):
        HeadSettings(class_weights="nope")
    for wrong in ({"learning_rate": -1.0}, {"learning_rate": float("nan")}, {"weight_decay": -1.0}):
        with pytest.raises(ConfigError, match="--learning-rate must be above 0"):
            HeadSettings(**wrong)
    with pytest.raises(RunError, match="not a whole head"):
        load_head(tmp_path, "fold0")
    save_head(fitted("concat", features()), "concat", SETTINGS, 3, tmp_path, "fold0")
    weights = tmp_path / "fold0.safetensors"
    whole = weights.read_bytes()
    for broken in (b"torn", whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(broken)
        with pytest.raises(RunError, match=r"not a whole head \(its weights are not those that were saved\); delete"):
            load_head(tmp_path, "fold0")
