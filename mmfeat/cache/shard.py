"""A shard: one immutable HDF5 file with some rows of one encoder.

A shard is laid out in memory, so that a failing disk is a plain OSError from a plain write, and committed in one step.
Every dataset is contiguous and unfiltered: any HDF5 reader opens the file, and the values can be mapped. For N samples
of an encoder whose output is `pooled`, `tokens` or `prefix`:

    keys (N), ids (N), errors (N)   fixed-length strings: content hash, sample id, reason for no value
    OUTPUT                          (N, D) if pooled, else (M, D): the tokens of all samples, one after the other
    OUTPUT_xxh3                     xxh3_64 of each MiB of OUTPUT
    bounds (N + 1)                  not if pooled: tokens of sample i are bounds[i] to bounds[i + 1]

A sample with an error has a vector of NaN, or no tokens. The file is named after the xxh3_128 of all its bytes
but those of OUTPUT. Name and checksums together tell a flipped bit anywhere.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.hdf5 import NOT_OURS, Stored, lay_out, open_plain, plain_attributes, plain_datasets, printable
from mmfeat.encoders.spec import EncoderSpec, Values
from mmfeat.errors import CacheError, ConfigError
from mmfeat.samples.contents import KEY_LENGTH
from mmfeat.system.files import canonical_json, write_named

MIB = 1 << 20
FORMAT = 2
SHARD_NAME = re.compile(r"[0-9a-f]{32}\.h5")
ATTRIBUTES = ("format", "rows", "output", "fingerprint", "spec")


@dataclass(frozen=True)
class Rows:
    """Values of N samples with content keys, ids of the samples that gave the values, and errors ("" for none).

    `values` are (N, D), or N times (T, D). Rows with an error hold NaN or no tokens; if all rows have one, D may be 0.
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
    def failed(self) -> int:
        """The number of rows with an error."""
        return len(self.errors) - self.errors.count("")

    @property
    def _arrays(self) -> Sequence[np.ndarray]:
        return [self.values] if isinstance(self.values, np.ndarray) else self.values

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self._arrays)

    @property
    def width(self) -> int:
        """D, the width of the values."""
        return max((array.shape[1] for array in self._arrays), default=0)

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each sample, 1 for a pooled vector."""
        return [1] * len(self.values) if isinstance(self.values, np.ndarray) else [len(value) for value in self.values]

    @property
    def widths(self) -> set[int]:
        """Each D of the rows without an error."""
        if isinstance(self.values, np.ndarray):
            return {self.values.shape[1]} if self.failed < len(self.errors) else set()
        return {value.shape[1] for value in self.values if len(value)}

    def arrays(self, width: int) -> Iterator[np.ndarray]:
        """The values as contiguous (n, width) arrays; failed vectors of width 0 are NaN in any width."""
        if not isinstance(self.values, np.ndarray):
            yield from (np.ascontiguousarray(value) for value in self.values if len(value))
        elif self.values.shape[1] == width:
            yield np.ascontiguousarray(self.values)
        else:
            yield np.full((len(self.values), width), np.nan, self.values.dtype)

    def take(self, chosen: Sequence[int]) -> Rows:
        """The rows at `chosen`."""
        return Rows(
            [self.keys[row] for row in chosen],
            [self.ids[row] for row in chosen],
            [self.errors[row] for row in chosen],
            self.values[list(chosen)] if isinstance(self.values, np.ndarray) else [self.values[row] for row in chosen],
        )


def mib_pieces(arrays: Sequence[np.ndarray]) -> Iterator[memoryview | bytes]:
    """The bytes of all arrays in pieces of 1 MiB, copied only where a piece spans several arrays."""
    held: list[memoryview] = []
    size = 0
    for array in arrays:
        raw = array.reshape(-1).view(np.uint8).data
        while raw:
            held.append(raw[: MIB - size])
            raw, size = raw[MIB - size :], size + len(held[-1])
            if size == MIB:
                yield held[0] if len(held) == 1 else b"".join(held)
                held, size = [], 0
    if held:
        yield b"".join(held)


@dataclass(frozen=True)
class Shard:
    """A checked shard. No file is kept open, so any process or thread may read the values.

    `keys` (N) S32, `errors` (N), `bounds` (N + 1): sample i has rows bounds[i] to bounds[i + 1] of `values`.
    `checked` marks the MiB pieces that were compared with their checksum before.
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
        """D, the width of the values."""
        return self.values.shape[1]

    @property
    def row_bytes(self) -> int:
        return self.width * self.values.dtype.itemsize


def write_shard(folder: Path, fingerprint: str, spec: dict[str, Any], batches: Sequence[Rows]) -> Path:
    """Commit the rows of all batches as one file named after its content; an equal file of another writer stays."""
    output, width = spec["output"], max(batch.width for batch in batches)
    if len(widths := set().union(*(batch.widths for batch in batches))) > 1:
        raise CacheError(f"{folder}: values of width {', '.join(map(str, sorted(widths)))} for one encoder")
    arrays = [array for batch in batches for array in batch.arrays(width)]
    if wrong := {str(array.dtype) for array in arrays} - {spec["storage"]}:
        raise CacheError(f"{folder}: {', '.join(wrong)} values for an encoder that stores {spec['storage']}")
    columns = _columns(batches, output)
    attributes = {"format": FORMAT, "rows": len(columns["keys"]), "output": np.bytes_(output)}
    attributes |= {"fingerprint": np.bytes_(fingerprint), "spec": np.bytes_(canonical_json(spec).encode())}

    def fill(file: Any) -> None:
        file.attrs.update(attributes)
        for name, column in columns.items():
            file[name] = column

    values = (sum(map(len, arrays)), width), np.dtype(spec["storage"])
    checksums = (-(-sum(array.nbytes for array in arrays) // MIB),), np.dtype(np.uint64)
    layout = lay_out(fill, {output: values, f"{output}_xxh3": checksums})
    return write_named(folder, _file_pieces(layout.gaps, arrays))


def _file_pieces(gaps: Sequence[bytes], arrays: Sequence[np.ndarray]) -> Generator[bytes | memoryview, None, str]:
    """Yield the file in order: head, values, gap, checksums, tail; return its name, the hash of all but the values."""
    import xxhash

    head, gap, tail = gaps
    yield head
    sums = []
    for piece in mib_pieces(arrays):
        sums.append(xxhash.xxh3_64_intdigest(piece))  # the piece is in the processor's cache here
        yield piece
    rest = gap + np.array(sums, np.uint64).tobytes() + tail
    yield rest
    return f"{xxhash.xxh3_128_hexdigest(head + rest)}.h5"


def as_strings(values: list[str]) -> np.ndarray:
    """Fixed-length UTF-8, at least one byte wide."""
    import h5py

    if not any(values):  # most errors are empty
        return np.zeros(len(values), h5py.string_dtype("utf-8", 1))
    encoded = "\0".join(values).encode().split(b"\0")  # one call is faster than one for each value
    if len(encoded) != len(values):
        encoded = [value.encode() for value in values]
    return np.array(encoded, h5py.string_dtype("utf-8", max(map(len, encoded))))


def open_shard(path: Path, fingerprint: str) -> Shard:
    """Open a shard and check everything but its values. Raises `CacheError` for anything unexpected."""
    with open_plain(path) as file:
        attributes = plain_attributes(file, path, ATTRIBUTES)
        output = attributes["output"]
        if attributes["format"] != FORMAT or output not in ("pooled", "tokens", "prefix"):
            version = printable(str(attributes["format"]))[:20]
            raise CacheError(f"{path}: format {version} of another version of mmfeat; {NOT_OURS}")
        if attributes["fingerprint"] != fingerprint:
            other = printable(str(attributes["fingerprint"]))[:8]
            raise CacheError(f"{path}: belongs to another encoder ({other}); {NOT_OURS}")
        if unknown := set(file.attrs) - set(ATTRIBUTES):
            names = printable(", ".join(sorted(unknown)))[:80]
            raise CacheError(f"{path}: the attributes {names} are not expected in a shard; {NOT_OURS}")
        stored = plain_datasets(file, path, _kinds(str(output)))
        values = stored.pop(str(output))
        columns = {name: file[name][:] for name in stored}
        if path.stem != _hash_around(path, values):
            raise CacheError(f"{path}: it does not match its name, which is its checksum; {NOT_OURS}")
    rows = len(columns["keys"])
    bounds = columns.get("bounds", np.arange(rows + 1))
    sums = columns[f"{output}_xxh3"]
    if not _consistent(columns, bounds, values, sums, attributes["rows"]):
        lengths = f"{rows} keys, {len(columns['errors'])} errors, {len(bounds)} bounds, values {values.shape}"
        raise CacheError(f"{path}: {lengths} do not fit together; {NOT_OURS}")
    return Shard(path, columns["keys"], columns["errors"], bounds, values, sums, np.zeros(len(sums), bool))


def read_spec(path: Path) -> EncoderSpec:
    """The spec that a shard states."""
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


def _hash_around(path: Path, values: Stored) -> str:
    """XXH3-128 of all bytes of a shard but its values."""
    import xxhash

    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start, stop in ((0, values.offset), (values.offset + values.nbytes, size)):
            file.seek(start)
            for at in range(start, stop, MIB):
                digest.update(file.read(min(MIB, stop - at)))
    return digest.hexdigest()


def _columns(batches: Sequence[Rows], output: str) -> dict[str, np.ndarray]:
    """All datasets of a shard but the values and their checksums."""
    keys = list(chain.from_iterable(batch.keys for batch in batches))
    if wrong := set(map(len, keys)) - {KEY_LENGTH}:  # a longer key would shift all others below
        raise CacheError(f"content keys of {', '.join(map(str, sorted(wrong)))} bytes; they have {KEY_LENGTH}")
    errors = chain.from_iterable(batch.errors for batch in batches)
    columns = {
        "keys": np.frombuffer(b"".join(keys), f"S{KEY_LENGTH}"),
        "ids": as_strings(list(chain.from_iterable(batch.ids for batch in batches))),
        "errors": as_strings(list(errors)),
    }
    if output != "pooled":
        lengths = [length for batch in batches for length in batch.lengths]
        columns["bounds"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return columns


def _kinds(output: str) -> dict[str, str]:
    kinds = {"keys": "S", "ids": "S", "errors": "S", output: "f", f"{output}_xxh3": "u"}
    return kinds if output == "pooled" else {**kinds, "bounds": "i"}


def _consistent(
    columns: dict[str, np.ndarray], bounds: np.ndarray, values: Stored, sums: np.ndarray, rows: int | str
) -> bool:
    """Whether the shapes, lengths and bounds of a shard's datasets fit together."""
    lengths = {len(columns["keys"]), len(columns["ids"]), len(columns["errors"]), len(bounds) - 1}
    return (
        lengths == {rows}
        and all(column.ndim == 1 for column in columns.values())
        and (values.shape[1:] != (0,) or bool((columns["errors"] != b"").all()) or "bounds" in columns)
        and columns["keys"].dtype.itemsize == KEY_LENGTH
        and len(values.shape) == 2
        and bounds[0] == 0
        and bounds[-1] == values.shape[0]
        and bool((np.diff(bounds) >= 0).all())
        and sums.dtype == np.uint64
        and len(sums) == -(-values.nbytes // MIB)
    )
