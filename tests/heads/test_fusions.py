"""Every head behind one interface: its size, that it learns, and that it survives missing parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfeat.cache.features import Block, Features
from mmfeat.evaluation.metrics import macro_f1
from mmfeat.heads.data import HeadData
from mmfeat.heads.fusions import TOKEN_WIDTH as WIDTH
from mmfeat.heads.fusions import CrossAttention
from mmfeat.heads.jobs import UNTRAINED, Job, Workbench, count_parameters, run_job
from mmfeat.heads.layers import Fusion, Shape
from mmfeat.heads.registry import BASELINES, FUSIONS, LINEAR, NEEDS_TOKENS, ZERO_SHOT, HeadSettings, load_fusion
from mmfeat.heads.stack import Member, train_stack
from mmfeat.samples.labels import Targets
from tests.heads.toy_features import (
    MULTILABEL,
    NUMBERS,
    SAMPLES,
    TARGETS,
    TEST,
    TRAIN,
    VALIDATION,
    features,
    token_block,
    with_tokens,
)

SETTINGS = HeadSettings(epochs=6, batch_size=16, learning_rate=3e-3, attention_learning_rate=3e-3)
HEADS = tuple(name for name in (*FUSIONS, *BASELINES) if name != ZERO_SHOT)  # zero-shot has tests of its own
LEARNS = [name for name in HEADS if name not in UNTRAINED]
RATES = ("learning_rate", "attention_learning_rate")


def logits(
    head: str,
    seen: Features,
    modality: str = "both",
    attend: str = "pooled",
    settings: HeadSettings = SETTINGS,
    targets: Targets = TARGETS,
) -> np.ndarray:
    """(N, C) of all samples from one head, trained on TRAIN."""
    if head == LINEAR:  # one layer of few weights needs larger steps
        settings = replace(settings, learning_rate=10 * settings.learning_rate)
    member = Member(settings, TRAIN, VALIDATION, (4, 2), 12)
    if head in BASELINES:  # trained on the whole fold
        member = replace(member, fold=np.union1d(TRAIN, VALIDATION), parts=(VALIDATION,))
    job = Job(head, modality, (member,), ((np.arange(SAMPLES),),))
    return run_job(job, Workbench(seen, targets, "cpu", attend))[0].logits[0]


def accuracy(found: np.ndarray) -> float:
    return float((found[TEST].argmax(1) == NUMBERS[TEST]).mean())


def probabilities(found: np.ndarray) -> np.ndarray:
    return torch.from_numpy(found).softmax(1).numpy()


@pytest.mark.parametrize("name", LEARNS)
def test_learns_and_needs_both_modalities(name: str) -> None:
    """Text tells the first class, images tell the last: one of them leaves two classes alike."""
    seen = features()
    assert accuracy(logits(name, seen)) > 0.88
    for modality in ("text", "image"):
        assert 0.5 < accuracy(logits(name, seen, modality)) < 0.87  # at best all of one class and the most of the rest


@pytest.mark.parametrize("name", FUSIONS)
def test_learns_several_labels_a_sample(name: str) -> None:
    found = logits(name, features(), targets=MULTILABEL)
    assert macro_f1(MULTILABEL.matrix[TEST], found[TEST] > 0) > 0.85


@pytest.mark.parametrize("name", LEARNS)
def test_several_encoders_a_modality_and_missing_parts(name: str) -> None:
    seen = features(missing=0.2, image=(8, 5), text=(12, 3, 4))
    for modality in ("both", "text") if name in FUSIONS else ("both",):
        found = logits(name, seen, modality)
        assert found.shape == (SAMPLES, 3)
        assert np.isfinite(found).all()
        assert accuracy(found) > (0.8 if modality == "both" else 0.5)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("width", [8, 0])
def test_a_modality_that_is_missing_everywhere(name: str, width: int) -> None:
    """Nobody knows the width of vectors that were never made: it is 0."""
    seen = features()
    gone = Block("hog", "image", np.full((SAMPLES, width), np.nan, np.float32), np.zeros(SAMPLES, bool))
    found = logits(name, Features(seen.ids, (seen.blocks[0], gone)), settings=replace(SETTINGS, epochs=2))
    assert np.isfinite(found).all()
    assert name == "prior" or accuracy(found) > 0.5


@pytest.mark.parametrize("name", [name for name in HEADS if name != NEEDS_TOKENS])
def test_scale_does_not_matter(name: str) -> None:
    """Vectors are standardised on the training rows."""
    small, large = (
        probabilities(logits(name, features(0.1, scale), settings=replace(SETTINGS, epochs=2)))
        for scale in (1.0, 1024.0)
    )
    np.testing.assert_allclose(small, large, atol=1e-3)


def test_standardising_takes_the_training_rows_only() -> None:
    seen = features()
    wild = tuple(
        replace(block, vectors=np.where(np.isin(np.arange(SAMPLES), TRAIN)[:, None], block.vectors, 1e4))
        for block in seen.blocks
    )
    member = Member(replace(SETTINGS, epochs=1), TRAIN, VALIDATION, (1,), 3)
    found = [
        train_stack(load_fusion("concat"), HeadData(each), TARGETS, [member])[0].tensors
        for each in (seen, Features(seen.ids, wild))
    ]
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=0, atol=0)


def classifier_size(width: int) -> int:
    """256 and 64 hidden units with batch normalisation, three classes."""
    return (width * 256 + 256) + 2 * 256 + (256 * 64 + 64) + 2 * 64 + (64 * 3 + 3)


def late_size(image: int, text: int) -> int:
    return (image * 512 + 512) + (text * 512 + 512) + (1024 * 512 + 512) + (512 * 3 + 3)


def gated_size(image: int, text: int) -> int:
    width = image if image == text else 256
    projections = sum(own * 256 + 256 for own in (image, text) if own != width)
    return projections + (2 * width * 64 + 64) + (64 + 1) + classifier_size(width)


def film_size(image: int, text: int) -> int:
    return (text * 64 + 64) + (64 * 2 * image + 2 * image) + classifier_size(image + text)


def film_concat_size(image: int, text: int) -> int:
    both = image + text
    return (both * 64 + 64) + (64 * 2 * both + 2 * both) + classifier_size(both)


def cross_attention_size(image: int, text: int) -> int:
    """Tokens are as wide as the vectors here; the key for nothing, the norm, and the gate's one number."""
    tokens = (image * 128 + 128) + (text * 128 + 128)
    attention = 4 * (128 * 128 + 128) + 128 + 2 * 128
    return tokens + attention + 1 + classifier_size(image + text + 128)


SIZES: dict[str, Callable[[int, int], int]] = {
    "late": late_size,
    "concat": lambda image, text: classifier_size(image + text),
    "gated": gated_size,
    "film": film_size,
    "film-concat": film_concat_size,
    "cross-attention": cross_attention_size,
    "linear": lambda image, text: (image + text) * 3 + 3,
}


@pytest.mark.parametrize("widths", [(1024, 384), (512, 256), (384, 384)])
@pytest.mark.parametrize("name", FUSIONS)
def test_parameter_counts(name: str, widths: tuple[int, int]) -> None:
    """By the formulas above, and an embedding for each encoder's missing vector."""
    image, text = widths
    cut = {"image": (image - 100, 100), "text": (text,)}
    tokens = {"image": (image,), "text": (text,)} if name == NEEDS_TOKENS else {}
    found = count_parameters(load_fusion(name), Shape(cut, tokens), 3)
    assert found == SIZES[name](image, text) + image + text


def numbers_like(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def start(name: str, data: HeadData) -> Fusion:
    """One head as it is before any training."""
    module = load_fusion(name)(1, data.shape, 3)
    module.reset_head(0, torch.Generator().manual_seed(6))
    module.standardise(0, data.statistics(TRAIN))
    return module.eval()


def test_attention_learns_from_tokens_what_vectors_lack() -> None:
    """Vectors of photos are noise here; one of their tokens tells."""
    seen, settings = with_tokens(features(told=("text",))), replace(SETTINGS, epochs=12)
    assert accuracy(logits(NEEDS_TOKENS, seen, "both", "tokens", settings)) > 0.88
    assert accuracy(logits("concat", seen)) < 0.87


def test_padding_of_tokens_changes_nothing() -> None:
    """Neither what stands behind the tokens of a sample nor what other samples of the batch need."""
    data = HeadData(with_tokens(features(0.1), missing=0.2), "both", "cpu", "tokens")
    module, rows = start(NEEDS_TOKENS, data), torch.from_numpy(TEST)[None]
    batch = data.batch(rows)
    found = module(batch)
    garbage = numbers_like(1, len(TEST), 7, 6) * 1e3
    padded = {
        name: [(torch.cat([x, garbage], 2), F.pad(mask, (0, 7))) for x, mask in sources]
        for name, sources in batch.tokens.items()
    }
    torch.testing.assert_close(module(replace(batch, tokens=padded)), found, rtol=0, atol=1e-5)
    for place in range(0, len(TEST), 8):
        torch.testing.assert_close(module(data.batch(rows[:, [place]]))[:, 0], found[:, place], rtol=0, atol=1e-5)
    other = {name: [(x + 1 * numbers_like(*x.shape), m) for x, m in pairs] for name, pairs in batch.tokens.items()}
    assert not torch.allclose(module(replace(batch, tokens=other)), found, atol=1e-4)


def test_the_gate_of_attention_is_closed_at_the_start() -> None:
    """What attention finds has length 1 a feature; sigmoid(-4) of it gets in."""
    data = HeadData(with_tokens(features()), "both", "cpu", "tokens")
    module = start(NEEDS_TOKENS, data)
    entered: list[Tensor] = []
    assert isinstance(module, CrossAttention)
    module.classifier.register_forward_pre_hook(lambda _, arguments: entered.append(arguments[0]))
    module(data.batch(torch.from_numpy(TEST)[None]))
    attended, vectors = entered[0][..., -WIDTH:], entered[0][..., :-WIDTH]
    sizes = attended.square().mean(-1).sqrt()
    torch.testing.assert_close(sizes, torch.full_like(sizes, 1 / (1 + np.exp(4.0))), rtol=1e-2, atol=0)
    assert vectors.square().mean(-1).sqrt().min() > 0.5


@cache
def tensors_after(rates: tuple[float, float], modality_dropout: float = 0.0, missing: float = 0.0) -> dict[str, Tensor]:
    """Of cross-attention after two epochs without weight decay, by the rates in the order of RATES."""
    data = HeadData(with_tokens(features(missing)), "both", "cpu", "tokens")
    settings = replace(
        SETTINGS, epochs=2, weight_decay=0.0, modality_dropout=modality_dropout, **dict(zip(RATES, rates, strict=True))
    )
    (trained,) = train_stack(CrossAttention, data, TARGETS, [Member(settings, TRAIN, VALIDATION, (1,), 6)])
    return trained.tensors


def moved(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    """Names of the parameters that differ; statistics of batch normalisation are none."""
    learned = {name for name in first if not name.endswith((".mean", ".var", ".std"))}
    return {name for name in learned if not torch.allclose(first[name], second[name], rtol=0, atol=1e-6)}


def test_attention_learns_at_its_own_rate() -> None:
    untrained = tensors_after((1e-30, 1e-30))
    slow, usual = moved(untrained, tensors_after((1e-30, 1e-2))), moved(untrained, tensors_after((1e-2, 1e-30)))
    assert {name.split(".")[0] for name in slow} == {"tokens", "attention", "gate"}
    assert {name.split(".")[0] for name in usual} == {"classifier"}
    assert "gate.value" in slow


@pytest.mark.parametrize(("dropout", "missing"), [(0.3, 0.0), (0.0, 0.3), (0.0, 0.0)])
def test_the_embedding_for_a_missing_modality_learns_where_one_is_missing(dropout: float, missing: float) -> None:
    found = tensors_after((1e-3, 1e-3), dropout, missing)
    for modality in ("image", "text"):
        assert bool(found[f"inputs.{modality}.0.missing"].abs().max() > 1e-4) == bool(dropout or missing)


def test_a_lost_modality_is_a_missing_one() -> None:
    """All its encoders and tokens at once."""
    seen = with_tokens(features(image=(8, 5), text=(12, 3)))
    data = HeadData(seen, "both", "cpu", "tokens")
    module, rows = start(NEEDS_TOKENS, data), torch.from_numpy(TEST)[None]
    for number, modality in enumerate(("image", "text")):
        gone = np.zeros(SAMPLES, bool)
        blocks = tuple(replace(b, mask=gone) if b.modality == modality else b for b in seen.blocks)
        none = token_block(modality, np.zeros((SAMPLES, 4, 6), np.float32), np.zeros(SAMPLES, np.int64))
        mapped = tuple(none if block.modality == modality else block for block in seen.mapped)
        without = HeadData(Features(seen.ids, blocks, mapped), "both", "cpu", "tokens")
        lost = module(data.batch(rows, dropped=torch.full_like(rows, number)))
        torch.testing.assert_close(lost, module(without.batch(rows)), rtol=0, atol=1e-5)
        assert not torch.allclose(lost, module(data.batch(rows)), atol=1e-3)


def test_every_head_has_a_name_of_its_own() -> None:
    assert len(set(HEADS)) == len(HEADS)
