"""The files beside the shards may hold anything: what cannot be used is told in one line, or counts as absent."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from mmfeat.cache.store import Cache
from mmfeat.cache.verify import verify_cache
from mmfeat.errors import CacheError, CacheMissError
from mmfeat.extraction.requests import all_requests, latest_request
from mmfeat.samples.dataset import Sample, content_key
from mmfeat.samples.keys import ENTRY, StatIndex
from tests.cache.shards import POOLED_SPEC, SAMPLES, VECTORS, rows


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    """One shard with its spec beside it."""
    store = Cache(tmp_path / "cache", "set")
    with store.writer(POOLED_SPEC, {}) as writer:
        writer.add(rows(POOLED_SPEC))
    return store


def refused_until_moved(store: Cache, path: Path) -> None:
    """One line with the remedy; after it, the shards speak for themselves."""
    with pytest.raises(CacheError) as caught:
        store.load(SAMPLES, [POOLED_SPEC])
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "mmfeat cache verify --quarantine" in str(caught.value)
    result = verify_cache(store.folder.parent, quarantine=True)
    assert [damage.path for damage in result.damages] == [path]
    assert (result.shards, result.rows) == (1, len(SAMPLES))  # they were looked at all the same
    np.testing.assert_array_equal(store.load(SAMPLES, [POOLED_SPEC]).blocks[0].vectors, VECTORS)
    assert verify_cache(store.folder.parent).damages == []


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "[" * 5000, "5", '{"spec": 5}', "\0" * 100, '{"spec": {"family": "x"}, "fingerprint": "", "a": 1}'],
)
def test_a_spec_file_of_any_content_is_one_line(store: Cache, content: str) -> None:
    path = store.spec_folder(POOLED_SPEC) / "spec.json"
    path.write_text(content)
    refused_until_moved(store, path)


def test_a_spec_file_that_is_a_pipe_does_not_hang_what_looks_at_the_cache(store: Cache) -> None:
    path = store.spec_folder(POOLED_SPEC) / "spec.json"
    path.unlink()
    os.mkfifo(path)
    (damage,) = verify_cache(store.folder.parent, quarantine=True).damages
    assert (damage.path, damage.reason) == (path, "not the spec of this folder (not a plain file)")
    np.testing.assert_array_equal(store.load(SAMPLES, [POOLED_SPEC]).blocks[0].vectors, VECTORS)


@pytest.mark.parametrize(("field", "value"), [("max_length", 7), ("max_length", "0"), ("modality", ["text"])])
def test_a_spec_file_of_another_encoder_is_one_line(store: Cache, field: str, value: Any) -> None:
    path = store.spec_folder(POOLED_SPEC) / "spec.json"
    content = json.loads(path.read_text())
    content["spec"][field] = value
    path.write_text(json.dumps(content))
    refused_until_moved(store, path)


def test_notes_of_any_content_only_mean_naming_the_flags_again(store: Cache) -> None:
    folder = store.folder.parent / "requests"
    folder.mkdir()
    for number, content in enumerate((b"", b"[]", b"{}", b"\xff" * 9, b'{"options": {}, "fingerprints": 3}')):
        (folder / f"{number}.json").write_bytes(content)
    assert all_requests(store.folder.parent) == []
    with pytest.raises(CacheMissError, match="nothing was extracted"):
        latest_request(store.folder.parent)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "empty", "longer"])
def test_a_damaged_stat_index_counts_as_absent(store: Cache, tmp_path: Path, damage: str) -> None:
    photos = [tmp_path / f"{number}.jpg" for number in range(3)]
    for number, photo in enumerate(photos):
        photo.write_bytes(bytes([number]) * 9)
        os.utime(photo, (1, 1))
    samples = [Sample(photo.stem, image=photo) for photo in photos]
    expected = [content_key(photo.read_bytes()) for photo in photos]
    index = store.folder / "images.index"
    entries = np.array([(1, 2, b"0" * 32)] * 3, ENTRY)
    good = xxhash.xxh3_128_digest(entries.tobytes()) + entries.tobytes()
    flipped = bytes([*good[:40], good[40] ^ 1, *good[41:]])
    kinds = {"cut": good[:-5], "flipped": flipped, "text": b"not an index " * 20, "empty": b"", "longer": good + b"\0"}
    index.write_bytes(good)
    assert len(StatIndex(index)) == 3
    index.write_bytes(kinds[damage])
    assert len(StatIndex(index)) == 0
    assert store.content_keys(samples, "image").keys.tolist() == expected
