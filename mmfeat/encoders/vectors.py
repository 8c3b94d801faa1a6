"""Vectors of the user's own, by sample id: `vectors:FILE` for texts, `vectors.image:FILE` for photos.

A file is `.npy` (a matrix with the ids in a `.csv` or `.txt` beside it, or a structured array), `.parquet`, `.csv` or
`.h5`, also one that `mmfeat cache pack` wrote. The spec holds the hash of the file, and no pickle is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.spec import Encoder, EncoderOptions, EncoderSpec
from mmfeat.encoders.weights import local_path, one_line, path_identity
from mmfeat.errors import EncoderError
from mmfeat.samples.table_columns import find_column, usual_name

if TYPE_CHECKING:
    import pyarrow

SHOWN = 3  # ids that a message names
BESIDE = (".csv", ".txt", ".ids")  # suffixes of the ids of a matrix


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of the one tower; its modality is that of the family's name."""
    path = local_path(variant)
    if path is None or not path.is_file() or path.suffix.lower() not in READERS:
        what = f"no file of {', '.join(READERS)}" if variant else "no file is named"
        raise EncoderError(f"{family}:{variant}: {what}; name one, as in {family}:vectors.npy")
    modality = family.partition(".")[2] or "text"
    identity = path_identity(path)
    if beside := _beside(path):
        identity = f"sha256:{hashlib.sha256(f'{identity} {path_identity(beside)}'.encode()).hexdigest()}"
    return [EncoderSpec("vectors", modality, path.name, identity, arithmetic="float32", storage="float32")]


def load(variant: str, specs: list[EncoderSpec]) -> Encoder:
    rows, vectors = read_vectors(Path(variant))

    def find(id: str) -> int:
        if id not in rows:
            raise ValueError(f"no vector of this id in {Path(variant).name}, which has {', '.join(list(rows)[:SHOWN])}")
        return rows[id]

    return Encoder(tuple(specs), find, lambda batch: lambda: [np.asarray(vectors[batch], np.float32)])


def read_vectors(path: Path) -> tuple[dict[str, int], np.ndarray]:
    """(Row of each id, (N, D) vectors) of a file. An id whose vector is NaN throughout has none.

    Raises `EncoderError` for a file that is none of vectors, ids that are there twice, and numbers that are not finite.
    """
    try:
        ids, vectors = READERS[path.suffix.lower()](path)
    except EncoderError:
        raise
    except Exception as error:  # libraries raise what they like for a broken file
        raise EncoderError(f"{path}: no vectors can be read ({one_line(error)}); write the file again") from error
    shape = f"{len(ids):,} ids for an array {vectors.shape} of {vectors.dtype}"
    if vectors.ndim != 2 or len(ids) != len(vectors) or vectors.dtype.kind not in "fiu" or not vectors.size:
        raise EncoderError(f"{path}: {shape}; it needs a number of D columns for each id")
    fine = np.concatenate([np.isfinite(part).all(1) for part in _pieces(vectors)])
    empty = np.concatenate([np.isnan(part).all(1) for part in _pieces(vectors)]) if vectors.dtype.kind == "f" else ~fine
    if len(broken := np.flatnonzero(~(fine | empty))):
        raise EncoderError(
            f"{path}: {len(broken):,} vectors hold NaN or infinity, the first is that of {ids[broken[0]]}; write them "
            "again, or NaN throughout for a sample without one"
        )
    rows: dict[str, int] = {}
    for row in np.flatnonzero(fine).tolist():
        if rows.setdefault(ids[row], row) != row:
            raise EncoderError(f"{path}: the id {ids[row]} occurs twice; keep one vector for each sample")
    return rows, vectors


def _pieces(vectors: np.ndarray) -> Iterator[np.ndarray]:
    return (vectors[start : start + 4096] for start in range(0, len(vectors), 4096))


def _beside(path: Path) -> Path | None:
    """The file of the ids of a matrix, None where there is none."""
    if path.suffix.lower() != ".npy":
        return None
    return next((file for suffix in BESIDE if (file := path.with_suffix(suffix)).is_file()), None)


def _read_npy(path: Path) -> tuple[list[str], np.ndarray]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if array.dtype.names:
        name = _id_column(path, list(array.dtype.names))
        wide = [other for other in array.dtype.names if array.dtype[other].shape]
        if len(wide) != 1:
            raise EncoderError(f"{path}: {len(wide)} fields of several numbers; it needs an id and one such field")
        return [_text(id) for id in array[name].tolist()], np.asarray(array[wide[0]])
    if (beside := _beside(path)) is None:
        raise EncoderError(f"{path}: no ids; write them beside it, as {path.stem}.csv with a column id, in its order")
    if beside.suffix == ".csv":
        table = _csv(beside)
        return _strings(table[_id_column(beside, table.column_names)]), array
    return beside.read_text(encoding="utf-8-sig").splitlines(), array


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray]:
    import pyarrow.parquet

    return _of_table(path, pyarrow.parquet.read_table(path, use_threads=False))


def _csv(path: Path) -> pyarrow.Table:
    """A table whose ids are texts, as 007."""
    import pyarrow
    from pyarrow import csv

    with path.open("rb") as file:
        names = file.readline().decode("utf-8-sig").strip().replace('"', "").split(",")
    options = csv.ConvertOptions(column_types={_id_column(path, names): pyarrow.string()})
    return csv.read_csv(path, convert_options=options)


def _of_table(path: Path, table: pyarrow.Table) -> tuple[list[str], np.ndarray]:
    """Ids and vectors: one column of lists, or all columns of numbers but the label's."""
    from pyarrow import types

    def is_number(kind: Any) -> bool:
        return bool(types.is_floating(kind) or types.is_integer(kind))

    name = _id_column(path, table.column_names)
    others = [field for field in table.schema if field.name not in (name, usual_name("label", table.column_names))]
    lists = [field.name for field in others if hasattr(field.type, "value_type") and is_number(field.type.value_type)]
    plain = [field.name for field in others if is_number(field.type)]
    if len(lists) > 1 or not (lists or plain):
        found = f"several columns of vectors ({', '.join(lists)})" if lists else "no column of vectors or numbers"
        raise EncoderError(f"{path}: {found}; it needs a column id, and one of lists or some of numbers")
    ids = _strings(table[name])
    if not lists:
        return ids, np.column_stack([table[column].to_numpy() for column in plain])
    rows = [np.empty(0) if row is None else np.asarray(row) for row in table[lists[0]].to_pylist()]
    width = max(map(len, rows), default=0)
    if odd := [row for row, values in enumerate(rows) if len(values) not in (0, width)]:
        raise EncoderError(f"{path}: the vector of {ids[odd[0]]} has {len(rows[odd[0]])} numbers, others {width}")
    return ids, np.array([row if len(row) else np.full(width, np.nan) for row in rows], np.float32)


def _read_h5(path: Path) -> tuple[list[str], np.ndarray]:
    """`/ids` and the only matrix of a file; links to other files are not followed."""
    import h5py

    with h5py.File(path, "r") as file:
        found: list[Any] = []
        file.visititems(lambda name, item: found.append(item) if isinstance(item, h5py.Dataset) else None)
        ids = [item for item in found if item.ndim == 1 and find_column(Path(item.name).name, ("id", "ids"))]
        wide = [item for item in found if item.ndim == 2 and item.dtype.kind in "fiu"]
        if len(ids) != 1 or len(wide) != 1 or any(item.external or item.is_virtual for item in (*ids, *wide)):
            names = ", ".join(item.name for item in wide) or "none"
            raise EncoderError(
                f"{path}: it needs one /ids and one matrix; it has {len(ids)} ids and the matrices {names}"
            )
        return [_text(id) for id in ids[0][:].tolist()], wide[0][:]


READERS: dict[str, Callable[[Path], tuple[list[str], np.ndarray]]] = {
    ".npy": _read_npy,
    ".parquet": _read_parquet,
    ".csv": lambda path: _of_table(path, _csv(path)),
    ".h5": _read_h5,
    ".hdf5": _read_h5,
}


def _id_column(path: Path, names: Sequence[str]) -> str:
    column = find_column("id", names) or find_column("ids", names) or usual_name("id", names)
    if column is None:
        raise EncoderError(f"{path}: no column id among {', '.join(list(names)[:8])}; name that of the ids so")
    return column


def _strings(column: Any) -> list[str]:
    return [_text(id) for id in column.to_pylist()]


def _text(id: object) -> str:
    return id.decode() if isinstance(id, bytes) else str(id)
