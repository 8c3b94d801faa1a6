"""Whatever is read is bit for bit what was written, or an error: any rows, any order, any number of readers."""

from __future__ import annotations

import dataclasses
import hashlib
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from mmfeat.cache.reading import FAILED, GOOD, MISSING, KnownKeys, RowIndex, corrupt_pieces, read_vectors, scan
from mmfeat.cache.shard import MIB, Rows
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.errors import CacheError
from mmfeat.samples.dataset import content_key
from tests.cache.shards import flip

# Width, dtype and rows of each shard: rows of 2 bytes to more than 4 MiB, with and without a border on each MiB.
SHAPES = {
    "2 bytes": (1, "float16", (550_000, 3)),
    "24 bytes": (6, "float32", (10, 50_000)),
    "3984 bytes": (996, "float32", (300, 1200)),
    "1 KiB": (256, "float32", (2048, 5)),
    "3 KiB": (384, "float64", (3000,)),
    "512 KiB": (MIB // 8, "float32", (8, 1)),
    "4.2 MiB": (1_100_000, "float32", (2, 1)),
}
LENGTHS = [0, 3, 1, 0, 0, 700, 2, 5, 1, 300, 0, 1, 40, 0]


def spec(dtype: str, output: str = "pooled") -> EncoderSpec:
    return EncoderSpec("hog", "image", "", "builtin:1", "float32", dtype, output=output)


class Stored(NamedTuple):
    """A cache of one encoder and its values in the order of the index."""

    cache: Cache
    spec: EncoderSpec
    values: np.ndarray | list[np.ndarray]

    @property
    def index(self) -> RowIndex:
        """Opened anew: nothing is known to be right yet."""
        return self.cache.row_index(self.spec)


def keys(start: int, count: int) -> list[bytes]:
    return [b"%032x" % number for number in range(start, start + count)]


def store(root: Path, spec: EncoderSpec, shards: list[np.ndarray] | list[list[np.ndarray]]) -> Stored:
    """One shard each; the key of a row tells its number, so the index can be sorted out."""
    cache, start = Cache(root, "set"), 0
    for values in shards:
        names = keys(start, len(values))
        with cache.writer(spec, {}) as writer:
            writer.add(Rows(names, ["x"] * len(names), [""] * len(names), values))
        start += len(values)
    order = [int(key, 16) for key in cache.row_index(spec).keys.tolist()]
    if spec.output == "pooled":
        return Stored(cache, spec, np.concatenate(shards)[order])
    flat = [row for values in shards for row in values]
    return Stored(cache, spec, [flat[number] for number in order])


def noise(shape: tuple[int, ...], dtype: str, seed: int = 1) -> np.ndarray:
    """Any bit pattern, NaN among them."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(count), dtype).reshape(shape)


@pytest.fixture(scope="module", params=SHAPES)
def vectors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    width, dtype, counts = SHAPES[request.param]
    shards = [noise((count, width), dtype, seed) for seed, count in enumerate(counts)]
    return store(tmp_path_factory.mktemp("vectors"), spec(dtype), shards)


@pytest.fixture(scope="module", params=[(24, "float16"), (996, "float32"), (MIB // 2, "float32")])
def tokens(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    width, dtype = request.param
    lengths = LENGTHS if width < MIB // 2 else [0, 2, 1, 0, 3]
    ragged = [noise((length, width), dtype, seed) for seed, length in enumerate(lengths)]
    return store(tmp_path_factory.mktemp("tokens"), spec(dtype, "tokens"), [ragged[:3], ragged[3:]])


def same(mine: np.ndarray, theirs: np.ndarray) -> bool:
    return (mine.shape, mine.dtype, mine.tobytes()) == (theirs.shape, theirs.dtype, theirs.tobytes())


def selections(count: int, row_bytes: int) -> Iterator[np.ndarray]:
    """Row numbers in ways that differ to a reader."""
    rng, few = np.random.default_rng(4), min(count, 3000)
    yield np.arange(count)
    yield np.arange(count)[::-1]
    yield np.arange(0)
    yield from (np.array([row]) for row in (0, count // 2, count - 1))
    yield np.array([count - 1, 0])
    yield rng.permutation(few)
    yield np.sort(rng.integers(0, count, few))
    yield rng.integers(0, count, few)
    yield np.repeat(rng.integers(0, count, few // 3 + 1), 3)
    for _ in range(4):
        start = int(rng.integers(0, count))
        yield np.arange(start, min(count, start + int(rng.integers(1, few + 1))))
    borders = np.arange(0, count * row_bytes, MIB) // row_bytes
    yield np.unique(np.clip(np.concatenate([borders - 1, borders, borders + 1]), 0, count - 1))
    yield np.arange(borders[len(borders) // 2], count)  # from a border on
    yield np.concatenate([np.arange(count // 2, count), np.arange(count // 2)])


def test_any_rows_are_bit_exact(vectors: Stored) -> None:
    expected, index = np.asarray(vectors.values), vectors.index
    for rows in selections(len(expected), expected[0].nbytes):
        for one in (vectors.index, index):  # with nothing compared yet, and with what earlier reads compared
            out = np.empty((len(rows), expected.shape[1]), expected.dtype)
            one.vectors(rows, out)
            assert same(out, expected[rows])


def test_rows_go_to_any_places_and_nowhere_else(vectors: Stored) -> None:
    expected, rng = np.asarray(vectors.values), np.random.default_rng(5)
    count, (_, width) = min(len(expected), 500), expected.shape
    swapped = np.arange(count)
    swapped[[count // 2 - 1, count // 2]] = swapped[[count // 2, count // 2 - 1]]
    for out in (np.zeros((3 * count, width), expected.dtype), np.zeros((3 * count, 2 * width), expected.dtype)[:, ::2]):
        for rows, places in (
            (rng.permutation(len(expected))[:count], rng.permutation(3 * count)[:count]),
            (np.arange(count), np.arange(count) + count),
            (np.arange(count), np.arange(count)[::-1] * 3),
            (np.arange(count), np.arange(count) * 2),
            (np.arange(count), swapped),
        ):
            out[:] = 0
            asked = np.full(len(out), -1)
            asked[places] = rows
            vectors.index.vectors(asked, out)
            wanted = np.zeros_like(out)
            wanted[places] = expected[rows]
            assert same(np.ascontiguousarray(out), np.ascontiguousarray(wanted))


def test_a_scan_sees_every_good_row_once(vectors: Stored) -> None:
    seen: list[bytes] = []
    index, expected = vectors.index, np.asarray(vectors.values)
    for names, values in vectors.cache.scan(vectors.spec):
        assert len(names) == len(values) > 0
        assert same(np.array(values), expected[index.find(names)])
        seen += names.tolist()
    assert sorted(seen) == keys(0, len(vectors.values))


def test_a_scan_leaves_failed_rows_out(tmp_path: Path) -> None:
    good = store(tmp_path, spec("float32"), [noise((5, 8), "float32")])
    with good.cache.writer(good.spec, {}) as writer:
        values = np.concatenate([np.full((1, 8), np.nan, np.float32), noise((1, 8), "float32", 9)])
        writer.add(Rows(keys(5, 2), ["x", "y"], ["bad", ""], values))
        writer.add(Rows(keys(7, 1), ["z"], ["bad"], np.empty((1, 0), np.float32)))
    assert sorted(key for names, _ in good.cache.scan(good.spec) for key in names.tolist()) == [
        *keys(0, 5),
        *keys(6, 1),
    ]


def test_any_tokens_are_bit_exact(tokens: Stored) -> None:
    count, rng = len(tokens.values), np.random.default_rng(6)
    for rows in (*selections(count, 1), np.array([-1, 0, -1]), np.array([-1]), rng.integers(-1, count, 40)):
        found = tokens.index.tokens(rows)
        lengths = [0 if row < 0 else len(tokens.values[row]) for row in rows]
        assert found.shape == (len(rows), max(lengths, default=0), tokens.values[0].shape[1])
        for row, length, mine in zip(rows, lengths, found, strict=True):
            assert not mine[length:].any()
            assert same(mine[:length], tokens.values[row][:length])


def all_vectors(index: RowIndex) -> np.ndarray:
    out = np.empty((len(index.keys), index.width), np.float32)
    index.vectors(np.arange(len(out)), out)
    return out


# Everything that reads values, each from all rows.
READERS: dict[str, Callable[[RowIndex], object]] = {
    "vectors": all_vectors,
    "tokens": lambda index: index.tokens(np.arange(len(index.keys))),
    "one by one": lambda index: [index.tokens(np.array([row])) for row in range(len(index.keys))],
    "scan": lambda index: [np.array(values) for shard in index.shards for _, values in scan(shard)],
}


@pytest.fixture
def small(tmp_path: Path) -> Stored:
    """One shard of 5.4 MiB, rows of 3984 bytes."""
    return store(tmp_path, spec("float32"), [noise((1432, 996), "float32")])


@pytest.mark.parametrize("at", [0, MIB - 1, 2 * MIB + 12345, 5 * MIB, 1432 * 3984 - 1])
def test_a_flipped_bit_is_an_error_for_whoever_touches_its_mib(small: Stored, at: int) -> None:
    index = small.index  # opened before
    (shard,) = index.shards
    flip(shard.path, shard.values.offset + at)
    for read in READERS.values():
        for one in (small.index, index):
            with pytest.raises(CacheError, match=rf"do not match their checksum \(MiB {at // MIB}\); mmfeat cache"):
                read(one)
    parts: list[np.ndarray] = []
    with pytest.raises(CacheError, match="checksum"):
        parts += (np.array(values) for _, values in small.cache.scan(small.spec))
    assert all(same(row, small.values[n]) for n, row in enumerate(row for part in parts for row in part))
    for row in range(0, 1432, 13):
        touched = range(row * 3984 // MIB, (row * 3984 + 3983) // MIB + 1)
        for read in (read_one, lambda index, row: index.tokens(np.array([row]))[0]):
            try:
                mine = read(index, row)
            except CacheError:
                assert at // MIB in touched
            else:
                assert at // MIB not in touched
                assert same(mine, small.values[row][None])


def read_one(index: RowIndex, row: int) -> np.ndarray:
    out = np.empty((1, index.width), np.float32)
    index.vectors(np.array([row]), out)
    return out


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("left", [0, 4096, 5 * MIB, -1])
def test_a_shard_that_is_cut_after_it_was_opened_is_an_error(small: Stored, read: str, left: int) -> None:
    """Whether or not it was compared before; a signal would end the process."""
    fresh, compared = small.index, small.index
    all_vectors(compared)
    (shard,) = fresh.shards
    os.truncate(shard.path, left if left >= 0 else shard.values.offset + shard.values.nbytes - 1)
    for index in (fresh, compared):
        with pytest.raises(CacheError, match=r"\.h5: "):
            READERS[read](index)


def test_a_shard_that_is_cut_during_a_scan_is_an_error(small: Stored) -> None:
    parts = small.cache.scan(small.spec)
    next(parts)
    os.truncate(small.index.shards[0].path, 8192)
    with pytest.raises(CacheError, match="it became shorter while it was read"):
        next(parts)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "the shard is gone; run mmfeat extract again"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read|became shorter"),
        (lambda path: (path.unlink(), path.symlink_to(path)), "cannot be read"),
    ],
)
def test_a_shard_that_is_lost_after_it_was_opened_is_an_error(
    small: Stored, damage: Callable[[Path], object], message: str
) -> None:
    index = small.index
    (shard,) = index.shards
    damage(shard.path)
    for read in (
        lambda: all_vectors(index),
        lambda: index.tokens(np.array([3])),
        lambda: next(scan(shard)),
        lambda: corrupt_pieces(shard),
    ):
        with pytest.raises(CacheError, match=message):
            read()


def digest(index: RowIndex, seed: int) -> str:
    """Of random rows, as a loader's worker reads them."""
    rows, found = np.random.default_rng(seed).integers(0, len(index.keys), 200), hashlib.sha256()
    for part in np.array_split(rows, 5):
        out = np.empty((len(part), index.width), np.float32)
        index.vectors(part, out)
        assert same(index.tokens(part)[:, 0], out)
        found.update(out.tobytes())
    return found.hexdigest()


def expected_digest(stored: Stored, seed: int) -> str:
    rows = np.random.default_rng(seed).integers(0, len(stored.values), 200)
    return hashlib.sha256(b"".join(stored.values[row].tobytes() for row in rows)).hexdigest()


@pytest.mark.parametrize("way", ["threads", "fork", "spawn"])
def test_many_readers_at_once_read_the_same(small: Stored, way: str) -> None:
    index, seeds = small.index, range(12)
    work = [(index, seed) for seed in seeds]
    if way == "threads":
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(digest, *zip(*work, strict=True)))
    else:
        with multiprocessing.get_context(way).Pool(2) as processes:
            found = processes.starmap(digest, work)
    assert found == [expected_digest(small, seed) for seed in seeds]


def test_a_shard_can_be_sent_to_another_process(tokens: Stored) -> None:
    for shard in tokens.index.shards:
        copy = pickle.loads(pickle.dumps(shard))  # noqa: S301
        for field in dataclasses.fields(shard):
            np.testing.assert_array_equal(getattr(copy, field.name), getattr(shard, field.name))
        assert len(pickle.dumps(shard)) < 10_000  # where the values lie, not the values


def test_an_empty_read_touches_nothing(small: Stored) -> None:
    (shard,) = small.index.shards
    shard.path.unlink()
    out = np.zeros((0, 996), np.float32)
    small_index = RowIndex([shard])
    small_index.vectors(np.arange(0), out)
    assert small_index.tokens(np.arange(0)).shape == (0, 0, 996)
    with pytest.raises(CacheError):
        read_vectors(shard, np.array([0]), np.zeros((1, 996), np.float32), np.array([0]))


def keys_of(numbers: range) -> np.ndarray:
    return np.array([content_key(str(number).encode()) for number in numbers], "S32")


@pytest.fixture
def overlapping(tmp_path: Path) -> Cache:
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


def test_a_good_row_counts_before_an_error(overlapping: Cache) -> None:
    states, asked = known(overlapping).states(keys_of(range(15)))
    assert states.tolist() == [GOOD] * 10 + [FAILED] * 3 + [MISSING] * 2
    assert not asked.any()


def test_what_was_asked_for_counts_once_and_is_about_to_be_there(overlapping: Cache) -> None:
    found = known(overlapping)
    found.ask(keys_of(range(9, 14)))
    states, asked = found.states(keys_of(range(8, 15)))
    assert states.tolist() == [GOOD, GOOD, FAILED, FAILED, FAILED, GOOD, MISSING]
    assert asked.tolist() == [False, *[True] * 5, False]
    assert len(found) == 14


def test_an_empty_cache_has_no_known_keys(tmp_path: Path) -> None:
    found = known(Cache(tmp_path, "data"))
    states, asked = found.states(keys_of(range(3)))
    assert (states.tolist(), asked.tolist(), len(found)) == ([MISSING] * 3, [False] * 3, 0)
    found.ask(keys_of(range(3)))
    assert found.states(keys_of(range(3)))[0].tolist() == [GOOD] * 3


@pytest.mark.parametrize("seed", range(5))
def test_known_keys_say_what_a_dictionary_says(seed: int) -> None:
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


def test_known_keys_take_few_bytes_a_content() -> None:
    found = KnownKeys([])
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    keys = digits[np.random.default_rng(0).integers(0, 16, (10_000, 32))].reshape(-1).view("S32")
    found.ask(np.unique(keys))
    assert sum(array.nbytes for array in vars(found).values()) <= 18 * 10_000
