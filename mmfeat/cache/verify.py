"""Verification: every checksum, count and hash of a cache is compared with the bytes on the disk."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mmfeat.cache.hdf5 import printable
from mmfeat.cache.reading import RowIndex, corrupt_pieces, scan
from mmfeat.cache.shard import MIB, Shard, read_ids
from mmfeat.cache.store import QUARANTINE, SPEC_FILE
from mmfeat.cache.survey import CachedEncoder, survey
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import CacheError, WriteError
from mmfeat.system.files import REMEDIES, make_folder, sync_folder
from mmfeat.system.notebook import usual_progress
from mmfeat.system.wording import Advance, Progress


@dataclass(frozen=True)
class Damage:
    """A damaged file, the reason, and the path to which the file was moved."""

    path: Path
    reason: str
    moved: Path | None = None


@dataclass(frozen=True)
class Verification:
    """Counts of all that was verified, and the damages.

    `doubles` are rows whose content is stored more than once with a value: harmless, the first row is read.
    """

    encoders: int
    shards: int
    rows: int
    bytes: int
    doubles: int
    damages: list[Damage]

    @property
    def sound(self) -> bool:
        """Whether no damaged file is left in its place."""
        return all(damage.moved for damage in self.damages)


def verify_cache(root: str | Path, *, quarantine: bool = False, progress: Progress | None = None) -> Verification:
    """Read every byte of every shard below `root`; with `quarantine`, move damaged files out of the way.

    The next extraction computes the rows of moved files again; nothing is deleted.
    """
    entries = survey(root)
    if not entries:
        raise CacheError(f"{root}: no encoder's vectors are here; name the folder of a cache with --cache")
    shards = [shard for entry in entries for shard in entry.shards]
    unread = [path for entry in entries for path in entry.problems if path.name != SPEC_FILE]
    paths = [shard.path for shard in shards] + unread
    size = sum(map(_size, paths))
    damages = []
    with (progress or usual_progress()).step("verify MiB", sum(len(shard.checksums) for shard in shards)) as advance:
        for entry in entries:
            for damage in _damages(entry, advance):
                moved = _moved(Path(root), damage.path) if quarantine else None
                damages.append(replace(damage, moved=moved))
    return Verification(
        encoders=len(entries),
        shards=len(paths),
        rows=sum(len(shard.keys) for shard in shards),
        bytes=size,
        doubles=sum(_doubles(entry) for entry in entries),
        damages=damages,
    )


def _size(path: Path) -> int:
    """Bytes of a file, 0 for one that is gone."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _doubles(entry: CachedEncoder) -> int:
    """The number of rows with a value whose key an earlier row with a value has."""
    index = RowIndex(entry.shards)
    good = index.keys[~index.failed]
    return len(good) - len(np.unique(good))


def _damages(entry: CachedEncoder, advance: Advance) -> Iterator[Damage]:
    for path, problem in entry.problems.items():
        yield Damage(path, _cause(path, problem))
    width = _usual_width(entry.shards)
    for shard in entry.shards:
        assert entry.spec is not None  # no shard is opened without a spec
        try:
            reason = _value_damage(shard, entry.spec)
        except CacheError as error:
            reason = _cause(shard.path, str(error))
        advance(len(shard.checksums))
        if reason or shard.width not in (0, width):
            yield Damage(shard.path, reason or f"values of width {shard.width} among others of width {width}")


def _usual_width(shards: Sequence[Shard]) -> int:
    """The width that most rows of an encoder have."""
    rows: Counter[int] = Counter()
    for shard in shards:
        rows[shard.width] += len(shard.keys) if shard.width else 0
    return rows.most_common(1)[0][0] if rows else 0


def _cause(path: Path, problem: str) -> str:
    """The problem without the file and the remedy, which the report names once."""
    return problem.removeprefix(f"{path}: ").partition("; mmfeat cache verify")[0]


def _value_damage(shard: Shard, spec: EncoderSpec) -> str:
    """The fault in the values of a shard with a sound header; "" for sound values."""
    if shard.values.dtype != spec.storage:
        return f"values of {shard.values.dtype}, the spec says {spec.storage}"
    if pieces := corrupt_pieces(shard):
        ids = read_ids(shard.path)
        return "; ".join(_where(shard, ids, piece) for piece in pieces[:5]) + (" and more" if len(pieces) > 5 else "")
    for part, values in scan(shard):
        wrong = np.flatnonzero(~np.isfinite(values).all(axis=1)) + part.start
        for row in np.searchsorted(shard.bounds, wrong, side="right") - 1:
            if not shard.errors[row]:
                name = printable(read_ids(shard.path)[row])
                return f"row {row} (sample {name}) has a value that is not finite, and no error says why"
    return ""


def _where(shard: Shard, ids: np.ndarray, piece: int) -> str:
    """A damaged MiB piece with the rows and samples in the piece."""
    stop = min((piece + 1) * MIB, shard.values.nbytes)
    values = np.array([piece * MIB // shard.row_bytes, (stop - 1) // shard.row_bytes])
    first, last = np.searchsorted(shard.bounds, values, side="right") - 1
    names = f"{printable(ids[first])} to {printable(ids[last])}"
    return f"MiB {piece} does not match its checksum: rows {first} to {last} (samples {names})"


def _moved(root: Path, path: Path) -> Path | None:
    """Move a damaged file into the quarantine, under a free name. The new path, or None for a file that is gone."""
    if not os.path.lexists(path):
        return None
    target = root / QUARANTINE / path.parent.parent.name / path.parent.name / path.name
    number = 1
    while os.path.lexists(target):
        target, number = target.with_name(f"{path.name}.{number}"), number + 1
    try:
        make_folder(target.parent)
        os.rename(path, target)
        sync_folder(target.parent)
        sync_folder(path.parent)
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "move it by hand")
        raise WriteError(f"cannot move {path} to {target.parent}: {error.strerror}; {remedy}") from error
    return target
