"""Atomic files: a reader sees the old content, the new content, or nothing, but never a half.

The bytes go to a temporary name unique to host, process and call, are synced, and are then renamed
or linked into place; the synced directory entry is the commit.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmfeat.errors import WriteError

_FREE = "free some space and run the same command again (what was committed before is intact)"
_RIGHTS = "get the right to write there, or name another place"
REMEDIES = {
    errno.ENOSPC: _FREE,
    errno.EDQUOT: _FREE,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
}

_calls = itertools.count()


def write_atomic(path: Path, data: bytes | memoryview, *, exclusive: bool = False) -> bool:
    """Write `data` to `path` in one step.

    With `exclusive`, an existing file is left as it is and False is returned: somebody committed the
    same name before us. Raises `WriteError` when the disk refuses; nothing is left behind.
    """
    with _temporary(path) as temporary:
        _write_synced(temporary, memoryview(data))
        if exclusive:
            committed = _link(temporary, path)
        else:
            os.replace(temporary, path)
            committed = True
        sync_folder(path.parent)
    return committed


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """The JSON value in `path`."""
    return json.loads(path.read_text(encoding="utf-8"))


def canonical_json(value: Any) -> str:
    """JSON with one spelling per value, so that it can be hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of the file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while piece := handle.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    temporary = path.parent / f".{path.name}.{socket.gethostname()}-{os.getpid()}-{next(_calls)}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        remedy = REMEDIES.get(error.errno or 0, "name another place")
        raise WriteError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _write_synced(path: Path, data: memoryview) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        while data:
            data = data[os.write(handle, data) :]  # a short write is legal: go on with the rest
        os.fsync(handle)
    finally:
        os.close(handle)


def _link(temporary: Path, path: Path) -> bool:
    """Commit under a new name only; True if the name was free."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        os.rename(temporary, path)
    return True
