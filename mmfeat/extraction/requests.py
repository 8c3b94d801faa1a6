"""Requests: what an extraction was asked for, remembered so that the next command can go on from it."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import CacheMissError, ConfigError, WriteError
from mmfeat.system.files import read_json, write_json
from mmfeat.system.hardware import resolve_dtype
from mmfeat.system.remote import absolute

FOLDER = "requests"


@dataclass(frozen=True)
class Request:
    """What the last complete extraction of a data set was asked for, or the first while it runs; `data` is absolute.

    `fingerprints` are those of the specs it meant, so that nobody has to load models to know what is in use.
    """

    data: str
    columns: dict[str, str]
    encoders: list[str]
    options: EncoderOptions
    fingerprints: tuple[str, ...] = ()

    def changed(
        self, encoders: list[str] | None, columns: dict[str, str] | None, options: Mapping[str, Any]
    ) -> Request:
        """The same request with what is given, not None, in place of what was remembered."""
        named = {name: value for name, value in options.items() if value is not None}
        if "dtype" in named:
            named["convolutional_dtype"] = ""  # it was chosen by `auto`, the user has chosen now
        return Request(
            self.data,
            columns if columns is not None else self.columns,
            encoders if encoders is not None else self.encoders,
            replace(self.options, **named),
        )


def new_request(data: str, encoders: list[str], columns: dict[str, str], options: Mapping[str, Any]) -> Request:
    """A request with defaults for the options that are None."""
    return Request(absolute(data), columns, encoders, EncoderOptions()).changed(None, None, options)


def remember_request(cache: str | Path, request: Request) -> None:
    """Note it in the cache, one file a data set. It is a convenience: a cache that is read-only stays usable."""
    name = hashlib.sha256(request.data.encode()).hexdigest()[:16]
    with contextlib.suppress(WriteError):
        write_json(Path(cache) / FOLDER / f"{name}.json", asdict(request))


def begin_request(cache: str | Path, request: Request) -> None:
    """Note that work on a request begins. One that was complete stays the latest, and both are in use."""
    try:
        before = latest_request(cache, request.data)
    except CacheMissError:
        before = request
    fingerprints = tuple(dict.fromkeys((*before.fingerprints, *request.fingerprints)))
    remember_request(cache, replace(before, fingerprints=fingerprints))


def latest_request(cache: str | Path, data: str | Path | None = None) -> Request:
    """The newest one in `cache`, of `data` if named: what `mmfeat heads` goes on with."""
    place = absolute(data) if data is not None else None
    for request in all_requests(cache):
        if place in (None, request.data):
            return request
    raise CacheMissError(
        f"{cache}: nothing was extracted{f' of {data}' if data is not None else ''}; "
        f"run mmfeat extract --data {data or 'DATA'} --encoders A,B first"
    )


def resolve_options(options: EncoderOptions, device: str) -> EncoderOptions:
    """The options with `auto` replaced by what this machine computes in."""
    return replace(
        options,
        dtype=resolve_dtype(options.dtype, device),
        convolutional_dtype=options.convolutional_dtype or resolve_dtype(options.dtype, device, convolutional=True),
    )


def all_requests(cache: str | Path) -> list[Request]:
    """Those in `cache`, the newest first."""
    paths = sorted(Path(cache).glob(f"{FOLDER}/*.json"), key=lambda path: -path.stat().st_mtime)
    return [request for request in map(_read, paths) if request is not None]


def _read(path: Path) -> Request | None:
    """None for a file that is no request: it only means that flags have to be named again."""
    try:
        found = read_json(path)
        options = EncoderOptions(**found["options"])
        return Request(**{**found, "options": options, "fingerprints": tuple(found["fingerprints"])})
    except (OSError, ValueError, KeyError, TypeError, ConfigError):
        return None
