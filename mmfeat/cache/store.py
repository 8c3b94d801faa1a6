"""The feature cache: (content of a sample, encoder spec) -> vectors.

One folder an encoder spec, `ROOT/DATASET/NAME-FINGERPRINT8/`, with `spec.json` and immutable shards.
Writers add files; nothing is changed in place, so readers and other writers need no lock.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.features import Block, Features, MappedBlock, joined, joined_mapped
from mmfeat.cache.hdf5 import NOT_OURS, printable
from mmfeat.cache.reading import RowIndex, scan
from mmfeat.cache.shard import SHARD_NAME, Rows, Shard, open_shard, write_shard
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import CacheError, CacheMissError, ConfigError, WriteError
from mmfeat.samples.dataset import Sample
from mmfeat.samples.keys import ContentKeys, StatIndex, content_keys
from mmfeat.system.files import (
    make_folder,
    read_json,
    sweep_temporaries,
    sync_folder,
    write_errors,
    write_json,
)
from mmfeat.system.locks import is_written, locked_folder
from mmfeat.system.remote import is_remote
from mmfeat.system.wording import Progress

INDEX_FILE = "images.index"
SPEC_FILE = "spec.json"
SHARD_BYTES = 128 << 20
SHARD_SECONDS = 30.0
QUARANTINE = "quarantine"
EXPORTED = ".runtimes"  # towers exported for other runtimes; no data set's folder begins with a dot
_DEVICE = re.compile(r"(con|prn|aux|nul|(com|lpt)\d)(\..*)?", re.IGNORECASE)  # no name of a file on Windows
RESERVED = ("requests", QUARANTINE, EXPORTED)  # folders beside those of the data sets


class Cache:
    """The shards of one data set under `root`."""

    def __init__(self, root: str | Path, dataset: str) -> None:
        if not str(root):
            raise ConfigError("--cache is empty; name a folder")
        if is_remote(str(root)):
            raise ConfigError(f"--cache {root}: a cache lies in a folder, it is mapped into memory; name a local one")
        self.folder = Path(root) / folder_name(dataset)

    def create(self) -> None:
        """Make the folder, and sweep it and those in it. Raises `WriteError` where it cannot be made, before any work
        is done."""
        with write_errors(self.folder):
            make_folder(self.folder)
            for path in (self.folder, *self.folder.iterdir()):
                sweep_temporaries(path)
                is_written(path)  # deletes the locks of killed processes

    def settle(self, spec: EncoderSpec) -> None:
        """Make the stored rows of `spec` outlive a power loss, whoever wrote them, and restore a lost `spec.json`."""
        if shard_files(self.spec_folder(spec)):
            with contextlib.suppress(WriteError):  # a cache that cannot be written stays as it is
                declare(self.spec_folder(spec), spec, {})
            settle(self.spec_folder(spec))

    def spec_folder(self, spec: EncoderSpec) -> Path:
        return self.folder / spec.folder_name

    def index(self, writes: bool = True) -> StatIndex:
        """The stat index of the data set's photos, a context that saves the index at its end."""
        return StatIndex(self.folder / INDEX_FILE, writes)

    def content_keys(
        self,
        samples: Sequence[Sample],
        modality: str,
        progress: Progress | None = None,
        index: StatIndex | None = None,
    ) -> ContentKeys:
        """Hash one modality of all samples; files that did not change since the last time are not read.

        For many blocks of samples, open the `index` once.
        """
        if modality == "text" or index is not None:
            return content_keys(samples, modality, progress, index)
        with self.index() as opened:
            return content_keys(samples, modality, progress, opened)

    def shards(self, spec: EncoderSpec, without: Collection[str] = ()) -> list[Shard]:
        """All committed shards of `spec` in a fixed order, without those named; refuses the folder of another spec."""
        folder = self.spec_folder(spec)
        paths = [path for path in shard_files(folder) if path.name not in without]
        _check_spec_file(folder / SPEC_FILE, spec)
        shards = [open_shard(path, spec.fingerprint) for path in paths]
        _check_alike(shards, spec)
        return shards

    def row_index(self, spec: EncoderSpec) -> RowIndex:
        """The index that finds the row of a content key among all shards of `spec`."""
        return RowIndex(self.shards(spec))

    def error(self, spec: EncoderSpec, key: bytes) -> str:
        """The stored reason why a content has no value; "" where it has one or is not stored."""
        errors = [shard.errors[row] for shard in self.shards(spec) for row in np.flatnonzero(shard.keys == key)]
        return printable(errors[0]) if errors and all(errors) else ""

    def writer(self, spec: EncoderSpec, provenance: dict[str, Any], known: Collection[str] = ()) -> ShardWriter:
        """A writer of new rows; `provenance` (library versions, origin of the weights) stands beside the spec.

        `known` names the shards whose rows the caller knows: the writer looks at all others.
        """
        folder = self.spec_folder(spec)
        _check_spec_file(folder / SPEC_FILE, spec)
        sweep_temporaries(folder)
        return ShardWriter(folder, spec, provenance, known)

    def load(
        self,
        samples: Sequence[Sample],
        specs: Iterable[EncoderSpec],
        keys: Mapping[str, ContentKeys] | None = None,
        memory: int | None = None,
    ) -> Features:
        """Values of `samples` for each spec, aligned, with masks for missing and broken parts.

        Pooled vectors are read into memory; tokens and prefixes stay on disk, as `Features.mapped`, and so do all
        pooled vectors if together they are more than `memory` bytes. A block without any stored vector has
        width 0, since its width is unknown. `keys` are content keys by modality that were computed before. Raises
        `CacheMissError` if any sample was never extracted: no value is made up.
        """
        specs = list(specs)
        known = dict(keys or {})
        for modality in {spec.part for spec in specs} - known.keys():
            known[modality] = self.content_keys(samples, modality)
        rows = {spec: self._find(samples, known[spec.part], spec) for spec in specs}
        owners = {modality: keys.owners for modality, keys in known.items() if keys.is_several}
        pooled = [spec for spec in specs if spec.output == "pooled"]
        size = sum(len(samples) * rows[spec][0].width * np.dtype(spec.storage).itemsize for spec in pooled)
        in_memory = pooled if memory is None or size <= memory else []
        return Features(
            tuple(sample.id for sample in samples),
            tuple(joined(_block(spec, *rows[spec]), owners.get(spec.part)) for spec in in_memory),
            tuple(
                joined_mapped(_mapped_block(spec, *rows[spec]), owners.get(spec.part))
                for spec in specs
                if spec not in in_memory
            ),
        )

    def map(
        self,
        samples: Sequence[Sample],
        spec: EncoderSpec,
        keys: ContentKeys | None = None,
        *,
        allow_missing: bool = False,
    ) -> MappedBlock:
        """The rows of `samples` on disk, to be read in batches: for tokens, and for vectors beyond the memory.

        A sample that was never extracted is masked with `allow_missing`, and raises `CacheMissError` without.
        """
        wanted = keys or self.content_keys(samples, spec.part)
        return joined_mapped(_mapped_block(spec, *self._find(samples, wanted, spec, allow_missing)), wanted.owners)

    def scan(self, spec: EncoderSpec) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (keys, vectors) of all pooled rows without error, a few MiB at a time, mapped, in file order.

        Copy vectors that are to be kept: a kept array keeps its whole shard mapped.
        """
        if spec.output != "pooled":
            raise CacheError(f"{spec.name}: only pooled vectors are scanned; use Cache.map for tokens")
        for shard in self.shards(spec):
            good = shard.errors == b""
            for part, values in scan(shard):
                fine = good[part]
                yield (shard.keys[part], values) if fine.all() else (shard.keys[part][fine], values[fine])

    def _find(
        self, samples: Sequence[Sample], wanted: ContentKeys, spec: EncoderSpec, allow_missing: bool = False
    ) -> tuple[RowIndex, np.ndarray, np.ndarray]:
        """The index, (N,) the row of each sample in the index (-1: none), and (N,) whether the row has a value.

        Where samples have several photos, N counts the photos.
        """
        if len(wanted.keys) != len(samples):
            raise CacheError(f"{spec.name}: {len(wanted.keys)} content keys for {len(samples)} samples")
        if wanted.single is not None and wanted.owners is not None:
            samples, wanted = [samples[owner] for owner in wanted.owners], wanted.single
        index = self.row_index(spec)
        rows = np.where(wanted.present, index.find(wanted.keys), -1)
        missing = np.flatnonzero(wanted.present & (rows < 0))
        if len(missing) and not allow_missing:
            raise CacheMissError(
                f"{self.spec_folder(spec)}: {len(missing)} of {len(samples)} samples are not in the cache for "
                f"{spec.name} (first: {samples[missing[0]].id}); run mmfeat extract with the same flags "
                f"(mmfeat cache explain {samples[missing[0]].id} says what differs)"
            )
        mask = rows >= 0
        mask[mask] = ~index.failed[rows[mask]]
        return index, rows, mask


class ShardWriter:
    """Collects rows and commits a shard when it is large or old enough, and on leaving the context.

    Rows that another writer committed meanwhile are left out; `known` names the shards whose rows the caller knows.
    Leaving by an exception commits too: computed rows are right, whatever stopped the computation of others.
    """

    def __init__(
        self, folder: Path, spec: EncoderSpec, provenance: dict[str, Any], known: Collection[str] = ()
    ) -> None:
        self._folder, self._spec, self._provenance = folder, spec, provenance
        self._batches: list[Rows] = []
        self._bytes, self._since = 0, time.monotonic()
        self._looked_at = set(known)
        self._good: set[bytes] = set()
        self._failed: set[bytes] = set()
        self.committed = 0  # rows with values that this writer wrote
        self.failed = 0  # rows with an error, also rows that were stored already
        self.by_others = 0  # rows with values that another writer wrote meanwhile

    def add(self, rows: Rows) -> None:
        """Collect some rows, and commit all collected rows if that is due."""
        if not self._batches:
            self._since = time.monotonic()
        self._batches.append(rows)
        self._bytes += rows.nbytes
        self.commit_if_due()

    def commit_if_due(self) -> None:
        """Commit collected rows that are large or old enough; call this now and then also while no rows come."""
        if self._bytes >= SHARD_BYTES or (self._batches and time.monotonic() - self._since >= SHARD_SECONDS):
            self.commit()

    def commit(self) -> None:
        """Write the collected rows as one shard, which outlives a power loss once this returns."""
        if self._batches:
            new: list[Rows] = []
            declare(self._folder, self._spec, self._provenance)
            with write_errors(self._folder), locked_folder(self._folder):
                self._look_at_new_shards()
                new = self._not_stored(self._batches)
                if any(batch.keys for batch in new):
                    path = write_shard(self._folder, self._spec.fingerprint, self._spec.stated, new)
                    self._looked_at.add(path.name)
                else:
                    sync_folder(self._folder)  # the writer that stored these rows may have died just before this
            # Cleared only here: an interrupt before this line leaves the rows to the commit on leaving the context.
            given, self._batches, self._bytes = self._batches, [], 0
            written = sum(len(batch.keys) - batch.failed for batch in new)
            self.committed += written
            self.by_others += sum(len(batch.keys) - batch.failed for batch in given) - written
            self.failed += sum(batch.failed for batch in given)

    def _look_at_new_shards(self) -> None:
        for path in self._folder.iterdir():
            if SHARD_NAME.fullmatch(path.name) and path.name not in self._looked_at:
                with contextlib.suppress(CacheError):  # rows of a damaged shard do not count as stored
                    shard = open_shard(path, self._spec.fingerprint)
                    fine = shard.errors == b""
                    self._good.update(shard.keys[fine].tolist())
                    self._failed.update(shard.keys[~fine].tolist())
                self._looked_at.add(path.name)

    def _not_stored(self, batches: Sequence[Rows]) -> list[Rows]:
        """The rows that the folder lacks, each key once; a row with a value also where the folder has only an error."""
        good: set[bytes] = set()
        failed: set[bytes] = set()
        new = []
        for rows in batches:
            if not (rows.failed or self._good or self._failed) and good.isdisjoint(rows.keys):
                before = len(good)
                good.update(rows.keys)
                if len(good) == before + len(rows.keys):  # the common case, a hundred times as fast as what follows
                    new.append(rows)
                    continue
                good.difference_update(rows.keys)
            chosen = []
            for row, (key, error) in enumerate(zip(rows.keys, rows.errors, strict=True)):
                if not (key in self._good or key in good or (error and (key in self._failed or key in failed))):
                    chosen.append(row)
                    (failed if error else good).add(key)
            new.append(rows if len(chosen) == len(rows.keys) else rows.take(chosen))
        return new

    def __enter__(self) -> ShardWriter:
        # Declared already here, so that a folder that cannot be written is an error before the work.
        declare(self._folder, self._spec, self._provenance)
        settle(self._folder)
        return self

    def __exit__(self, *error: object) -> None:
        self.commit()


def declare(folder: Path, spec: EncoderSpec, provenance: dict[str, Any]) -> None:
    """Write `spec.json` beside the shards, unless another writer did."""
    if not (folder / SPEC_FILE).exists():
        stated = {"fingerprint": spec.fingerprint, "spec": spec.stated, "provenance": provenance}
        write_json(folder / SPEC_FILE, stated, exclusive=True)


def settle(folder: Path) -> None:
    """Make an encoder's folder outlive a power loss: a killed writer may have left it and its parents unsynced."""
    with write_errors(folder):
        for directory in (folder, *list(folder.parents)[:3]):
            with contextlib.suppress(PermissionError):  # a directory that may be passed but not read
                sync_folder(directory)


def shard_files(folder: Path) -> list[Path]:
    """The committed shards in an encoder's folder, by name."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if SHARD_NAME.fullmatch(path.name))


def folder_name(name: str) -> str:
    """A data set's name as one folder's name; names that had to be altered stay apart by a hash."""
    plain = re.sub(r"[^\w.-]+", "-", name).strip(".-")
    is_device = sys.platform == "win32" and _DEVICE.fullmatch(name)
    if plain == name and name not in RESERVED and not is_device:
        return plain
    return f"{plain or 'data'}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _block(spec: EncoderSpec, index: RowIndex, rows: np.ndarray, mask: np.ndarray) -> Block:
    vectors = np.empty((len(rows), index.width), spec.storage)
    vectors[~mask] = np.nan
    index.vectors(np.where(mask, rows, -1), vectors)
    return Block(spec.folder_name, spec.modality, vectors, mask, spec.source, spec.view)


def _mapped_block(spec: EncoderSpec, index: RowIndex, rows: np.ndarray, mask: np.ndarray) -> MappedBlock:
    """The block of the samples' rows; its `read` can be pickled, for loader workers and remote tasks."""
    lengths = np.zeros(len(rows), np.int64)
    lengths[mask] = index.lengths[rows[mask]]
    return MappedBlock(
        name=spec.folder_name,
        modality=spec.modality,
        width=index.width,
        lengths=lengths,
        mask=mask,
        rows=np.arange(len(rows)),
        read=partial(_read_vectors if spec.output == "pooled" else _read_rows, index, np.where(mask, rows, -1)),
        source=spec.source,
        view=spec.view,
        output=spec.output,
    )


def _read_rows(index: RowIndex, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return index.tokens(rows[positions])


def _read_vectors(index: RowIndex, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(B, 1, D) pooled vectors as one token a sample, zero for a sample without vector; (B, 0, D) if none has one."""
    wanted = rows[positions]
    out = np.zeros((len(wanted), int((wanted >= 0).any()), index.width), index.dtype)
    if out.size:
        index.vectors(wanted, out[:, 0])
    return out


def _check_spec_file(path: Path, spec: EncoderSpec) -> None:
    """Raise `CacheError` if the file states another spec; without the file, each shard states its fingerprint."""
    if not path.exists():
        return
    try:
        stated = EncoderSpec.from_json(read_json(path)["spec"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CacheError(f"{path}: not a spec ({error}); {NOT_OURS}") from error
    if stated != spec:
        fields = ", ".join(stated.differences(spec))
        raise CacheError(f"{path}: describes another encoder than its folder name ({fields}); {NOT_OURS}")


def _check_alike(shards: list[Shard], spec: EncoderSpec) -> None:
    """Raise `CacheError` unless all vectors have the dtype of `spec` and one width."""
    widths = {shard.width for shard in shards} - {0}
    for shard in shards:
        if shard.values.dtype != spec.storage or len(widths) > 1:
            kind = f"{shard.values.dtype} of width {shard.width}"
            raise CacheError(f"{shard.path}: {kind} among others of {spec.name}; {NOT_OURS}")
