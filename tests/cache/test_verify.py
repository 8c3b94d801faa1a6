"""Whatever changed on the disk is told, with the rows it touches, and only moved away: nothing is deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from mmfeat.cache.shard import MIB, Rows
from mmfeat.cache.store import Cache
from mmfeat.cache.verify import Damage, verify_cache
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.extraction.extract import extract_features
from mmfeat.samples.dataset import content_key, read_samples
from tests.cache.shards import (
    POOLED_SPEC,
    ROWS,
    SAMPLES,
    TOKEN_SPEC,
    VECTORS,
    falsify,
    flip,
    rows,
    values_of,
    write,
)

LARGE, LARGE_WIDTH = 2000, 401  # 3.06 MiB; no MiB ends where a row does
SPECS = (POOLED_SPEC, TOKEN_SPEC)


def large_rows(spec: EncoderSpec) -> Rows:
    """The same values as 2,000 vectors, or as 500 samples of which each has up to 7 tokens."""
    vectors = np.random.default_rng(2).standard_normal((LARGE, LARGE_WIDTH)).astype(np.float32)
    parts = [vectors] if spec.output == "pooled" else np.split(vectors, large_bounds()[1:-1])
    count = LARGE if spec.output == "pooled" else len(parts)
    keys = [content_key(str(n).encode()) for n in range(count)]
    return Rows(keys, [f"s{n}" for n in range(count)], [""] * count, vectors if spec.output == "pooled" else parts)


def large_bounds() -> np.ndarray:
    lengths = np.tile([4, 0, 1, 7, 3, 5, 0, 12], LARGE // 32 + 1)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return np.append(bounds[bounds < LARGE], LARGE)


def positions(path: Path) -> list[int]:
    """The first 64 bytes, all that HDF5 wrote about a dataset, each column's ends, padding, and 150 places anywhere."""
    data = path.read_bytes()
    start, stop = values_of(path)
    places = {*range(64), len(data) - 1, start - 1, start, stop - 1, *range(start, stop, MIB // 2)}
    with h5py.File(path, "r") as file:
        for name in file:
            offset = file[name].id.get_offset()
            places |= {offset - 1, offset, offset + 1, offset + file[name].nbytes - 1}
            header = data.index(name.encode() + b"\0") if name.encode() + b"\0" in data else data.index(name.encode())
            places |= {*range(header - 4, header + 12)}
    random = np.random.default_rng(3)
    return sorted({*places, *random.integers(0, start, 40).tolist(), *random.integers(0, len(data), 110).tolist()})


def rows_in_piece(spec: EncoderSpec, piece: int, size: int) -> tuple[int, int]:
    """First and last sample with a byte in a MiB, looked up one by one."""
    bounds = np.arange(LARGE + 1) if spec.output == "pooled" else large_bounds()
    low, high = piece * MIB, min((piece + 1) * MIB, size)
    starts, stops = bounds[:-1] * LARGE_WIDTH * 4, bounds[1:] * LARGE_WIDTH * 4
    inside = np.flatnonzero((starts < high) & (stops > low) & (starts < stops))
    return int(inside[0]), int(inside[-1])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.output)
def test_one_flipped_bit_anywhere_is_told(tmp_path: Path, spec: EncoderSpec) -> None:
    path = write(Cache(tmp_path, "set").spec_folder(spec), spec, large_rows(spec))
    start, stop = values_of(path)
    assert verify_cache(tmp_path).damages == []
    for at in positions(path):
        flip(path, at)
        (damage,) = verify_cache(tmp_path).damages
        assert damage.path == path
        if start <= at < stop:
            piece = (at - start) // MIB
            first, last = rows_in_piece(spec, piece, stop - start)
            expected = f"MiB {piece} does not match its checksum: rows {first} to {last} (samples s{first} to s{last})"
            assert damage.reason == expected, at
        flip(path, at)
    assert verify_cache(tmp_path).damages == []


def only_damage(root: Path) -> Damage:
    (damage,) = verify_cache(root).damages
    return damage


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.output)
def test_what_else_can_happen_to_a_file_is_told(tmp_path: Path, spec: EncoderSpec) -> None:
    path = write(Cache(tmp_path, "set").spec_folder(spec), spec)
    whole = path.read_bytes()
    start, stop = values_of(path)
    for size in (0, 1, 100, start, start + 7, stop - 1, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert only_damage(tmp_path).path == path
    for more in (b"\0", b"more", bytes(MIB)):
        path.write_bytes(whole + more)
        assert only_damage(tmp_path).reason.startswith("it does not match its name")
    path.write_bytes(whole)
    other = path.rename(path.with_name(f"{'a' * 32}.h5"))
    assert only_damage(tmp_path) == Damage(other, "it does not match its name, which is its checksum")
    other.rename(path)
    assert verify_cache(tmp_path).damages == []


def test_values_that_cannot_be_right_are_told(tmp_path: Path) -> None:
    for spec, row, sample in ((POOLED_SPEC, 3, 3), (TOKEN_SPEC, 4, 3)):  # the fifth token is of the fourth sample
        path = write(Cache(tmp_path / spec.output, "set").spec_folder(spec), spec)
        wrong = falsify(path, row, np.full((1, VECTORS.shape[1]), np.inf, np.float32))
        damage = only_damage(tmp_path / spec.output)
        assert damage == Damage(
            wrong, f"row {sample} (sample s{sample}) has a value that is not finite, and no error says why"
        )


def test_shards_of_another_width_are_told_where_loading_refuses_them(tmp_path: Path) -> None:
    store = Cache(tmp_path, "set")
    write(store.spec_folder(POOLED_SPEC), POOLED_SPEC)
    odd = Rows([content_key(b"odd")], ["odd"], [""], VECTORS[:1, :5])
    path = write(store.spec_folder(POOLED_SPEC), POOLED_SPEC, odd)
    assert only_damage(tmp_path) == Damage(path, "values of width 5 among others of width 24")
    verify_cache(tmp_path, quarantine=True)
    np.testing.assert_array_equal(store.load(SAMPLES, [POOLED_SPEC]).blocks[0].vectors, VECTORS)


def test_errors_and_doubles_are_no_damage(tmp_path: Path) -> None:
    store = Cache(tmp_path, "set")
    folder = store.spec_folder(POOLED_SPEC)
    write(folder, POOLED_SPEC)
    write(folder, POOLED_SPEC, rows(POOLED_SPEC, 3))
    failed = Rows([content_key(b"bad")], ["b"], ["broken"], np.empty((1, 0), np.float32))
    write(folder, POOLED_SPEC, failed, rows(POOLED_SPEC, 1))
    write(folder, POOLED_SPEC, failed)
    result = verify_cache(tmp_path)
    assert result.damages == []
    assert result.sound
    assert (result.encoders, result.shards, result.rows) == (1, 4, ROWS + 3 + 2 + 1)
    assert result.doubles == 3 + 1  # an error that is stored twice is not counted
    assert result.bytes == sum(path.stat().st_size for path in folder.glob("*.h5"))


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    """Two encoders with two shards each, written as an extraction does."""
    store = Cache(tmp_path / "cache", "set")
    for spec in SPECS:
        for part in (rows(spec, 5), rows(spec).take(range(5, ROWS))):
            with store.writer(spec, {}) as writer:
                writer.add(part)
    return store


def test_a_changed_spec_file_is_told_and_its_shards_are_checked_all_the_same(store: Cache) -> None:
    path = store.spec_folder(POOLED_SPEC) / "spec.json"
    content = json.loads(path.read_text())
    for change in ({"max_length": 7}, {"cleaning": "none"}):
        path.write_text(json.dumps(content | {"spec": content["spec"] | change}))
        damage = only_damage(store.folder.parent)
        assert damage.path == path
        assert damage.reason.startswith("not the spec of this folder (its fingerprint is ")
    path.write_text(json.dumps(content | {"fingerprint": "0" * 64}))
    assert only_damage(store.folder.parent).reason == "not the spec of this folder (it states the fingerprint 00000000)"
    flip(shard := next(path.parent.glob("*.h5")), 3000)
    assert {damage.path for damage in verify_cache(store.folder.parent).damages} == {path, shard}


def test_without_a_spec_file_the_shards_speak_for_themselves(store: Cache) -> None:
    folder = store.spec_folder(POOLED_SPEC)
    (folder / "spec.json").unlink()
    assert verify_cache(store.folder.parent).damages == []
    first, _ = sorted(folder.glob("*.h5"))
    first.write_bytes(b"not a shard")
    assert only_damage(store.folder.parent).path == first  # and the other one says what the folder is
    (folder.parent / "stray").mkdir()
    strays = [shutil.copy(path, folder.parent / "stray") for path in folder.glob("*.h5")]
    found = verify_cache(store.folder.parent, quarantine=True)
    assert {damage.path for damage in found.damages} == {first, *map(Path, strays)}  # of an encoder of another name
    assert found.sound
    assert verify_cache(store.folder.parent).damages == []


def test_quarantine_moves_the_same_bytes_under_names_of_their_own(store: Cache) -> None:
    root = store.folder.parent
    kept: list[bytes] = []
    for time in range(3):
        first = sorted(store.spec_folder(POOLED_SPEC).glob("*.h5"))[0]
        whole = first.read_bytes()
        flip(first, values_of(first)[0] + time)
        kept.append(first.read_bytes())
        assert not verify_cache(root).sound
        assert first.exists()  # only told
        result = verify_cache(root, quarantine=True)
        assert result.sound
        (damage,) = result.damages
        assert damage.moved == root / "quarantine" / "set" / first.parent.name / (
            first.name + (f".{time}" * (time > 0))
        )
        assert not first.exists()
        first.write_bytes(whole)
    assert sorted(path.read_bytes() for path in (root / "quarantine").rglob("*.h5*")) == sorted(kept)
    assert verify_cache(root).encoders == 2  # what lies in quarantine is no encoder


def test_after_quarantine_an_extraction_computes_exactly_what_was_moved(demo_folder: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(demo_folder, tmp_path / "demo"))
    labels = (data / "train.txt").read_text().splitlines()
    lists = [labels[:31], labels]
    for lines in lists:  # two shards
        (data / "train.txt").write_text("\n".join(lines) + "\n")
        result = extract_features(data, ["hashing"], cache=tmp_path / "cache")
    (tower,) = result.towers
    store = Cache(tmp_path / "cache", "demo")
    before = store.load(read_samples(result.samples.source).samples, [tower.spec]).blocks[0]
    shard = min(store.shards(tower.spec), key=lambda shard: len(shard.keys))
    flip(shard.path, shard.values.offset + 99)
    (damage,) = verify_cache(tmp_path / "cache", quarantine=True).damages
    assert damage.moved is not None
    again = extract_features(data, ["hashing"], cache=tmp_path / "cache")
    assert again.new == {tower.spec.folder_name: len(shard.keys)}
    after = store.load(read_samples(again.samples.source).samples, [tower.spec]).blocks[0]
    np.testing.assert_array_equal(after.vectors, before.vectors)
    assert verify_cache(tmp_path / "cache").damages == []
