"""Places that are no local path: URLs that fsspec opens, as in s3://bucket/tweets.parquet."""

from __future__ import annotations

import errno
import os
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mmfeat.errors import DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class RemoteFile:
    """A file behind a URL; like a path, as far as samples need one."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def read_bytes(self) -> bytes:
        """Its content. Raises `OSError` where it cannot be had, whatever its protocol raises."""
        try:
            with open_file(self.url) as file:
                return file.read()
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url) from None
        except DataError:
            raise
        except Exception as error:  # each protocol has errors of its own; their texts name the file
            raise OSError(errno.EIO, type(error).__name__, self.url) from error


def is_remote(place: str | Path) -> bool:
    """Whether this is a URL."""
    return isinstance(place, str) and _URL.match(place) is not None


def open_file(place: str | Path) -> AbstractContextManager[BinaryIO]:
    """A local or remote file to read bytes from."""
    if not is_remote(place):
        return open(place, "rb")
    return _filesystem(str(place)).open(str(place), "rb")


def exists(place: str | Path) -> bool:
    """Whether there is a file or, locally, a folder."""
    return bool(_filesystem(str(place)).exists(str(place))) if is_remote(place) else os.path.exists(place)


def absolute(place: str | Path) -> str:
    """The place in a form that means the same from any folder."""
    return str(place) if is_remote(place) else os.path.abspath(place)


def _filesystem(url: str) -> Any:
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)[0]
    except ImportError as error:
        raise DataError(f"{url}: {error}; pip install what it names") from error
    except ValueError as error:
        raise DataError(f"{url}: {error}; use a local path or a protocol that fsspec knows") from error
