"""The feature cache: (content of a sample, encoder spec) -> vectors.

One folder an encoder spec, `ROOT/DATASET/NAME-FINGERPRINT8/`, with `spec.json` and immutable shards.
Writers add files; nothing is changed in place, so readers and other writers need no lock.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mmfeat.cache.keys import ContentKeys, content_keys
from mmfeat.cache.shard import SHARD_NAME, Rows, Shard, corrupt_pieces, open_shard, write_shard
from mmfeat.encoders import EncoderSpec
from mmfeat.errors import CacheError, CacheMissError, ConfigError
from mmfeat.features import Block, Features
from mmfeat.files import read_json, write_json
from mmfeat.samples import KEY_LENGTH, Sample

SHARD_BYTES = 128 << 20
SHARD_SECONDS = 30.0
SPEC_FILE = "spec.json"


class Cache:
    """The shards of one data set under `root`."""

    def __init__(self, root: str | Path, dataset: str) -> None:
        if not str(root):
            raise ConfigError("--cache is empty; name a folder")
        self.folder = Path(root) / folder_name(dataset)

    def spec_folder(self, spec: EncoderSpec) -> Path:
        return self.folder / spec.folder_name

    def shards(self, spec: EncoderSpec) -> list[Shard]:
        """All committed shards of `spec`, in a fixed order; a folder of another spec is refused."""
        folder = self.spec_folder(spec)
        if not folder.is_dir():
            return []
        paths = sorted(path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name))
        if paths or (folder / SPEC_FILE).exists():  # a kill may leave a folder with neither
            _check_spec_file(folder / SPEC_FILE, spec)
        shards = [open_shard(path, spec.fingerprint) for path in paths]
        _check_alike(shards, spec)
        return shards

    def keys(self, spec: EncoderSpec) -> tuple[np.ndarray, np.ndarray]:
        """(N,) S32 content keys that are stored, and for each whether all that is stored is an error."""
        keys, failed = _joined(self.shards(spec))
        order = np.lexsort((failed, keys))  # of equal keys the good row comes first
        unique, first = np.unique(keys[order], return_index=True)
        return unique, failed[order][first]

    def writer(self, spec: EncoderSpec, provenance: dict[str, Any]) -> ShardWriter:
        """A writer of new rows; `provenance` (library versions, where the weights lay) goes beside the spec."""
        folder = self.spec_folder(spec)
        if (folder / SPEC_FILE).exists():
            _check_spec_file(folder / SPEC_FILE, spec)
        else:
            content = {"fingerprint": spec.fingerprint, "spec": asdict(spec), "provenance": provenance}
            write_json(folder / SPEC_FILE, content)
        return ShardWriter(folder, spec)

    def load(
        self,
        samples: Sequence[Sample],
        specs: Iterable[EncoderSpec],
        keys: Mapping[str, ContentKeys] | None = None,
    ) -> Features:
        """Vectors of `samples` for each spec, aligned, with masks for missing and broken parts.

        A block of which no row is there has width 0: nobody knows its width yet.
        `keys` are content keys by modality, where they were taken already.
        Raises `CacheMissError` if any sample was never extracted: nothing is made up.
        """
        specs = list(specs)
        known = dict(keys or {})
        for modality in {spec.modality for spec in specs} - known.keys():
            known[modality] = content_keys(samples, modality)
        blocks = tuple(self._block(samples, known[spec.modality], spec) for spec in specs)
        return Features(tuple(sample.id for sample in samples), blocks)

    def _block(self, samples: Sequence[Sample], wanted: ContentKeys, spec: EncoderSpec) -> Block:
        shards = self.shards(spec)
        rows = _find(*_joined(shards), wanted.keys)
        missing = np.flatnonzero(wanted.present & (rows < 0))
        if len(missing):
            raise CacheMissError(
                f"{self.spec_folder(spec)}: {len(missing)} of {len(samples)} samples are not in the cache for "
                f"{spec.name} (first: {samples[missing[0]].id}); run mmfeat extract with the same --data and --encoders"
            )
        width = max((shard.pooled.shape[1] for shard in shards), default=0)
        vectors = np.full((len(samples), width), np.nan, dtype=spec.storage)
        mask = wanted.present.copy()
        start = 0
        for shard in shards:
            here = np.flatnonzero(wanted.present & (rows >= start) & (rows < start + len(shard.keys)))
            mask[here] = shard.errors[rows[here] - start] == b""
            here = here[mask[here]]
            if len(here):
                _check_vectors(shard)
                vectors[here] = shard.pooled[rows[here] - start]
            start += len(shard.keys)
        return Block(spec.folder_name, spec.modality, vectors, mask)


class ShardWriter:
    """Collects rows and commits a shard when it is large or old enough, and on leaving the context.

    Leaving by an exception commits too: rows that were computed are right whatever stopped the rest.
    """

    def __init__(self, folder: Path, spec: EncoderSpec) -> None:
        self._folder, self._spec = folder, spec
        self._batches: list[Rows] = []
        self._bytes, self._since = 0, time.monotonic()
        self.committed = self.failed = 0  # rows, and how many of them hold an error

    def add(self, rows: Rows) -> None:
        """Take over some rows; commits what has gathered if it is due."""
        self._batches.append(rows)
        self._bytes += rows.pooled.nbytes
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Write what has gathered as one shard."""
        if batches := self._batches:
            width = max(batch.pooled.shape[1] for batch in batches)
            rows = Rows(
                [key for batch in batches for key in batch.keys],
                [id for batch in batches for id in batch.ids],
                [error for batch in batches for error in batch.errors],
                np.concatenate([_widened(batch.pooled, width) for batch in batches]),
            )
            write_shard(self._folder, self._spec.fingerprint, asdict(self._spec), rows)
            self.committed += len(rows.keys)
            self.failed += sum(map(bool, rows.errors))
        # Only now: an interrupt before this line leaves the rows here for the commit on the way out.
        self._batches, self._bytes, self._since = [], 0, time.monotonic()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.commit()


def folder_name(name: str) -> str:
    """A data set's name as one folder's name; names that had to be altered stay apart by a hash."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip(".-")
    return plain if plain == name else f"{plain or 'data'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _check_spec_file(path: Path, spec: EncoderSpec) -> None:
    try:
        found = EncoderSpec.from_json(read_json(path)["spec"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CacheError(f"{path}: not a spec ({error}); delete the folder {path.parent} and extract again") from error
    if found != spec:
        fields = ", ".join(found.differences(spec))
        raise CacheError(f"{path}: describes another encoder than its folder name ({fields}); delete the folder")


def _widened(pooled: np.ndarray, width: int) -> np.ndarray:
    """Failed rows may come without a width of their own; they are NaN in any."""
    return pooled if pooled.shape[1] == width else np.full((len(pooled), width), np.nan, pooled.dtype)


def _check_alike(shards: list[Shard], spec: EncoderSpec) -> None:
    """All vectors of one encoder have its dtype and one width."""
    widths = {shard.pooled.shape[1] for shard in shards} - {0}
    for shard in shards:
        if shard.pooled.dtype != spec.storage or len(widths) > 1:
            found = f"{shard.pooled.dtype} of width {shard.pooled.shape[1]}"
            raise CacheError(f"{shard.path}: {found} among others of {spec.name}; move it away and extract again")


def _check_vectors(shard: Shard) -> None:
    """Vectors are used only if they are the ones that were written."""
    if pieces := corrupt_pieces(shard):
        raise CacheError(
            f"{shard.path}: vectors do not match their checksum (MiB {', '.join(map(str, pieces[:5]))}); "
            "move the file away and run mmfeat extract again"
        )


def _joined(shards: list[Shard]) -> tuple[np.ndarray, np.ndarray]:
    """Keys of all rows, and whether each row is an error."""
    keys = np.concatenate([shard.keys for shard in shards] or [np.empty(0, f"S{KEY_LENGTH}")])
    return keys, np.concatenate([shard.errors != b"" for shard in shards] or [np.empty(0, bool)])


def _find(stored: np.ndarray, failed: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Row in `stored` of each wanted key, a good one if there is any, -1 where there is none."""
    if not len(stored):
        return np.full(len(wanted), -1)
    order = np.lexsort((failed, stored))
    positions = np.minimum(np.searchsorted(stored[order], wanted), len(stored) - 1)
    rows = order[positions]
    return np.where(stored[rows] == wanted, rows, -1)
