"""Writing rows: gathered into shards that are committed in one step, each row once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from mmfeat.cache.shard import SHARD_NAME, Rows, joined, open_shard, write_shard
from mmfeat.encoders import EncoderSpec
from mmfeat.errors import CacheError
from mmfeat.files import locked_folder, write_json

SPEC_FILE = "spec.json"
SHARD_BYTES = 128 << 20
SHARD_SECONDS = 30.0


class ShardWriter:
    """Collects rows and commits a shard when it is large or old enough, and on leaving the context.

    Rows that another writer committed meanwhile are left out; `known` are the shards that the caller
    has looked at already. Leaving by an exception commits too: rows that were computed are right
    whatever stopped the rest.
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
        self.committed = self.failed = 0  # rows, and how many of them hold an error

    def add(self, rows: Rows) -> None:
        """Take over some rows; commits what has gathered if it is due."""
        self._batches.append(rows)
        self._bytes += rows.nbytes
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._since >= SHARD_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Write what has gathered as one shard; when this returns it outlives a power loss."""
        if self._batches:
            rows = joined(self._batches)
            self._declare()
            with locked_folder(self._folder):
                new = rows.take(self._not_stored(rows))
                if new.keys:
                    write_shard(self._folder, self._spec.fingerprint, asdict(self._spec), new)
            self.committed += len(rows.keys)
            self.failed += sum(map(bool, rows.errors))
        # Only now: an interrupt before this line leaves the rows here for the commit on the way out.
        self._batches, self._bytes, self._since = [], 0, time.monotonic()

    def _declare(self) -> None:
        """Say beside the shards what they are of; whoever said it first is right."""
        path = self._folder / SPEC_FILE
        if not path.exists():
            spec = {"fingerprint": self._spec.fingerprint, "spec": asdict(self._spec)}
            write_json(path, {**spec, "provenance": self._provenance}, exclusive=True)

    def _not_stored(self, rows: Rows) -> list[int]:
        """Positions of the rows that the folder lacks; a good row also where it has only an error."""
        for path in self._folder.iterdir():
            if SHARD_NAME.fullmatch(path.name) and path.name not in self._looked_at:
                self._looked_at.add(path.name)
                with contextlib.suppress(CacheError):  # a damaged shard has no rows to count on
                    shard = open_shard(path, self._spec.fingerprint)
                    fine = shard.errors == b""
                    self._good.update(shard.keys[fine].tolist())
                    self._failed.update(shard.keys[~fine].tolist())
        chosen: dict[tuple[bytes, bool], int] = {}
        for position, (key, error) in enumerate(zip(rows.keys, rows.errors, strict=True)):
            if key not in self._good and not (error and key in self._failed):
                chosen.setdefault((key, bool(error)), position)
        return list(chosen.values())

    def __enter__(self) -> ShardWriter:
        self._declare()  # a folder that cannot be written is told before the work, not after
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.commit()
