"""What a cache holds: one entry an encoder's folder, whatever state it is in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.keys import ContentKeys
from mmfeat.cache.shard import Shard, open_shard, read_spec
from mmfeat.cache.store import RESERVED, shard_files
from mmfeat.cache.table import Table
from mmfeat.cache.writer import SPEC_FILE
from mmfeat.encoders import EncoderSpec
from mmfeat.errors import CacheError, ConfigError
from mmfeat.files import read_json


@dataclass(frozen=True)
class Entry:
    """One encoder's folder. `spec` is None where nothing says what the folder is of; `problems` say what is wrong."""

    folder: Path
    spec: EncoderSpec | None
    provenance: Mapping[str, Any]
    shards: tuple[Shard, ...]
    problems: tuple[str, ...]
    bytes: int
    changed: float  # seconds since 1970, of the newest file

    @property
    def dataset(self) -> str:
        """The folder's name of the data set."""
        return self.folder.parent.name

    @property
    def name(self) -> str:
        """The encoder's, or the folder's where nothing says which it is."""
        return self.spec.name if self.spec else self.folder.name

    @property
    def width(self) -> int:
        return max((shard.width for shard in self.shards), default=0)

    def count(self) -> tuple[int, int]:
        """(contents with a value, contents with only an error)."""
        _, failed = Table(self.shards).unique()
        return int((~failed).sum()), int(failed.sum())

    def covered(self, keys: ContentKeys) -> tuple[int, int, int]:
        """Of the contents in `keys`: how many have a value, have only an error, are missing."""
        wanted = np.unique(keys.keys[keys.present])
        table = Table(self.shards)
        rows = table.find(wanted)
        failed = int(table.failed[rows[rows >= 0]].sum())
        return int((rows >= 0).sum()) - failed, failed, int((rows < 0).sum())


def survey(root: str | Path, dataset: str | None = None) -> list[Entry]:
    """All encoders' folders below `root`, or of one data set's folder, sorted by path."""
    if not Path(root).is_dir():
        raise CacheError(f"{root}: no such cache; name its folder with --cache, or make one with mmfeat extract")
    return [read_entry(folder) for folder in _folders(Path(root)) if dataset in (None, folder.parent.name)]


def read_entry(folder: Path) -> Entry:
    """One encoder's folder; what cannot be read becomes a problem."""
    files = [path.stat() for path in folder.iterdir()]
    size, changed = sum(file.st_size for file in files), max(file.st_mtime for file in files)
    paths = shard_files(folder)
    try:
        spec, provenance = _spec(folder, paths)
    except CacheError as error:
        return Entry(folder, None, {}, (), (str(error),), size, changed)
    problems, shards = [], []
    for path in paths:
        try:
            shards.append(open_shard(path, spec.fingerprint))
        except CacheError as error:
            problems.append(str(error))
    return Entry(folder, spec, provenance, tuple(shards), tuple(problems), size, changed)


def _folders(root: Path) -> Iterator[Path]:
    for dataset in sorted(path for path in root.iterdir() if path.name not in RESERVED and path.is_dir()):
        for folder in sorted(path for path in dataset.iterdir() if path.is_dir()):
            if (folder / SPEC_FILE).exists() or shard_files(folder):
                yield folder


def _spec(folder: Path, shards: list[Path]) -> tuple[EncoderSpec, Mapping[str, Any]]:
    """What the folder says it is of, or where it does not, what its first shard says."""
    path = folder / SPEC_FILE
    if not path.exists() and shards:
        return read_spec(shards[0]), {}
    try:
        found = read_json(path)
        spec, provenance = EncoderSpec.from_json(found["spec"]), dict(found["provenance"])
        stated = found["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise CacheError(f"{path}: not a spec of this version of mmfeat ({error})") from error
    if not stated == spec.fingerprint or folder.name != spec.folder_name:
        raise CacheError(f"{path}: the spec gives another fingerprint ({spec.fingerprint[:8]}) than is stated")
    return spec, provenance
