"""Losses of a stack are torch's own of each head, and settings that make no sense get one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from mmfeat.errors import ConfigError
from mmfeat.heads.registry import HeadSettings, settings_of
from mmfeat.heads.training import StackedLoss, class_weights, validation_loss
from mmfeat.samples.labels import Targets, indicator

SMOOTHING, GAMMA = (0.0, 0.1, 0.3), (0.0, 0.5, 3.0)
WEIGHTS = np.array([[1.0, 1.0, 1.0, 1.0], [0.2, 0.8, 1.0, 2.0], [3.0, 0.5, 0.1, 0.4]])
NUMBERS = torch.from_numpy(np.random.default_rng(1).integers(0, 4, (3, 10)))
LOGITS = torch.from_numpy(np.random.default_rng(2).normal(0, 3, (3, 10, 4)).astype(np.float32))
SINGLE = F.one_hot(NUMBERS, 4).float()
SEVERAL = torch.from_numpy((np.random.default_rng(3).random((3, 10, 4)) < 0.3).astype(np.float32))


def stacked(loss: str, multilabel: bool) -> StackedLoss:
    """Three heads that differ in all that a loss takes."""
    settings = [
        HeadSettings(loss=loss, label_smoothing=s, focal_gamma=g) for s, g in zip(SMOOTHING, GAMMA, strict=True)
    ]
    return StackedLoss(settings, list(WEIGHTS), multilabel, "cpu")


def test_cross_entropy_is_torchs_of_each_head() -> None:
    expected = [
        F.cross_entropy(LOGITS[k], NUMBERS[k], torch.tensor(WEIGHTS[k]).float(), label_smoothing=SMOOTHING[k])
        for k in range(3)
    ]
    torch.testing.assert_close(stacked("cross-entropy", False)(LOGITS, SINGLE), torch.stack(expected))


def test_multilabel_is_torchs_binary_loss_of_each_head() -> None:
    smooth = [SEVERAL[k] * (1 - SMOOTHING[k]) + SMOOTHING[k] / 2 for k in range(3)]
    expected = [
        F.binary_cross_entropy_with_logits(LOGITS[k], smooth[k], pos_weight=torch.tensor(WEIGHTS[k]).float())
        for k in range(3)
    ]
    torch.testing.assert_close(stacked("cross-entropy", True)(LOGITS, SEVERAL), torch.stack(expected))


def test_focal_loss_by_its_formula() -> None:
    """-w (1 - p)^gamma log p, of the smoothed target, as a weighted mean."""
    found = stacked("focal", False)(LOGITS, SINGLE).numpy()
    for head in range(3):
        odds = np.exp(LOGITS[head].double().numpy())
        p = odds / odds.sum(1, keepdims=True)
        smooth = SINGLE[head].numpy() * (1 - SMOOTHING[head]) + SMOOTHING[head] / 4
        losses = -(smooth * WEIGHTS[head] * (1 - p) ** GAMMA[head] * np.log(p)).sum(1)
        expected = losses.sum() / WEIGHTS[head][NUMBERS[head]].sum()
        assert found[head] == pytest.approx(expected, rel=1e-4)


def test_multilabel_focal_loss_by_its_formula() -> None:
    found = stacked("focal", True)(LOGITS, SEVERAL).numpy()
    for head in range(3):
        p = 1 / (1 + np.exp(-LOGITS[head].double().numpy()))
        smooth = SEVERAL[head].numpy() * (1 - SMOOTHING[head]) + SMOOTHING[head] / 2
        there = smooth * WEIGHTS[head] * (1 - p) ** GAMMA[head] * np.log(p)
        absent = (1 - smooth) * p ** GAMMA[head] * np.log(1 - p)
        assert found[head] == pytest.approx(-(there + absent).mean(), rel=1e-4)


@pytest.mark.parametrize("multilabel", [False, True])
def test_focal_gradients_are_finite_where_a_head_is_certain(multilabel: bool) -> None:
    """The slope of (1 - p)^gamma below gamma 1 has no end at p = 1."""
    logits = (200 * SINGLE).requires_grad_()
    stacked("focal", multilabel)(logits, SINGLE).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_validation_loss_is_torchs_without_smoothing(multilabel: bool) -> None:
    logits, weights = LOGITS.double(), torch.from_numpy(WEIGHTS)
    for head in range(3):
        if multilabel:
            targets = SEVERAL[head]
            expected = F.binary_cross_entropy_with_logits(logits[head], targets.double(), pos_weight=weights[head])
        else:
            targets = SINGLE[head]
            expected = F.cross_entropy(logits[head], NUMBERS[head], weights[head])
        found = validation_loss(logits[head].numpy(), targets.bool().numpy(), WEIGHTS[head], multilabel)
        assert found == pytest.approx(float(expected))
    assert validation_loss(np.zeros((0, 4)), np.zeros((0, 4), bool), WEIGHTS[0], multilabel) == 0


@pytest.mark.parametrize("loss", ["cross-entropy", "focal"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_heads_that_stay_keep_their_own_loss(loss: str, multilabel: bool) -> None:
    targets = SEVERAL if multilabel else SINGLE
    criterion, stay = stacked(loss, multilabel), torch.tensor([2, 0])
    before = criterion(LOGITS, targets)[stay]
    criterion.keep(stay)
    torch.testing.assert_close(criterion(LOGITS[stay], targets[stay]), before)


def test_class_weights() -> None:
    """90 samples of a class against 10 of another."""
    targets = Targets(("a", "b"), indicator([0] * 90 + [1] * 10, 2))
    weights = {policy: class_weights(targets, policy) for policy in ("none", "inverse", "sqrt", "effective")}
    assert all(each.mean() == pytest.approx(1) for each in weights.values())
    ratios = {policy: each[1] / each[0] for policy, each in weights.items()}
    effective = (1 - 0.999**90) / (1 - 0.999**10)
    assert ratios == pytest.approx({"none": 1, "inverse": 9, "sqrt": 3, "effective": effective})


def test_class_weights_of_multilabel_weigh_presence_against_absence() -> None:
    matrix = np.stack([np.arange(100) < 20, np.arange(100) < 50], axis=1)
    targets = Targets(("a", "b"), matrix, multilabel=True)
    np.testing.assert_allclose(class_weights(targets, "none"), [1, 1])
    np.testing.assert_allclose(class_weights(targets, "inverse"), [4, 1])
    np.testing.assert_allclose(class_weights(targets, "sqrt"), [2, 1])


@pytest.mark.parametrize("policy", ["none", "inverse", "sqrt", "effective"])
@pytest.mark.parametrize("multilabel", [False, True])
def test_a_class_that_no_training_row_has_gets_a_finite_weight(policy: str, multilabel: bool) -> None:
    targets = Targets(("a", "b", "c"), indicator([0, 0, 1], 3), multilabel)
    assert np.isfinite(class_weights(targets, policy)).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("attention_learning_rate", float("inf")),
        ("weight_decay", -1.0),
        ("focal_gamma", float("nan")),
        ("min_delta", -0.1),
        ("dropout", 1.0),
        ("modality_dropout", -0.1),
        ("label_smoothing", 1.5),
        ("class_weights", "nope"),
        ("loss", "hinge"),
        ("batch_size", 1),
        ("monitor", "auc"),
        ("epochs", 0),
        ("patience", 0),
    ],
)
def test_a_wrong_setting_is_named_by_its_flag(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}") as caught:
        HeadSettings(**{name: value})
    assert "\n" not in str(caught.value)


def test_settings_come_back_from_numbers_of_a_search() -> None:
    """A search and JSON know floats only."""
    assert settings_of({"epochs": 5.0, "batch_size": 16.0, "dropout": 0}) == HeadSettings(
        epochs=5, batch_size=16, dropout=0.0
    )
    assert isinstance(settings_of({"epochs": 5.0}).epochs, int)
