"""`embed`: vectors of texts and images in one call, through the cache."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np

from mmfeat.cache.explain import why_failed
from mmfeat.cache.features import Features
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower, describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, DataError
from mmfeat.extraction.extract import ExtractSettings, extract_samples
from mmfeat.extraction.in_memory import Embedder
from mmfeat.extraction.requests import resolve_options
from mmfeat.samples.dataset import MODALITIES, PART, Sample, SampleSet
from mmfeat.samples.loose import Picture, Text, as_samples, is_single
from mmfeat.samples.objects import FRAME
from mmfeat.system.hardware import resolve_device
from mmfeat.system.wording import Progress


class NothingEncodedError(DataError):
    """All texts or images are missing or broken."""


Texts: TypeAlias = "str | Iterable[Text]"
Pictures: TypeAlias = "Picture | Iterable[Picture]"


@overload
def embed(texts: Texts, images: None = None, encoder: Any = ..., cache: Any = ..., **settings: Any) -> np.ndarray: ...
@overload
def embed(
    texts: None = None, images: Pictures = ..., encoder: Any = ..., cache: Any = ..., **settings: Any
) -> np.ndarray: ...
@overload
def embed(
    texts: Texts, images: Pictures, encoder: Any = ..., cache: Any = ..., **settings: Any
) -> tuple[np.ndarray, np.ndarray]: ...
def embed(  # type: ignore[misc]  # the settings above are those below
    texts: Texts | None = None,
    images: Pictures = None,
    encoder: str | Sequence[str] = "clip",
    cache: str | Path | None = "cache",
    *,
    options: EncoderOptions | None = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> Any:
    """(N, D) float32 vectors of N texts or images, or both arrays, aligned, where both are given.

    One text or image gives one vector (D,). An image is a path, a URL, the bytes of a file, a PIL image or a uint8
    array (H, W, 3). None stands for what is lacking: its row is NaN, and so is that of a broken image, with a
    `UserWarning`. `encoder` may name several, as in "bert,resnet50": those of one modality stand side by side. Vectors
    are cached by content with those of frames, in the folder `frame` of `cache`; None for `cache` writes nothing.
    Raises `ConfigError` for an encoder that does not take what is given, and `DataError` where nothing can be encoded.
    """
    samples = as_samples(texts, images)
    asked = [name for name, values in zip(MODALITIES, (texts, images), strict=True) if values is not None]
    requests = [part.strip() for part in encoder.split(",")] if isinstance(encoder, str) else list(encoder)
    resolved = resolve_options((options or EncoderOptions()).cleaned("none"), device)  # texts stay as they are given
    towers = [
        tower
        for tower in describe_encoders(requests, resolved)
        if tower.spec.part in asked and (tower.spec.output, tower.spec.view) == ("pooled", "none")
    ]
    if lacking := [name for name in asked if not any(tower.spec.modality == name for tower in towers)]:
        others = "hashing for texts, hog for images, clip for both"
        raise ConfigError(f"encoder {','.join(requests)}: it takes no {lacking[0]}s; name one that does, as {others}")
    if not samples:
        raise DataError("no texts or images: the list is empty; give at least one")
    features, why = _features(samples, towers, cache, device, progress)
    arrays = []
    for name in asked:  # no comprehension, which is a frame of its own for a warning
        arrays.append(_matrix(features, name, why))
    if is_single(texts if images is None else images):
        arrays = [array[0] for array in arrays]
    return arrays[0] if len(arrays) == 1 else tuple(arrays)


def _features(
    samples: Sequence[Sample], towers: Sequence[Tower], cache: str | Path | None, device: str, progress: Progress | None
) -> tuple[Features, Callable[[str, int], str]]:
    """The features of N samples, and the function from a modality and a row to the reason why it has no vector."""
    if cache is None:
        embedded = Embedder(towers, resolve_device(device)).embed(samples, progress)
        return embedded.features, lambda modality, row: embedded.reasons[modality][row]
    data, store = SampleSet(FRAME, "", tuple(samples)), Cache(cache, FRAME)
    extract_samples(data, towers, cache=cache, settings=ExtractSettings(device), progress=progress)
    specs = {name: [tower.spec for tower in towers if tower.spec.modality == name] for name in MODALITIES}
    features = store.load(samples, [tower.spec for tower in towers])
    return features, lambda modality, row: why_failed(store, samples[row], specs[modality])


def _matrix(features: Features, modality: str, why: Callable[[str, int], str]) -> np.ndarray:
    """(N, D) float32 vectors of one modality; warns of those that are given and cannot be encoded."""
    blocks = [block for block in features.blocks if block.modality == modality]
    absent = np.flatnonzero(~np.all([block.mask for block in blocks], axis=0))
    lost = [(row, reason) for row in absent.tolist() if (reason := why(modality, row))]
    what = f"{len(lost):,} of {len(features):,} {PART[modality]}s cannot be encoded"
    if lost:
        what += f" (number {lost[0][0]}: {lost[0][1]})"
    if not any(block.mask.any() for block in blocks):
        raise NothingEncodedError(
            what if lost else f"all {len(features):,} {PART[modality]}s are None; give at least one"
        )
    if lost:
        warnings.warn(f"{what}: their rows are NaN", stacklevel=3)
    return np.hstack([block.vectors.astype(np.float32) for block in blocks])
