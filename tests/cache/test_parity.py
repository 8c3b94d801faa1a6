"""What is cached is what the reference libraries' own plain calls give, and a row that is not is found."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from mmfeat.cache.parity import FLOAT32_DEVIATION, Parity, _worse, check_parity
from mmfeat.cache.shard import open_shard, read_ids
from mmfeat.cache.store import Cache
from mmfeat.cache.verify import verify_cache
from mmfeat.cli.cache import show_parity
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.extraction.extract import Extraction, ExtractSettings, extract_features
from mmfeat.samples.dataset import read_samples
from tests.cache.shards import falsify

OUTPUTS = (
    "pooled",
    *(f"{name}={output}" for name in ("clip", "bert", "resnet18") for output in ("tokens", "prefix:1")),
)

CPU = ExtractSettings("cpu")


@pytest.fixture(scope="module")
def data(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pairs of the demo, one of them with a broken photo."""
    data = Path(shutil.copytree(demo_folder, tmp_path_factory.mktemp("parity") / "demo"))
    lines = (data / "train.txt").read_text().splitlines()
    broken = [line for line in lines if line.startswith("1003,")]
    (data / "train.txt").write_text("\n".join(dict.fromkeys([*lines[:16], *broken])) + "\n")
    (data / "test_without_label.txt").unlink()
    return data


@pytest.fixture(scope="module")
def requests(tiny_bert: Path, tiny_clip: Path, tiny_timm: Path, resnet_file: Path) -> list[str]:
    return [f"bert:{tiny_bert}", f"clip:{tiny_clip}", f"timm:{tiny_timm}", f"resnet18:{resnet_file}", "hashing", "hog"]


def check(result: Extraction, count: int) -> list[Parity]:
    store = Cache(result.folder.parent, result.folder.name)
    return list(check_parity(read_samples(result.samples.source), result.towers, store, count))


@pytest.mark.parametrize(("dtype", "views"), [("float32", 1), ("bfloat16", 0)])
def test_parity_holds_for_every_family_output_and_view(
    data: Path, tmp_path: Path, requests: list[str], dtype: str, views: int
) -> None:
    options = EncoderOptions(dtype=dtype, cleaning="tweet", outputs=OUTPUTS, views=views)
    result = extract_features(data, requests, cache=tmp_path, options=options, settings=CPU)
    found = check(result, 2)
    assert [parity.encoder for parity in found] == [tower.spec.name for tower in result.towers]
    assert [parity for parity in found if not parity.holds] == []
    assert {parity.rows for parity in found} == {2}
    there = {(tower.spec.tower, tower.spec.output, tower.spec.view != "none") for tower in result.towers}
    texts, photos, seen = ("clip.text", "bert"), ("clip.image", "resnet18"), (False, True)[: views + 1]
    expected = {(tower, output, False) for tower in texts for output in ("pooled", "tokens", "prefix")}
    expected |= {
        (tower, output, view) for tower in photos for output in ("pooled", "tokens", "prefix") for view in seen
    }
    expected |= {(tower, "pooled", view) for tower in ("timm", "hog") for view in seen} | {("hashing", "pooled", False)}
    assert there == expected


@pytest.fixture
def one(data: Path, tmp_path: Path) -> Extraction:
    return extract_features(
        data, ["hashing", "hog"], cache=tmp_path, options=EncoderOptions(dtype="float32", cleaning="tweet")
    )


def falsified(result: Extraction, number: int, row: int, change: float, place: int) -> str:
    """Add to one value of a row; returns the id that the row was computed for."""
    spec = result.towers[number].spec
    (path,) = (result.folder / spec.folder_name).glob("*.h5")
    values = next(iter(Cache(result.folder.parent, result.folder.name).scan(spec)))[1][row : row + 1].copy()
    values[0, place] += change
    shard = open_shard(falsify(path, row, values), spec.fingerprint)
    return str(read_ids(shard.path)[row].decode())


@pytest.mark.parametrize("number", [0, 1])
def test_one_false_value_is_found_though_every_checksum_is_right(one: Extraction, number: int) -> None:
    assert all(parity.holds for parity in check(one, 1000))
    id = falsified(one, number, 5, 2e-5, 7)
    assert verify_cache(one.folder.parent).damages == []
    found = check(one, 1000)
    assert [parity.holds for parity in found] == [n != number for n in (0, 1)]
    assert found[number].sample == id
    assert found[number].deviation == pytest.approx(2e-5, rel=0.01)


def test_the_promise_for_float32_is_of_the_largest_value_of_the_row() -> None:
    """1e-5 where values are small; in proportion where they are large, as in the middle of a transformer."""
    spec = EncoderSpec("x", "text", "", "builtin:1", "float32", "float32")
    start = Parity("x", 0, 0.0, 1.0, "", True, "")
    for largest, deviation, holds in (
        (0.1, 0.9e-5, True),
        (0.1, 1.1e-5, False),
        (40.0, 39e-5, True),
        (40.0, 41e-5, False),
    ):
        wanted = np.array([0.0, largest])
        cached = wanted + np.array([deviation, 0.0])
        assert _worse(start, "a", cached, wanted, spec).holds == holds
    assert FLOAT32_DEVIATION == 1e-5


@pytest.mark.parametrize(
    ("cached", "wanted", "holds"),
    [
        ([1.0, 2.0], [1.01, 2.01], True),
        ([1.0, 2.0], [2.0, 1.0], False),
        ([2.0, 4.0], [1.0, 2.0], False),  # the angle is right, the length is not
        ([0.0, 0.0], [0.0, 0.0], True),
        ([1.0, 0.0], [0.0, 0.0], False),
        ([0.0, 0.0], [1.0, 0.0], False),
        ([np.nan, 1.0], [1.0, 1.0], False),
        ([1.0], [1.0, 1.0], False),
    ],
)
@pytest.mark.parametrize("storage", ["float16", "float32"])
def test_what_half_precision_promises(cached: list[float], wanted: list[float], holds: bool, storage: str) -> None:
    spec = EncoderSpec("x", "text", "", "builtin:1", "bfloat16", storage)
    found = _worse(Parity("x", 0, 0.0, 1.0, "", True, ""), "a", np.array(cached), np.array(wanted), spec)
    assert found.holds == (holds and (storage == "float16" or cached == wanted))
    assert found.sample == ("a" if cached != wanted else "")
    later = _worse(found, "b", np.array([1.0, 1.0]), np.array([1.0, 1.0]), spec)
    assert (later.holds, later.sample, later.rows) == (found.holds, found.sample, 2)


def test_half_precision_rows_that_are_swapped_are_found(data: Path, tmp_path: Path, tiny_bert: Path) -> None:
    options = EncoderOptions(dtype="bfloat16", cleaning="tweet", outputs=("tokens",))
    result = extract_features(data, [f"bert:{tiny_bert}"], cache=tmp_path, options=options, settings=CPU)
    (tower,) = result.towers
    (shard,) = Cache(tmp_path, "demo").shards(tower.spec)
    assert all(parity.holds for parity in check(result, 1000))
    with h5py.File(shard.path, "r") as file:
        tokens = file["tokens"][int(shard.bounds[3]) : int(shard.bounds[4])]
    falsify(shard.path, int(shard.bounds[3]), tokens[::-1])
    (found,) = check(result, 1000)
    assert not found.holds


def test_what_is_not_cached_is_not_checked_and_that_is_told(
    one: Extraction, capsys: pytest.CaptureFixture[str]
) -> None:
    other = dataclasses.replace(one.towers[0].spec, max_length=9)
    towers = [dataclasses.replace(one.towers[0], spec=other)]
    found = list(check_parity(read_samples(one.samples.source), towers, Cache(one.folder.parent, "demo"), 5))
    assert [parity.rows for parity in found] == [0]
    show_parity(found)
    assert capsys.readouterr().out.startswith("parity not checked: hashing: none of its rows is cached")
