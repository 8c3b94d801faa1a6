"""Parity: cached values against the values that the reference library's own plain call gives now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, load_reference
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.samples.contents import augment, content_key
from mmfeat.samples.dataset import Sample, SampleSet
from mmfeat.samples.keys import single_photos
from mmfeat.samples.photos import decode_image
from mmfeat.system.notebook import usual_progress
from mmfeat.system.wording import Progress

# Promises: float32 values deviate by 1e-5 at most, relative to the row's largest value if that is above 1. Rows in half
# precision keep their angle, and their length to within what such an angle could change.
FLOAT32_DEVIATION = 1e-5
LEAST_COSINE = 0.999
LENGTH_DEVIATION = 0.05
FLOAT32_BOUND = f"deviation {FLOAT32_DEVIATION:.0e} of the largest value"
HALF_BOUND = f"cosine {LEAST_COSINE}, length within {LENGTH_DEVIATION:.0%}"


@dataclass(frozen=True)
class Parity:
    """The worst of `rows` rows of one encoder: largest absolute deviation and smallest cosine, over all values.

    `bound` says in words what the rows must keep.
    """

    encoder: str
    rows: int
    deviation: float
    cosine: float
    sample: str  # the id of the row that deviates most
    holds: bool
    bound: str


def check_parity(
    samples: SampleSet,
    towers: Sequence[Tower],
    store: Cache,
    count: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> Iterator[Parity]:
    """Compare `count` random cached rows of each tower with the values that the tower's reference gives."""
    for tower in towers:
        keys = store.content_keys(samples.samples, tower.spec.part)
        block = store.map(samples.samples, tower.spec, keys, allow_missing=True)
        chosen = np.random.default_rng(seed).permutation(np.flatnonzero(block.mask))[:count]
        reference = load_reference(tower)
        is_exact = tower.spec.storage == "float32"
        worst = Parity(tower.spec.name, 0, 0.0, 1.0, "", True, FLOAT32_BOUND if is_exact else HALF_BOUND)
        with (progress or usual_progress()).step(f"parity {tower.spec.name}", len(chosen)) as advance:
            for row in chosen.tolist():
                values, _ = block.batch(np.array([row]))
                sample = samples.samples[row]
                wanted = _wanted(reference, sample, tower.spec)
                worst = _worse(worst, sample.id, values.reshape(-1), wanted, tower.spec)
                advance(1)
        yield worst


def _wanted(reference: Callable[[Any], np.ndarray], sample: Sample, spec: EncoderSpec) -> np.ndarray:
    """What the library computes of a sample: of several photos the mean, or all tokens side by side."""
    if spec.part != "image":
        return reference(getattr(sample, spec.part))
    photos = [single.image.read_bytes() for single in single_photos([sample])[0] if single.image is not None]
    pictures = [(decode_image(data, spec.decoding)[0], content_key(data)) for data in photos]
    values = [reference(augment(picture, spec.view, key)) for picture, key in pictures if picture is not None]
    if len(values) == 1:
        return values[0]
    return np.mean(values, axis=0) if spec.output == "pooled" else np.concatenate(values)


def _worse(worst: Parity, id: str, cached: np.ndarray, wanted: np.ndarray, spec: EncoderSpec) -> Parity:
    """`worst` with one more row taken into account."""
    a, b = cached.astype(np.float64), wanted.reshape(-1).astype(np.float64)
    if a.shape != b.shape:
        return replace(worst, rows=worst.rows + 1, deviation=float("inf"), cosine=0.0, sample=id, holds=False)
    deviation = float(np.abs(a - b).max(initial=0.0)) if np.isfinite([a, b]).all() else float("inf")
    cosine, length = angle_and_length(a, b)
    if spec.storage == "float32":
        holds = deviation <= FLOAT32_DEVIATION * max(1.0, float(np.abs(b).max(initial=0.0)))
    else:
        holds = cosine >= LEAST_COSINE and abs(length - 1.0) <= LENGTH_DEVIATION
    return replace(
        worst,
        rows=worst.rows + 1,
        deviation=max(deviation, worst.deviation),
        cosine=min(cosine, worst.cosine),
        sample=id if deviation > worst.deviation else worst.sample,
        holds=holds and worst.holds,
    )


def angle_and_length(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """(cosine between `a` and `b`, length of `a` / length of `b`); two zero vectors count as equal."""
    one, other = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not (np.isfinite(one) and one and other):
        return (1.0, 1.0) if one == other else (0.0, float("inf"))
    return float(a @ b) / (one * other), one / other
