"""Remote data: a table and its photos behind URLs are extracted like those on the disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from mmfeat.cache.store import Cache
from mmfeat.errors import ConfigError, DataError
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.requests import latest_request
from mmfeat.samples.dataset import read_samples
from mmfeat.system.remote import RemoteFile, absolute, exists, is_remote


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Three samples, one of which names a photo that is not there."""
    folder = tmp_path / "local"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "tweets.csv").write_text("id,text,image,label\na,one,0.png,x\nb,two,1.png,y\nc,three,gone.png,x\n")
    return folder


@pytest.fixture
def bucket(local: Path) -> Iterator[str]:
    """The same in a file system that has nothing to do with the disk."""
    files = fsspec.filesystem("memory")
    for path in local.iterdir():
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)


def test_remote_pairs_give_the_vectors_of_local_ones(local: Path, bucket: str, tmp_path: Path) -> None:
    asked = ["hashing", "hog"]
    here = extract_features(local / "tweets.csv", asked, cache=tmp_path / "here")
    there = extract_features(f"{bucket}/tweets.csv", asked, cache=tmp_path / "there")
    assert (there.samples.name, here.new) == ("tweets", there.new)
    assert there.missing["image"] == {"unreadable: No such file or directory": 1}
    assert here.missing["image"] == {"image file not found": 1}
    samples = read_samples(f"{bucket}/tweets.csv").samples
    assert samples[0].image == RemoteFile(f"{bucket}/0.png")
    specs = [tower.spec for tower in here.towers]
    local_samples = read_samples(local / "tweets.csv").samples
    ours = Cache(tmp_path / "here", "tweets").load(local_samples, specs).blocks
    theirs = Cache(tmp_path / "there", "tweets").load(samples, specs).blocks
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.vectors, other.vectors)
    assert latest_request(tmp_path / "there").data == f"{bucket}/tweets.csv"
    assert extract_features(f"{bucket}/tweets.csv", asked, cache=tmp_path / "there").nothing_to_do


def test_a_local_table_may_name_remote_photos(local: Path, bucket: str, tmp_path: Path) -> None:
    table = tmp_path / "mixed.jsonl"
    table.write_text(f'{{"id": "a", "image": "{bucket}/0.png"}}\n{{"id": "b", "image": "local/1.png"}}\n')
    result = extract_features(table, ["hog"], cache=tmp_path / "cache")
    assert list(result.new.values()) == [2]


def test_parquet_is_read_remotely_too(bucket: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    with fsspec.open(f"{bucket}/t.parquet", "wb") as file:
        pyarrow.parquet.write_table(pyarrow.table({"id": ["a"], "text": ["one"]}), file)
    assert [sample.text for sample in read_samples(f"{bucket}/t.parquet")] == ["one"]


def test_what_is_not_there_or_cannot_be_reached_is_one_line(bucket: str) -> None:
    with pytest.raises(DataError, match=r"memory://bucket/no\.csv: no such folder or table"):
        read_samples(f"{bucket}/no.csv")
    with pytest.raises(DataError, match=r"nowhere://x/t\.csv: .*use a local path or a protocol that fsspec knows"):
        read_samples("nowhere://x/t.csv")


def test_a_url_may_go_on_with_a_query(bucket: str) -> None:
    fsspec.filesystem("memory").pipe("/bucket/signed.csv?key=1", b"id,text\na,one\n")
    assert len(read_samples(f"{bucket}/signed.csv?key=1")) == 1


def test_a_cache_is_no_url(bucket: str) -> None:
    with pytest.raises(ConfigError, match="--cache memory://bucket/cache: a cache lies in a folder"):
        extract_features(f"{bucket}/tweets.csv", ["hashing"], cache=f"{bucket}/cache")


def test_places() -> None:
    assert is_remote("s3://bucket/x.csv")
    assert not is_remote("C:/data/x.csv")
    assert not is_remote(Path("data/x.csv"))
    assert absolute("s3://bucket/x.csv") == "s3://bucket/x.csv"
    assert absolute("x.csv") == str(Path.cwd() / "x.csv")
    assert exists(".")
    assert RemoteFile("s3://bucket/a/x.jpg").name == "x.jpg"
