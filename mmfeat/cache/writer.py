"""Writing rows: rows are collected into shards, each content once, and a shard is committed in one step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from mmfeat.cache.shard import SHARD_NAME, Rows, open_shard, write_shard
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import CacheError
from mmfeat.system.files import locked_folder, sync_folder, write_errors, write_json

SPEC_FILE = "spec.json"
SHARD_BYTES = 128 << 20
SHARD_SECONDS = 30.0


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
