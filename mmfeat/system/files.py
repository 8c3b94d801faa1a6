"""Atomic files: a reader sees the old content, the new content, or nothing, but never a half.

The bytes go to a temporary name unique to host, process and call, are synced, and are then renamed
or linked into place; the synced directory entry is the commit. A killed writer leaves only a temporary file
behind, which the next writer in the folder sweeps.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import errno
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import socket
import stat
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmfeat.errors import DataError, WriteError

_FREE = "free some space and run the same command again (what was committed before is intact)"
_RIGHTS = "get the right to write there, or name another place"
if os.name == "nt":
    _RIGHTS = f"close the program that has it open, {_RIGHTS}"
REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EFBIG: "raise the limit on file sizes (ulimit -f), or name another place",
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
}

# EINVAL: Windows, where the disk is a stick.
NO_HARD_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
# Errors of a read-only file system, and of file systems that keep their folders safe without a sync.
NO_FOLDER_SYNC = (errno.EROFS, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
SYNC_BYTES = 16 << 20
STALE_SECONDS = 24 * 3600.0

_BINARY = getattr(os, "O_BINARY", 0)  # Windows alters line ends without it
_TEMPORARY = re.compile(r"\..+\.(?P<owner>[^.]+)-(?P<pid>\d+)-\d+\.tmp")
_calls = itertools.count()
_seeking = threading.Lock()
Pieces = Iterable["bytes | memoryview"]


def write_atomic(path: Path, data: bytes | memoryview | Pieces, *, exclusive: bool = False) -> bool:
    """Write `data`, in one piece or several that follow each other, to `path` in one step.

    With `exclusive`, a file that another writer committed before is left as it is, and the result is False. Raises
    `WriteError` if the disk refuses; nothing is left behind.
    """
    with temporary_file(path) as temporary:
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
    with temporary_file(folder / "shard") as temporary:
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
    """CSV text of rows below a header."""
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


def open_for_reading(path: str | Path) -> int:
    """A file descriptor from which `read_at` reads the bytes of a file as they are."""
    return os.open(path, os.O_RDONLY | _BINARY)


def read_at(handle: int, target: memoryview, start: int) -> int:
    """Read into `target` from byte `start` of an open file, for many threads at once; returns the number of bytes."""
    if hasattr(os, "preadv"):
        return os.preadv(handle, [target], start)
    with _seeking:  # Windows reads only at the position of the file
        os.lseek(handle, start, os.SEEK_SET)
        data = os.read(handle, len(target))
    target[: len(data)] = data
    return len(data)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power loss, whatever process made the entries.

    Windows opens no folder, and its file system keeps a journal of them.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make `folder` and its missing parents, and make the folder's entry survive a power loss.

    The parent is synced also if the folder exists: the process that made the folder may have died before syncing.
    """
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError:  # a file stands where the folder should be
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from None
    with contextlib.suppress(PermissionError):  # a parent that may be passed but not read
        sync_folder(folder.parent)


def stale_temporaries(folder: Path, seconds: float = STALE_SECONDS) -> Iterator[Path]:
    """Temporary files whose writer ran on this machine and ended, or that are older than `seconds`."""
    for path in folder.glob(".*.tmp"):
        name = _TEMPORARY.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):  # another process swept the file
            if name and (_is_dead(name["owner"], int(name["pid"])) or _age(path) > seconds):
                yield path


def sweep_temporaries(folder: Path) -> None:
    """Delete the temporary files whose writer is gone."""
    for path in stale_temporaries(folder):
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn an `OSError` while `path` is written into a `WriteError`: one line with a remedy."""
    try:
        yield
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "name another place")
        raise WriteError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def temporary_beside(path: Path) -> Path:
    """A temporary name beside `path`, from which other processes tell whether its writer is gone."""
    return path.parent / f".{path.name}.{_owner()}-{os.getpid()}-{next(_calls)}.tmp"


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, in a folder that is made if it is missing; what is left of it goes at the end."""
    temporary = temporary_beside(path)
    try:
        with write_errors(path):
            make_folder(path.parent)
            sweep_temporaries(path.parent)
            yield temporary
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@functools.cache
def _owner() -> str:
    """The name of this host, boot and process namespace, within which a process id means one process."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:40]
    with contextlib.suppress(OSError):  # without Linux's /proc, the host's name alone
        boot = Path("/proc/sys/kernel/random/boot_id").read_text() + os.readlink("/proc/self/ns/pid")
        return f"{name}-{hashlib.sha256(boot.encode()).hexdigest()[:12]}"
    return name


def _is_dead(owner: str, pid: int) -> bool:
    """Whether a process ended; False for a process of another machine, about which nothing is known."""
    try:
        if owner == _owner() and os.name != "nt":  # there the signal 0 is a Ctrl-C to whoever shares the console
            os.kill(pid, 0)
    except OSError as error:  # a process that lives and belongs to another user raises PermissionError
        return isinstance(error, ProcessLookupError)
    return False


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _write_synced(path: Path, pieces: Pieces) -> str | None:
    """Write a file and sync it; the disk gets the first part of a large file while the rest is still being made.

    Returns what `pieces` returns at its end, if it is a generator that does.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o644)
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
            sync.result()  # the kernel reports an error once, which may have been in the thread
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
        try:
            os.link(temporary, path)
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            if path.exists():
                return False
            os.rename(temporary, path)  # on Windows it raises FileExistsError if the name is taken meanwhile
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which then replaces `folder`; a failure before that leaves `folder` as it was.

    After a killed process, an earlier folder that the process had moved aside is put back, and temporary folders are
    deleted. Raises `WriteError` if the disk refuses.
    """
    with write_errors(folder):
        make_folder(folder.parent)
        _recover(folder)
        new = temporary_beside(folder)
        new.mkdir()
        try:
            yield new
            _put(new, folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def _put(new: Path, folder: Path) -> None:
    """Rename the finished folder to `folder`; an earlier folder is moved aside and then deleted."""
    old = _old(folder)
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _old(folder: Path) -> Path:
    """The path of an earlier folder while the new one replaces it."""
    return folder.parent / f".{folder.name}.old"


def _recover(folder: Path) -> None:
    """Undo a replacement that a kill interrupted: put the earlier folder back unless the new one is there."""
    old = _old(folder)
    if old.is_dir() and not old.is_symlink():
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    sweep_folders(folder)


def sweep_folders(path: Path, seconds: float = STALE_SECONDS) -> None:
    """Delete the temporary folders that were made for `path` beside it, if their maker is gone or they are older."""
    for stale in stale_temporaries(path.parent, seconds):
        if stale.name.startswith(f".{path.name}.") and stale.is_dir() and not stale.is_symlink():
            shutil.rmtree(stale, ignore_errors=True)


def no_such_data(path: str | Path) -> DataError:
    """The error for a name that stands for nothing, with the file or folder beside it that may be meant."""
    parts = [part.strip() for part in str(path).split(",")]
    missing = [part for part in parts if part and not glob.glob(part)]
    if 0 < len(missing) < len(parts):
        path = missing[0]  # of a list of which others are there
    if os.path.islink(path):
        return DataError(f"{path}: a link to {os.readlink(path)}, which is not there; correct the link")
    folder, name = os.path.split(str(path))
    beside = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    close = difflib.get_close_matches(name, beside, 1, cutoff=0.75)
    remedy = f"did you mean {os.path.join(folder, close[0])}?" if close else "check the path"
    return DataError(f"{path}: no such folder or table; {remedy}")
