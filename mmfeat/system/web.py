"""Files behind http:// and https:// URLs, read in bounded time and size.

A server that is silent, slow or endless costs seconds; one that was silent several times and never answered is asked
no more.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

from mmfeat.errors import DataError
from mmfeat.system.wording import HIDDEN

TIMEOUT = "MMFEAT_URL_TIMEOUT"  # variable with the seconds, which processes inherit
SECONDS = 10.0
WHOLE = 3  # times the seconds that a whole file may take
LARGEST = 1 << 28  # bytes of a file
TABLE = 1 << 34  # bytes of a table whose size the server says; of another one, `LARGEST`
BLOCK = 10  # times the seconds that a part of a table, of 5 MB, may take
SLOWEST = 1000  # bytes a second that a table must come with, after the time that a whole file may take
PIECE = 1 << 20
REDIRECTS = 5
TRIES = 2  # requests of a file, unless the server says that there is no such file
PAUSE = 0.5  # seconds between them
SILENT = 3  # times that a host may be silent before its first answer

_USER = re.compile(rf"(?<=://)[^/@\s]*{re.escape(HIDDEN)}@")

_silences: Counter[str] = Counter()  # host -> times that it was silent
_answered: set[str] = set()  # hosts


def is_web(url: str) -> bool:
    """Whether a URL is one of HTTP."""
    return url.lower().startswith(("http://", "https://"))


def completed(url: str) -> str:
    """A URL that was recorded without its secrets, as it is opened: without user, whom the environment may name.

    Raises `DataError` where a key or token of the query is needed.
    """
    if f"={HIDDEN}" in url:
        raise DataError(f"{url} was recorded without its keys and tokens; name the whole address again, as with --data")
    return _USER.sub("", url)


def seconds() -> float:
    """The longest time to wait for a connection and for the next piece of a file."""
    try:
        return float(os.environ.get(TIMEOUT, SECONDS))
    except ValueError:
        return SECONDS


def client_options() -> dict[str, Any]:
    """The options of fsspec's HTTP file system for tables, of which no request waits without end."""
    import aiohttp

    patience = aiohttp.ClientTimeout(total=None, sock_connect=seconds(), sock_read=seconds())
    return {"client_kwargs": {"timeout": patience, "trust_env": True}}


def bounded(file: Any) -> Any:
    """A table behind a URL, opened by fsspec, whose `read` raises `OSError` for what is too slow, endless or cut."""
    import aiohttp

    read, size, spent, most = file.read, 0, 0.0, TABLE if file.size else LARGEST
    if file.size:
        file.kwargs["timeout"] = aiohttp.ClientTimeout(BLOCK * seconds(), sock_connect=seconds(), sock_read=seconds())

    def guarded(length: int = -1) -> bytes:
        nonlocal size, spent
        if length < 0:
            return b"".join(iter(lambda: guarded(PIECE), b""))
        start = time.monotonic()
        try:
            data: bytes = read(length)
        except TimeoutError:
            raise _failed(file.path, "no answer in time") from None
        except aiohttp.ClientError as error:
            raise _failed(file.path, f"no connection ({type(error).__name__})") from None
        size, spent = size + len(data), spent + time.monotonic() - start
        if size > most:
            raise _failed(file.path, f"larger than {most >> 20} MB")
        if spent > WHOLE * seconds() and size < SLOWEST * spent:
            raise _failed(file.path, f"slower than {SLOWEST} bytes a second")
        return data

    file.read = guarded
    return file


def read_url(system: Any, url: str, most: int = LARGEST) -> bytes:
    """The file behind a URL, or its first bytes where `most` is 0, by the client of fsspec's HTTP file system.

    Raises `OSError` whose `strerror` is the reason: no answer, an answer such as HTTP 404, redirects without end or to
    something else than HTTP, more than `most` bytes.
    """
    from fsspec.asyn import sync

    host = urlsplit(url).hostname or ""
    for attempt in range(TRIES):
        if _silences[host] >= SILENT and host not in _answered:
            raise _failed(url, f"{host} never answers")
        try:
            data: bytes = sync(system.loop, _get, system, url, most)
        except OSError as error:
            if not isinstance(error, ConnectionError) or attempt + 1 == TRIES:
                raise
            time.sleep(PAUSE)
        else:
            return data
    raise AssertionError("the last attempt returns or raises")


async def _get(system: Any, url: str, most: int) -> bytes:
    import asyncio

    import aiohttp

    wait, host = seconds(), urlsplit(url).hostname or ""
    patience = aiohttp.ClientTimeout(total=WHOLE * wait, sock_connect=wait, sock_read=wait)
    plain = {"Accept-Encoding": "identity"}  # packed bytes could unpack to any size
    session = await system.set_session()
    try:
        async with session.get(url, timeout=patience, max_redirects=REDIRECTS, headers=plain) as answer:
            _answered.add(host)
            if answer.status >= 500 or answer.status == 429:
                raise _again(url, f"HTTP {answer.status} {answer.reason}")
            if answer.status >= 400:
                raise _failed(url, f"HTTP {answer.status} {answer.reason}")
            data = bytearray()
            async for piece in answer.content.iter_chunked(PIECE):
                data += piece
                if not most:
                    break
                if len(data) > most:
                    raise _failed(url, f"larger than {most >> 20} MB")
            return bytes(data)
    except asyncio.TimeoutError:
        _silences[host] += 1
        raise _again(url, f"no whole answer within {wait:g} to {WHOLE * wait:g} s") from None
    except aiohttp.TooManyRedirects:
        raise _failed(url, f"more than {REDIRECTS} redirects") from None
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
        raise _failed(url, "no address of HTTP, or a redirect to something else") from None
    except aiohttp.ClientError as error:
        reason = getattr(getattr(error, "os_error", None), "strerror", None) or type(error).__name__
        raise _again(url, f"no connection ({reason})") from None


def _again(url: str, reason: str) -> OSError:
    """An error after which a second request may help."""
    return ConnectionError(errno.ECONNREFUSED, reason, url)


def _failed(url: str, reason: str) -> OSError:
    return OSError(errno.EIO, reason, url)
