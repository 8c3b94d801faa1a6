"""What is stored comes back, aligned and bit-exact; what is foreign or damaged is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import mmfeat.cache.store as writing
from mmfeat.cache.shard import Rows, open_shard, write_shard
from mmfeat.cache.store import Cache
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import CacheError, CacheMissError
from mmfeat.samples.dataset import Sample, content_key

SPEC = EncoderSpec("hashing", "text", "", "builtin:1", "float32", "float32", cleaning="tweet")
TOKENS = dataclasses.replace(SPEC, output="tokens", pooling="none")
TEXTS = [f"text {number}" for number in range(40)]
VECTORS = np.random.default_rng(1).standard_normal((40, 24)).astype(np.float32)
SAMPLES = [Sample(f"s{number}", text) for number, text in enumerate(TEXTS)]


def rows(numbers: range | list[int]) -> Rows:
    return Rows(
        [content_key(TEXTS[n].encode()) for n in numbers],
        [f"s{n}" for n in numbers],
        [""] * len(numbers),
        VECTORS[list(numbers)],
    )


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """Two shards, 25 and 15 rows."""
    cache = Cache(tmp_path, "set")
    for part in (range(25), range(25, 40)):
        with cache.writer(SPEC, {}) as writer:
            writer.add(rows(part))
    return cache


def shard_paths(cache: Cache) -> list[Path]:
    return sorted(cache.spec_folder(SPEC).glob("*.h5"))


def test_vectors_come_back_bit_exact_in_the_order_of_the_samples(cache: Cache) -> None:
    order = np.random.default_rng(2).permutation(40)
    features = cache.load([SAMPLES[n] for n in order], [SPEC])
    (block,) = features.blocks
    assert features.ids == tuple(f"s{n}" for n in order)
    assert block.mask.all()
    np.testing.assert_array_equal(block.vectors, VECTORS[order])


def test_equal_texts_share_a_row(cache: Cache) -> None:
    block = cache.load([Sample("x", TEXTS[3]), Sample("y", TEXTS[3])], [SPEC]).blocks[0]
    np.testing.assert_array_equal(block.vectors, VECTORS[[3, 3]])


def test_failed_rows_are_remembered_masked(cache: Cache) -> None:
    key = content_key(b"broken")
    with cache.writer(SPEC, {}) as writer:
        writer.add(Rows([key], ["b"], ["not decodable"], np.empty((1, 0), np.float32)))
    keys, failed = cache.row_index(SPEC).unique()
    assert keys[failed].tolist() == [key]
    block = cache.load([Sample("b", "broken"), SAMPLES[1]], [SPEC]).blocks[0]
    assert block.mask.tolist() == [False, True]
    assert np.isnan(block.vectors[0]).all()
    np.testing.assert_array_equal(block.vectors[1], VECTORS[1])


def test_a_shard_that_vanished_is_a_miss(cache: Cache) -> None:
    shard_paths(cache)[0].unlink()
    with pytest.raises(CacheMissError):
        cache.load(SAMPLES, [SPEC])


def test_another_spec_shares_nothing(cache: Cache) -> None:
    other = dataclasses.replace(SPEC, cleaning="none")
    assert len(cache.row_index(other).unique()[0]) == 0
    with pytest.raises(CacheMissError):
        cache.load(SAMPLES, [other])


def test_the_same_rows_written_twice_leave_the_first_file_alone(cache: Cache) -> None:
    before = {path: (path.stat().st_ino, path.read_bytes()) for path in shard_paths(cache)}
    with cache.writer(SPEC, {}) as writer:
        writer.add(rows(range(25)))
    assert {path: (path.stat().st_ino, path.read_bytes()) for path in shard_paths(cache)} == before


def test_a_folder_that_a_kill_left_empty_is_filled(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "set")
    cache.spec_folder(SPEC).mkdir(parents=True)
    assert len(cache.row_index(SPEC).unique()[0]) == 0
    with cache.writer(SPEC, {}) as writer:
        writer.add(rows([0]))
    assert len(cache.row_index(SPEC).unique()[0]) == 1


def test_dataset_names_stay_inside_the_cache(tmp_path: Path) -> None:
    for name in ("../../etc", "..", ".", "a/b", "a b", "推文", "微博"):
        assert Cache(tmp_path, name).folder.parent == tmp_path
        assert Cache(tmp_path, name).folder.name not in ("", ".", "..")
    assert len({Cache(tmp_path, name).folder for name in ("推文", "微博", "a/b", "a-b", "a b")}) == 5


def test_a_good_row_wins_over_an_error_for_the_same_content(cache: Cache) -> None:
    key = content_key(b"later")
    for error, vector in (("broken", np.empty((1, 0), np.float32)), ("", VECTORS[:1])):
        with cache.writer(SPEC, {}) as writer:
            writer.add(Rows([key], ["l"], [error], vector))
    keys, failed = cache.row_index(SPEC).unique()
    assert not failed[keys == key].any()
    block = cache.load([Sample("l", "later")], [SPEC]).blocks[0]
    assert block.mask.all()
    np.testing.assert_array_equal(block.vectors, VECTORS[:1])


def test_an_interrupted_commit_is_made_up_for(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = writing.write_shard, []

    def interrupted_once(*arguments: object) -> Path:
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(writing, "write_shard", interrupted_once)
    other = dataclasses.replace(SPEC, cleaning="none")

    def write() -> None:
        with cache.writer(other, {}) as writer:
            writer.add(rows([0]))
            writer.commit()

    with pytest.raises(KeyboardInterrupt):
        write()
    assert len(cache.row_index(other).unique()[0]) == 1


def test_shards_of_another_width_or_dtype_are_refused(cache: Cache) -> None:
    for wrong in (VECTORS[:1, :5], VECTORS[:1].astype(np.float16)):
        spec = SPEC.stated | {"storage": str(wrong.dtype)}
        odd = Rows([content_key(b"odd")], ["o"], [""], wrong)
        write_shard(cache.spec_folder(SPEC), SPEC.fingerprint, spec, [odd])
        with pytest.raises(CacheError, match=r"of width \d+ among others of hashing"):
            cache.load(SAMPLES, [SPEC])
        for path in set(shard_paths(cache)):
            if len(open_shard(path, SPEC.fingerprint).keys) == 1:
                path.unlink()


def test_rows_are_committed_in_time_also_while_no_more_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path, "set")
    with cache.writer(SPEC, {}) as writer:
        writer.add(rows(range(3)))
        writer.commit_if_due()
        assert len(cache.row_index(SPEC).unique()[0]) == 0
        monkeypatch.setattr(writing, "SHARD_SECONDS", 0.0)
        writer.commit_if_due()
        assert len(cache.row_index(SPEC).unique()[0]) == 3


def test_values_of_two_widths_are_never_written(cache: Cache) -> None:
    """The shorter ones would be lost."""
    for spec, values in ((SPEC, [VECTORS[:1], VECTORS[1:2, :5]]), (TOKENS, [[VECTORS[:3]], [VECTORS[:2, :5]]])):
        odd = [Rows([content_key(str(n).encode())], ["o"], [""], value) for n, value in enumerate(values)]
        with pytest.raises(CacheError, match="values of width 5, 24 for one encoder"):
            write_shard(tmp := cache.spec_folder(spec), spec.fingerprint, spec.stated, odd)
        assert not tmp.exists() or len(list(tmp.glob("*.h5"))) in (0, 2)


def test_keys_of_another_length_are_never_written(cache: Cache) -> None:
    """Two that make up for each other would give every row between them to its neighbour."""
    key = content_key(b"some")
    odd = Rows([key + b"0", key, key[:-1]], ["a", "b", "c"], [""] * 3, VECTORS[:3])
    with pytest.raises(CacheError, match="content keys of 31, 33 bytes; they have 32"):
        write_shard(cache.spec_folder(SPEC), SPEC.fingerprint, SPEC.stated, [odd])
    assert len(cache.row_index(SPEC).unique()[0]) == 40
