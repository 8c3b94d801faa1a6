"""Small real shards, and forged ones: a real shard's content with one thing changed, under a name that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from mmfeat.cache.shard import MIB, Rows, write_shard
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.samples.dataset import Sample, content_key

ROWS, WIDTH = 8, 24
TEXTS = [f"text {number}" for number in range(ROWS)]
SAMPLES = [Sample(f"s{number}", text) for number, text in enumerate(TEXTS)]
VECTORS = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
LENGTHS = [2, 0, 1, 3, 1, 2, 4, 1]
TOKENS = [np.tile(VECTORS[row], (length, 1)) for row, length in enumerate(LENGTHS)]
POOLED_SPEC = EncoderSpec("hashing", "text", "", "builtin:1", "float32", "float32", cleaning="tweet")
TOKEN_SPEC = dataclasses.replace(POOLED_SPEC, family="bert", variant="tiny", output="tokens")
SPECS = {"pooled": POOLED_SPEC, "tokens": TOKEN_SPEC}
Change = Callable[[h5py.File, Path], None]


def rows(spec: EncoderSpec, count: int = ROWS) -> Rows:
    """The first rows, for samples s0, s1, ..."""
    values = VECTORS[:count] if spec.output == "pooled" else TOKENS[:count]
    keys = [content_key(text.encode()) for text in TEXTS[:count]]
    return Rows(keys, [sample.id for sample in SAMPLES[:count]], [""] * count, values)


def write(folder: Path, spec: EncoderSpec, *batches: Rows) -> Path:
    return write_shard(folder, spec.fingerprint, spec.stated, batches or [rows(spec)])


def put(name: str, data: Any, **options: Any) -> Change:
    """Replace a dataset."""

    def change(file: h5py.File, _: Path) -> None:
        if name in file:
            del file[name]
        file.create_dataset(name, data=data, **options)

    return change


def forge(shard: Path, change: Change) -> Path:
    """Take the shard's place by a copy after `change`, which is given the open file and a folder for other files."""
    copy = shard.parent / "copy"
    with h5py.File(shard, "r") as old, h5py.File(copy, "w", libver=("v108", "latest")) as new:
        new.attrs.update(old.attrs)
        for name in old:
            new.create_dataset(name, data=old[name][:], dtype=old[name].dtype)
        change(new, shard.parents[3])
    shard.unlink()
    return fit(copy)


def fit(path: Path) -> Path:
    """Give a file the name that its content asks for."""
    data = path.read_bytes()
    start, stop = values_of(path)
    named = path.with_name(f"{xxhash.xxh3_128_hexdigest(data[:start] + data[stop:])}.h5")
    path.rename(named)
    return named


def values_of(path: Path) -> tuple[int, int]:
    """First byte and end of the values; both 0 where they are not stored in one piece."""
    try:
        with h5py.File(path, "r") as file:
            output = file.attrs["output"].decode()
            offset = file[output].id.get_offset() or 0
            return offset, offset + file[output].nbytes if offset else 0
    except (OSError, KeyError, AttributeError, TypeError):
        return 0, 0


def flip(path: Path, at: int) -> None:
    """Flip one bit of the byte at an offset; which one depends on the offset."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << at % 8]))


def falsify(shard: Path, row: int, values: np.ndarray) -> Path:
    """Give a row other values, with checksums and a name that fit: what no checksum can tell."""
    with h5py.File(shard, "r+") as file:
        output = file.attrs["output"].decode()
        file[output][row : row + len(values)] = values
        raw = file[output][:].tobytes()
        file[f"{output}_xxh3"][:] = [xxhash.xxh3_64_intdigest(raw[at : at + MIB]) for at in range(0, len(raw), MIB)]
    return fit(shard)
