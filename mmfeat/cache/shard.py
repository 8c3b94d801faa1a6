"""A shard: one immutable HDF5 file with some rows of one encoder.

It is built in memory, so that a failing disk is a plain OSError from a plain write, and committed in
one step. Every dataset is contiguous and unfiltered: any HDF5 reader opens it, and its values can be
mapped. For N samples of an encoder whose output is `pooled`, `tokens` or `prefix`:

    keys (N), ids (N), errors (N)   fixed-length strings: content hash, the sample's id, why there is no value
    OUTPUT                          (N, D) if pooled, else (M, D): the tokens of all samples, one after the other
    OUTPUT_xxh3                     xxh3_64 of each MiB of OUTPUT
    bounds (N + 1)                  not if pooled: tokens of sample i are bounds[i] to bounds[i + 1]

A sample with an error has a vector of NaN, or no tokens. The file is named after the xxh3_128 of all its bytes
but those of OUTPUT, which lie at its end and have their checksums: together they tell a flipped bit anywhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.hdf5 import NOT_OURS, Stored, open_plain, plain_attributes, plain_datasets
from mmfeat.cache.layout import lay_out
from mmfeat.encoders import EncoderSpec, Values
from mmfeat.errors import CacheError, ConfigError
from mmfeat.files import canonical_json, write_atomic
from mmfeat.samples import KEY_LENGTH

FORMAT = 2
MIB = 1 << 20
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.h5")
ATTRIBUTES = ("format", "rows", "output", "fingerprint", "spec")


@dataclass(frozen=True)
class Rows:
    """Values of N samples with their content keys, the ids they were first computed for, and errors ("" if none).

    `values` are (N, D), or N times (T, D). Rows with an error hold NaN or no tokens; where all have one, D may be 0.
    """

    keys: list[bytes]
    ids: list[str]
    errors: list[str]
    values: Values

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.ids) == len(self.errors) == len(self.values):
            counts = f"{len(self.keys)} keys, {len(self.ids)} ids, {len(self.errors)} errors, {len(self.values)} values"
            raise CacheError(f"rows that do not belong together: {counts}")

    @property
    def nbytes(self) -> int:
        return self.values.nbytes if isinstance(self.values, np.ndarray) else sum(one.nbytes for one in self.values)

    def take(self, chosen: Sequence[int]) -> Rows:
        """The rows at `chosen`."""
        return Rows(
            [self.keys[row] for row in chosen],
            [self.ids[row] for row in chosen],
            [self.errors[row] for row in chosen],
            self.values[list(chosen)] if isinstance(self.values, np.ndarray) else [self.values[row] for row in chosen],
        )


@dataclass(frozen=True)
class Shard:
    """A checked shard and where its values lie. It holds no open file, so any process or thread may read it.

    `keys` (N) S32, `errors` (N), `bounds` (N + 1): the rows of `values` that belong to each sample. `checked`
    marks the MiB pieces that were compared with their checksum already.
    """

    path: Path
    keys: np.ndarray
    errors: np.ndarray
    bounds: np.ndarray
    values: Stored
    checksums: np.ndarray
    checked: np.ndarray

    @property
    def width(self) -> int:
        """D."""
        return self.values.shape[1]

    @property
    def row_bytes(self) -> int:
        return self.width * self.values.dtype.itemsize


def joined(batches: Sequence[Rows]) -> Rows:
    """All rows of `batches` in one."""
    return Rows(
        [key for batch in batches for key in batch.keys],
        [id for batch in batches for id in batch.ids],
        [error for batch in batches for error in batch.errors],
        _stacked([batch.values for batch in batches]),
    )


def write_shard(folder: Path, fingerprint: str, spec: dict[str, Any], rows: Rows) -> None:
    """Commit `rows` as one file named after its content; if somebody already did, theirs stands."""
    import xxhash

    output = spec["output"]
    values, bounds = _flat(rows.values, output)
    columns = {
        "keys": np.array(rows.keys, f"S{KEY_LENGTH}"),
        "ids": as_strings(rows.ids),
        "errors": as_strings(rows.errors),
    }
    columns |= {"bounds": bounds} if output != "pooled" else {}
    columns[f"{output}_xxh3"] = checksums(values)
    attributes = {"format": FORMAT, "rows": len(rows.keys), "output": np.bytes_(output)}
    attributes |= {"fingerprint": np.bytes_(fingerprint), "spec": np.bytes_(canonical_json(spec).encode())}

    def fill(file: Any) -> None:
        file.attrs.update(attributes)
        for name, column in columns.items():
            file[name] = column

    layout = lay_out(fill, {output: (values.shape, values.dtype)})
    name = xxhash.xxh3_128_hexdigest(layout.head())
    raw = values.reshape(-1).view(np.uint8).data
    write_atomic(folder / f"{name}.h5", layout.pieces({output: [raw]}), exclusive=True)


def as_strings(values: list[str]) -> np.ndarray:
    """Fixed-length UTF-8, at least one byte wide."""
    import h5py

    encoded = [value.encode() for value in values]
    return np.array(encoded, dtype=h5py.string_dtype("utf-8", max(map(len, encoded), default=1) or 1))


def open_shard(path: Path, fingerprint: str) -> Shard:
    """Check the file and everything but the values. Raises `CacheError` for anything unexpected."""
    with open_plain(path) as file:
        attributes = plain_attributes(file, path, ATTRIBUTES)
        output = attributes["output"]
        if attributes["format"] != FORMAT or output not in ("pooled", "tokens", "prefix"):
            raise CacheError(f"{path}: format {attributes['format']} of another version of mmfeat; {NOT_OURS}")
        if attributes["fingerprint"] != fingerprint:
            raise CacheError(f"{path}: belongs to another encoder ({str(attributes['fingerprint'])[:8]}); {NOT_OURS}")
        stored = plain_datasets(file, path, _kinds(str(output)))
        values = stored.pop(str(output))
        columns = {name: file[name][:] for name in stored}
    if path.stem != _head_hash(path, values):
        raise CacheError(f"{path}: its header does not match its name, which is its checksum; {NOT_OURS}")
    rows = len(columns["keys"])
    bounds = columns.get("bounds", np.arange(rows + 1))
    sums = columns[f"{output}_xxh3"]
    if not _consistent(columns, bounds, values, sums, attributes["rows"]):
        lengths = f"{rows} keys, {len(columns['errors'])} errors, {len(bounds)} bounds, values {values.shape}"
        raise CacheError(f"{path}: {lengths} do not fit together; {NOT_OURS}")
    return Shard(path, columns["keys"], columns["errors"], bounds, values, sums, np.zeros(len(sums), bool))


def read_spec(path: Path) -> EncoderSpec:
    """The spec that a shard says it is of."""
    with open_plain(path) as file:
        spec = plain_attributes(file, path, ("spec",))["spec"]
    try:
        return EncoderSpec.from_json(json.loads(str(spec)))
    except (ValueError, TypeError, AttributeError, ConfigError) as error:
        raise CacheError(f"{path}: its spec is none ({error}); {NOT_OURS}") from error


def read_ids(path: Path) -> np.ndarray:
    """(N,) the sample id that each row of a checked shard was first computed for."""
    with open_plain(path) as file:
        return file["ids"][:]


def checksums(array: np.ndarray) -> np.ndarray:
    """xxh3_64 of each MiB."""
    import xxhash

    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return np.array([xxhash.xxh3_64_intdigest(raw[at : at + MIB]) for at in range(0, len(raw), MIB)], np.uint64)


def _head_hash(path: Path, values: Stored) -> str:
    """Hash of all bytes but the values; of a file that goes on after them, of nothing that was ever written."""
    import xxhash

    if values.nbytes and os.stat(path).st_size != values.offset + values.nbytes:
        return ""
    with path.open("rb") as file:
        return xxhash.xxh3_128_hexdigest(file.read(values.offset if values.nbytes else -1))


def _flat(values: Values, output: str) -> tuple[np.ndarray, np.ndarray]:
    """(rows, D) contiguous, and the bounds of each sample in it."""
    if output == "pooled":
        assert isinstance(values, np.ndarray)
        return np.ascontiguousarray(values), np.arange(len(values) + 1)
    width = max((one.shape[1] for one in values), default=0)
    lengths = [len(one) for one in values]
    kept = [one for one in values if len(one)] or [np.empty((0, width), values[0].dtype)]
    return np.ascontiguousarray(np.concatenate(kept)), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _stacked(parts: list[Values]) -> Values:
    """All values in one. Failed rows may come without a width of their own; they are NaN in any."""
    matrices = [part for part in parts if isinstance(part, np.ndarray)]
    if len(matrices) < len(parts):
        return [value for part in parts for value in part]
    width = max(part.shape[1] for part in matrices)
    empty = lambda part: np.full((len(part), width), np.nan, part.dtype)  # noqa: E731
    return np.concatenate([part if part.shape[1] == width else empty(part) for part in matrices])


def _kinds(output: str) -> dict[str, str]:
    kinds = {"keys": "S", "ids": "S", "errors": "S", output: "f", f"{output}_xxh3": "u"}
    return kinds if output == "pooled" else {**kinds, "bounds": "i"}


def _consistent(
    columns: dict[str, np.ndarray], bounds: np.ndarray, values: Stored, sums: np.ndarray, rows: int | str
) -> bool:
    lengths = {len(columns["keys"]), len(columns["ids"]), len(columns["errors"]), len(bounds) - 1}
    return (
        lengths == {rows}
        and columns["keys"].dtype.itemsize == KEY_LENGTH
        and len(values.shape) == 2
        and bounds[0] == 0
        and bounds[-1] == values.shape[0]
        and bool((np.diff(bounds) >= 0).all())
        and sums.dtype == np.uint64
        and len(sums) == -(-values.nbytes // MIB)
    )
