"""Atomic files: a reader sees the old content, the new content, or nothing, but never a half.

The bytes go to a temporary name unique to host, process and call, are synced, and are then renamed
or linked into place; the synced directory entry is the commit. What a killed writer leaves behind is a
temporary file, which the next writer sweeps.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmfeat.errors import WriteError

_FREE = "free some space and run the same command again (what was committed before is intact)"
_RIGHTS = "get the right to write there, or name another place"
REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or name another place",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
}

NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
# What a read-only file system says, and those that keep their folders safe without being asked.
NO_FOLDER_SYNC = (errno.EROFS, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
SYNC_BYTES = 16 << 20
LOCK_SECONDS = 30.0
STALE_SECONDS = 24 * 3600.0

_TEMPORARY = re.compile(r"\..+\.(?P<owner>[^.]+)-(?P<pid>\d+)-\d+\.tmp")
_calls = itertools.count()
Pieces = Iterable["bytes | memoryview"]


def write_atomic(path: Path, data: bytes | memoryview | Pieces, *, exclusive: bool = False) -> bool:
    """Write `data`, in one piece or several that follow each other, to `path` in one step.

    With `exclusive`, an existing file is left as it is and False is returned: somebody committed the
    same name before us. Raises `WriteError` when the disk refuses; nothing is left behind.
    """
    with _temporary(path) as temporary:
        _write_synced(temporary, [data] if isinstance(data, bytes | memoryview) else data)
        if exclusive:
            committed = _link(temporary, path)
        else:
            os.replace(temporary, path)
            committed = True
        sync_folder(path.parent)
    return committed


def write_named(folder: Path, pieces: Generator[bytes | memoryview, None, str]) -> Path:
    """Write what `pieces` yields into `folder`, under the name that it returns; an existing file of the name stays."""
    with _temporary(folder / "shard") as temporary:
        path = folder / str(_write_synced(temporary, pieces))
        _link(temporary, path)
        sync_folder(folder)
    return path


def write_json(path: Path, value: Any, *, exclusive: bool = False) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode(), exclusive=exclusive)


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises `OSError`, or `ValueError` for what is no JSON or no plain file."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait for ever
        raise ValueError("not a plain file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value, so that it can be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows below a header, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power loss, whoever made them."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make `folder` and what is missing above it, and make its entry survive a power loss.

    The parent is synced also where the folder exists: whoever made it may not have come so far.
    """
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:  # a file stands where the folder should be
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    with contextlib.suppress(PermissionError):  # a parent that may be passed but not read
        sync_folder(folder.parent)


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Keep other writers out of `folder`, if that is possible; without the lock, the block runs after `LOCK_SECONDS`.

    The lock only saves work that is done twice: correctness must not rely on it, since a file system may have no locks,
    and a process that holds the lock may have been stopped.
    """
    with _locked(folder, exclusive=True, seconds=LOCK_SECONDS):
        yield


def stale_temporaries(folder: Path) -> Iterator[Path]:
    """Temporary files whose writer is gone: it ran here and ended, or they have lain for a day."""
    for path in folder.glob(".*.tmp"):
        found = _TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):  # somebody else swept it
            if found and (_is_dead(found["owner"], int(found["pid"])) or _age(path) > STALE_SECONDS):
                yield path


def sweep_temporaries(folder: Path, name: str = "") -> None:
    """Delete the temporary files that nobody will ever commit, or only those of one file's name."""
    for path in stale_temporaries(folder):
        with contextlib.suppress(OSError):
            if not path.name.startswith(f".{name}"):
                continue
            path.unlink()


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """One line with a remedy for whatever the disk says while `path` is written."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "name another place")
        raise WriteError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def temporary_beside(path: Path) -> Path:
    """A name for what will be put in the place of `path`, which tells whether its writer is gone."""
    return path.parent / f".{path.name}.{_owner()}-{os.getpid()}-{next(_calls)}.tmp"


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = temporary_beside(path)
    try:
        with write_errors(path):
            make_folder(path.parent)
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@functools.cache
def _owner() -> str:
    """This host, boot and process namespace: where a process id means one process."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:40]
    with contextlib.suppress(OSError):  # elsewhere than on Linux the name has to do
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        return f"{name}-{hashlib.sha256(boot.encode()).hexdigest()[:12]}"
    return name


def _is_dead(owner: str, pid: int) -> bool:
    if owner != _owner():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it lives, and belongs to somebody else
        return False
    return False


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _write_synced(path: Path, pieces: Pieces) -> str | None:
    """Write and sync; of a large file the disk gets the first part while the rest is still being made.

    Returns what `pieces` returns at its end, if it is a generator that does.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    waiting, remaining = 0, iter(pieces)
    syncs: list[Future[None]] = []
    try:
        with ThreadPoolExecutor(1) as pool:  # a thread is started only if it gets work
            while True:
                try:
                    piece = next(remaining)
                except StopIteration as end:
                    result: str | None = end.value
                    break
                waiting += _write_whole(handle, memoryview(piece).cast("B"))
                if waiting >= SYNC_BYTES:
                    syncs.append(pool.submit(os.fsync, handle))
                    waiting = 0
        for sync in syncs:
            sync.result()  # the kernel tells an error once, so it may have been told there
        os.fsync(handle)
    finally:
        os.close(handle)
    return result


def _write_whole(handle: int, data: memoryview) -> int:
    size = len(data)
    while data:
        data = data[os.write(handle, data) :]  # a short write is legal: go on with the rest
    return size


def _link(temporary: Path, path: Path) -> bool:
    """Commit under a new name only; True if the name was free."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        if path.exists():
            return False
        os.rename(temporary, path)
    return True


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill. It takes the place of `folder`, which is then deleted; what fails before leaves that as it was.

    Of what a killed process left, an earlier folder that it had moved aside is put back, the rest is deleted. Raises
    `WriteError` where the disk does not let it.
    """
    with write_errors(folder):
        make_folder(folder.parent)
        _recover(folder)
        place = temporary_beside(folder)
        place.mkdir()
        try:
            yield place
            _put(place, folder)
        finally:
            shutil.rmtree(place, ignore_errors=True)


def _put(place: Path, folder: Path) -> None:
    """Rename the finished folder into place; an earlier one makes room and is then deleted."""
    old = _old(folder)
    if folder.exists():
        folder.rename(old)
    try:
        place.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    """Where an earlier folder is put while the new one takes its place."""
    return folder.parent / f".{folder.name}.old"


def _recover(folder: Path) -> None:
    """As if nobody had been killed: the earlier folder is there until the new one is."""
    old = _old(folder)
    if old.is_dir() and not old.is_symlink():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    for stale in stale_temporaries(folder.parent):
        if stale.name.startswith(f".{folder.name}.") and stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Mark an existing folder as one in which this process writes; other processes may write in the folder, too."""
    with _locked(folder, exclusive=False):
        yield


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Keep writers from beginning in `folder`; yields False if a writer is at work in the folder."""
    with _locked(folder, exclusive=True) as alone:
        yield alone


@contextlib.contextmanager
def _locked(folder: Path, exclusive: bool, seconds: float = 0.0) -> Iterator[bool]:
    """Lock `folder`; yields False if another process keeps its lock for `seconds`.

    The lock is the kernel's, on the folder itself, and ends with the process: no file can stay behind.
    """
    import fcntl

    kind, deadline = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, time.monotonic() + seconds
    handle = os.open(folder, os.O_RDONLY)
    try:
        while not (free := _flock(handle, kind | fcntl.LOCK_NB)) and time.monotonic() < deadline:
            time.sleep(0.02)
        yield free
    finally:
        os.close(handle)


def _flock(handle: int, kind: int) -> bool:
    """Try to take a lock. False if another process holds one; a file system without locks counts as locked."""
    import fcntl

    try:
        fcntl.flock(handle, kind)
    except OSError as error:  # a file system without locks raises others
        return not isinstance(error, BlockingIOError)
    return True
