"""A shard may come from anywhere: whatever HDF5 lets it do is refused before a value is read."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mmfeat.cache.shard import open_shard
from mmfeat.cache.store import Cache
from mmfeat.cache.verify import verify_cache
from mmfeat.errors import CacheError
from tests.cache.shards import (
    LENGTHS,
    POOLED_SPEC,
    ROWS,
    SAMPLES,
    SPECS,
    VECTORS,
    WIDTH,
    Change,
    fit,
    forge,
    put,
    rows,
    write,
)

SECRET = np.full((ROWS, WIDTH), 1234.5, np.float32)
REMEDY = "mmfeat cache verify --quarantine moves it away, mmfeat extract then computes its rows again"


@pytest.fixture
def store(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", "set")


def values(store: Cache, output: str) -> np.ndarray:
    """All values of the samples as the library gives them to anybody."""
    features = store.load(SAMPLES, [SPECS[output]])
    if output == "pooled":
        return features.blocks[0].vectors
    read, there = features.mapped[0].batch(np.arange(ROWS))
    return read[there]


def refused(store: Cache, output: str, path: Path, reason: str) -> None:
    """Loading, packing and verifying say the same one line; then the file is moved away as it is."""
    with pytest.raises(CacheError) as caught:
        values(store, output)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert message.endswith(REMEDY)
    assert reason in message
    before = path.read_bytes() if path.is_file() else b""
    (damage,) = verify_cache(store.folder.parent, quarantine=True).damages
    assert damage.path == path
    assert reason in damage.reason
    assert damage.moved is not None
    assert os.path.lexists(damage.moved)
    assert not os.path.lexists(path)
    assert not before or damage.moved.read_bytes() == before


def external_link(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["pooled"] = SECRET
    del file["pooled"]
    file["pooled"] = h5py.ExternalLink(str(folder / "other.h5"), "pooled")


def external_storage(file: h5py.File, folder: Path) -> None:
    (folder / "secret").write_bytes(SECRET.tobytes())
    del file["pooled"]
    file.create_dataset("pooled", SECRET.shape, "f4", external=[(str(folder / "secret"), 0, SECRET.nbytes)])


def virtual(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "other.h5", "w") as other:
        other["pooled"] = SECRET
    layout = h5py.VirtualLayout(SECRET.shape, "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "pooled", SECRET.shape)
    del file["pooled"]
    file.create_virtual_dataset("pooled", layout)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (external_link, "pooled is a link, not a dataset"),
        (external_storage, "pooled has its values in another file"),
        (virtual, "pooled is virtual: its values lie in other files"),
    ],
)
def test_no_other_file_is_read(store: Cache, change: Change, reason: str) -> None:
    path = forge(write(store.spec_folder(POOLED_SPEC), POOLED_SPEC), change)
    with h5py.File(path, "r") as file:  # what a reader who trusts the file gets
        np.testing.assert_array_equal(file["pooled"][:], SECRET)
    refused(store, "pooled", path, reason)


def test_a_forged_copy_without_a_change_is_taken(store: Cache) -> None:
    """So what refuses the others is what was changed in them."""
    for output, spec in SPECS.items():
        forge(write(store.spec_folder(spec), spec), lambda *_: None)
        np.testing.assert_array_equal(
            values(store, output), VECTORS if output == "pooled" else np.repeat(VECTORS, LENGTHS, axis=0)
        )


def soft_link(file: h5py.File, _: Path) -> None:
    del file["ids"]
    file["ids"] = h5py.SoftLink("/errors")


def group(file: h5py.File, _: Path) -> None:
    del file["errors"]
    file.create_group("errors")


def references(kind: Any) -> Change:
    def change(file: h5py.File, _: Path) -> None:
        reference = file.ref if kind is h5py.ref_dtype else file["pooled"].regionref[:2]
        held = np.empty(ROWS, kind)
        held[:] = [reference] * ROWS
        del file["keys"]
        file.create_dataset("keys", data=held, dtype=kind)

    return change


def half_used_floats(file: h5py.File, _: Path) -> None:
    """Two bytes a value that NumPy has no type for, as large brains keep them."""
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(15, 7, 8, 0, 7)
    kind.set_size(2)
    kind.set_precision(16)
    del file["pooled"]
    space = h5py.h5s.create_simple((ROWS, WIDTH))
    h5py.h5d.create(file.id, b"pooled", kind, space).write(h5py.h5s.ALL, h5py.h5s.ALL, VECTORS)


def unallocated(file: h5py.File, _: Path) -> None:
    del file["pooled"]
    file.create_dataset("pooled", (1 << 50, WIDTH), "f4")


TEXT = h5py.string_dtype()
LISTS = np.array([np.arange(row) for row in range(ROWS)], object)
COMPOUND = np.zeros(ROWS, [("a", "f4"), ("b", "f4")])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(soft_link, "ids is a link", id="soft link"),
        pytest.param(group, "errors is not a dataset", id="group"),
        pytest.param(put("pooled", VECTORS, chunks=(4, WIDTH), compression="gzip"), "pooled is behind filters", id="z"),
        pytest.param(put("pooled", VECTORS, chunks=(4, WIDTH), shuffle=True), "pooled is behind filters", id="shuffle"),
        pytest.param(put("pooled", VECTORS, fletcher32=True), "pooled is behind filters", id="fletcher32"),
        pytest.param(put("pooled", VECTORS, chunks=(4, WIDTH)), "pooled is not stored in one piece", id="chunks"),
        pytest.param(put("ids", ["a"] * ROWS, dtype=TEXT), "ids has a variable-length", id="variable-length text"),
        pytest.param(put("keys", LISTS, dtype=h5py.vlen_dtype("i4")), "keys has a variable-length", id="lists"),
        pytest.param(references(h5py.ref_dtype), "keys has a variable-length or reference", id="references"),
        pytest.param(references(h5py.regionref_dtype), "keys has a variable-length or reference", id="regions"),
        pytest.param(put("pooled", COMPOUND), "pooled has the type", id="compound"),
        pytest.param(put("pooled", VECTORS.astype(">f4")), "pooled has the type >f4", id="big-endian"),
        pytest.param(put("pooled", VECTORS.astype("i4")), "pooled has the type int32", id="integers"),
        pytest.param(half_used_floats, "pooled is stored in another way than", id="bfloat16"),
        pytest.param(unallocated, "pooled reaches beyond the end of the file", id="nothing behind it"),
        pytest.param(put("extra", VECTORS), "nothing named extra belongs into it", id="extra"),
        pytest.param(put("a\n\x1b[31mb", VECTORS), "nothing named a ?[31mb belongs", id="name that colours"),
        pytest.param(lambda file, _: file.__delitem__("errors"), "it has no errors", id="missing"),
        pytest.param(put("keys", np.zeros(ROWS, "S31")), "do not fit together", id="short keys"),
        pytest.param(put("keys", np.zeros((ROWS, 1), "S32")), "do not fit together", id="keys in columns"),
        pytest.param(put("pooled", VECTORS[:, :0]), "do not fit together", id="no width"),
        pytest.param(put("ids", np.zeros(ROWS + 1, "S1")), "do not fit together", id="one id more"),
        pytest.param(put("errors", np.zeros(ROWS - 1, "S1")), "do not fit together", id="one error less"),
        pytest.param(put("pooled", VECTORS.ravel()), "do not fit together", id="flat"),
        pytest.param(put("pooled", VECTORS[:-1]), "do not fit together", id="one vector less"),
        pytest.param(put("pooled_xxh3", np.zeros(2, "u8")), "do not fit together", id="checksums"),
        pytest.param(put("pooled_xxh3", np.zeros(1, "u4")), "do not fit together", id="short checksums"),
    ],
)
def test_only_plain_whole_datasets_are_read(store: Cache, change: Change, reason: str) -> None:
    path = forge(write(store.spec_folder(POOLED_SPEC), POOLED_SPEC), change)
    refused(store, "pooled", path, reason)


BOUNDS = np.concatenate([[0], np.cumsum(LENGTHS)])


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param([*BOUNDS[:3], 9, *BOUNDS[4:]], id="backwards"),
        pytest.param([[bound] for bound in BOUNDS], id="in columns"),
        pytest.param([*BOUNDS[:-1], BOUNDS[-1] + 1], id="beyond"),
        pytest.param([-1, *BOUNDS[1:]], id="before"),
        pytest.param([1, *BOUNDS[1:]], id="late"),
        pytest.param(BOUNDS[:-1], id="short"),
        pytest.param([*BOUNDS[:2], np.iinfo(np.int64).min, *BOUNDS[3:]], id="overflow"),
    ],
)
def test_bounds_stay_inside_and_go_on(store: Cache, bounds: list[int]) -> None:
    spec = SPECS["tokens"]
    path = forge(write(store.spec_folder(spec), spec), put("bounds", np.array(bounds, np.int64)))
    refused(store, "tokens", path, "do not fit together")


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("format", None, "it has no attribute format"),
        ("more", "a string of any length", "the attributes more are not expected"),
        ("format", 1, "format 1 of another version of mmfeat"),
        ("format", 3, "format 3 of another version of mmfeat"),
        ("rows", ROWS + 1, "do not fit together"),
        ("rows", 8.0, "its attribute rows is neither a number nor a plain string"),
        ("rows", np.array([ROWS]), "its attribute rows is neither"),
        ("spec", "a string of any length", "its attribute spec is neither"),
        ("output", np.bytes_(b"logits"), "of another version of mmfeat"),
        ("fingerprint", np.bytes_(b"0" * 64), "belongs to another encoder (00000000)"),
        ("fingerprint", np.bytes_(b"\xff" * 64), "not a readable HDF5 file of mmfeat"),
    ],
)
def test_attributes_are_what_they_should_be(store: Cache, name: str, value: Any, reason: str) -> None:
    def change(file: h5py.File, _: Path) -> None:
        file.attrs.pop(name, None)
        if value is not None:
            file.attrs[name] = value

    with store.writer(POOLED_SPEC, {}) as writer:  # the folder says of itself what it is of
        writer.add(rows(POOLED_SPEC))
    (shard,) = store.spec_folder(POOLED_SPEC).glob("*.h5")
    refused(store, "pooled", forge(shard, change), reason)


@pytest.mark.parametrize("claimed", [(ROWS + 1, WIDTH), (1 << 40, WIDTH), (1 << 62, 1 << 62)])
def test_a_shape_larger_than_the_file_is_refused(store: Cache, claimed: tuple[int, int]) -> None:
    """In the older layout no checksum guards the shape."""
    real = write(store.spec_folder(POOLED_SPEC), POOLED_SPEC)
    copy = real.with_name("copy")
    with h5py.File(real, "r") as old, h5py.File(copy, "w", libver="earliest") as new:
        new.attrs.update(old.attrs)
        for name in old:
            new.create_dataset(name, data=old[name][:], dtype=old[name].dtype)
    real.unlink()
    data, shape = copy.read_bytes(), struct.pack("<2Q", ROWS, WIDTH)
    assert data.count(shape) == 2  # present and greatest size
    copy.write_bytes(data.replace(shape, struct.pack("<2Q", *claimed)))
    with pytest.raises(CacheError, match=r"copy: .*(not a readable|beyond the end|larger or smaller)"):
        open_shard(copy, POOLED_SPEC.fingerprint)
    refused(store, "pooled", fit(copy), "")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        pytest.param(lambda path: path.write_bytes(b""), "not a readable HDF5 file", id="empty"),
        pytest.param(lambda path: path.write_text("not HDF5 " * 1000), "not a readable HDF5 file", id="text"),
        pytest.param(lambda path: path.mkdir(), "not a plain file", id="folder"),
        pytest.param(lambda path: os.mkfifo(path), "not a plain file", id="pipe"),
        pytest.param(lambda path: path.symlink_to("/etc/passwd"), "not a readable HDF5 file", id="link to a text"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), "not a plain file", id="link to a device"),
        pytest.param(lambda path: path.symlink_to("nowhere"), "the file is gone", id="link to nothing"),
    ],
)
def test_what_is_no_hdf5_file_is_refused(store: Cache, make: Callable[[Path], object], reason: str) -> None:
    with store.writer(POOLED_SPEC, {}) as writer:
        writer.add(rows(POOLED_SPEC, 3))
    path = store.spec_folder(POOLED_SPEC) / f"{'0' * 32}.h5"
    make(path)
    with pytest.raises(CacheError, match=reason):
        store.load(SAMPLES[:3], [POOLED_SPEC])
    (damage,) = verify_cache(store.folder.parent, quarantine=True).damages
    assert reason in damage.reason
    assert damage.moved is not None
    assert os.path.lexists(damage.moved)
    np.testing.assert_array_equal(store.load(SAMPLES[:3], [POOLED_SPEC]).blocks[0].vectors, VECTORS[:3])


def test_a_pipe_does_not_hang_any_command(store: Cache, tmp_path: Path) -> None:
    with store.writer(POOLED_SPEC, {}) as writer:
        writer.add(rows(POOLED_SPEC))
    os.mkfifo(store.spec_folder(POOLED_SPEC) / f"{'0' * 32}.h5")
    code = (
        "from mmfeat.cache.survey import survey; from mmfeat.cache.verify import verify_cache\n"
        "print(len(survey('cache')[0].problems), len(verify_cache('cache').damages))"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    assert answer.stdout.split() == ["1", "1"], answer.stderr


def test_a_shard_under_another_name_is_refused(store: Cache) -> None:
    path = write(store.spec_folder(POOLED_SPEC), POOLED_SPEC)
    other = path.rename(path.with_name(f"{'0' * 32}.h5"))
    refused(store, "pooled", other, "it does not match its name, which is its checksum")


def test_a_link_gives_what_its_name_says_or_nothing(store: Cache, tmp_path: Path) -> None:
    """Tools that keep large files elsewhere leave links; the checks are those of a file."""
    path = write(store.spec_folder(POOLED_SPEC), POOLED_SPEC)
    kept = path.rename(tmp_path / path.name)
    path.symlink_to(kept)
    np.testing.assert_array_equal(values(store, "pooled"), VECTORS)
    path.rename(path.with_name(f"{'0' * 32}.h5"))
    with pytest.raises(CacheError, match="it does not match its name"):
        values(store, "pooled")


def test_other_names_are_not_opened(store: Cache) -> None:
    path = write(store.spec_folder(POOLED_SPEC), POOLED_SPEC)
    for name in (f"{path.name}.bak", path.stem.upper() + "-.h5", "x.h5", f"{path.stem}0.h5", f".{path.name}.h-1-0.tmp"):
        path.with_name(name).write_bytes(b"not HDF5")
        os.mkfifo(path.with_name(f"pipe-{name}"))
    np.testing.assert_array_equal(values(store, "pooled"), VECTORS)
    assert verify_cache(store.folder.parent).damages == []
