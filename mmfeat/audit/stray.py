"""Stray files: what lies in a data folder and belongs to no sample of its lists."""

from __future__ import annotations

import os
from pathlib import Path

from mmfeat.remote import is_remote
from mmfeat.samples import IMAGE_SUFFIXES, SampleSet


def stray_files(samples: SampleSet) -> list[str]:
    """Names of files in `data/` that no sample uses, sorted: ids on no list, second photos of an id, other kinds."""
    folder = Path(samples.source) / "data"
    if is_remote(samples.source) or not (Path(samples.source).is_dir() and folder.is_dir()):
        return []
    ids = {sample.id for sample in samples}
    photos = {sample.image.name for sample in samples if sample.image}
    names = sorted(entry.name for entry in os.scandir(folder))
    return [name for name in names if not _is_used(Path(name), ids, photos)]


def _is_used(path: Path, ids: set[str], photos: set[str]) -> bool:
    suffix = path.suffix.lower()
    return path.name in photos if suffix in IMAGE_SUFFIXES else suffix == ".txt" and path.stem in ids
