"""Writing HDF5 files without HDF5 touching the disk: where it fails on a full disk, it takes the process along.

The library lays the file out in memory, with places for the large datasets that hold no bytes yet. The file is
then plain bytes, one piece after the other, and its large datasets are never copied.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

PAGE = 4096


@dataclass(frozen=True)
class Layout:
    """The bytes that HDF5 wrote, by their offset, and the (offset, length) of each large dataset."""

    written: Mapping[int, bytes]
    places: Mapping[str, tuple[int, int]]
    size: int

    def pieces(self, values: Mapping[str, Iterable[bytes | memoryview]]) -> Iterator[bytes | memoryview]:
        """The file from its first byte to its last; `values` are the bytes of each large dataset in pieces.

        Those of one dataset are asked for when the ones before it are done.
        """
        names = {offset: name for name, (offset, length) in self.places.items() if length}
        small, at = bytearray(), 0
        for offset in sorted([*self.written, *names]):
            small += bytes(offset - at)
            if offset in names:
                yield bytes(small)
                yield from values[names[offset]]
                small, at = bytearray(), offset + self.places[names[offset]][1]
            else:
                small += self.written[offset]
                at = offset + len(self.written[offset])
        yield bytes(small + bytes(self.size - at))


def lay_out(fill: Callable[[Any], None], large: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Layout:
    """`fill` writes groups, attributes and small datasets; `large` are (shape, dtype) of the others by path.

    Superblock 2 for old readers, every dataset on pages of its own, so that it can be mapped.
    """
    import h5py

    memory, places = _Memory(), {}
    with h5py.File(memory, "w", libver=("v108", "v108"), alignment_threshold=1, alignment_interval=PAGE) as file:
        fill(file)
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plan.set_obj_track_times(False)  # equal content gives equal bytes
        for path, (shape, dtype) in large.items():
            space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(dtype))
            offset = h5py.h5d.create(file.id, path.encode(), kind, space, plan).get_offset() or 0
            places[path] = (offset, int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize if offset else 0)
    return Layout(memory.written, places, memory.size)


class _Memory(io.RawIOBase):
    """A file that keeps what is written and nothing in between."""

    def __init__(self) -> None:
        self.written: dict[int, bytes] = {}
        self._at = self.size = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def write(self, data: Any) -> int:
        self.written[self._at] = bytes(data)
        self._at += len(data)
        self.size = max(self.size, self._at)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size
