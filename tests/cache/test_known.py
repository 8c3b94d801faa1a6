"""Known keys: what is stored, however many shards and however often asked, in 16 bytes a content."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mmfeat.cache.reading import FAILED, GOOD, MISSING, KnownKeys
from mmfeat.cache.shard import Rows
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.samples.dataset import content_key


def keys_of(numbers: range) -> np.ndarray:
    return np.array([content_key(str(number).encode()) for number in numbers], "S32")


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    """Ten good rows, five of them again, and five errors of which two were good elsewhere."""
    cache = Cache(tmp_path, "data")
    (tower,) = describe_encoders(["hashing"], EncoderOptions(dtype="float32", cleaning="tweet"))
    for numbers, error in ((range(10), ""), (range(5, 10), ""), (range(8, 13), "broken")):
        with cache.writer(tower.spec, {}) as writer:
            keys = keys_of(numbers).tolist()
            values = np.full((len(keys), 4), np.nan if error else 1, np.float32)
            writer.add(Rows(keys, ["x"] * len(keys), [error] * len(keys), values))
    return cache


def known(cache: Cache) -> KnownKeys:
    (tower,) = describe_encoders(["hashing"], EncoderOptions(dtype="float32", cleaning="tweet"))
    return KnownKeys(cache.shards(tower.spec))


def test_a_good_row_counts_before_an_error(store: Cache) -> None:
    states, asked = known(store).states(keys_of(range(15)))
    assert states.tolist() == [GOOD] * 10 + [FAILED] * 3 + [MISSING] * 2
    assert not asked.any()


def test_what_was_asked_for_counts_once_and_is_about_to_be_there(store: Cache) -> None:
    found = known(store)
    found.ask(keys_of(range(9, 14)))
    states, asked = found.states(keys_of(range(8, 15)))
    assert states.tolist() == [GOOD, GOOD, FAILED, FAILED, FAILED, GOOD, MISSING]
    assert asked.tolist() == [False, *[True] * 5, False]
    assert len(found) == 14


def test_an_empty_cache_knows_nothing(tmp_path: Path) -> None:
    found = known(Cache(tmp_path, "data"))
    states, asked = found.states(keys_of(range(3)))
    assert (states.tolist(), asked.tolist(), len(found)) == ([MISSING] * 3, [False] * 3, 0)
    found.ask(keys_of(range(3)))
    assert found.states(keys_of(range(3)))[0].tolist() == [GOOD] * 3


@pytest.mark.parametrize("seed", range(5))
def test_it_says_what_a_dictionary_says(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found, wanted = KnownKeys([]), set()
    for _ in range(20):
        numbers = np.unique(rng.integers(0, 200, rng.integers(1, 30)))
        keys = np.array([content_key(str(number).encode()) for number in numbers], "S32")
        states, asked = found.states(keys)
        assert (states == GOOD).tolist() == asked.tolist() == [number in wanted for number in numbers.tolist()]
        found.ask(keys)
        wanted |= set(numbers.tolist())
    assert len(found) == len(wanted)


def test_it_takes_few_bytes_a_content() -> None:
    found = KnownKeys([])
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    keys = digits[np.random.default_rng(0).integers(0, 16, (10_000, 32))].reshape(-1).view("S32")
    found.ask(np.unique(keys))
    assert sum(array.nbytes for array in vars(found).values()) <= 18 * 10_000
