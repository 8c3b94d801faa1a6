"""Content keys of many samples at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.hardware import cpu_count
from mmfeat.progress import Progress, Silent
from mmfeat.samples import KEY_LENGTH, Sample

if TYPE_CHECKING:
    from mmfeat.cache.index import StatIndex

STEP = 1024


@dataclass(frozen=True)
class ContentKeys:
    """(N,) S32 keys; where `present` is False there is no content, for the reason given."""

    keys: np.ndarray
    present: np.ndarray
    reasons: tuple[str, ...]


def content_keys(
    samples: Sequence[Sample], modality: str, progress: Progress | None = None, index: StatIndex | None = None
) -> ContentKeys:
    """Hash one modality of all samples; images are read from disk unless `index` knows the unchanged file."""
    keys = np.zeros(len(samples), f"S{KEY_LENGTH}")
    reasons = [""] * len(samples)
    task = (progress or Silent()).task(f"hash {modality}s", len(samples))
    with task as advance, ThreadPoolExecutor(cpu_count()) as pool:
        for start in range(0, len(samples), STEP):
            part = samples[start : start + STEP]
            for row, (key, reason) in enumerate(_keys(part, modality, index, pool), start):
                keys[row], reasons[row] = key or b"", reason
            advance(len(part))
    return ContentKeys(keys, keys != b"", tuple(reasons))


def _keys(
    samples: Sequence[Sample], modality: str, index: StatIndex | None, pool: Executor
) -> Iterable[tuple[bytes | None, str]]:
    if modality == "text":
        return [sample.key(modality) for sample in samples]
    if index is None:
        return pool.map(lambda sample: sample.key(modality), samples)
    found = index.keys([sample.image for sample in samples], pool)
    return [entry if sample.image else (None, sample.image_error) for entry, sample in zip(found, samples, strict=True)]
