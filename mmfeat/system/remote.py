"""Remote files: URLs that fsspec opens, as in s3://bucket/tweets.parquet, beside local paths."""

from __future__ import annotations

import errno
import glob
import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmfeat.errors import DataError
from mmfeat.system.archives import open_archive, split_path, split_url

EXTRAS = {"http": "http", "https": "http", "s3": "s3", "gs": "gcs", "gcs": "gcs"}  # protocol -> extra of mmfeat
HUB = "hf:"  # begins the name of a data set that the library `datasets` reads
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL, with those methods of a path that samples need."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def read_bytes(self) -> bytes:
        """The content of the file. Raises `OSError` for a file that cannot be read, whatever the protocol raises."""
        if member := split_url(self.url):
            return open_archive(member[0]).read(member[1])
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
    return _filesystem(str(path)).open(str(path), "rb")


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
    path = str(path)
    if (member := split_url(path)) and member[1] in open_archive(member[0]).members:
        return [path]
    if is_remote(path) and not member:
        system = _filesystem(path)
        if system.exists(path):
            return [path]
        return sorted(map(system.unstrip_protocol, system.glob(path))) if "*" in path else []
    if os.path.exists(path):
        return [path]
    if "," in path:
        parts = [files_of(part.strip()) for part in path.split(",")]
        return [file for part in parts for file in part] if all(parts) else []
    return sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []


def absolute(path: str | Path) -> str:
    """The path in a form that means the same from any folder."""
    if str(path).startswith(HUB):
        source, split = hub_parts(str(path))
        local = os.path.abspath(source) if os.path.isdir(source) else source
        return f"{HUB}{local}" + (f":{split}" if split else "")
    if not is_remote(path) and "," in str(path) and not os.path.exists(path) and exists(path):
        return ",".join(absolute(part.strip()) for part in str(path).split(","))
    return str(path) if is_remote(path) else os.path.abspath(path)


def hub_parts(name: str) -> tuple[str, str]:
    """(name or folder of a data set, its split or "") of `hf:NAME[:SPLIT]`."""
    source, _, split = name.removeprefix(HUB).rpartition(":")
    whole = name.removeprefix(HUB)
    return (source, split) if source and not os.path.isdir(whole) else (whole, "")


def _filesystem(url: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        extra = EXTRAS.get(url.partition("://")[0].lower())
        install = f"pip install 'mmfeat[{extra}]'" if extra else f"{error}; pip install what it names"
        raise DataError(f"{url}: a package that reads such URLs is missing; {install}") from error
    except ValueError as error:
        raise DataError(f"{url}: {error}; use a local path or a protocol that fsspec knows") from error
