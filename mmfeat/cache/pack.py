"""Packs: the ids, labels and values of a data set, aligned, for other programs; `pack_formats` has those without HDF5.

    /ids, /labels, /splits (N)    UTF-8 strings; the label of an unlabelled sample is empty, split is the user's own
    /ENCODER/mask (N)             1 for a sample with a value
    /ENCODER/pooled (N, D)        NaN for a sample without a value, or
    /ENCODER/tokens (M, D)        with /ENCODER/bounds (N + 1): sample i has rows bounds[i] to bounds[i + 1]

Each encoder's group has its name, its fingerprint and its whole spec as attributes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.features import MappedBlock
from mmfeat.cache.hdf5 import is_hard_link, lay_out, open_plain, plain_attributes, plain_datasets, printable
from mmfeat.cache.pack_formats import WRITERS, file_of, is_pack, read_matrix, read_table
from mmfeat.cache.shard import as_strings
from mmfeat.cache.store import Cache
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import CacheError, ConfigError, MmfeatError
from mmfeat.samples.dataset import SampleSet
from mmfeat.system.files import canonical_json, write_atomic
from mmfeat.system.notebook import usual_progress
from mmfeat.system.wording import Advance, Progress

FORMAT = "mmfeat pack 1"
STEP = 256  # samples whose tokens are in memory at once
REMEDY = "mmfeat cache pack makes a new one"
HDF5 = "h5"
FORMATS = (HDF5, *WRITERS)
STRINGS = ("ids", "labels", "splits")


def write_pack(
    path: Path,
    store: Cache,
    samples: SampleSet,
    specs: Sequence[EncoderSpec],
    progress: Progress | None = None,
    format: str | None = None,
) -> int:
    """Write the file in one step, a few samples' values in memory at a time; returns its size in bytes.

    `format` is one of `FORMATS`, by default the one that the suffix names. Raises `CacheMissError` if any sample was
    never extracted, and `ConfigError` for an unknown suffix, or if `path` is a file that is no pack.
    """
    kind = _format_of(path, format)
    _check_free(path, kind, specs)
    keys = {modality: store.content_keys(samples.samples, modality) for modality in {s.part for s in specs}}
    blocks = {spec: store.map(samples.samples, spec, keys[spec.part]) for spec in specs}
    with (progress or usual_progress()).step("pack", len(samples) * len(blocks)) as advance:
        if kind == HDF5:
            return _write_hdf5(path, samples, blocks, advance)
        named = {spec.folder_name: block for spec, block in blocks.items()}
        WRITERS[kind](path, samples, named, advance)
    return sum(file.stat().st_size for file in _files(path, kind, specs))


def _write_hdf5(path: Path, samples: SampleSet, blocks: Mapping[EncoderSpec, MappedBlock], advance: Advance) -> int:
    paths = {spec: f"{spec.folder_name}/{spec.output}" for spec in blocks}
    shapes = {}
    for spec, block in blocks.items():
        count = len(block) if spec.output == "pooled" else int(block.lengths.sum())
        shapes[paths[spec]] = (count, block.width), np.dtype(spec.storage)

    def fill(file: Any) -> None:
        file.attrs.update({"format": np.bytes_(FORMAT), "dataset": np.bytes_(samples.name.encode())})
        file["ids"] = as_strings([sample.id for sample in samples])
        file["labels"] = as_strings([sample.label or "" for sample in samples])
        file["splits"] = as_strings([sample.split for sample in samples])
        for spec, block in blocks.items():
            _fill(file.create_group(spec.folder_name), spec, block)

    layout = lay_out(fill, shapes)
    write_atomic(path, layout.pieces({paths[s]: _values(block, s, advance) for s, block in blocks.items()}))
    return layout.size


def read_pack(path: Path, encoder: str, format: str | None = None) -> dict[str, np.ndarray]:
    """`ids`, `labels`, `splits`, `mask` and the values of one encoder, after the checks that shards get."""
    kind = format or Path(path).suffix.lower().removeprefix(".")
    if kind not in WRITERS:
        return _read_hdf5(Path(path), encoder)
    try:
        if not is_pack(Path(path), kind):
            raise ValueError("not a pack")
        return (read_matrix if kind in ("npy", "faiss") else read_table)(Path(path), kind, encoder)
    except MmfeatError:
        raise
    except Exception as error:  # libraries raise what they like for a broken file
        reason = " ".join(str(error).split())[:160]
        raise CacheError(f"{path}: not a readable pack of {kind} ({reason}); {REMEDY}") from error


def _read_hdf5(path: Path, encoder: str) -> dict[str, np.ndarray]:
    import h5py

    with open_plain(path, REMEDY) as file:
        if plain_attributes(file, path, ("format",), REMEDY)["format"] != FORMAT:
            raise CacheError(f"{path}: not a {FORMAT}; {REMEDY}")
        groups = [name for name in file if name not in STRINGS]
        if encoder not in groups:
            raise CacheError(f"{path}: no encoder {encoder!r}; it has {', '.join(map(printable, groups))}")
        if not is_hard_link(file, encoder) or not isinstance(file[encoder], h5py.Group):
            raise CacheError(f"{path}: {encoder} is a link, not a group; {REMEDY}")
        group = file[encoder]
        output = next((name for name in ("pooled", "tokens", "prefix") if name in group), "pooled")
        kinds = {"mask": "u", output: "f"} | ({} if output == "pooled" else {"bounds": "i"})
        strings = [name for name in STRINGS if name in file or name != "splits"]  # which older packs lack
        stored = plain_datasets(group, path, kinds, remedy=REMEDY)
        stored |= plain_datasets(file, path, dict.fromkeys(strings, "S"), beside=groups, remedy=REMEDY)
        arrays = {name: (file if name in STRINGS else group)[name][:] for name in stored}
    if not _fit(arrays, output):
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise CacheError(f"{path}: {encoder}: {shapes} do not fit together; {REMEDY}")
    return arrays


def _fit(arrays: dict[str, np.ndarray], output: str) -> bool:
    """Whether the arrays of one encoder agree on the number of samples and of tokens."""
    values, bounds = arrays[output], arrays.get("bounds", np.arange(len(arrays["mask"]) + 1))
    return (
        {len(arrays[name]) for name in (*STRINGS, "mask") if name in arrays} == {len(bounds) - 1}
        and values.ndim == 2
        and bounds[0] == 0
        and bounds[-1] == len(values)
        and bool((np.diff(bounds) >= 0).all())
    )


def _format_of(path: Path, named: str | None) -> str:
    """The format that is named, or that of the suffix. Raises `ConfigError` for neither."""
    if named not in (None, *FORMATS):
        raise ConfigError(f"--format {named}: use one of {', '.join(FORMATS)}")
    kind = named or {".hdf5": HDF5}.get(path.suffix.lower(), path.suffix.lower().removeprefix("."))
    if kind not in FORMATS:
        raise ConfigError(
            f"--out {path}: no format has this suffix; use one of .{', .'.join(FORMATS)}, or add --format"
        )
    return kind


def _files(path: Path, kind: str, specs: Sequence[EncoderSpec]) -> list[Path]:
    """The files of a pack; a folder counts as what is in it."""
    if kind in ("npy", "faiss"):
        return [path.with_suffix(".csv"), *(file_of(path, spec.folder_name, len(specs)) for spec in specs)]
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def _check_free(path: Path, kind: str, specs: Sequence[EncoderSpec]) -> None:
    """Raise `ConfigError` where what is there is no pack, which may be replaced, or cannot hold the values."""
    if kind != HDF5 and (deep := [spec.name for spec in specs if spec.output != "pooled"]):
        raise ConfigError(
            f"--format {kind}: it takes one vector a sample, and {deep[0]} has more; add --outputs pooled"
        )
    if not any(file.exists() for file in (path, *_files(path, kind, specs))) or (kind != HDF5 and is_pack(path, kind)):
        return
    try:
        with open_plain(path) as file:
            free = str(plain_attributes(file, path, ("format",))["format"]).startswith("mmfeat pack")
    except CacheError:
        free = False
    if kind != HDF5 or not free:
        raise ConfigError(f"--out {path}: this exists and is no pack; name another file")


def _fill(group: Any, spec: EncoderSpec, block: MappedBlock) -> None:
    group.attrs["encoder"] = np.bytes_(spec.name.encode())
    group.attrs["fingerprint"] = np.bytes_(spec.fingerprint)
    group.attrs["spec"] = np.bytes_(canonical_json(spec.stated).encode())
    group["mask"] = block.mask.astype(np.uint8)
    if spec.output != "pooled":
        group["bounds"] = np.concatenate([[0], np.cumsum(block.lengths)])


def _values(block: MappedBlock, spec: EncoderSpec, advance: Advance) -> Iterator[memoryview]:
    """Yield the bytes of the values of all samples, in order."""
    for start in range(0, len(block), STEP):
        rows = np.arange(start, min(start + STEP, len(block)))
        values, present = block.batch(rows)
        if spec.output == "pooled":
            vectors = np.full((len(rows), block.width), np.nan, values.dtype)
            vectors[block.mask[rows]] = values[present]
        yield (vectors if spec.output == "pooled" else values[present]).reshape(-1).view(np.uint8).data
        advance(len(rows))
