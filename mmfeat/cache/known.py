"""Which contents one encoder has vectors of, in 16 bytes a content: what an extraction asks for every sample."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mmfeat.cache.hdf5 import NOT_OURS
from mmfeat.cache.shard import Shard
from mmfeat.errors import CacheError

MISSING, FAILED, GOOD = 0, 1, 2


class KnownKeys:
    """Keys of what is stored, with what is asked for, so that each content counts once however often it comes."""

    def __init__(self, shards: Iterable[Shard]) -> None:
        self._keys = np.empty(0, "S16")
        self._states = np.empty(0, np.uint8)
        self._asked = np.empty(0, bool)
        self.add(shards)

    def add(self, shards: Iterable[Shard]) -> None:
        """Know what these hold, too."""
        if parts := [(_packed_of(shard), _states_of(shard)) for shard in shards]:
            self._merge(*map(np.concatenate, zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self._keys)

    def states(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(N,) whether each of the S32 keys is MISSING, FAILED or GOOD, and (N,) whether it was asked for before."""
        packed = _packed(keys)
        if not len(self._keys):
            return np.zeros(len(keys), np.uint8), np.zeros(len(keys), bool)
        at = np.minimum(np.searchsorted(self._keys, packed), len(self._keys) - 1)
        there = self._keys[at] == packed
        return np.where(there, self._states[at], MISSING).astype(np.uint8), there & self._asked[at]

    def ask(self, keys: np.ndarray) -> None:
        """Note distinct keys as asked for; those that are missing are about to be encoded and count as good."""
        packed = _packed(keys)
        states, _ = self.states(keys)
        self._merge(packed[states == MISSING], np.full(int((states == MISSING).sum()), GOOD, np.uint8))
        self._asked[np.searchsorted(self._keys, packed)] = True

    def _merge(self, packed: np.ndarray, states: np.ndarray) -> None:
        """Add keys; of equal ones the best state counts."""
        if not len(packed):
            return
        order = np.lexsort((-states.astype(np.int8), packed))
        packed, states = packed[order], states[order]
        first = np.concatenate([[True], packed[1:] != packed[:-1]])
        packed, states = packed[first], states[first]
        at = np.searchsorted(self._keys, packed)
        inside = np.minimum(at, max(len(self._keys) - 1, 0))
        known = self._keys[inside] == packed if len(self._keys) else np.zeros(len(packed), bool)
        self._states[inside[known]] = np.maximum(self._states[inside[known]], states[known])
        self._keys = np.insert(self._keys, at[~known], packed[~known])
        self._states = np.insert(self._states, at[~known], states[~known])
        self._asked = np.insert(self._asked, at[~known], False)


def _packed_of(shard: Shard) -> np.ndarray:
    try:
        return _packed(shard.keys)
    except ValueError:
        raise CacheError(f"{shard.path}: its keys are no content keys; {NOT_OURS}") from None


def _states_of(shard: Shard) -> np.ndarray:
    return np.where(shard.errors == b"", GOOD, FAILED).astype(np.uint8)


def _packed(keys: np.ndarray) -> np.ndarray:
    """(N,) S16 of (N,) S32: two hexadecimal digits in a byte."""
    return np.frombuffer(bytes.fromhex(np.ascontiguousarray(keys, "S32").tobytes().decode()), "S16")
