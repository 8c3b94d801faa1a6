"""Rows on their way into a shard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mmfeat.encoders import Values
from mmfeat.errors import CacheError

MIB = 1 << 20


@dataclass(frozen=True)
class Rows:
    """Values of N samples with their content keys, the ids they were first computed for, and errors ("" if none).

    `values` are (N, D), or N times (T, D). Rows with an error hold NaN or no tokens; where all have one, D may be 0.
    """

    keys: list[bytes]
    ids: list[str]
    errors: list[str]
    values: Values

    def __post_init__(self) -> None:
        if not len(self.keys) == len(self.ids) == len(self.errors) == len(self.values):
            counts = f"{len(self.keys)} keys, {len(self.ids)} ids, {len(self.errors)} errors, {len(self.values)} values"
            raise CacheError(f"rows that do not belong together: {counts}")

    @property
    def failed(self) -> int:
        """How many rows have an error."""
        return len(self.errors) - self.errors.count("")

    @property
    def nbytes(self) -> int:
        return self.values.nbytes if isinstance(self.values, np.ndarray) else sum(one.nbytes for one in self.values)

    @property
    def width(self) -> int:
        """D."""
        if isinstance(self.values, np.ndarray):
            return self.values.shape[1]
        return max((value.shape[1] for value in self.values), default=0)

    @property
    def lengths(self) -> list[int]:
        """Rows of values of each sample."""
        return [1] * len(self.values) if isinstance(self.values, np.ndarray) else [len(one) for one in self.values]

    @property
    def widths(self) -> set[int]:
        """D of everything that is no error."""
        if isinstance(self.values, np.ndarray):
            return {self.values.shape[1]} if self.failed < len(self.errors) else set()
        return {value.shape[1] for value in self.values if len(value)}

    def arrays(self, width: int) -> Iterator[np.ndarray]:
        """The values as contiguous (n, width) arrays; a vector that failed without a width is NaN in any."""
        if not isinstance(self.values, np.ndarray):
            yield from (np.ascontiguousarray(value) for value in self.values if len(value))
        elif self.values.shape[1] == width:
            yield np.ascontiguousarray(self.values)
        else:
            yield np.full((len(self.values), width), np.nan, self.values.dtype)

    def take(self, chosen: Sequence[int]) -> Rows:
        """The rows at `chosen`."""
        return Rows(
            [self.keys[row] for row in chosen],
            [self.ids[row] for row in chosen],
            [self.errors[row] for row in chosen],
            self.values[list(chosen)] if isinstance(self.values, np.ndarray) else [self.values[row] for row in chosen],
        )


def mib_pieces(arrays: Sequence[np.ndarray]) -> Iterator[memoryview | bytes]:
    """The bytes of all arrays in pieces of 1 MiB, copied only where a piece spans several."""
    held: list[memoryview] = []
    size = 0
    for array in arrays:
        raw = array.reshape(-1).view(np.uint8).data
        while raw:
            held.append(raw[: MIB - size])
            raw, size = raw[MIB - size :], size + len(held[-1])
            if size == MIB:
                yield held[0] if len(held) == 1 else b"".join(held)
                held, size = [], 0
    if held:
        yield b"".join(held)
