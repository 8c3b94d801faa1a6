"""Packs in other formats than HDF5, of encoders with one vector a sample.

    .npy        one matrix an encoder (N, D), NaN without a value, and FILE.csv
    .faiss      one exact index an encoder, by inner product of vectors of length 1; its ids are rows of FILE.csv
    .parquet    one table, with a column of vectors an encoder, null without a value
    .lance      the same table as a Lance data set, a folder

With several encoders a matrix or index is FILE-ENCODER.npy. All tables begin with `COLUMNS`; in FILE.csv a column an
encoder says 1 where the sample has a vector.
"""

from __future__ import annotations

import csv
import importlib
import io
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.features import MappedBlock
from mmfeat.cache.shard import as_strings
from mmfeat.errors import CacheError, ConfigError
from mmfeat.samples.dataset import Sample, SampleSet
from mmfeat.system.files import csv_text, sync_folder, temporary_file, write_atomic
from mmfeat.system.wording import Advance, without_passwords
from mmfeat.version import install_command

COLUMNS = ("id", "text", "image", "label", "split")  # image: the path of a photo
STEP = 4096  # samples whose vectors are in memory at once
MARK = b"mmfeat pack"  # the key of the data set's name in the metadata of a table
Blocks = Mapping[str, MappedBlock]  # name of an encoder's cache folder -> its vectors
_ENCODER = re.compile(r".+-[0-9a-f]{8}")


def write_npy(path: Path, samples: SampleSet, blocks: Blocks, advance: Advance) -> None:
    """Write a matrix for each encoder, then the rows of the table; a pack whose table has no rows is not finished."""
    _write_csv(path, blocks)
    for name, block in blocks.items():
        with _replacing(file_of(path, name, len(blocks))) as temporary:
            shape = (len(block), block.width)
            matrix = np.lib.format.open_memmap(str(temporary), "w+", block.read(block.rows[:0]).dtype, shape)
            for rows, vectors in _vectors(block, advance):
                matrix[rows] = vectors
            matrix.flush()
    _write_csv(path, blocks, samples)


def write_faiss(path: Path, samples: SampleSet, blocks: Blocks, advance: Advance) -> None:
    """Write an index for each encoder, then the rows of the table, as `write_npy` does."""
    faiss = _library("faiss")
    _write_csv(path, blocks)
    for name, block in blocks.items():
        index = faiss.IndexIDMap(faiss.IndexFlatIP(block.width or 1))
        for rows, vectors in _vectors(block, advance) if block.width else ():
            present = block.mask[rows]
            known = vectors[present].astype(np.float32)
            faiss.normalize_L2(known)
            index.add_with_ids(known, rows[present])
        with _replacing(file_of(path, name, len(blocks))) as temporary:
            faiss.write_index(index, str(temporary))
    _write_csv(path, blocks, samples)


def write_parquet(path: Path, samples: SampleSet, blocks: Blocks, advance: Advance) -> None:
    """Write one table."""
    import pyarrow.parquet as pq

    schema, batches = _arrow(samples, blocks, advance)
    with _replacing(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def write_lance(path: Path, samples: SampleSet, blocks: Blocks, advance: Advance) -> None:
    """Write a folder, which takes the place of an earlier one when it is whole."""
    lance = _library("lance")
    schema, batches = _arrow(samples, blocks, advance)
    with _replacing(path) as temporary:
        lance.write_dataset(batches, str(temporary), schema=schema)


WRITERS: dict[str, Callable[[Path, SampleSet, Blocks, Advance], None]] = {
    "npy": write_npy,
    "parquet": write_parquet,
    "lance": write_lance,
    "faiss": write_faiss,
}


def read_table(path: Path, kind: str, encoder: str) -> dict[str, np.ndarray]:
    """The arrays of one encoder in a Parquet or Lance pack."""
    table = (_library("lance").dataset(str(path)).to_table if kind == "lance" else _parquet(path).read)()
    _check_encoder(path, encoder, [name for name in table.column_names if name not in COLUMNS])
    column = table[encoder].combine_chunks()
    mask, width = np.asarray(column.is_valid()), column.type.list_size
    vectors = np.full((len(mask), width), np.nan, column.type.value_type.to_pandas_dtype())
    vectors[mask] = column.drop_null().flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
    return _arrays([table[name].to_pylist() for name in COLUMNS], mask, vectors)


def read_matrix(path: Path, kind: str, encoder: str) -> dict[str, np.ndarray]:
    """The arrays of one encoder in a pack of NumPy or FAISS, whose vectors are of length 1."""
    header, *rows = csv.reader(io.StringIO(path.with_suffix(".csv").read_text(encoding="utf-8"), newline=""))
    _check_encoder(path, encoder, header[len(COLUMNS) :])
    mask = np.array([row[header.index(encoder)] == "1" for row in rows], bool)
    file = file_of(path, encoder, len(header) - len(COLUMNS))
    if kind == "npy":
        vectors = np.load(file, allow_pickle=False)
    else:
        faiss = _library("faiss")
        index = faiss.read_index(str(file))
        vectors = np.full((len(mask), index.d), np.nan, np.float32)
        vectors[faiss.vector_to_array(index.id_map)] = index.index.reconstruct_n(0, index.ntotal)
    if vectors.ndim != 2 or len(vectors) != len(mask) or (np.isnan(vectors).all(axis=1) != ~mask).any():
        raise ValueError(f"{len(mask)} rows and vectors of shape {vectors.shape} do not fit together")
    return _arrays([[row[place] for row in rows] for place in range(len(COLUMNS))], mask, vectors)


def is_pack(path: Path, kind: str) -> bool:
    """Whether the table of a pack is at `path`, or beside it."""
    try:
        if kind in ("npy", "faiss"):
            with path.with_suffix(".csv").open(encoding="utf-8", newline="") as file:
                names = next(csv.reader(file), [])
            return tuple(names[:5]) == COLUMNS and len(names) > 5 and all(map(_ENCODER.fullmatch, names[5:]))
        schema = _library("lance").dataset(str(path)).schema if kind == "lance" else _parquet(path).schema_arrow
        return MARK in (schema.metadata or {})
    except (OSError, ValueError, csv.Error):
        return False


def file_of(path: Path, encoder: str, encoders: int) -> Path:
    """The file of one encoder's matrix or index."""
    return path if encoders == 1 else path.with_name(f"{path.stem}-{encoder}{path.suffix}")


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file or folder, which takes the place of `path` when it is whole."""
    with temporary_file(path) as temporary:
        try:
            yield temporary
            for file in (temporary, *temporary.rglob("*")):
                sync_folder(file)  # a file has no entries, but is synced in the same way
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(temporary, path)
            sync_folder(path.parent)
        finally:
            if temporary.is_dir():
                shutil.rmtree(temporary)


def _parquet(path: Path) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(path)


def _check_encoder(path: Path, encoder: str, names: Sequence[str]) -> None:
    if encoder not in names:
        raise CacheError(f"{path}: no encoder {encoder!r}; it has {', '.join(names)}")


def _arrays(columns: Sequence[Sequence[str | None]], mask: np.ndarray, vectors: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of `read_pack`; strings are bytes, as HDF5 has them."""
    words = dict(zip(COLUMNS, columns, strict=True))
    strings = {f"{name}s": as_strings([cell or "" for cell in words[name]]) for name in ("id", "label", "split")}
    return {**strings, "mask": mask.astype(np.uint8), "pooled": vectors}


def _words(samples: Iterable[Sample]) -> Iterator[tuple[str, ...]]:
    for sample in samples:
        image = without_passwords(str(sample.image)) if sample.image else ""
        yield sample.id, sample.text or "", image, sample.label or "", sample.split


def _write_csv(path: Path, blocks: Blocks, samples: Iterable[Sample] = ()) -> None:
    masks = np.column_stack([block.mask for block in blocks.values()]).astype(int).tolist() if samples else []
    rows = ((*words, *mask) for words, mask in zip(_words(samples), masks, strict=True))
    write_atomic(path.with_suffix(".csv"), csv_text((*COLUMNS, *blocks), rows).encode())


def _vectors(block: MappedBlock, advance: Advance) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows, their vectors, NaN where there is none) of all samples in order, `STEP` at a time."""
    for start in range(0, len(block), STEP):
        rows = np.arange(start, min(start + STEP, len(block)))
        values, present = block.batch(rows)
        vectors = np.full((len(rows), block.width), np.nan, values.dtype)
        vectors[block.mask[rows]] = values[present]
        yield rows, vectors
        advance(len(rows))


def _arrow(samples: SampleSet, blocks: Blocks, advance: Advance) -> tuple[Any, Iterator[Any]]:
    """(schema, batches of rows) of the table; an empty cell is null."""
    import pyarrow as pa

    kinds = {
        name: pa.list_(pa.from_numpy_dtype(block.read(block.rows[:0]).dtype), block.width or 1)  # Arrow crashes at 0
        for name, block in blocks.items()
    }
    schema = pa.schema([*((name, pa.string()) for name in COLUMNS), *kinds.items()], {MARK: samples.name.encode()})

    def batches() -> Iterator[Any]:
        words = _words(samples)
        for parts in zip(*(_vectors(block, advance) for block in blocks.values()), strict=True):
            cells = zip(*(next(words) for _ in parts[0][0]), strict=True)
            arrays = [pa.array([cell or None for cell in column], pa.string()) for column in cells]
            for block, kind, (rows, vectors) in zip(blocks.values(), kinds.values(), parts, strict=True):
                if not block.width:
                    arrays.append(pa.nulls(len(rows), kind))
                    continue
                flat = pa.array(vectors.reshape(-1), kind.value_type)
                arrays.append(pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=pa.array(~block.mask[rows])))
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    return schema, batches()


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"--format {name} needs {name}; {install_command(name)}") from None
