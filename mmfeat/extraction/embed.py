"""`embed`: vectors of texts and images in one call, through the cache; and the embedder: samples -> features in memory,
by encoders that stay loaded, where no cache is read or written.

Reader, batches and the rules for unreadable contents are those of an extraction.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np

from mmfeat.cache.explain import why_failed
from mmfeat.cache.features import Block, Features, MappedBlock, joined, joined_mapped
from mmfeat.cache.shard import Rows
from mmfeat.cache.store import Cache
from mmfeat.encoders.names import listed
from mmfeat.encoders.registry import Tower, describe_encoders, load_encoders, loading
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.errors import ConfigError, DataError
from mmfeat.extraction.encode import Batcher, Stage
from mmfeat.extraction.extract import ExtractSettings, extract_samples
from mmfeat.extraction.missing import Clocks, Item
from mmfeat.extraction.reader import Reader
from mmfeat.extraction.requests import resolve_options
from mmfeat.samples.dataset import MODALITIES, PART, Sample, SampleSet
from mmfeat.samples.keys import PARTS, ContentKeys, content_keys, single_photos
from mmfeat.samples.loose import Picture, Text, as_samples, is_single
from mmfeat.samples.objects import FRAME
from mmfeat.system.hardware import resolve_device
from mmfeat.system.notebook import usual_progress
from mmfeat.system.wording import Progress

CHANGED = "changed while it was read"
EncodedValues = tuple[np.ndarray, str]  # (D) or (T, D) values, and the error, "" if there is none


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
    requests = listed(encoder)
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


@dataclass(frozen=True)
class Embedded:
    """Features of N samples; `reasons` maps modality -> (N,) reasons why a sample lacks it, "" where it does not."""

    features: Features
    reasons: Mapping[str, tuple[str, ...]]


class Embedder:
    """Encodes samples by `towers`. A model is loaded when a sample first needs it, and stays loaded.

    One thread may use an embedder at a time.
    """

    def __init__(self, towers: Sequence[Tower], device: str) -> None:
        self.towers, self.device = list(towers), device
        self._batchers: dict[str, list[Batcher]] = {}

    def embed(self, samples: Sequence[Sample], progress: Progress | None = None) -> Embedded:
        """Encode each content once. Samples may lack a modality, or have an unreadable one."""
        asked = [name for name in PARTS if self._specs(name)]
        keys = {name: content_keys(samples, name) for name in asked}
        progress = progress or usual_progress()
        self._load([name for name in asked if keys[name].present.any()], progress)
        encoded: defaultdict[str, dict[bytes, EncodedValues]] = defaultdict(dict)  # by fingerprint and content key

        def add(fingerprint: str, rows: Rows, clocks: Clocks) -> None:
            encoded[fingerprint].update(zip(rows.keys, zip(rows.values, rows.errors, strict=True), strict=True))

        for modality in asked:
            single = keys[modality].single or keys[modality]
            photos = single_photos(samples)[0] if keys[modality].is_several else samples
            if items := self._items(photos, single, modality):
                batchers = self._batchers[modality]
                stage = Stage(batchers, Reader([batcher.encoder for batcher in batchers]), add, self.device)
                with progress.step(f"encode {modality}s", len(items)) as advance:
                    for _ in stage.run(items, advance):
                        pass  # the rows hold the errors as well
        blocks = [_block(tower.spec, keys[tower.spec.part], encoded) for tower in self.towers]
        features = Features(
            tuple(sample.id for sample in samples),
            tuple(block for block in blocks if isinstance(block, Block)),
            tuple(block for block in blocks if isinstance(block, MappedBlock)),
        )
        return Embedded(features, {name: _reasons(keys[name], self._specs(name), encoded) for name in asked})

    def _specs(self, modality: str) -> list[EncoderSpec]:
        return [tower.spec for tower in self.towers if tower.spec.part == modality]

    def _load(self, modalities: Sequence[str], progress: Progress) -> None:
        """Load the encoders of several modalities in one call, because they may be towers of one model."""
        fresh = [name for name in modalities if name not in self._batchers]
        wanted = [tower for tower in self.towers if tower.spec.part in fresh]
        if wanted:
            with progress.step(loading(wanted), None):
                loaded = load_encoders(wanted, self.device)
            for name in fresh:
                self._batchers[name] = [Batcher(encoder, self.device) for encoder in loaded if encoder.modality == name]

    def _items(self, samples: Sequence[Sample], keys: ContentKeys, modality: str) -> list[Item]:
        """Items of each content once, in the order of an extraction."""
        fingerprints = frozenset(spec.fingerprint for spec in self._specs(modality))
        first: dict[bytes, Item] = {}
        for sample, key in zip(samples, keys.keys.tolist(), strict=True):
            if key:
                first.setdefault(key, Item(sample, modality, key, fingerprints))
        if modality == "text":
            return sorted(first.values(), key=lambda item: -len(item.sample.text or ""))
        return list(first.values())


def _block(
    spec: EncoderSpec, keys: ContentKeys, rows: Mapping[str, Mapping[bytes, EncodedValues]]
) -> Block | MappedBlock:
    """The block that a cache would load: NaN or no tokens where a row lacks values, width 0 where all rows do."""
    encoded, wanted = rows.get(spec.fingerprint, {}), (keys.single or keys).keys.tolist()
    values = [encoded[key][0] if key in encoded and not encoded[key][1] else None for key in wanted]
    mask = np.array([value is not None for value in values], bool)
    width = next((value.shape[-1] for value in values if value is not None), 0)
    if spec.output == "pooled":
        vectors = np.full((len(values), width), np.nan, spec.storage)
        for row in np.flatnonzero(mask):
            vectors[row] = values[row]
        return joined(Block(spec.folder_name, spec.modality, vectors, mask, spec.source, spec.view), keys.owners)
    empty = np.empty((0, width), spec.storage)
    tokens = [empty if value is None else value for value in values]
    block = MappedBlock(
        name=spec.folder_name,
        modality=spec.modality,
        width=width,
        lengths=np.array([len(sequence) for sequence in tokens], np.int64),
        mask=mask,
        rows=np.arange(len(tokens)),
        read=partial(_padded, tokens),
        source=spec.source,
        view=spec.view,
        output=spec.output,
    )
    return joined_mapped(block, keys.owners)


def _padded(tokens: Sequence[np.ndarray], positions: np.ndarray) -> np.ndarray:
    """(B, T, D) tokens of B samples, padded with zeros."""
    chosen = [tokens[position] for position in positions]
    out = np.zeros((len(chosen), max(map(len, chosen), default=0), tokens[0].shape[1]), tokens[0].dtype)
    for row, values in enumerate(chosen):
        out[row, : len(values)] = values
    return out


def _reasons(
    keys: ContentKeys, specs: Sequence[EncoderSpec], rows: Mapping[str, Mapping[bytes, EncodedValues]]
) -> tuple[str, ...]:
    """(N,) the first reason why an encoder has no row of a sample, "" where all have one."""

    def reason(key: bytes, why: str) -> str:
        if not key:
            return why
        errors = (rows.get(spec.fingerprint, {}).get(key, (None, CHANGED))[1] for spec in specs)
        return next(filter(None, errors), "")

    single = keys.single or keys
    reasons = [reason(key, why) for key, why in zip(single.keys.tolist(), single.reasons, strict=True)]
    if keys.owners is None:
        return tuple(reasons)
    of_sample: dict[int, str] = {}  # of several photos one without a reason is enough
    for owner, why in zip(keys.owners.tolist(), reasons, strict=True):
        of_sample[owner] = why and of_sample.get(owner, why)
    return tuple(of_sample.values())
