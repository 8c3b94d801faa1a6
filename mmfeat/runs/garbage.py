"""Garbage: the files of a cache that no run and no latest extraction needs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfeat.cache.shard import SHARD_NAME
from mmfeat.cache.store import EXPORTED, QUARANTINE, SPEC_FILE
from mmfeat.cache.survey import CachedEncoder, survey
from mmfeat.encoders.torch_tower import export_name
from mmfeat.errors import CacheError, ConfigError, RunError, WriteError
from mmfeat.extraction.requests import FOLDER as REQUESTS
from mmfeat.extraction.requests import read_note
from mmfeat.runs.run import RUN_FILE, read_run
from mmfeat.system.files import REMEDIES, stale_temporaries, sync_folder

FRESH_SECONDS = 3600.0  # an extraction may still be at work in a data set that changed so recently


@dataclass(frozen=True)
class Garbage:
    """Files in one folder that can be deleted for the same `reason`."""

    folder: Path
    files: tuple[Path, ...]
    reason: str
    bytes: int
    changed: float  # when the newest file was written, in seconds since 1970


def find_garbage(cache: str | Path, runs: Sequence[str | Path] = ("heads",)) -> list[Garbage]:
    """List what can be deleted: encoders that no run and no latest extraction names, quarantined and temporary files.

    `runs` are folders that hold runs. No encoder goes from a data set that changed within the last hour: an extraction
    may be at work on it and rely on older files. Raises `RunError` for a run and `CacheError` for a note of an
    extraction that cannot be read, since the vectors they need are then unknown.
    """
    root, encoders = Path(cache).resolve(), survey(cache)
    named = _named_by_runs(runs) | _named_by_extractions(Path(cache))
    needed = tuple(fingerprint[:8] for fingerprint in named)
    busy = {encoder.dataset for encoder in encoders if encoder.changed > time.time() - FRESH_SECONDS}
    unneeded = [
        _files_of(encoder)
        for encoder in encoders
        if encoder.folder.resolve().is_relative_to(root)  # a link may lead elsewhere
        and encoder.dataset not in busy
        and not encoder.folder.name.endswith(needed)  # the name is right even where the spec is damaged
    ]
    exported = _exported(root / EXPORTED, {export_name(fingerprint) for fingerprint in named})
    return [garbage for garbage in unneeded if garbage.files] + [*exported, *_leftovers(Path(cache))]


def delete_garbage(garbage: Sequence[Garbage]) -> int:
    """Delete what `find_garbage` listed; returns the bytes. Files that appeared since, and their folders, stay."""
    freed = 0
    for piece in garbage:
        # The spec goes last: a spec without shards is harmless, and shards without a spec are damage.
        for file in sorted(piece.files, key=lambda file: file.name == SPEC_FILE):
            freed += _deleted(file)
        for folder in (piece.folder, piece.folder.parent):
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
                sync_folder(folder.parent)
    return freed


def _named_by_runs(folders: Sequence[str | Path]) -> set[str]:
    names: set[str] = set()
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise ConfigError(f"--runs {folder}: no such folder; name the folders that hold your runs, or --runs none")
        for file in [*folder.glob(RUN_FILE), *folder.glob(f"*/{RUN_FILE}")]:
            try:
                names |= read_run(file.parent).fingerprints
            except RunError as error:
                raise RunError(f"{error} (cache gc deletes nothing while a run cannot be read)") from error
    return names


def _named_by_extractions(cache: Path) -> set[str]:
    names: set[str] = set()
    for file in sorted(cache.glob(f"{REQUESTS}/*.json")):
        try:
            names |= set(map(str, read_note(file)["fingerprints"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{file}: this note of an extraction cannot be read, and cache gc deletes nothing without knowing what "
                "it needs; run that mmfeat extract again, or delete the note"
            ) from error
    return names


def _files_of(encoder: CachedEncoder) -> Garbage:
    """The shards and the spec of an encoder that nothing names."""
    paths = [path for path in _files_in(encoder.folder) if SHARD_NAME.fullmatch(path.name) or path.name == SPEC_FILE]
    reason = (
        "neither a run nor a latest extraction needs it" if encoder.spec else "of another version of mmfeat, or damaged"
    )
    return _garbage(encoder.folder, paths, reason)


def _exported(root: Path, needed: set[str]) -> Iterator[Garbage]:
    """Towers exported for other runtimes that no encoder in use, with the libraries of today, would take."""
    for folder in sorted(root.iterdir()) if root.is_dir() else ():
        if folder.name not in needed and folder.is_dir() and not folder.is_symlink():
            garbage = _garbage(folder, _files_in(folder), "exported for an encoder or library that is not in use now")
            if garbage.files and garbage.changed < time.time() - FRESH_SECONDS:
                yield garbage


def _leftovers(root: Path) -> Iterator[Garbage]:
    """Temporary files of killed processes, and quarantined files."""
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]:
        stale = list(stale_temporaries(folder))
        if stale:
            yield _garbage(folder, stale, "left by a killed process")
        moved = [path for path in _files_in(folder) if path not in stale]
        if QUARANTINE in folder.relative_to(root).parts[:1] and moved:
            yield _garbage(folder, moved, "moved away by cache verify")


def _files_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_symlink() or not path.is_dir()]


def _garbage(folder: Path, files: Sequence[Path], reason: str) -> Garbage:
    stats = [file.lstat() for file in files]
    size, changed = sum(stat.st_size for stat in stats), max((stat.st_mtime for stat in stats), default=0.0)
    return Garbage(folder, tuple(files), reason, size, changed)


def _deleted(file: Path) -> int:
    """Delete a file; returns its bytes, 0 where it is gone already."""
    try:
        size = file.lstat().st_size
        os.unlink(file)
    except FileNotFoundError:
        return 0
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "delete it by hand")
        raise WriteError(f"cannot delete {file}: {error.strerror}; {remedy}") from error
    return size
