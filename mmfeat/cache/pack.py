"""Packing: one plain HDF5 file with the ids, labels and values of a data set, aligned, for other programs.

    /ids (N), /labels (N)         UTF-8 strings; no label is an empty one
    /ENCODER/mask (N)             1 where there is a value
    /ENCODER/pooled (N, D)        NaN where there is none, or
    /ENCODER/tokens (M, D)        with /ENCODER/bounds (N + 1): sample i has rows bounds[i] to bounds[i + 1]

Each encoder's group has its name, its fingerprint and its whole spec as attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.hdf5 import open_plain, plain_datasets
from mmfeat.cache.layout import lay_out
from mmfeat.cache.shard import as_strings
from mmfeat.cache.store import Cache
from mmfeat.encoders import EncoderSpec
from mmfeat.errors import CacheError
from mmfeat.features import MappedBlock
from mmfeat.files import canonical_json, write_atomic
from mmfeat.progress import Progress, Silent
from mmfeat.samples import SampleSet

FORMAT = "mmfeat pack 1"
STEP = 256  # samples whose tokens are in memory at once


def write_pack(
    path: Path, store: Cache, samples: SampleSet, specs: Sequence[EncoderSpec], progress: Progress | None = None
) -> int:
    """Write the file in one step, one encoder's vectors in memory at a time; returns its size in bytes.

    Raises `CacheMissError` if any sample was never extracted.
    """
    keys = {modality: store.content_keys(samples.samples, modality) for modality in {s.modality for s in specs}}
    blocks = {spec: store.map(samples.samples, spec, keys[spec.modality]) for spec in specs}
    shapes = {_path(s): ((_rows(s, block), block.width), np.dtype(s.storage)) for s, block in blocks.items()}

    def fill(file: Any) -> None:
        file.attrs.update({"format": np.bytes_(FORMAT), "dataset": np.bytes_(samples.name.encode())})
        file["ids"] = as_strings([sample.id for sample in samples])
        file["labels"] = as_strings([sample.label or "" for sample in samples])
        for spec, block in blocks.items():
            _fill(file.create_group(spec.folder_name), spec, block)

    layout = lay_out(fill, shapes)
    with (progress or Silent()).task("pack", len(samples) * len(blocks)) as advance:
        write_atomic(path, layout.pieces({_path(s): _values(block, s, advance) for s, block in blocks.items()}))
    return layout.size


def read_pack(path: Path, encoder: str) -> dict[str, np.ndarray]:
    """`ids`, `labels`, `mask` and the values of one encoder's group, after the checks that shards get."""
    with open_plain(path) as file:
        groups = [name for name in file if name not in ("ids", "labels")]
        if encoder not in groups:
            raise CacheError(f"{path}: no encoder {encoder!r}; it has {', '.join(groups)}")
        group = file[encoder]
        output = next((name for name in ("pooled", "tokens", "prefix") if name in group), "pooled")
        kinds = {"mask": "u", output: "f"} | ({} if output == "pooled" else {"bounds": "i"})
        plain_datasets(group, path, kinds)
        plain_datasets(file, path, {"ids": "S", "labels": "S"}, beside=groups)
        found = {name: group[name][:] for name in kinds}
        return {**found, "ids": file["ids"][:], "labels": file["labels"][:]}


def _fill(group: Any, spec: EncoderSpec, block: MappedBlock) -> None:
    group.attrs["encoder"] = np.bytes_(spec.name.encode())
    group.attrs["fingerprint"] = np.bytes_(spec.fingerprint)
    group.attrs["spec"] = np.bytes_(canonical_json(asdict(spec)).encode())
    group["mask"] = block.mask.astype(np.uint8)
    if spec.output != "pooled":
        group["bounds"] = np.concatenate([[0], np.cumsum(block.lengths)])


def _values(block: MappedBlock, spec: EncoderSpec, advance: Callable[[int], None]) -> Iterator[memoryview]:
    """The values of the samples in order."""
    for start in range(0, len(block), STEP):
        rows = np.arange(start, min(start + STEP, len(block)))
        values, present = block.batch(rows)
        if spec.output == "pooled":
            vectors = np.full((len(rows), block.width), np.nan, values.dtype)
            vectors[block.mask[rows]] = values[present]
        yield (vectors if spec.output == "pooled" else values[present]).reshape(-1).view(np.uint8).data
        advance(len(rows))


def _rows(spec: EncoderSpec, block: MappedBlock) -> int:
    return len(block) if spec.output == "pooled" else int(block.lengths.sum())


def _path(spec: EncoderSpec) -> str:
    return f"{spec.folder_name}/{spec.output}"
