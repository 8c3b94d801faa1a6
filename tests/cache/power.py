"""A model of a disk that loses power: what a folder may hold afterwards.

POSIX promises little. The bytes of a file are safe once the file is synced; its name is safe once the folder
that holds the name is synced; a rename happens wholly or not at all. What is not safe yet may be there or not,
in any order. A `Disk` follows the calls that `syscalls.trace` recorded and writes down, at any moment, one of
the trees that a power loss just then could leave.
"""

from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from tests.cache.syscalls import Call

MODES = ("nothing", "names", "zeros", "random")
PAGE = 4096
# They change nothing that a power loss could take away, or only rights and times.
_HARMLESS = {"acknowledge", "read", "pread", "readv", "lseek", "getdents", "readlink", "close", "flock", "fcntl"}
_HARMLESS |= {"stat", "access", "statfs", "chmod", "utime", "ioctl"}


@dataclass(eq=False)
class File:
    data: bytes = b""  # what processes see
    synced: bytes = b""  # what is on the disk


@dataclass(eq=False)
class Folder:
    entries: dict[str, Node] = field(default_factory=dict)  # what processes see
    synced: dict[str, Node] = field(default_factory=dict)  # what is on the disk


Node: TypeAlias = "File | Folder"
Change: TypeAlias = "tuple[Folder, str, Node | None]"  # a name in a folder stands for this now; None: for nothing


class Disk:
    """A disk whose `root`, empty at first, is a mounted folder."""

    def __init__(self, root: Path) -> None:
        self._path = str(root)
        self._root = Folder()
        self._unsynced: list[list[Change]] = []  # each inner list happens wholly or not at all

    def apply(self, call: Call) -> None:
        """Take over one call; raises `NotImplementedError` for one whose effect the model does not know."""
        deleted = any(path.endswith(" (deleted)") for path in call.paths)  # nothing of such a file can be left
        if call.result is None or call.result < 0 or call.name in _HARMLESS or deleted:
            return
        method = getattr(self, f"_on_{call.name}", None)
        if method is None:
            raise NotImplementedError(str(call))
        method(call)

    def lose_power(self, into: Path, mode: str, seed: int = 0) -> None:
        """Write a tree that may be left into the new folder `into`.

        `nothing`: all that was not synced is gone. `names`: all names are there, bytes that were not synced
        are gone. `zeros`: all names and lengths are there, bytes that were not synced are zero. `random`: each
        change of names is there or not, each page of a file is there, zero or old, and it ends anywhere.
        """
        into.mkdir()
        chance = random.Random(seed)
        kept = [
            changes
            for changes in self._unsynced
            if mode in ("names", "zeros") or (mode == "random" and chance.random() < 0.5)
        ]
        names: dict[Folder, dict[str, Node]] = {}
        for folder, name, node in (change for changes in kept for change in changes):
            _name(names.setdefault(folder, dict(folder.synced)), name, node)
        _write_tree(self._root, into, names, lambda file: _left_of(file, mode, chance), {})

    def _on_open(self, call: Call) -> None:
        if call.flags & os.O_CREAT:
            folder, name = self._place(call.paths[0])
            if name not in folder.entries:
                self._change((folder, name, File()))
        if call.flags & os.O_TRUNC:
            self._file(call).data = b""

    def _on_mmap(self, call: Call) -> None:
        if call.args[2] & mmap.PROT_WRITE and call.args[3] & mmap.MAP_SHARED:
            raise NotImplementedError("writes through a mapping cannot be seen")

    def _on_write(self, call: Call) -> None:
        file, end = self._file(call), call.offset + len(call.data)
        file.data = file.data[: call.offset].ljust(call.offset, b"\0") + call.data + file.data[end:]

    _on_pwrite = _on_writev = _on_pwritev = _on_write

    def _on_ftruncate(self, call: Call) -> None:
        file, length = self._file(call), call.args[1]
        file.data = file.data[:length].ljust(length, b"\0")

    _on_truncate = _on_ftruncate

    def _on_fsync(self, call: Call) -> None:
        node = self._node(call.paths[0])
        if isinstance(node, File):
            node.synced = node.data
            return
        for changes in [changes for changes in self._unsynced if any(change[0] is node for change in changes)]:
            self._unsynced.remove(changes)
            for folder, name, target in changes:
                _name(folder.synced, name, target)

    _on_fdatasync = _on_fsync

    def _on_mkdir(self, call: Call) -> None:
        self._change((*self._place(call.paths[0]), Folder()))

    def _on_link(self, call: Call) -> None:
        self._change((*self._place(call.paths[1]), self._node(call.paths[0])))

    def _on_unlink(self, call: Call) -> None:
        self._change((*self._place(call.paths[0]), None))

    _on_rmdir = _on_unlink

    def _on_rename(self, call: Call) -> None:
        node = self._node(call.paths[0])
        self._change((*self._place(call.paths[1]), node), (*self._place(call.paths[0]), None))

    def _change(self, *changes: Change) -> None:
        for folder, name, node in changes:
            _name(folder.entries, name, node)
        self._unsynced.append(list(changes))

    def _node(self, path: str) -> Node:
        node: Node = self._root
        for part in Path(path).relative_to(self._path).parts:
            assert isinstance(node, Folder)
            node = node.entries[part]
        return node

    def _place(self, path: str) -> tuple[Folder, str]:
        folder = self._node(os.path.dirname(path))
        assert isinstance(folder, Folder)
        return folder, os.path.basename(path)

    def _file(self, call: Call) -> File:
        node = self._node(call.paths[0])
        assert isinstance(node, File)
        return node


def _name(entries: dict[str, Node], name: str, node: Node | None) -> None:
    if node is None:
        entries.pop(name, None)
    else:
        entries[name] = node


def _left_of(file: File, mode: str, chance: random.Random) -> bytes:
    if mode in ("nothing", "names") or file.data == file.synced:
        return file.synced
    length = len(file.data)
    if mode == "random":
        length = chance.choice([length, len(file.synced), chance.randint(0, max(length, len(file.synced)))])
    pages = []
    for start in range(0, length, PAGE):
        new, old = (data[start : start + PAGE].ljust(PAGE, b"\0") for data in (file.data, file.synced))
        lost = b"\0" * PAGE
        pages.append(new if new == old else chance.choice([new, old, lost]) if mode == "random" else lost)
    return b"".join(pages)[:length]


def _write_tree(
    folder: Folder,
    into: Path,
    names: dict[Folder, dict[str, Node]],
    left_of: Callable[[File], bytes],
    written: dict[File, Path],
) -> None:
    for name, node in names.get(folder, folder.synced).items():
        path = into / name
        if isinstance(node, Folder):
            path.mkdir()
            _write_tree(node, path, names, left_of, written)
        elif node in written:
            os.link(written[node], path)  # two names of one file stay that
        else:
            path.write_bytes(left_of(node))
            written[node] = path
