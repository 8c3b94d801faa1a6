"""What mmfeat accepts in an HDF5 file: plain datasets of expected names that lie whole inside the very file.

HDF5 can point to other files, hide data behind filters, and hold types whose reading follows pointers. A
file may come from anywhere, so all of this is refused before a value is read.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.errors import CacheError

NOT_OURS = "mmfeat cache verify --quarantine moves it away, mmfeat extract then computes its rows again"


@dataclass(frozen=True)
class Stored:
    """Where a dataset's values lie in the file."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


@contextmanager
def open_plain(path: Path) -> Iterator[Any]:
    """The file for reading; whatever is wrong with it becomes one `CacheError`."""
    import h5py

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise CacheError(f"{path}: not a plain file; {NOT_OURS}")
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except FileNotFoundError:
        raise CacheError(f"{path}: the file is gone; run mmfeat extract again") from None
    except (OSError, KeyError, ValueError, TypeError, RuntimeError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise CacheError(f"{path}: not a readable shard ({reason}); {NOT_OURS}") from error


def plain_datasets(file: Any, path: Path, kinds: Mapping[str, str], beside: Collection[str] = ()) -> dict[str, Stored]:
    """The datasets named in `kinds` (name -> NumPy kind), and no others but those `beside` them.

    Raises `CacheError` for any danger.
    """
    import h5py

    if names := set(file.keys()) ^ {*kinds, *beside}:
        unexpected = ", ".join(sorted(name[:40] for name in names))
        raise CacheError(f"{path}: {unexpected} is missing or not expected in a shard; {NOT_OURS}")
    size, found = os.stat(path).st_size, {}
    for name, kind in kinds.items():
        if not isinstance(file.get(name, getlink=True), h5py.HardLink):
            raise CacheError(f"{path}: {name} is a link, not a dataset; {NOT_OURS}")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise CacheError(f"{path}: {name} is not a dataset; {NOT_OURS}")
        if danger := _danger(dataset, kind):
            raise CacheError(f"{path}: {name} {danger}; {NOT_OURS}")
        found[name] = stored = Stored(dataset.shape, dataset.dtype, dataset.id.get_offset() or 0)
        if stored.nbytes and (not stored.offset or stored.offset + stored.nbytes > size):
            raise CacheError(f"{path}: {name} reaches beyond the end of the file; {NOT_OURS}")
    return found


def plain_attributes(file: Any, path: Path, names: tuple[str, ...]) -> dict[str, int | str]:
    """Attributes that are one number or one fixed-length string."""
    import h5py

    values: dict[str, int | str] = {}
    for name in names:
        if name not in file.attrs:
            raise CacheError(f"{path}: it has no attribute {name}; {NOT_OURS}")
        attribute = file.attrs.get_id(name)
        kind = attribute.get_type()
        text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
        if attribute.shape != () or not (text or isinstance(kind, h5py.h5t.TypeIntegerID)):
            raise CacheError(f"{path}: its attribute {name} is neither a number nor a plain string; {NOT_OURS}")
        value = file.attrs[name]
        values[name] = value.decode() if text else int(value)
    return values


def _danger(dataset: Any, kind: str) -> str:
    """What is wrong with how the values are stored, or nothing."""
    import h5py

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
    return ""
