"""Garbage: what a cache holds that no run and no latest extraction needs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmfeat.cache.shard import SHARD_NAME
from mmfeat.cache.store import QUARANTINE
from mmfeat.cache.survey import CachedEncoder, survey
from mmfeat.cache.writer import SPEC_FILE
from mmfeat.errors import CacheError, ConfigError, RunError, WriteError
from mmfeat.extraction.requests import FOLDER as REQUESTS
from mmfeat.runs.run import RUN_FILE, read_run
from mmfeat.system.files import REMEDIES, read_json, stale_temporaries, sync_folder

FRESH_SECONDS = 3600.0  # somebody may be at work there


@dataclass(frozen=True)
class Garbage:
    """Files of one kind in one folder, and why nobody needs them."""

    folder: Path
    files: tuple[Path, ...]
    reason: str
    bytes: int
    changed: float  # seconds since 1970, of the newest file


def find_garbage(cache: str | Path, runs: Sequence[str | Path] = ("heads",)) -> list[Garbage]:
    """What could go: encoders that neither a run nor a latest extraction names, quarantined and temporary files.

    `runs` are the folders with runs. A data set that changed within the last hour stays whole: an extraction
    may be at work on it, and count on what is old. Raises `RunError` for a run and `CacheError` for a note of an
    extraction that cannot be read: nobody knows what it needs.
    """
    root, entries = Path(cache).resolve(), survey(cache)
    needed = _named_by_runs(runs) | _named_by_extractions(Path(cache))
    busy = _at_work(entries)
    ours = [entry for entry in entries if entry.folder.resolve().is_relative_to(root)]  # a link may lead elsewhere
    spare = [entry for entry in ours if entry.dataset not in busy and _is_unneeded(entry, needed)]
    return [garbage for entry in spare if (garbage := _unneeded(entry)).files] + list(_leftovers(Path(cache)))


def delete_garbage(garbage: Sequence[Garbage]) -> int:
    """Delete what `find_garbage` found; returns the bytes. Files that appeared since, and their folders, stay."""
    freed = 0
    for piece in garbage:
        # The spec goes last: without its shards it is still true, and shards are the worth of the folder.
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
            names |= set(map(str, read_json(file)["fingerprints"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CacheError(
                f"{file}: this note of an extraction cannot be read, and cache gc deletes nothing without knowing what "
                "it needs; run that mmfeat extract again, or delete the note"
            ) from error
    return names


def _at_work(entries: Sequence[CachedEncoder]) -> set[str]:
    """Data sets with new files."""
    return {entry.dataset for entry in entries if entry.changed > time.time() - FRESH_SECONDS}


def _is_unneeded(entry: CachedEncoder, needed: set[str]) -> bool:
    return not any(entry.folder.name.endswith(fingerprint[:8]) for fingerprint in needed)  # also where it is damaged


def _unneeded(entry: CachedEncoder) -> Garbage:
    names = [path for path in entry.folder.iterdir() if SHARD_NAME.fullmatch(path.name) or path.name == SPEC_FILE]
    files = tuple(path for path in names if path.is_symlink() or not path.is_dir())
    reason = "no run and no latest extraction names it" if entry.spec else "of another version of mmfeat, or damaged"
    return _garbage(entry.folder, files, reason)


def _leftovers(root: Path) -> Iterator[Garbage]:
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir() and not path.is_symlink())]:
        stale = tuple(stale_temporaries(folder))
        if stale:
            yield _garbage(folder, stale, "left by a killed process")
        if QUARANTINE in folder.relative_to(root).parts[:1]:
            files = [path for path in folder.iterdir() if path.is_symlink() or not path.is_dir()]
            if moved := tuple(path for path in files if path not in stale):
                yield _garbage(folder, moved, "moved away by cache verify")


def _garbage(folder: Path, files: tuple[Path, ...], reason: str) -> Garbage:
    found = [file.lstat() for file in files]
    return Garbage(folder, files, reason, sum(s.st_size for s in found), max((s.st_mtime for s in found), default=0.0))


def _deleted(file: Path) -> int:
    try:
        size = file.lstat().st_size
        os.unlink(file)
    except FileNotFoundError:
        return 0
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "delete it by hand")
        raise WriteError(f"cannot delete {file}: {error.strerror}; {remedy}") from error
    return size
