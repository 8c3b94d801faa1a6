"""One plain file for other programs: equal to what the cache gives, and read back only after the shards' checks."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas
import pytest

from mmfeat.cache.pack import FORMATS, read_pack, write_pack
from mmfeat.cache.store import Cache
from mmfeat.errors import CacheError, CacheMissError, ConfigError
from mmfeat.samples.dataset import Sample, SampleSet
from tests.cache.shards import (
    LENGTHS,
    POOLED_SPEC,
    ROWS,
    SAMPLES,
    TOKEN_SPEC,
    TOKENS,
    VECTORS,
    Change,
    flip,
    put,
    rows,
    values_of,
)  # fmt: skip
from tests.cache.syscalls import Fault, trace, unavailable

POOLED, TOKEN = POOLED_SPEC.folder_name, TOKEN_SPEC.folder_name
ORDER = [5, 0, 7, 2, 1, 2]
PARTS = ("train", "test")
LABELLED = tuple(
    dataclasses.replace(SAMPLES[n], id=f"é{i}", label=f"l{n % 2}", split=PARTS[n % 2]) for i, n in enumerate(ORDER)
)
NOTHING = Sample("none", None, text_error="no text file", label="l0")
SET = SampleSet("set", "set", (*LABELLED, NOTHING, SAMPLES[3]))  # the last has no label


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    store = Cache(tmp_path / "cache", "set")
    for spec in (POOLED_SPEC, TOKEN_SPEC):
        with store.writer(spec, {}) as writer:
            writer.add(rows(spec))
    return store


@pytest.fixture
def pack(store: Cache, tmp_path: Path) -> Path:
    path = tmp_path / "out" / "pack.h5"
    assert write_pack(path, store, SET, [POOLED_SPEC, TOKEN_SPEC]) == path.stat().st_size
    return path


def test_plain_h5py_reads_what_the_cache_gives(store: Cache, pack: Path) -> None:
    features = store.load(SET.samples, [POOLED_SPEC, TOKEN_SPEC])
    with h5py.File(pack, "r") as file:
        assert set(file) == {"ids", "labels", "splits", POOLED, TOKEN}
        assert [split.decode() for split in file["splits"]] == [sample.split for sample in SET]
        assert [id.decode() for id in file["ids"]] == [sample.id for sample in SET]
        assert [label.decode() for label in file["labels"]] == [sample.label or "" for sample in SET]
        assert file["labels"][-1] == b""
        np.testing.assert_array_equal(file[POOLED]["pooled"][:], features.blocks[0].vectors)
        np.testing.assert_array_equal(file[POOLED]["mask"][:], features.blocks[0].mask)
        assert np.isnan(file[POOLED]["pooled"][6]).all()
        bounds, tokens = file[TOKEN]["bounds"][:], file[TOKEN]["tokens"][:]
        assert np.diff(bounds).tolist() == [LENGTHS[n] for n in ORDER] + [0, LENGTHS[3]]
        for row, number in enumerate([*ORDER, None, 3]):
            expected = TOKENS[number] if number is not None else np.empty((0, VECTORS.shape[1]))
            np.testing.assert_array_equal(tokens[bounds[row] : bounds[row + 1]], expected)
        for name, spec in ((POOLED, POOLED_SPEC), (TOKEN, TOKEN_SPEC)):
            assert json.loads(file[name].attrs["spec"]) == spec.stated
            assert file[name].attrs["fingerprint"].decode() == spec.fingerprint
            assert file[name].attrs["encoder"].decode() == spec.name
        assert (file.attrs["format"], file.attrs["dataset"]) == (b"mmfeat pack 1", b"set")
        assert all(file[name].chunks is None for name in ("ids", "labels", f"{POOLED}/pooled", f"{TOKEN}/tokens"))


def test_what_was_written_is_read_back(pack: Path) -> None:
    found = read_pack(pack, POOLED)
    assert set(found) == {"ids", "labels", "splits", "mask", "pooled"}
    np.testing.assert_array_equal(found["pooled"][found["mask"] == 1], VECTORS[[*ORDER, 3]])
    tokens = read_pack(pack, TOKEN)
    assert set(tokens) == {"ids", "labels", "splits", "mask", "bounds", "tokens"}
    np.testing.assert_array_equal(tokens["tokens"], np.concatenate([TOKENS[n] for n in [*ORDER, 3]]))


def test_an_older_pack_without_splits_is_read(pack: Path) -> None:
    with h5py.File(pack, "r+") as file:
        del file["splits"]
    assert set(read_pack(pack, POOLED)) == {"ids", "labels", "mask", "pooled"}


def test_a_pack_has_the_same_bytes_each_time(pack: Path, store: Cache) -> None:
    before = pack.read_bytes()
    write_pack(pack, store, SET, [POOLED_SPEC, TOKEN_SPEC])  # an older pack may be replaced
    assert pack.read_bytes() == before


def test_an_encoder_that_no_sample_has_content_for_is_an_empty_group(tmp_path: Path, store: Cache) -> None:
    write_pack(tmp_path / "p.h5", store, SampleSet("set", "set", (NOTHING, NOTHING)), [POOLED_SPEC])
    assert np.isnan(read_pack(tmp_path / "p.h5", POOLED)["pooled"]).all()
    nowhere = Cache(tmp_path / "cache", "other")  # nobody ever extracted anything there
    for spec in (POOLED_SPEC, TOKEN_SPEC):
        write_pack(tmp_path / "p.h5", nowhere, SampleSet("other", "other", (NOTHING, NOTHING)), [spec])
        found = read_pack(tmp_path / "p.h5", spec.folder_name)
        assert found["mask"].tolist() == [0, 0]
        assert found[spec.output].size == 0


def test_nothing_is_made_up_and_nothing_of_others_replaced(tmp_path: Path, store: Cache) -> None:
    new = SampleSet("set", "set", (SAMPLES[0], Sample("new", "never seen")))
    with pytest.raises(CacheMissError, match=r"1 of 2 samples are not in the cache for hashing \(first: new\)"):
        write_pack(tmp_path / "p.h5", store, new, [POOLED_SPEC])
    table = tmp_path / "table.csv"
    table.write_text("id,text\n1,a\n")
    (shard,) = store.spec_folder(POOLED_SPEC).glob("*.h5")
    for taken in (table, shard, tmp_path):
        with pytest.raises(ConfigError, match="this exists and is no pack; name another file"):
            write_pack(taken, store, SET, [POOLED_SPEC], format="h5")
    assert table.read_text() == "id,text\n1,a\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "table.csv"]


@pytest.mark.skipif(bool(unavailable()), reason=unavailable() or "can be traced")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_pack_of_several_files_that_was_killed_is_no_pack_and_written_again(tmp_path: Path, store: Cache) -> None:
    path = tmp_path / "p.npy"
    pack = partial(write_pack, path, store, SET, [POOLED_SPEC])
    calls = trace(lambda _: pack(), tmp_path).calls
    whole = path.read_bytes(), path.with_suffix(".csv").read_bytes()
    last = max(number for number, call in enumerate(calls) if call.name == "rename")
    trace(lambda _: pack(), tmp_path, Fault(last, "kill before"))  # over a pack, whose rows may be others
    with pytest.raises(CacheError):
        read_pack(path, POOLED)
    pack()
    assert (path.read_bytes(), path.with_suffix(".csv").read_bytes()) == whole
    assert not list(tmp_path.glob("*.tmp"))


def test_a_damaged_shard_is_not_packed(tmp_path: Path, store: Cache) -> None:
    (shard,) = store.spec_folder(TOKEN_SPEC).glob("*.h5")
    flip(shard, values_of(shard)[0])
    with pytest.raises(CacheError, match="do not match their checksum"):
        write_pack(tmp_path / "p.h5", store, SET, [POOLED_SPEC, TOKEN_SPEC])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


@pytest.mark.skipif(not shutil.which("h5ls"), reason="h5ls and h5dump are not installed (Debian: hdf5-tools)")
def test_the_hdf5_tools_open_it(pack: Path, store: Cache) -> None:
    def run(*command: object) -> str:
        return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=True).stdout

    (shard,) = store.spec_folder(TOKEN_SPEC).glob("*.h5")
    names = run("h5ls", "-r", pack)
    assert f"/{POOLED}/pooled " in names
    assert f"/{TOKEN}/tokens " in names
    assert "Dataset {8, 24}" in names
    assert "H5T_IEEE_F32LE" in run("h5dump", "-H", pack)
    assert "Dataset {14, 24}" in run("h5ls", "-r", shard)
    assert "H5T_IEEE_F32LE" in run("h5dump", "-H", shard)


def link_to_another_file(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other.create_group("g")["pooled"] = np.zeros((len(SET), 3), np.float32)
        other["g/mask"] = np.ones(len(SET), np.uint8)
    del file[POOLED]
    file[POOLED] = h5py.ExternalLink(str(folder / "other.h5"), "g")


def values_elsewhere(file: h5py.File, folder: Path) -> None:
    (folder / "secret").write_bytes(b"1234" * len(SET) * 3)
    del file[POOLED]["pooled"]
    file[POOLED].create_dataset("pooled", (len(SET), 3), "f4", external=[(str(folder / "secret"), 0, len(SET) * 3 * 4)])


def other_format(file: h5py.File, _: Path) -> None:
    file.attrs["format"] = np.bytes_(b"mmfeat pack 9")


VALUES = np.zeros((len(SET), 3), np.float32)
BACKWARDS = np.array([0, 2, 1, *[2] * (len(SET) - 2)], np.int64)


@pytest.mark.parametrize(
    ("encoder", "change", "reason"),
    [
        (POOLED, link_to_another_file, "is a link, not a group"),
        (POOLED, values_elsewhere, "pooled has its values in another file"),
        (POOLED, put(POOLED, VALUES), "is a link, not a group"),
        (POOLED, put(f"{POOLED}/pooled", VALUES, compression="gzip"), "pooled is behind filters"),
        (POOLED, put("ids", np.zeros(3, "S1")), "do not fit together"),
        (POOLED, put(f"{POOLED}/pooled", VALUES[1:]), "do not fit together"),
        (POOLED, put(f"{POOLED}/mask", np.zeros(2, np.uint8)), "do not fit together"),
        (TOKEN, put(f"{TOKEN}/bounds", BACKWARDS), "do not fit together"),
        (TOKEN, put(f"{TOKEN}/bounds", BACKWARDS[:2]), "do not fit together"),
        (POOLED, other_format, "not a mmfeat pack 1"),
    ],
)
def test_a_pack_from_anywhere_is_checked(pack: Path, tmp_path: Path, encoder: str, change: Change, reason: str) -> None:
    with h5py.File(pack, "r+") as file:
        change(file, tmp_path)
    with pytest.raises(CacheError) as caught:
        read_pack(pack, encoder)
    message = str(caught.value)
    assert message.startswith(f"{pack}: ")
    assert reason in message
    assert message.endswith("; mmfeat cache pack makes a new one")
    assert "\n" not in message


def test_what_is_no_pack_is_refused(pack: Path, store: Cache, tmp_path: Path) -> None:
    (shard,) = store.spec_folder(POOLED_SPEC).glob("*.h5")
    (tmp_path / "text").write_text("text")
    for path in (shard, tmp_path / "text", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CacheError, match="mmfeat cache pack makes a new one"):
            read_pack(path, POOLED)
    for name in ("bert", "ids", f"{POOLED}/pooled", ""):
        with pytest.raises(CacheError, match=f"no encoder {name!r}; it has bert-tiny-tokens-.*, hashing-"):
            read_pack(pack, name)
    assert len(read_pack(pack, POOLED)["ids"]) == len(SET) != ROWS + 1


OTHER_SPEC = dataclasses.replace(POOLED_SPEC, cleaning="none", storage="float16")
OTHER = OTHER_SPEC.folder_name
LIBRARIES = {"npy": "numpy", "parquet": "pyarrow", "lance": "lance", "faiss": "faiss"}


@pytest.fixture
def two(store: Cache) -> Cache:
    """A cache with another encoder, in half precision."""
    with store.writer(OTHER_SPEC, {}) as writer:
        writer.add(dataclasses.replace(rows(POOLED_SPEC), values=VECTORS.astype(np.float16)))
    return store


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_an_encoder_without_any_vector_is_packed_as_none(tmp_path: Path, kind: str) -> None:
    pytest.importorskip(LIBRARIES[kind])
    nowhere, path = Cache(tmp_path / "cache", "other"), tmp_path / f"p.{kind}"
    write_pack(path, nowhere, SampleSet("other", "other", (NOTHING, NOTHING)), [POOLED_SPEC])
    found = read_pack(path, POOLED)
    assert found["mask"].tolist() == [0, 0]
    assert np.isnan(found["pooled"]).all()


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("kind", FORMATS[1:])
def test_every_format_gives_back_what_the_cache_gives(two: Cache, tmp_path: Path, kind: str) -> None:
    pytest.importorskip(LIBRARIES[kind])
    path, specs = tmp_path / "out" / f"tweets.{kind}", [POOLED_SPEC, OTHER_SPEC]
    for _ in range(2):  # an older pack may be replaced
        size = write_pack(path, two, SET, specs)
    files = [file for file in path.parent.rglob("*") if file.is_file()]
    assert size == sum(file.stat().st_size for file in files) > 0
    features = two.load(SET.samples, specs)
    for name, block in zip((POOLED, OTHER), features.blocks, strict=True):
        found = read_pack(path, name)
        assert [id.decode() for id in found["ids"]] == [sample.id for sample in SET]
        assert [label.decode() for label in found["labels"]] == [sample.label or "" for sample in SET]
        assert [split.decode() for split in found["splits"]] == [sample.split for sample in SET]
        np.testing.assert_array_equal(found["mask"], block.mask)
        expected = block.vectors
        if kind == "faiss":
            expected = expected.astype(np.float32)
            expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
            np.testing.assert_allclose(found["pooled"], expected, atol=1e-6)
        else:
            assert found["pooled"].dtype == expected.dtype
            np.testing.assert_array_equal(found["pooled"], expected)
    with pytest.raises(CacheError, match=f"no encoder 'bert'; it has {POOLED}, {OTHER}"):
        read_pack(path, "bert")


def test_the_files_are_those_of_the_programs(two: Cache, tmp_path: Path) -> None:
    """What NumPy and pandas read by themselves, with texts for a person who looks at a map of the vectors."""
    write_pack(tmp_path / "one.npy", two, SET, [POOLED_SPEC])
    write_pack(tmp_path / "two.npy", two, SET, [POOLED_SPEC, OTHER_SPEC])
    write_pack(tmp_path / "pack", two, SET, [POOLED_SPEC], format="parquet")
    names = {"cache", "one.csv", "one.npy", "pack", "two.csv", f"two-{POOLED}.npy", f"two-{OTHER}.npy"}
    assert {*names_in(tmp_path)} == names
    vectors, table = np.load(tmp_path / "one.npy"), pandas.read_csv(tmp_path / "one.csv", keep_default_na=False)
    assert list(table) == ["id", "text", "image", "label", "split", POOLED]
    assert table["text"].tolist() == [sample.text or "" for sample in SET]
    assert np.isnan(vectors).all(axis=1).tolist() == (table[POOLED] == 0).tolist()
    frame = pandas.read_parquet(tmp_path / "pack")
    assert frame["split"].tolist()[:2] == ["test", "train"]
    np.testing.assert_array_equal(frame[POOLED][0], VECTORS[5])
    assert frame[POOLED][6] is None


def test_unknown_formats_and_files_of_others_are_refused(two: Cache, tmp_path: Path) -> None:
    before = tmp_path / "tweets.csv"
    before.write_text("id,text,image,label,split\n1,a,,b,train\n")
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    for name, spec, reason in (
        ("p.txt", POOLED_SPEC, "no format has this suffix; use one of .h5, .npy, .parquet, .lance, .faiss, or add --f"),
        ("p", POOLED_SPEC, "no format has this suffix"),
        ("tweets.npy", POOLED_SPEC, "this exists and is no pack; name another file"),
        ("p.parquet", POOLED_SPEC, "this exists and is no pack; name another file"),
        ("q.parquet", TOKEN_SPEC, "takes one vector a sample, and bert:tiny.* has more; add --outputs pooled"),
    ):
        with pytest.raises(ConfigError, match=reason):
            write_pack(tmp_path / name, two, SET, [spec])
    with pytest.raises(ConfigError, match="--format zip: use one of h5, npy, parquet, lance, faiss"):
        write_pack(tmp_path / "p.h5", two, SET, [POOLED_SPEC], format="zip")
    assert names_in(tmp_path) == ["cache", "p.parquet", "tweets.csv"]
    assert before.read_text().endswith("train\n")
    for name in ("p.parquet", "tweets.npy", "nowhere.npy"):
        with pytest.raises(CacheError, match=r"not a readable pack .*; mmfeat cache pack makes a new one"):
            read_pack(tmp_path / name, POOLED)


def test_rows_of_a_table_and_a_matrix_that_do_not_fit_are_refused(two: Cache, tmp_path: Path) -> None:
    path = tmp_path / "p.npy"
    write_pack(path, two, SET, [POOLED_SPEC])
    np.save(path, np.load(path)[1:])
    with pytest.raises(CacheError, match=r"8 rows and vectors of shape \(7, 24\) do not fit together"):
        read_pack(path, POOLED)
    np.save(path, np.array([{}] * 8))
    pickled, header = path.read_bytes(), (b"\x93NUMPY\x01\x00" + len(b'{"""').to_bytes(2, "little") + b'{"""')
    for broken in (pickled, header):  # nothing is unpickled; NumPy has errors of Python's tokens for a header
        path.write_bytes(broken)
        with pytest.raises(CacheError, match="not a readable pack of npy"):
            read_pack(path, POOLED)
