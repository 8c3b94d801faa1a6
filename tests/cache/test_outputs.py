"""Tokens, prefixes and views in the cache: each in a folder of its own, aligned, and the encoder's own values."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmfeat.cache.shard import Rows
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import load_encoders
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.errors import CacheError, CacheMissError
from mmfeat.extraction.extract import Extraction, ExtractSettings, extract_features
from mmfeat.samples.contents import augment
from mmfeat.samples.dataset import Sample, content_key, read_samples
from mmfeat.samples.keys import ContentKeys, content_keys

ALL = ("pooled", "tokens", "prefix:1")
CAPTIONS = ["a day", "so tired of this", "", "the bus", "a day", "what a wonderful day of the bus " * 3, "bus"]


def options(*outputs: str, **others: Any) -> EncoderOptions:
    return EncoderOptions(**{"dtype": "float32", "cleaning": "tweet", "outputs": outputs or ALL, "views": 2, **others})


def cpu(batch_size: int = 0, retry_failed: bool = False) -> ExtractSettings:
    return ExtractSettings("cpu", batch_size=batch_size, retry_failed=retry_failed)


def samples_of(result: Extraction) -> tuple[Sample, ...]:
    return read_samples(result.samples.source).samples


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Models this small only wait for each other's threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven samples; the third has no caption, the fourth a broken photo, the last none at all."""
    folder = tmp_path_factory.mktemp("outputs") / "set"
    (folder / "data").mkdir(parents=True)
    for number, text in enumerate(CAPTIONS):
        (folder / "data" / f"s{number}.txt").write_text(text)
        pixels, buffer = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8), io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        if number != 6:
            (folder / "data" / f"s{number}.png").write_bytes(buffer.getvalue() if number != 3 else b"no photo")
    (folder / "train.txt").write_text("".join(f"s{n},x\n" for n in range(len(CAPTIONS))))
    return folder


@pytest.fixture(scope="module")
def encoders(tiny_bert: Path, tiny_clip: Path, tiny_timm: Path) -> list[str]:
    return [f"bert:{tiny_bert}", f"clip:{tiny_clip}", f"timm:{tiny_timm}"]


@pytest.fixture(scope="module")
def result(data: Path, encoders: list[str], tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    """Everything, one sample a batch."""
    cache = tmp_path_factory.mktemp("cache") / "cache"
    return extract_features(data, encoders, cache=cache, options=options(), settings=cpu(1))


def opened(result: Extraction) -> Cache:
    return Cache(result.folder.parent, result.folder.name)


def files(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_ino, path.read_bytes()) for path in folder.rglob("*.h5")}


def content(spec: EncoderSpec, sample: Sample) -> Any:
    """What the encoder is given, decoded without mmfeat; None where there is nothing to encode."""
    if spec.modality == "text":
        return sample.text
    if sample.image is None or sample.id == "s3":
        return None
    return augment(Image.open(sample.image).convert("RGB"), spec.view, content_key(sample.image.read_bytes()))


def stored(result: Extraction, spec: EncoderSpec) -> list[np.ndarray | None]:
    """The (T, D) values of each sample; pooled vectors count as one token."""
    block = opened(result).map(samples_of(result), spec)
    batches = (block.batch(np.array([row]))[0][0] for row in range(len(block)))
    return [values if present else None for values, present in zip(batches, block.mask, strict=True)]


def test_every_output_of_every_view_is_a_folder_of_its_own(result: Extraction) -> None:
    specs = [tower.spec for tower in result.towers]
    found = {(spec.tower, spec.view, spec.output) for spec in specs}
    seen = {(tower, view) for tower in ("clip.image", "timm") for view in ("none", "train:1", "train:2")}
    seen |= {("bert", "none"), ("clip.text", "none")}
    assert found == {(*one, output) for one in seen for output in ("pooled", "tokens", "prefix")}
    folders = {path.name for path in result.folder.iterdir() if path.is_dir()}
    assert folders == {spec.folder_name for spec in specs} == set(result.new)
    assert len(folders) == len(found) == 24
    assert set(result.new.values()) == {5}  # different captions, photos that are whole
    assert {result.unreadable[spec.folder_name] for spec in specs if spec.modality == "image"} == {1}
    assert result.failures == [("s3", "not an image")]


def test_cached_values_are_the_live_encoders(result: Extraction) -> None:
    compared = 0
    for encoder in load_encoders(result.towers, "cpu"):
        cached = {spec: stored(result, spec) for spec in encoder.specs}
        for row, sample in enumerate(read_samples(result.samples.source)):
            given = content(encoder.specs[0], sample)
            live = encoder.embed([encoder.prepare(given)]) if given is not None else [[None]] * len(encoder.specs)
            for spec, (value,) in zip(encoder.specs, live, strict=True):
                mine = cached[spec][row]
                assert (mine is None) == (value is None), (spec.name, sample.id)
                if mine is not None:
                    assert mine.dtype == np.float32
                    np.testing.assert_array_equal(mine, np.atleast_2d(value), err_msg=spec.name)
                    compared += 1
    assert compared == 24 * 5 + 6  # of the captions, two are equal


def test_other_batches_change_no_value_but_by_rounding(
    data: Path, encoders: list[str], result: Extraction, tmp_path: Path
) -> None:
    other = extract_features(data, encoders, cache=tmp_path, options=options(), settings=cpu(5))
    for tower in result.towers:
        for one, two in zip(stored(result, tower.spec), stored(other, tower.spec), strict=True):
            assert (one is None) == (two is None)
            if one is not None and two is not None:
                np.testing.assert_allclose(one, two, atol=1e-5, err_msg=tower.spec.name)


def test_a_fresh_cache_gets_the_same_bytes(data: Path, encoders: list[str], result: Extraction, tmp_path: Path) -> None:
    """Views included: their random choices depend on the picture alone."""
    again = extract_features(data, encoders, cache=tmp_path, options=options(), settings=cpu(1))
    ours, theirs = (
        {path.relative_to(r.folder): data for path, (_, data) in files(r.folder).items()} for r in (result, again)
    )
    assert ours == theirs


def test_views_differ_from_the_plain_picture_and_from_each_other(result: Extraction) -> None:
    for name in ("clip.image", "timm"):
        specs = [t.spec for t in result.towers if t.spec.tower == name and t.spec.output == "pooled"]
        for values in zip(*(stored(result, spec) for spec in specs), strict=True):
            present = [value.tobytes() for value in values if value is not None]
            assert len(set(present)) == len(present) in (0, 3)


@pytest.mark.parametrize("later", ["tokens", "prefix:1", "pooled"])
def test_only_an_output_that_is_missing_is_written(data: Path, encoders: list[str], tmp_path: Path, later: str) -> None:
    def extract(outputs: tuple[str, ...], views: int) -> Extraction:
        asked = options(*outputs, views=views)
        return extract_features(data, encoders[:2], cache=tmp_path, options=asked, settings=cpu(3))

    first = extract(tuple(output for output in ALL if output != later), 1)
    before = files(tmp_path)
    second = extract(ALL, 1)
    added = {folder for folder, count in second.new.items() if count}
    assert added == {t.spec.folder_name for t in second.towers} - {t.spec.folder_name for t in first.towers}
    assert len(added) == 4  # bert, clip.text, and clip.image plain and as one view
    after = files(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path.parent.name for path in after.keys() - before.keys()} == added
    views = extract(ALL, 2)
    assert {t.spec.view for t in views.towers if views.new.get(t.spec.folder_name)} == {"train:2"}
    assert {path: files(tmp_path)[path] for path in after} == after
    assert extract(ALL, 2).nothing_to_do


def test_each_output_is_written_only_for_the_samples_that_lack_it(data: Path, tiny_clip: Path, tmp_path: Path) -> None:
    part = Path(shutil.copytree(data, tmp_path / "set"))
    (part / "train.txt").write_text("guid,tag\ns0,x\ns1,x\n")
    asked = [options(*outputs, views=0) for outputs in (ALL[:1], ALL)]
    extract_features(part, [f"clip:{tiny_clip}"], cache=tmp_path / "cache", options=asked[0], settings=cpu())
    rest = extract_features(data, [f"clip:{tiny_clip}"], cache=tmp_path / "cache", options=asked[1], settings=cpu())
    for spec in (tower.spec for tower in rest.towers):
        assert rest.new[spec.folder_name] == (3 if spec.output == "pooled" else 5)
        keys = [key for shard in opened(rest).shards(spec) for key in shard.keys.tolist()]
        assert len(keys) == len(set(keys))


def test_load_gives_vectors_and_mapped_tokens_side_by_side(result: Extraction) -> None:
    specs, samples = [tower.spec for tower in result.towers], samples_of(result)
    features = opened(result).load(samples, specs)
    assert features.ids == tuple(sample.id for sample in samples)
    assert [block.name for block in features.blocks] == [s.folder_name for s in specs if s.output == "pooled"]
    assert [block.name for block in features.mapped] == [s.folder_name for s in specs if s.output != "pooled"]
    for block in features.blocks:
        (spec,) = (spec for spec in specs if spec.folder_name == block.name)
        for mine, present, alone in zip(block.vectors, block.mask, stored(result, spec), strict=True):
            assert present == (alone is not None)
            np.testing.assert_array_equal(mine, np.full_like(mine, np.nan) if alone is None else alone[0])
    for tokens in features.mapped:
        lacking = {"s2"} if tokens.modality == "text" else {"s3", "s6"}
        assert {id for id, present in zip(features.ids, tokens.mask, strict=True) if not present} == lacking
        assert (tokens.lengths == 0).tolist() == (~tokens.mask).tolist()


def test_a_batch_is_padded_with_zeros_behind_its_mask(result: Extraction) -> None:
    rng = np.random.default_rng(3)
    for tower in result.towers:
        block, alone = (
            opened(result).map(samples_of(result), tower.spec),
            stored(result, tower.spec),
        )
        for size in (0, 1, 2, 7, 20):
            rows = rng.integers(0, len(block), size)
            values, present = block.batch(rows)
            lengths = [0 if alone[row] is None else len(alone[row]) for row in rows]
            assert values.shape == (size, max(lengths, default=0), block.width)
            assert present.shape == values.shape[:2]
            assert present.sum(axis=1).tolist() == lengths == block.lengths[rows].tolist()
            for row, mine, length in zip(rows, values, lengths, strict=True):
                assert not mine[length:].any()
                if length:
                    np.testing.assert_array_equal(mine[:length], alone[row])


def test_take_composes(result: Extraction) -> None:
    features = opened(result).load(samples_of(result), [tower.spec for tower in result.towers])
    chosen, then = np.array([5, 1, 3, 3, 0]), np.array([4, 0, 2])
    mask = np.isin(np.arange(7), [0, 2, 5])
    for taken, rows in (
        (features.take(chosen).take(then), chosen[then]),
        (features.take(mask), np.flatnonzero(mask)),
        (features.named([features.blocks[0].name]).take(chosen), chosen),
        (features.take(np.array([], int)), np.array([], int)),
    ):
        assert taken.ids == tuple(features.ids[row] for row in rows)
        whole = {block.name: block for block in (*features.blocks, *features.mapped)}
        for block in taken.blocks:
            np.testing.assert_array_equal(block.vectors, whole[block.name].vectors[rows])
        for tokens in taken.mapped:
            here = np.arange(len(rows))
            for mine, theirs in zip(tokens.batch(here), whole[tokens.name].batch(rows), strict=True):
                np.testing.assert_array_equal(mine, theirs)
            np.testing.assert_array_equal(tokens.mask, whole[tokens.name].mask[rows])


def test_what_was_never_extracted_is_a_miss_or_masked(result: Extraction, tmp_path: Path) -> None:
    spec = next(tower.spec for tower in result.towers if tower.spec.output == "tokens")
    samples = [*samples_of(result), Sample("new", "never seen"), Sample("none")]
    with pytest.raises(CacheMissError, match=r"1 of 9 samples are not in the cache for bert.* \(first: new\)"):
        opened(result).load(samples, [spec])
    keys = content_keys(samples[:4], "text")
    with pytest.raises(CacheError, match="4 content keys for 9 samples"):
        opened(result).load(samples, [spec], {"text": keys})
    block = opened(result).map(samples, spec, allow_missing=True)
    assert block.mask.tolist() == [True, True, False, True, True, True, True, False, False]
    assert block.batch(np.array([7, 8]))[0].shape == (2, 0, block.width)
    empty = Cache(tmp_path, "empty").map(samples, spec, allow_missing=True)
    assert [array.shape for array in empty.batch(np.arange(9))] == [(9, 0, 0), (9, 0)]
    assert empty.take(np.array([1])).batch(np.array([0]))[1].tolist() == [[]]
    nothing = ContentKeys(np.zeros(1, "S32"), np.zeros(1, bool), ("no text",))
    assert Cache(tmp_path, "empty").load(samples[-1:], [spec], {"text": nothing}).mapped[0].mask.tolist() == [False]


def test_half_precision_is_stored_as_float16(
    data: Path, encoders: list[str], tmp_path: Path, result: Extraction
) -> None:
    half = extract_features(
        data,
        encoders,
        cache=tmp_path,
        options=options(dtype="bfloat16", views=0),
        settings=cpu(),
    )
    for tower in half.towers:
        (exact,) = (t.spec for t in result.towers if t.spec.name == tower.spec.name)
        for mine, other in zip(stored(half, tower.spec), stored(result, exact), strict=True):
            assert (mine is None) == (other is None)
            if mine is not None and other is not None:
                assert mine.dtype == np.float16
                cosine = (mine.astype(np.float64) * other).sum(-1)
                cosine /= np.linalg.norm(mine.astype(np.float64), axis=-1) * np.linalg.norm(other, axis=-1)
                assert cosine.min() > 0.99


def errors(cache: Cache, spec: EncoderSpec, key: bytes) -> list[str]:
    """The error of every row that is stored under `key`, "" of a good one."""
    return sorted(error.decode() for s in cache.shards(spec) for error in s.errors[s.keys == key].tolist())


def test_what_failed_is_remembered_and_tried_again_only_when_asked(data: Path, tiny_clip: Path, tmp_path: Path) -> None:
    def extract(retry: bool = False) -> Extraction:
        asked = options(*ALL, views=1)
        return extract_features(data, [f"clip:{tiny_clip}"], cache=tmp_path, options=asked, settings=cpu(0, retry))

    first = extract()
    images = [tower.spec for tower in first.towers if tower.spec.modality == "image"]
    key = content_key(b"no photo")
    assert len(images) == 6
    assert {first.unreadable[spec.folder_name] for spec in images} == {1}
    before = files(tmp_path)
    for retry in (False, True, True):
        again = extract(retry)
        assert again.failures == ([("s3", "not an image")] if retry else [])
        assert again.nothing_to_do == (not retry)
        assert {again.unreadable[spec.folder_name] for spec in images} == {1}
        assert {again.stored[spec.folder_name] for spec in images} == {5}
        assert files(tmp_path) == before  # no second row that says the same
        for spec in images:
            assert errors(opened(again), spec, key) == ["not an image"]
            block = opened(again).map(samples_of(again)[3:4], spec)
            assert (block.mask.tolist(), block.lengths.tolist()) == ([False], [0])


def test_a_photo_that_can_be_read_after_all_is_stored_once(data: Path, tiny_clip: Path, tmp_path: Path) -> None:
    """As after an update of the decoder: there are errors for two photos that are fine."""
    asked, clip = options("pooled", "tokens", views=0), [f"clip:{tiny_clip}"]
    whole = extract_features(data, clip, cache=tmp_path / "whole", options=asked, settings=cpu(1))
    images = [tower.spec for tower in whole.towers if tower.spec.modality == "image"]
    keys = [content_key((data / "data" / f"s{number}.png").read_bytes()) for number in (0, 4)]
    cache = Cache(tmp_path / "cache", "set")
    for spec in images:
        nothing = np.empty((2, 0), np.float32)
        with cache.writer(spec, {}) as writer:
            writer.add(Rows(keys, ["s0", "s4"], ["bad"] * 2, nothing if spec.output == "pooled" else [nothing] * 2))
    for retry, new, unreadable in ((False, 3, 3), (True, 2, 1), (True, 0, 1), (False, 0, 1)):
        again = extract_features(
            data,
            clip,
            cache=tmp_path / "cache",
            options=asked,
            settings=cpu(1, retry),
        )
        for spec in images:
            assert again.new.get(spec.folder_name, 0) == new
            assert again.unreadable[spec.folder_name] == unreadable
            for key in keys:
                assert errors(cache, spec, key) == (["bad"] if unreadable == 3 else ["", "bad"])
            assert errors(cache, spec, content_key(b"no photo")) == ["not an image"]
    for spec in images:
        for one, two in zip(stored(again, spec), stored(whole, spec), strict=True):
            np.testing.assert_array_equal(one, two)


def test_values_that_are_not_finite_are_a_failure_of_that_sample(data: Path, tiny_bert: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_bert, tmp_path / "odd"))
    state = load_file(folder / "model.safetensors")
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    state["embeddings.word_embeddings.weight"][words["tired"]] = float("nan")
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    found = extract_features(
        data, [f"bert:{folder}"], cache=tmp_path / "cache", options=options(views=0), settings=cpu(2)
    )
    assert found.failures == [("s1", "the encoder gives no finite vector")]
    assert set(found.unreadable.values()) == {1}
    for tower in found.towers:
        block, table = (
            opened(found).map(samples_of(found), tower.spec),
            opened(found).row_index(tower.spec),
        )
        assert table.lengths[table.failed].tolist() == ([1] if tower.spec.output == "pooled" else [0])
        assert block.mask.tolist() == [True, False, False, True, True, True, True]
        assert np.isfinite(block.batch(np.arange(7))[0]).all()
