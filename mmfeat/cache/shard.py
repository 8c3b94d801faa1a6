"""A shard: one immutable HDF5 file with some rows of one encoder.

It is built in memory, so that a failing disk is a plain OSError from a plain write, and committed in
one step. Every dataset is contiguous and unfiltered: any HDF5 reader opens it, and its vectors can be
mapped. Datasets: `keys` (N) content hashes, `ids` (N) and `errors` (N), fixed-length strings, `pooled` (N, D),
`pooled_xxh3` one checksum a MiB. A row with an error holds NaN.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.errors import CacheError
from mmfeat.files import canonical_json, write_atomic
from mmfeat.samples import KEY_LENGTH

FORMAT = 1
MIB = 1 << 20
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.h5")
_KINDS = {"keys": "S", "ids": "S", "errors": "S", "pooled": "f", "pooled_xxh3": "u"}


@dataclass(frozen=True)
class Rows:
    """Vectors with their content keys, the ids they were first computed for, and errors ("" if none).

    `pooled` is (N, D); rows with an error hold NaN, and where all rows have one D may be 0.
    """

    keys: list[bytes]
    ids: list[str]
    errors: list[str]
    pooled: np.ndarray


@dataclass(frozen=True)
class Shard:
    """An open shard; `pooled` is mapped, not read. `keys` are (N,) S32."""

    path: Path
    keys: np.ndarray
    errors: np.ndarray
    pooled: np.ndarray


def write_shard(folder: Path, fingerprint: str, spec: dict[str, Any], rows: Rows) -> Path:
    """Commit `rows` as one file named after its content; if somebody already did, theirs stands."""
    import h5py
    import xxhash

    keys = np.array(rows.keys, dtype=f"S{KEY_LENGTH}")
    ids, errors = _strings(rows.ids), _strings(rows.errors)
    pooled = np.ascontiguousarray(rows.pooled)
    attributes = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "spec": canonical_json(spec),
        "rows": len(keys),
    }
    checksums = _checksums(pooled)
    name = xxhash.xxh3_128(keys.tobytes() + errors.tobytes() + checksums.tobytes()).hexdigest()
    path = folder / f"{name}.h5"
    buffer = io.BytesIO()
    # Superblock 2 for old readers; every dataset on a page of its own, so that it can be mapped.
    with h5py.File(buffer, "w", libver=("v108", "v108"), alignment_threshold=1, alignment_interval=4096) as file:
        file.attrs.update(attributes)
        file.attrs["header_xxh3"] = _header_hash(attributes, keys, ids, errors)
        file["keys"], file["ids"], file["errors"] = keys, ids, errors
        file["pooled"], file["pooled_xxh3"] = pooled, checksums
    write_atomic(path, buffer.getbuffer(), exclusive=True)
    return path


def open_shard(path: Path, fingerprint: str) -> Shard:
    """Check the header and map the vectors. Raises `CacheError` for anything unexpected."""
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            size = path.stat().st_size
            sets = {name: _checked_dataset(path, file, name, size) for name in _KINDS}
            keys, ids, errors = sets["keys"][:], sets["ids"][:], sets["errors"][:]
            pooled = sets["pooled"]
            shape, dtype, offset = pooled.shape, pooled.dtype, pooled.id.get_offset()
            attributes = {name: _plain(file.attrs[name]) for name in ("format", "fingerprint", "spec", "rows")}
            header = int(file.attrs["header_xxh3"])
    except (OSError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise CacheError(
            f"{path}: not a readable shard ({error}); move it away and run mmfeat extract again"
        ) from error
    if attributes["format"] != FORMAT or header != _header_hash(attributes, keys, ids, errors):
        raise CacheError(f"{path}: its header does not match its checksum; move it away and run mmfeat extract again")
    if attributes["fingerprint"] != fingerprint:
        raise CacheError(f"{path}: belongs to another encoder ({attributes['fingerprint'][:8]}); move it away")
    if keys.dtype.itemsize != KEY_LENGTH or not len(keys) == len(errors) == shape[0] or len(shape) != 2:
        raise CacheError(f"{path}: {len(keys)} keys, {len(errors)} errors, vectors {shape}; move it away")
    empty = not all(shape)  # nothing to map where every row failed
    mapped = np.empty(shape, dtype) if empty else np.memmap(path, mode="r", dtype=dtype, shape=shape, offset=offset)
    return Shard(path, keys, errors, mapped)


def corrupt_pieces(shard: Shard) -> list[int]:
    """Numbers of the MiB pieces of the vectors whose checksum does not match."""
    import h5py

    with h5py.File(shard.path, "r", locking=False) as file:
        stored = file["pooled_xxh3"][:]
    return [int(piece) for piece in np.flatnonzero(stored != _checksums(shard.pooled))]


def _checked_dataset(path: Path, file: Any, name: str, size: int) -> Any:
    """A dataset that lies plainly inside this very file; anything else may read what it should not."""
    import h5py

    link = file.get(name, getlink=True)
    dataset = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(dataset, h5py.Dataset):
        raise CacheError(f"{path}: {name} is not a plain dataset; move the file away")
    plain = dataset.chunks is None and dataset.external is None and not dataset.is_virtual
    offset = dataset.id.get_offset()
    if not plain or dataset.dtype.kind != _KINDS[name] or (dataset.size and offset is None):
        raise CacheError(f"{path}: {name} is stored in a way that mmfeat never writes; move the file away")
    if dataset.size and offset + dataset.size * dataset.dtype.itemsize > size:
        raise CacheError(f"{path}: {name} reaches beyond the end of the file; move the file away")
    return dataset


def _strings(values: list[str]) -> np.ndarray:
    """Fixed-length UTF-8, at least one byte wide."""
    encoded = [value.encode() for value in values]
    return np.array(encoded, dtype=f"S{max(map(len, encoded), default=1) or 1}")


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return (raw[start : start + MIB] for start in range(0, len(raw), MIB))


def _checksums(array: np.ndarray) -> np.ndarray:
    import xxhash

    return np.array([xxhash.xxh3_64_intdigest(piece.data) for piece in _pieces(array)], dtype=np.uint64)


def _header_hash(attributes: dict[str, Any], *columns: np.ndarray) -> int:
    import xxhash

    digest = xxhash.xxh3_64(canonical_json(attributes).encode())
    for column in columns:
        digest.update(column.tobytes())
    return digest.intdigest() >> 1  # HDF5 readers in other languages may have no unsigned attributes


def _plain(value: Any) -> Any:
    """An attribute as a Python value."""
    if isinstance(value, bytes):
        return value.decode()
    return value.item() if isinstance(value, np.generic) else value
