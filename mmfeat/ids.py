"""Ids of samples: printable, no paths, and each only once, also where there are more than memory holds."""

from __future__ import annotations

from array import array
from typing import Protocol

import numpy as np

from mmfeat.errors import DataError


def checked_id(value: str | None, where: str, seen: SeenIds) -> str:
    """The id, if it is new and no path; `seen` maps each id to where it stood."""
    id = (value or "").strip()
    if not id or not id.isprintable():
        raise DataError(f"{where}: an id must be printable text, this is {value!r}; give the sample an id")
    if "/" in id or "\\" in id or ".." in id:
        raise DataError(f"{where}: the id {id!r} looks like a path; use a plain id without / \\ and ..")
    if id in seen:
        raise DataError(f"{where}: the id {id!r} stands already at {seen[id]}; remove or rename one of them")
    seen[id] = where
    return id


class SeenIds(Protocol):
    """Where each id stood; a dict is one."""

    def __contains__(self, id: object) -> bool: ...
    def __getitem__(self, id: str) -> str: ...
    def __setitem__(self, id: str, where: str) -> None: ...


class HashedIds:
    """Ids in eight bytes each, which are compared at the end; equal ones are found among `doubles`."""

    def __init__(self) -> None:
        self._hashes = array("Q")

    def __contains__(self, id: object) -> bool:
        return False

    def __getitem__(self, id: str) -> str:
        raise KeyError(id)

    def __setitem__(self, id: str, where: str) -> None:
        self._hashes.append(_hash(id))

    def doubles(self) -> frozenset[int]:
        """Hashes that occur more than once."""
        hashes = np.frombuffer(self._hashes, np.uint64) if self._hashes else np.empty(0, np.uint64)
        hashes = np.sort(hashes)
        return frozenset(hashes[1:][hashes[1:] == hashes[:-1]].tolist())


class SuspectIds(dict[str, str]):
    """Remembers only the ids with one of some hashes."""

    def __init__(self, hashes: frozenset[int]) -> None:
        super().__init__()
        self._hashes = hashes

    def __setitem__(self, id: str, where: str) -> None:
        if self._hashes and _hash(id) in self._hashes:
            super().__setitem__(id, where)


def _hash(id: str) -> int:
    import xxhash

    return xxhash.xxh3_64_intdigest(id.encode())
