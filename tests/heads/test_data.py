"""What heads see: aligned vectors, views, masks and tokens, the same from memory and from disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfeat.cache.features import Block, Features
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import CacheError, HeadError
from mmfeat.extraction.extract import extract_features
from mmfeat.heads import tokens
from mmfeat.heads.data import HeadData
from mmfeat.heads.jobs import Job, Workbench, run_job
from mmfeat.heads.registry import FUSIONS, NEEDS_TOKENS, HeadSettings, load_fusion
from mmfeat.heads.stack import Member, predict_stack, train_stack
from mmfeat.heads.tokens import CompactTokens
from mmfeat.heads.training import Draws, draw_epoch
from mmfeat.samples.dataset import read_samples
from tests.heads.toy_features import (
    SAMPLES,
    TARGETS,
    TEST,
    TRAIN,
    VALIDATION,
    features,
    on_disk,
    token_block,
    with_tokens,
)

EVERYTHING = np.arange(SAMPLES)
ROWS = torch.from_numpy(EVERYTHING)[None]
SETTINGS = HeadSettings(epochs=3, batch_size=16, learning_rate=3e-3, modality_dropout=0.2)
MEMBER = Member(SETTINGS, TRAIN, VALIDATION, (1, 2), 6, fold=np.union1d(TRAIN, VALIDATION), parts=(VALIDATION,))


def vectors(data: HeadData, modality: str, view: int) -> np.ndarray:
    """(N, D) of the first encoder as a batch shows it."""
    views = torch.full_like(ROWS, view)
    return data.batch(ROWS, views).vectors[modality][0][0].numpy()


@pytest.mark.parametrize("arrange", [lambda x: x, on_disk], ids=["memory", "disk"])
def test_a_view_that_is_missing_is_the_plain_picture(arrange: Callable[[Features], Features]) -> None:
    """And text, which has no views, is always itself."""
    seen = features(missing=0.3, views=2)
    text, *photos = seen.blocks
    data = HeadData(arrange(seen))
    assert data.views == 2
    for number, view in enumerate(photos):
        shown = np.where(view.mask[:, None], view.vectors, photos[0].vectors)
        there = photos[0].mask
        assert (view.mask & there).any()
        assert bool((~view.mask & there).any()) == (number > 0)
        np.testing.assert_array_equal(vectors(data, "image", number)[there], shown[there])
        np.testing.assert_array_equal(vectors(data, "text", number)[text.mask], text.vectors[text.mask])
        np.testing.assert_array_equal(data.batch(ROWS).masks["image"][0][0].numpy(), there)


@pytest.mark.parametrize("arrange", [lambda x: x, on_disk], ids=["memory", "disk"])
def test_encoders_may_have_different_numbers_of_views(arrange: Callable[[Features], Features]) -> None:
    seen = features(image=(8, 5), views=2)
    fewer = replace(seen, blocks=tuple(block for block in seen.blocks if block.name != "image-1-2"))
    data = HeadData(arrange(fewer))
    first, second = data.batch(ROWS, torch.full_like(ROWS, 2)).vectors["image"]
    named = {block.name: block.vectors for block in seen.blocks}
    np.testing.assert_array_equal(first[0], named["image-0-2"])
    np.testing.assert_array_equal(second[0], named["image-1-0"])


def test_each_sample_draws_one_view_an_epoch_and_all_are_as_likely() -> None:
    draws = Draws((1,), TRAIN, HeadSettings(batch_size=16), 10)
    shown = torch.stack([draw_epoch([draws], 12, 2, 2, "cpu").views for _ in range(20)])
    assert shown.shape == (20, 1, 12, 16)
    shares = shown.flatten().bincount(minlength=3) / shown.numel()
    np.testing.assert_allclose(shares, np.full(3, 1 / 3), atol=0.03)
    assert draw_epoch([draws], 12, 0, 2, "cpu").views is None


def test_samples_lose_either_modality_at_the_rate_asked_for() -> None:
    draws = [Draws((seed,), TRAIN, HeadSettings(batch_size=16, modality_dropout=seed * 0.3), 10) for seed in range(2)]
    lost = torch.stack([draw_epoch(draws, 12, 0, 2, "cpu").dropped for _ in range(20)])
    assert (lost[:, 0] == -1).all()
    shares = (lost[:, 1].flatten() + 1).bincount(minlength=3) / lost[:, 1].numel()
    np.testing.assert_allclose(shares, [0.7, 0.15, 0.15], atol=0.03)
    assert draw_epoch(draws, 12, 0, 1, "cpu").dropped is None  # a head that sees one modality loses none


def test_training_sees_the_views() -> None:
    """Plain photos are noise here, their views tell; statistics and rows stay those of plain photos."""
    seen, told = features(views=1, told=("text",)), features(views=1)
    views = {block.name: block for block in told.blocks if block.view != "none"}
    data = HeadData(replace(seen, blocks=tuple(views.get(block.name, block) for block in seen.blocks)), "image")
    (trained,) = train_stack(load_fusion("concat"), data, TARGETS, [replace(MEMBER, steps=40)])
    with torch.inference_mode():
        module = load_fusion("concat")(1, data.shape, 3).eval()
        module.load_state_dict({name: value[None] for name, value in trained.tensors.items()})
        of_view = module(data.batch(ROWS, torch.ones_like(ROWS)))[0, TEST].argmax(1).numpy()
    assert (of_view == TARGETS.numbers[TEST]).mean() > 0.65


@pytest.mark.parametrize("name", ["concat", "ridge"])
def test_a_prediction_is_the_mean_of_logits_over_the_views(name: str) -> None:
    """Those of the plain photos and of each view as if it were the plain photo."""
    seen = features(missing=0.2, views=2)
    together = HeadData(seen)
    bench = Workbench(seen, TARGETS, "cpu", "")
    (fitted,) = run_job(Job(name, "both", (MEMBER,), ((EVERYTHING,),), keep=True), bench)
    plain = seen.blocks[1]
    each = []
    for view in seen.blocks[1:]:
        there = plain.mask & view.mask
        shown = np.where(there[:, None], view.vectors, plain.vectors)
        single = HeadData(Features(seen.ids, (seen.blocks[0], Block("one", "image", shown, plain.mask))))
        if name == "concat":
            tensors = {key: torch.from_numpy(value) for key, value in fitted.tensors.items()}
            each.append(predict_stack(load_fusion(name), 3, single, [tensors], [EVERYTHING])[0])
        else:
            from mmfeat.baselines.fit import restore
            from mmfeat.heads.jobs import View

            each.append(restore(name, fitted.config, fitted.tensors).logits(View(single), EVERYTHING))
    assert together.views == 2
    np.testing.assert_allclose(fitted.logits[0], np.mean(each, axis=0), rtol=0, atol=1e-5)
    assert not np.allclose(fitted.logits[0], each[0], atol=1e-2)


@pytest.mark.parametrize("views", [0, 1])
@pytest.mark.parametrize("name", [*(name for name in FUSIONS if name != NEEDS_TOKENS), "logistic"])
def test_vectors_on_disk_give_the_same_head(name: str, views: int) -> None:
    """Bit by bit: weights and predictions, with missing vectors, lost modalities and views."""
    seen = features(missing=0.2, image=(8, 5), views=views)
    job = Job(name, "both", (MEMBER,), ((EVERYTHING,),), keep=True)
    found = [run_job(job, Workbench(each, TARGETS, "cpu", ""))[0] for each in (seen, on_disk(seen))]
    np.testing.assert_array_equal(found[0].logits[0], found[1].logits[0])
    for key, value in found[0].tensors.items():
        np.testing.assert_array_equal(value, found[1].tensors[key])


def test_a_real_cache_gives_the_same_head_from_memory_and_from_disk(demo_folder: Path, tmp_path: Path) -> None:
    options = EncoderOptions(dtype="float32", cleaning="tweet")
    extract_features(demo_folder, ["hashing", "hog"], cache=tmp_path, options=options)
    samples = read_samples(demo_folder)
    store, labelled = Cache(tmp_path, samples.name), samples.labelled
    specs = [tower.spec for tower in describe_encoders(["hashing", "hog"], options)]
    numbers = np.arange(len(labelled))
    targets = replace(TARGETS, matrix=TARGETS.matrix[: len(labelled)])
    member = Member(SETTINGS, numbers[:60], numbers[60:80], (1,), 4)
    found = []
    for memory in (None, 0):
        seen = store.load(labelled, specs, memory=memory)
        assert bool(seen.mapped) == (memory == 0)
        job = Job("concat", "both", (member,), ((numbers,),))
        found.append(run_job(job, Workbench(seen, targets, "cpu", ""))[0].logits[0])
    np.testing.assert_array_equal(*found)


def test_statistics_are_those_of_the_rows_that_are_there() -> None:
    seen = features(missing=0.3)
    for arrange in (seen, on_disk(seen)):
        (mean, std), plain = HeadData(arrange).statistics(TRAIN)["image"][0], seen.blocks[1]
        there = plain.vectors[TRAIN][plain.mask[TRAIN]].astype(np.float64)
        np.testing.assert_allclose(mean, there.mean(0), atol=1e-6)
        np.testing.assert_allclose(std, there.std(0), rtol=1e-5)


def test_what_never_varies_or_is_never_there_is_left_as_it_is() -> None:
    same = Block("same", "text", np.full((SAMPLES, 3), 7, np.float16), np.ones(SAMPLES, bool))
    gone = Block("gone", "image", np.full((SAMPLES, 3), np.nan, np.float16), np.zeros(SAMPLES, bool))
    found = HeadData(Features(tuple(map(str, EVERYTHING)), (same, gone))).statistics(TRAIN)
    for modality, expected in (("text", 7.0), ("image", 0.0)):
        mean, std = found[modality][0]
        np.testing.assert_array_equal(mean, np.full(3, expected))
        np.testing.assert_array_equal(std, np.ones(3))


def test_rows_stand_side_by_side_images_first() -> None:
    seen = features(missing=0.2, image=(8, 5), text=(12,))
    rows = HeadData(seen).rows(TEST)
    text, first, second = (block.vectors[TEST] for block in seen.blocks)
    np.testing.assert_array_equal(rows, np.concatenate([first, second, text], axis=1))
    assert np.isnan(rows).any()
    assert HeadData(seen, "text").rows(TEST).shape == (len(TEST), 12)


def test_pooled_vectors_serve_as_tokens_where_they_are_there() -> None:
    seen = features(missing=0.3, image=(8, 5))
    batch = HeadData(seen, "both", "cpu", "pooled").batch(ROWS)
    for block, (values, mask) in zip(seen.blocks[1:], batch.tokens["image"], strict=True):
        np.testing.assert_array_equal(mask[0, :, 0], block.mask)
        np.testing.assert_array_equal(values[0, :, 0], np.nan_to_num(block.vectors))


def test_tokens_are_padded_to_the_longest_of_the_batch() -> None:
    seen = with_tokens(features(), longest=4, missing=0.2)
    data = HeadData(seen, "both", "cpu", "tokens")
    lengths = seen.mapped[1].lengths
    rows = np.flatnonzero(lengths == 2)[:5]
    values, mask = data.batch(torch.from_numpy(rows)[None]).tokens["image"][0]
    assert values.shape == (1, 5, 2, 6)
    assert mask.all()
    np.testing.assert_array_equal(data.batch(ROWS).tokens["image"][0][1][0].sum(1), lengths)


@pytest.mark.parametrize("kept", [0, 2**28], ids=["read", "kept"])
def test_compact_tokens_are_normed_in_a_basis(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From memory or batch by batch; the basis keeps the lengths of what it spans, and few columns stay as they are."""
    monkeypatch.setattr(tokens, "KEPT", kept)
    plain = with_tokens(features(), width=100, missing=0.2)
    data = HeadData(plain, "both", "cpu", "tokens")
    compact = data.compacted(partial(CompactTokens, device="cpu"))
    (source,), rows = compact.compact["text"], ROWS[:, ::7].expand(2, -1)
    values, mask = data.batch(rows).tokens["text"][0]
    found, there = compact.batch(rows).tokens["text"][0]
    torch.testing.assert_close(there, mask, rtol=0, atol=0)
    expected = torch.nn.functional.layer_norm(values, (100,)) @ source.basis
    torch.testing.assert_close(found[there], expected[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(source.basis.T @ source.basis, torch.eye(tokens.COMPACT), rtol=0, atol=1e-5)
    assert compact.shape.tokens == {"image": (tokens.COMPACT,), "text": (tokens.COMPACT,)}
    few = CompactTokens(with_tokens(features()).mapped[0], "cpu")
    torch.testing.assert_close(few.basis, torch.eye(6), rtol=0, atol=0)
    order = compact.by_length(rows)
    lengths = source.lengths[rows.gather(1, order)]
    assert bool((lengths.diff() >= 0).all()), "texts that are cut together are alike"


def without_photos(seen: Features, share: int) -> Features:
    """No photo anywhere, in the width that photos have (`share` 1) or, as in a cache that saw none, of width 0."""
    nobody = np.zeros(SAMPLES, int)
    vectors = [np.full((SAMPLES, share * block.width), np.nan, np.float32) for block in seen.blocks]
    tokens = [np.zeros((SAMPLES, 4, share * block.width), np.float32) for block in seen.mapped]
    blocks = [replace(block, vectors=x, mask=nobody > 0) for block, x in zip(seen.blocks, vectors, strict=True)]
    mapped = [token_block(block.modality, x, nobody) for block, x in zip(seen.mapped, tokens, strict=True)]
    texts = {block.name: block for block in (*seen.blocks, *seen.mapped) if block.modality == "text"}
    return Features(
        seen.ids,
        tuple(texts.get(block.name, block) for block in blocks),
        tuple(texts.get(block.name, block) for block in mapped),
    )


def test_where_nobody_has_a_photo_heads_predict_in_the_width_they_know() -> None:
    seen = with_tokens(features(missing=0.1))
    (trained,) = train_stack(
        load_fusion(NEEDS_TOKENS), HeadData(seen, "both", "cpu", "tokens"), TARGETS, [replace(MEMBER, steps=2)]
    )
    found, expected = (
        predict_stack(load_fusion(NEEDS_TOKENS), 3, HeadData(each, "both", "cpu", "tokens"), [trained.tensors], [TEST])
        for each in (without_photos(seen, 0).widened(seen.widths), without_photos(seen, 1))
    )
    np.testing.assert_allclose(found[0], expected[0], atol=1e-6)
    with pytest.raises(CacheError, match="image-tokens: vectors of width 6, the head takes 7"):
        seen.widened({**seen.widths, "image-tokens": 7})


def test_no_vectors_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(HeadError, match="no pooled vectors of image; extract them with --outputs pooled"):
        HeadData(features().named(["text"]), "image")
