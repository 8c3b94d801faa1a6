"""Archives: members of .zip and .tar files, read where they are. Nothing is unpacked, no link is followed.

A member has the URL `zip:///FOLDER/A.zip!/INNER/NAME`. Users write `A.zip`, or `A.zip/INNER` for a part of it.
"""

from __future__ import annotations

import os
import re
import stat
import tarfile
import zipfile
from functools import lru_cache
from typing import Any, BinaryIO

from mmfeat.errors import DataError

KINDS = (".zip", ".tar")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".7z", ".rar")
_URL = re.compile(r"(?:zip|tar)://(?P<path>.+?\.(?:zip|tar))!/(?P<name>.*)", re.DOTALL | re.IGNORECASE)
# A member that is larger than this and packed tighter than this is a bomb; photos and tables are packed less.
LARGEST, TIGHTEST = 1 << 28, 200


class Archive:
    """The members of an archive by name, without folders and hidden files.

    Raises `DataError` for a file that is no whole archive, and for members that no data set has: names that lead
    elsewhere, links, devices, passwords, and bombs.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self.members: dict[str, Any] = {}
        try:
            if path.lower().endswith(".zip"):
                self._index_zip()
            else:
                self._index_tar()
        except (zipfile.BadZipFile, tarfile.TarError, EOFError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: broken or cut short ({error}); write or download it again") from error

    def _index_zip(self) -> None:
        self._zip = zipfile.ZipFile(self.path)
        for info in self._zip.infolist():
            if info.is_dir():
                continue
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG):
                self._refuse(info.filename, "is a link or no file")
            if info.flag_bits & 1:
                self._refuse(info.filename, "has a password")
            if info.file_size > max(LARGEST, TIGHTEST * info.compress_size):
                self._refuse(info.filename, f"unpacks to {info.file_size:,} bytes from {info.compress_size:,}")
            self._add(info.filename, info)
        self.members = dict(sorted(self.members.items()))  # programs pack files in any order

    def _index_tar(self) -> None:
        end = os.path.getsize(self.path)
        with tarfile.open(self.path, "r:") as tar:
            for info in tar:
                tar.members = []  # type: ignore[attr-defined]  # else it remembers all of them
                if info.isdir():
                    continue
                if not info.isreg() or info.issparse():
                    self._refuse(info.name, "is a link or no file")
                if info.offset_data + info.size > end:
                    raise tarfile.ReadError(f"the member {info.name} ends behind the end of the file")
                self._add(info.name, (info.offset_data, info.size))

    def _add(self, name: str, member: object) -> None:
        parts = name.replace("\\", "/").removeprefix("./").split("/")
        if parts[0] == "" or ".." in parts or ":" in parts[0] or "\0" in name:
            self._refuse(name, "lies outside the archive")
        if not any(part.startswith((".", "__MACOSX")) for part in parts):
            self.members["/".join(parts)] = member

    def _refuse(self, name: str, reason: str) -> None:
        raise DataError(f"{self.path}: the member {name[:80]!r} {reason}; nothing of this archive is read")

    def open(self, name: str) -> BinaryIO:
        """Open a member for reading. Raises `OSError` for a member that is not there or broken."""
        import io

        if name not in self.members:
            raise FileNotFoundError(2, "No such file or directory", member_url(self.path, name))
        member = self.members[name]
        if self._zip is None:
            with open(self.path, "rb") as file:
                file.seek(member[0])
                return io.BytesIO(file.read(member[1]))
        try:
            return self._zip.open(member)  # type: ignore[return-value]
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise OSError(5, str(error), member_url(self.path, name)) from error

    def read(self, name: str) -> bytes:
        """The content of a member. Raises `OSError` as `open` does."""
        import zlib

        try:
            with self.open(name) as file:
                return file.read()
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise OSError(5, f"broken in the archive ({error})", member_url(self.path, name)) from error


@lru_cache(maxsize=64)
def _opened(path: str, size: int, changed: int) -> Archive:
    return Archive(path)


def open_archive(path: str) -> Archive:
    """The archive at a path; it is indexed once, and again if the file changes."""
    status = os.stat(path)
    return _opened(os.path.abspath(path), status.st_size, status.st_mtime_ns)


def member_url(path: str, name: str) -> str:
    """The URL of a member."""
    return f"{path[-3:].lower()}://{os.path.abspath(path)}!/{name}"


def split_url(url: str) -> tuple[str, str] | None:
    """(path of the archive, name of the member) of the URL of a member, else None."""
    match = _URL.fullmatch(url)
    return (match["path"], match["name"]) if match else None


def split_path(path: str) -> tuple[str, str] | None:
    """(archive, part of it) of a path that leads into an archive, as in `shop.zip/train`; None for another path."""
    parts = path.split("/")
    for count in range(1, len(parts) + 1):
        archive = "/".join(parts[:count])
        if archive.lower().endswith(KINDS) and os.path.isfile(archive):
            return archive, "/".join(parts[count:]).strip("/")
    return None


def refuse_packed(path: str) -> None:
    """Raise `DataError` for an archive whose members cannot be read where they are."""
    if path.lower().endswith(PACKED) and os.path.isfile(path):
        raise DataError(f"{path}: only .zip and .tar files are read where they are; unpack it and name the folder")
