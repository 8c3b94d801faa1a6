"""docs/format.md is true: its code reads a real cache, and its tables name what is in the files."""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import xxhash

from mmfeat import Cache, EncoderOptions, describe_encoders, extract_features, read_samples
from mmfeat.cache.store import shard_files
from tests.docs.markdown import ROOT, blocks
from tests.sweep.small_sweeps import FLOAT32

PAGE = ROOT / "docs/format.md"


@pytest.fixture(scope="module")
def cache(demo_folder: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of the demo data in two shards: built-in encoders, and tokens of a small BERT."""
    place = tmp_path_factory.mktemp("format") / "cache"
    table = place.parent / "half" / "demo.csv"
    table.parent.mkdir()
    some = [sample for sample in read_samples(demo_folder) if sample.text][:40]
    lines = [f'{sample.id},"{sample.text}"\n' for sample in some if '"' not in str(sample.text)]
    table.write_text("id,text\n" + "".join(lines))
    extract_features(table, ["hashing"], cache=place, options=FLOAT32)
    options = EncoderOptions(dtype="float32", cleaning="tweet", outputs=("pooled", "bert=tokens"))
    extract_features(demo_folder, ["hashing", "hog", f"bert:{tiny_bert}"], cache=place, options=options)
    return place


def block_with(words: str) -> str:
    """The one Python block of the page that holds these words."""
    (found,) = [block.text for block in blocks(PAGE, "python") if words in block.text]
    return found


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a block of the page on one encoder's folder."""
    monkeypatch.chdir(folder.parent.parent.parent)
    code = code.replace("DATASET", folder.parent.name).replace("NAME-FINGERPRINT8", folder.name)
    names: dict[str, Any] = {}
    exec(code.replace("NAME-*", folder.name), names)
    return names


@pytest.mark.parametrize("family", ["hashing", "hog"])
def test_the_reader_without_mmfeat_finds_what_the_cache_loads(
    cache: Path, demo_folder: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tower,) = describe_encoders([family], FLOAT32)
    samples = read_samples(demo_folder)
    store = Cache(cache, samples.name)
    folder = store.spec_folder(tower.spec)
    assert len(shard_files(folder)) == (2 if family == "hashing" else 1)
    code = block_with("import h5py")
    assert len(code.splitlines()) <= 10
    assert "mmfeat" not in code
    vectors = run(code, folder, monkeypatch)["vectors"]
    (block,) = store.load(samples.samples, [tower.spec]).blocks
    keys = store.content_keys(samples.samples, tower.spec.modality).keys
    assert [key.decode() in vectors for key in keys.tolist()] == block.mask.tolist()
    assert 100 < block.mask.sum() < len(samples)
    found = np.stack([vectors[key.decode()] for key in keys[block.mask].tolist()])
    np.testing.assert_array_equal(found, block.vectors[block.mask])


def test_the_fingerprint_is_computed_as_the_page_says(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (cache / "demo").glob("*/"):
        run(block_with("hashlib"), folder, monkeypatch)
        assert capsys.readouterr().out.strip()[:8] == folder.name[-8:]


def test_keys_and_names_are_the_hashes_that_the_page_says(cache: Path, demo_folder: Path) -> None:
    samples = {sample.id: sample for sample in read_samples(demo_folder)}
    for path in (cache / "demo").glob("*/*.h5"):
        with h5py.File(path, "r") as shard:
            output = shard.attrs["output"].decode()
            key, sample = shard["keys"][0].decode(), samples[shard["ids"][0].decode()]
            start, size = shard[output].id.get_offset(), shard[output].id.get_storage_size()
            sums = shard[f"{output}_xxh3"][:].tolist()
            assert not shard["pooled"].chunks if output == "pooled" else shard["bounds"][-1] == len(shard[output])
        content = [str(sample.text).encode(), sample.image.read_bytes() if sample.image else b""]
        assert key in [hashlib.sha256(each).hexdigest()[:32] for each in content]
        data = path.read_bytes()
        assert data[8] == 2  # version of the superblock, which old readers know
        assert start % 4096 == 0
        assert path.stem == xxhash.xxh3_128_hexdigest(data[:start] + data[start + size :])
        values, mib = data[start : start + size], 1 << 20
        assert sums == [xxhash.xxh3_64_intdigest(values[at : at + mib]) for at in range(0, size, mib)]


def test_the_tables_name_what_is_there(cache: Path) -> None:
    text = PAGE.read_text()
    assert any("tokens" in path.name for path in (cache / "demo").iterdir())
    for path in (cache / "demo").glob("*/*.h5"):
        with h5py.File(path, "r") as shard:
            output = shard.attrs["output"].decode()
            for name in (*shard.attrs, *shard):
                assert f"`{name.replace(f'{output}_xxh3', 'OUTPUT_xxh3')}`" in text, name
    (tower,) = describe_encoders(["hog"], FLOAT32)
    table = text.split("## spec.json")[1].split("## Content keys")[0]
    assert re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE) == list(asdict(tower.spec))
    for path in cache.rglob("*"):
        if path.is_file() and path.suffix not in (".h5", ".json"):
            assert f"{path.name} " in text, path.name
