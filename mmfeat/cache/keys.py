"""Content keys of many samples at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfeat.progress import Progress, Silent
from mmfeat.samples import KEY_LENGTH, Sample

STEP = 256


@dataclass(frozen=True)
class ContentKeys:
    """(N,) S32 keys; where `present` is False there is no content, for the reason given."""

    keys: np.ndarray
    present: np.ndarray
    reasons: tuple[str, ...]


def content_keys(samples: Sequence[Sample], modality: str, progress: Progress | None = None) -> ContentKeys:
    """Hash one modality of all samples; images are read from disk."""
    found = []
    with (progress or Silent()).task(f"hash {modality}s", len(samples)) as advance:
        for start in range(0, len(samples), STEP):
            found += [sample.key(modality) for sample in samples[start : start + STEP]]
            advance(min(STEP, len(samples) - start))
    keys = np.array([key or b"" for key, _ in found], dtype=f"S{KEY_LENGTH}")
    present = np.array([key is not None for key, _ in found], dtype=bool)
    return ContentKeys(keys, present, tuple(reason for _, reason in found))
