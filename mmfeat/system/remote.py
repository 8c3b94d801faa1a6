"""Files beside those of local paths: URLs that fsspec opens, as in s3://bucket/tweets.parquet, and members of archives.

Members of .zip and .tar files are read where they are, and no link is followed; a .tar that is compressed as a whole
lies unpacked in a temporary file until the process ends. A member has the URL
`zip:///FOLDER/A.zip!/INNER/NAME`; users write `A.zip`, or `A.zip/INNER` for a part of it.
"""

from __future__ import annotations

import atexit
import bz2
import errno
import glob
import gzip
import hashlib
import io
import lzma
import math
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from mmfeat.errors import DataError
from mmfeat.system.files import read_at, sweep_folders, temporary_beside
from mmfeat.system.web import bounded, client_options, completed, is_web, read_url
from mmfeat.system.wording import without_passwords
from mmfeat.version import install_command

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> extra of mmfeat
HUB = "hf:"  # begins the name of a data set that the library `datasets` reads
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
ARCHIVES = (".zip", *TARS)
TEMPORARY = "MMFEAT_TEMPORARY"  # the variable that names the temporary folder of a process to those that it starts
FOREIGN = (".7z", ".rar")  # archives that are not read
_MEMBER = re.compile(
    rf"(?:zip|tar)://(?P<path>.+?(?:{'|'.join(map(re.escape, ARCHIVES))}))!/(?P<name>.*)", re.DOTALL | re.IGNORECASE
)
PIECE = 1 << 20  # bytes that are unpacked at a time
MARK_BYTES = 10  # first bytes that show a compression
# What reading a broken compressed file raises, beside OSError.
BROKEN = (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
# A member that is larger than this and packed tighter than this is a bomb; photos and tables are packed less.
LARGEST, TIGHTEST = 1 << 28, 200


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, with those methods of a path that samples need."""

    url: str

    def __str__(self) -> str:
        return without_passwords(self.url)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def read_bytes(self) -> bytes:
        """The content of the file. Raises `OSError` for a file that cannot be read, whatever the protocol raises."""
        if member := split_url(self.url):
            return open_archive(member[0]).read(member[1])
        if is_web(self.url):
            return read_url(_filesystem(self.url), completed(self.url))
        try:
            with open_file(self.url) as file:
                return file.read()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url) from None
        except DataError:
            raise
        except Exception as error:  # each protocol has other errors; the texts name the file
            raise OSError(errno.EIO, type(error).__name__, self.url) from error


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return isinstance(path, str) and _URL.match(path) is not None


def open_file(path: str | Path) -> AbstractContextManager[BinaryIO]:
    """Open a local or remote file for reading bytes."""
    if not is_remote(path):
        return open(path, "rb")
    if member := split_url(str(path)):
        return open_archive(member[0]).open(member[1])
    url = completed(str(path))
    file = _filesystem(url).open(url, "rb")
    return bounded(file) if is_web(url) else file


def exists(path: str | Path) -> bool:
    """Whether there is a file or, locally, a folder of this name, or what a pattern or a list of names stands for.

    A part of an archive counts, whether or not the archive has it.
    """
    if str(path).startswith(HUB):
        return True  # whether it is there shows when it is read
    return bool(files_of(path)) or split_path(str(path)) is not None


def files_of(path: str | Path) -> list[str]:
    """The files that exist under a name: itself, else those of a pattern with * or of names with commas between them.

    The files of a pattern are sorted. A list of which a part is missing has none.
    """
    path = completed(str(path)) if is_remote(path) else str(path)
    if (member := split_url(path)) and member[1] in open_archive(member[0]).members:
        return [path]
    if is_remote(path) and not member:
        try:
            return _remote_files(path)
        except DataError:
            raise
        except Exception as error:  # each protocol has other errors
            reason = getattr(error, "strerror", None) or error or type(error).__name__
            raise DataError(f"{without_passwords(path)}: {reason}; check the address") from error
    if os.path.exists(path):
        return [path]
    if "," in path:
        parts = [files_of(part.strip()) for part in path.split(",")]
        return [file for part in parts for file in part] if all(parts) else []
    return sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []


def _remote_files(url: str) -> list[str]:
    system = _filesystem(url)
    if is_web(url):
        read_url(system, url, 0)
        return [url]
    if system.exists(url):
        return [url]
    return sorted(map(system.unstrip_protocol, system.glob(url))) if "*" in url else []


def absolute(path: str | Path) -> str:
    """The path in a form that means the same from any folder and may be recorded: it holds no secret of a URL."""
    if str(path).startswith(HUB):
        source, split = hub_parts(str(path))
        local = os.path.abspath(source) if os.path.isdir(source) else source
        return f"{HUB}{local}" + (f":{split}" if split else "")
    if not is_remote(path) and "," in str(path) and not os.path.exists(path) and exists(path):
        return ",".join(absolute(part.strip()) for part in str(path).split(","))
    return without_passwords(str(path)) if is_remote(path) else os.path.abspath(path)


def hub_parts(name: str) -> tuple[str, str]:
    """(name or folder of a data set, its split or "") of `hf:NAME[:SPLIT]`."""
    source, _, split = name.removeprefix(HUB).rpartition(":")
    whole = name.removeprefix(HUB)
    return (source, split) if source and not os.path.isdir(whole) else (whole, "")


def _filesystem(url: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url, **client_options() if is_web(url) else {})[0]
    except ImportError as error:
        extra = EXTRAS.get(url.partition("://")[0].lower())
        install = install_command(extra) if extra else f"{error}; pip install what it names"
        raise DataError(f"{url}: a package that reads such URLs is missing; {install}") from error
    except ValueError as error:
        raise DataError(f"{url}: {error}; use a local path or a protocol that fsspec knows") from error


class Archive:
    """The members of an archive by name, without folders and hidden files.

    Raises `DataError` for a file that is no whole archive, and for members that no data set has: names that lead
    elsewhere, links, devices, passwords, and bombs.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._tar: Any = None
        self.members: dict[str, Any] = {}
        try:
            if path.lower().endswith(".zip"):
                self._index_zip()
            else:
                self._index_tar()
        except BaseException as error:
            for file in (self._zip, self._tar):
                if file is not None:
                    file.close()
            if isinstance(error, (*BROKEN, tarfile.TarError, UnicodeDecodeError)):
                raise DataError(f"{path}: broken or cut short ({error}); write or download it again") from error
            raise

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
        self._tar = open(_unpacked_tar(self.path), "rb")  # noqa: SIM115  lives as long as the archive
        end = os.fstat(self._tar.fileno()).st_size
        with tarfile.open(fileobj=self._tar, mode="r:") as tar:
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
        if name not in self.members:
            raise FileNotFoundError(2, "No such file or directory", member_url(self.path, name))
        member = self.members[name]
        if self._zip is None:
            return io.BufferedReader(Part(self._tar, *member))
        try:
            return self._zip.open(member)  # type: ignore[return-value]
        except (zipfile.BadZipFile, NotImplementedError, OSError) as error:  # its place may be before the file's start
            raise OSError(5, str(error), member_url(self.path, name)) from error

    def read(self, name: str) -> bytes:
        """The content of a member. Raises `OSError` as `open` does."""
        try:
            with self.open(name) as file:
                return file.read()
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise OSError(5, f"broken in the archive ({error})", member_url(self.path, name)) from error


class Part(io.RawIOBase):
    """Some bytes of an open file, read without the file's own position, which other threads may use."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        self._file, self._start, self._end, self._place = file, start, start + size, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + {os.SEEK_SET: self._start, os.SEEK_CUR: self._place, os.SEEK_END: self._end}[whence]
        return self._place - self._start

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._end - self._place))
        count = read_at(self._file.fileno(), memoryview(buffer)[:count], self._place)
        self._place += count
        return count

    def readall(self) -> bytes:
        data = bytearray(max(0, self._end - self._place))
        view = memoryview(data)
        while view and (count := self.readinto(view)):
            view = view[count:]
        return bytes(data)


@lru_cache(maxsize=64)
def _opened(path: str, size: int, changed: int) -> Archive:
    return Archive(path)


def open_archive(path: str) -> Archive:
    """The archive at a path; it is indexed once, and again if the file changes."""
    status = os.stat(path)
    return _opened(os.path.abspath(path), status.st_size, status.st_mtime_ns)


def member_url(path: str, name: str) -> str:
    """The URL of a member."""
    return f"{'zip' if path.lower().endswith('.zip') else 'tar'}://{os.path.abspath(path)}!/{name}"


def split_url(url: str) -> tuple[str, str] | None:
    """(path of the archive, name of the member) of the URL of a member, else None."""
    match = _MEMBER.fullmatch(url)
    return (match["path"], match["name"]) if match else None


def split_path(path: str) -> tuple[str, str] | None:
    """(archive, part of it) of a path that leads into an archive, as in `shop.zip/train`; None for another path."""
    parts = path.split("/")
    for count in range(1, len(parts) + 1):
        archive = "/".join(parts[:count])
        if archive.lower().endswith(ARCHIVES) and os.path.isfile(archive):
            return archive, "/".join(parts[count:]).strip("/")
    return None


def _zstd(raw: BinaryIO) -> Any:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"), PIECE)


COMPRESSIONS: dict[str, tuple[bytes, Callable[[BinaryIO], Any]]] = {  # suffix -> (first bytes, what unpacks a file)
    ".gz": (rb"\x1f\x8b", lambda raw: gzip.GzipFile(fileobj=raw)),
    ".bz2": (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", bz2.BZ2File),
    ".xz": (rb"\xfd7zXZ\0", lzma.LZMAFile),
    ".zst": (rb"\x28\xb5\x2f\xfd", _zstd),
}
SLOW = (bz2.BZ2File, lzma.LZMAFile)  # unpacking takes a quarter of the time of reading a table


def decompressor(first: bytes) -> Callable[[BinaryIO], Any] | None:
    """What unpacks a file that begins with these `MARK_BYTES`, whatever it is called; None for a plain file."""
    return next((unpack for mark, unpack in COMPRESSIONS.values() if re.match(mark, first)), None)


def unpack_into(whole: BinaryIO, path: str, unpack: Callable[[BinaryIO], Any]) -> None:
    """Write into a temporary file what a compressed file unpacks to. Raises `DataError` for a bomb and a full disk."""
    try:
        with open_file(path) as raw, unpack(raw) as file:
            while piece := file.read(PIECE):
                whole.write(piece)
                if whole.tell() > max(LARGEST, TIGHTEST * raw.tell()):
                    raise DataError(
                        f"{path}: {raw.tell():,} bytes unpack to {whole.tell():,} and more; nothing of it is read"
                    )
        whole.flush()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        full = f"{tempfile.gettempdir()} is full; set TMPDIR to a folder with more room, or unpack it yourself"
        raise DataError(f"{path}: unpacked into a temporary file, for which {full}") from error


def _unpacked_tar(path: str) -> str:
    """The path of a .tar, or of the file that a compressed one is unpacked to, once for all processes of a command."""
    with open(path, "rb") as raw:
        unpack = decompressor(raw.read(MARK_BYTES))
    if unpack is None:
        return path
    status = os.stat(path)
    key = f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"
    target = os.path.join(temporary_folder(), f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.tar")
    if not os.path.exists(target):
        with tempfile.NamedTemporaryFile(dir=temporary_folder(), delete=False) as whole:
            unpack_into(whole, path, unpack)  # type: ignore[arg-type]
        os.replace(whole.name, target)
    return target


def temporary_folder() -> str:
    """A folder of files that are deleted when the process ends; processes that it starts share the folder.

    What killed processes left goes first.
    """
    if not os.path.isdir(folder := os.environ.get(TEMPORARY, "")):
        beside = Path(tempfile.gettempdir(), "mmfeat")
        sweep_folders(beside, math.inf)  # the folder of a process that lives may be old
        folder = os.environ[TEMPORARY] = str(temporary_beside(beside))
        os.mkdir(folder, 0o700)
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def refuse_foreign(path: str) -> None:
    """Raise `DataError` for an archive of a kind that is not read."""
    if path.lower().endswith(FOREIGN) and os.path.isfile(path):
        raise DataError(f"{path}: archives are .zip, .tar or .tar.gz and its like; unpack it and name the folder")
