"""Survey of a cache: one entry for each encoder's folder, whatever state the folder is in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.hdf5 import NOT_OURS, printable
from mmfeat.cache.reading import RowIndex
from mmfeat.cache.shard import Shard, open_shard, read_spec
from mmfeat.cache.store import RESERVED, SPEC_FILE, shard_files
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import CacheError, ConfigError
from mmfeat.samples.dataset import MODALITIES
from mmfeat.samples.keys import ContentKeys
from mmfeat.system.files import read_json

NO_SPEC = (OSError, ValueError, KeyError, TypeError, RecursionError)


@dataclass(frozen=True)
class CachedEncoder:
    """One encoder's folder; `spec` is None if no file states a spec of this folder.

    `problems` map a file to its fault.
    """

    folder: Path
    spec: EncoderSpec | None
    provenance: Mapping[str, Any]
    shards: tuple[Shard, ...]
    problems: Mapping[Path, str]
    bytes: int
    changed: float  # modification time of the newest file, in seconds since 1970

    @property
    def dataset(self) -> str:
        """The name of the data set's folder."""
        return self.folder.parent.name

    @property
    def name(self) -> str:
        """The encoder's name, or the folder's name without a spec."""
        return self.spec.name if self.spec else self.folder.name

    @property
    def width(self) -> int:
        return max((shard.width for shard in self.shards), default=0)

    def count(self) -> tuple[int, int]:
        """(contents with a value, contents with only an error)."""
        _, failed = RowIndex(self.shards).unique()
        return int((~failed).sum()), int(failed.sum())

    def covered(self, keys: ContentKeys) -> tuple[int, int, int]:
        """Numbers of the contents in `keys`: (with a value, with only an error, missing)."""
        wanted = np.unique(keys.keys[keys.present])
        index = RowIndex(self.shards)
        rows = index.find(wanted)
        failed = int(index.failed[rows[rows >= 0]].sum())
        return int((rows >= 0).sum()) - failed, failed, int((rows < 0).sum())


def survey(root: str | Path, dataset: str | None = None) -> list[CachedEncoder]:
    """All encoders' folders below `root`, or of one data set's folder, sorted by path."""
    if not str(root) or not Path(root).is_dir():
        shown = root or repr("")
        raise CacheError(f"{shown}: no such cache; name its folder with --cache, or make one with mmfeat extract")
    return [read_entry(folder) for folder in _folders(Path(root)) if dataset in (None, folder.parent.name)]


def read_entry(folder: Path) -> CachedEncoder:
    """Read one encoder's folder; a file that cannot be read becomes a problem."""
    size, changed = _extent(folder)
    paths = shard_files(folder)
    spec, provenance, problem = _spec(folder, paths)
    problems = {folder / SPEC_FILE: problem} if problem else {}
    shards = []
    for path in paths:
        try:
            if spec is None:
                raise CacheError(f"{path}: nothing says which encoder its vectors are of; {NOT_OURS}")
            shards.append(open_shard(path, spec.fingerprint))
        except CacheError as error:
            problems.setdefault(path, str(error))
    return CachedEncoder(folder, spec, provenance, tuple(shards), problems, size, changed)


def _folders(root: Path) -> Iterator[Path]:
    for dataset in sorted(path for path in root.iterdir() if path.name not in RESERVED and path.is_dir()):
        for folder in sorted(path for path in dataset.iterdir() if path.is_dir()):
            if (folder / SPEC_FILE).exists() or shard_files(folder):
                yield folder


def _extent(folder: Path) -> tuple[int, float]:
    """(bytes in a folder, modification time of the newest file)."""
    size, changed = 0, 0.0
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a writer's temporary file
            status = path.lstat()
            size, changed = size + status.st_size, max(changed, status.st_mtime)
    return size, changed


def _spec(folder: Path, shards: list[Path]) -> tuple[EncoderSpec | None, Mapping[str, Any], str]:
    """(spec, provenance, problem of `spec.json` or ""); without a sound `spec.json` the spec is that of a shard."""
    path, problem = folder / SPEC_FILE, ""
    if path.exists():
        try:
            content = read_json(path)
            stated, provenance = content["fingerprint"], _provenance(content["provenance"])
            spec = _checked(EncoderSpec.from_json(content["spec"]), folder)
            if stated != spec.fingerprint:
                raise ValueError(f"it states the fingerprint {printable(str(stated))[:8]}")
            return spec, provenance, ""
        except (*NO_SPEC, ConfigError) as error:
            problem = f"{path}: not the spec of this folder ({printable(str(error))[:160]}); {NOT_OURS}"
    for shard in shards:
        try:
            return _checked(read_spec(shard), folder), {}, problem
        except (*NO_SPEC, CacheError):
            continue
    return None, {}, problem


def _provenance(stated: Mapping[str, Any]) -> dict[str, Any]:
    """The request and the library versions that made the vectors, as printable text."""
    versions = {printable(str(name)): printable(str(version)) for name, version in stated.get("versions", {}).items()}
    return {"request": printable(str(stated.get("request", ""))), "versions": versions}


def _checked(spec: EncoderSpec, folder: Path) -> EncoderSpec:
    """The spec. Raises `ValueError` for a field of a wrong type and for the spec of another folder."""
    for field in fields(spec):
        if type(value := getattr(spec, field.name)) is not (int if field.type == "int" else str):
            raise ValueError(f"{field.name} is {value!r}")
        if isinstance(value, str) and not value.isprintable():
            raise ValueError(f"{field.name} is {value!r}, which is not printable")
    if spec.modality not in MODALITIES or spec.folder_name != folder.name:
        raise ValueError(f"its fingerprint is {spec.fingerprint[:8]}")
    return spec
