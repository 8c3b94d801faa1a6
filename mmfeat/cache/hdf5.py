"""HDF5 files: checks before a file is read, and the layout of a file that is to be written in one pass.

HDF5 can point to other files, hide data behind filters, and hold types whose reading follows pointers, and a file may
come from anywhere. So only plain datasets of expected names are read that lie whole inside the very file. HDF5 lays out
a new file in memory, without the large datasets; their bytes are written into the gaps of the layout.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.errors import CacheError

NOT_OURS = "mmfeat cache verify --quarantine moves it away, mmfeat extract then computes its rows again"
PAGE = 4096  # bytes; each dataset begins on a page of its own


@dataclass(frozen=True)
class Stored:
    """A dataset's values: shape, type, and offset in the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


@contextmanager
def open_plain(path: Path, remedy: str = NOT_OURS) -> Iterator[Any]:
    """Open a file for reading; any fault of the file raises one `CacheError` that ends with `remedy`."""
    import h5py

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise CacheError(f"{path}: not a plain file; {remedy}")
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError:
        again = "run mmfeat extract again" if remedy == NOT_OURS else remedy
        raise CacheError(f"{path}: the file is gone; {again}") from None
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        reason = printable(str(error.args[0]) if error.args else "")[:160] or type(error).__name__
        raise CacheError(f"{path}: not a readable HDF5 file of mmfeat ({reason}); {remedy}") from error


def plain_datasets(
    file: Any, path: Path, kinds: Mapping[str, str], beside: Collection[str] = (), remedy: str = NOT_OURS
) -> dict[str, Stored]:
    """The datasets named in `kinds` (name -> NumPy kind).

    Raises `CacheError` for any danger, and for members of the file that are named neither there nor in `beside`.
    """

    names = set(file.keys())
    if lacking := sorted({*kinds, *beside} - names):
        raise CacheError(f"{path}: it has no {', '.join(lacking)}; {remedy}")
    if unexpected := sorted(names - {*kinds, *beside}):
        first = ", ".join(printable(name[:40]) for name in unexpected[:5])
        raise CacheError(f"{path}: nothing named {first} belongs into it; {remedy}")
    size, datasets = os.stat(path).st_size, {}
    for name, kind in kinds.items():
        if danger := _danger(file, name, kind, size):
            raise CacheError(f"{path}: {name} {danger}; {remedy}")
        datasets[name] = _stored(file[name])
    return datasets


def is_hard_link(group: Any, name: str) -> bool:
    """Whether the member lies in this very file, and not where a soft or external link points."""
    import h5py

    return isinstance(group.get(name, getlink=True), h5py.HardLink)


def plain_attributes(file: Any, path: Path, names: tuple[str, ...], remedy: str = NOT_OURS) -> dict[str, int | str]:
    """The attributes `names`, each one number or one fixed-length string; any other raises `CacheError`."""
    import h5py

    values: dict[str, int | str] = {}
    for name in names:
        if name not in file.attrs:
            raise CacheError(f"{path}: it has no attribute {name}; {remedy}")
        attribute = file.attrs.get_id(name)
        kind = attribute.get_type()
        text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
        if attribute.shape != () or not (text or isinstance(kind, h5py.h5t.TypeIntegerID)):
            raise CacheError(f"{path}: its attribute {name} is neither a number nor a plain string; {remedy}")
        value = file.attrs[name]
        values[name] = value.decode() if text else int(value)
    return values


def printable(text: str | bytes) -> str:
    """The text as one line of printable letters: text from an unknown file must not steer a terminal."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def _stored(dataset: Any) -> Stored:
    return Stored(dataset.shape, dataset.dtype, dataset.id.get_offset() or 0)


def _danger(file: Any, name: str, kind: str, size: int) -> str:
    """The danger in a member of a file of `size` bytes that should be a dataset of the NumPy `kind`; "" for none."""
    import h5py

    if not is_hard_link(file, name):
        return "is a link, not a dataset"
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        return "is not a dataset"
    plan = dataset.id.get_create_plist()
    if dataset.is_virtual:
        return "is virtual: its values lie in other files"
    if plan.get_external_count():
        return "has its values in another file"
    if plan.get_nfilters():
        return "is behind filters"
    if plan.get_layout() != h5py.h5d.CONTIGUOUS:
        return "is not stored in one piece"
    if h5py.check_vlen_dtype(dataset.dtype) or h5py.check_ref_dtype(dataset.dtype) or dataset.dtype.kind == "O":
        return "has a variable-length or reference type"
    if dataset.dtype.kind != kind or dataset.dtype.fields or not dataset.dtype.isnative:
        return f"has the type {dataset.dtype}"
    if kind != "S" and not dataset.id.get_type().equal(h5py.h5t.py_create(dataset.dtype)):
        return f"is stored in another way than {dataset.dtype}"  # NumPy has no bfloat16, nor numbers of 12 bits
    stored = _stored(dataset)
    if stored.nbytes and (not stored.offset or stored.offset + stored.nbytes > size):
        return "reaches beyond the end of the file"
    if stored.nbytes != dataset.id.get_storage_size():
        return "is said to be larger or smaller than it is"
    return ""


@dataclass(frozen=True)
class Layout:
    """A file of `size` bytes whose large datasets are still to be written, in the order of `names`.

    `gaps` are the bytes before each large dataset and, last, the bytes after all of them.
    """

    names: tuple[str, ...]
    gaps: tuple[bytes, ...]
    size: int

    def pieces(self, values: Mapping[str, Iterable[bytes | memoryview]]) -> Iterator[bytes | memoryview]:
        """The file from its first byte to its last; `values` are the bytes of each large dataset in pieces."""
        for name, gap in zip(self.names, self.gaps, strict=False):
            yield gap
            yield from values[name]
        yield self.gaps[-1]


def lay_out(fill: Callable[[Any], None], large: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Layout:
    """The layout of a file: `fill` writes groups, attributes and small datasets, `large` are (shape, dtype) by path.

    Superblock 2 for old readers, every dataset on pages of its own, so that it can be mapped.
    """
    import h5py

    memory, extents = _Memory(), []
    with h5py.File(memory, "w", libver=("v108", "v108"), alignment_threshold=1, alignment_interval=PAGE) as file:
        fill(file)
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        plan.set_obj_track_times(False)  # equal content gives equal bytes
        for path, (shape, dtype) in large.items():
            space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(np.dtype(dtype))
            offset = h5py.h5d.create(file.id, path.encode(), kind, space, plan).get_offset()
            extents.append((offset, int(np.prod(shape, dtype=object)) * np.dtype(dtype).itemsize))
    gaps, end = [], 0
    for offset, length in extents:
        start = offset if length else end  # an empty dataset lies nowhere
        gaps.append(memory.between(end, start))
        end = start + length
    return Layout(tuple(large), (*gaps, memory.between(end, memory.size)), memory.size)


class _Memory(io.RawIOBase):
    """A file that keeps the written bytes in memory, and nothing for the gaps between them."""

    def __init__(self) -> None:
        self._written: dict[int, bytes] = {}
        self._at = self.size = 0

    def between(self, start: int, stop: int) -> bytes:
        """The bytes from offset `start` to `stop`, zeros where nothing was written."""
        data = bytearray()
        for offset in sorted(offset for offset in self._written if start <= offset < stop):
            data += bytes(offset - start - len(data)) + self._written[offset]
        return bytes(data + bytes(stop - start - len(data)))

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self.size}[whence]
        return self._at

    def write(self, data: Any) -> int:
        self._written[self._at] = bytes(data)
        self._at += len(data)
        self.size = max(self.size, self._at)
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size
