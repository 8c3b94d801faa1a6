"""Where the inputs of a moving tower come from: the cached prefix, or the samples themselves. Read on the CPU, ahead
of the step that needs them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from mmfeat.cache.features import MappedBlock
from mmfeat.errors import RunError
from mmfeat.samples.dataset import Sample, content_key
from mmfeat.samples.images import augment, decode_image, view_name

SIDE = 224  # of the pictures that early fusion sees
RESIZED = 256
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet
STD = np.array([0.229, 0.224, 0.225], np.float32)
FRESH_VIEWS = 2**20  # augmented views that training draws from


@dataclass(frozen=True)
class Read:
    """Inputs of the samples at `places` of a batch of `size`."""

    size: int
    places: np.ndarray
    inputs: Any


class InputReader(Protocol):
    """Inputs of some samples, each in a view (0 is the plain one)."""

    def read(self, rows: np.ndarray, views: np.ndarray) -> Any: ...


class PrefixReader:
    """(hidden (B, T, D) float32, mask (B, T)) of the cached prefix, the plain one and those of augmented views."""

    def __init__(self, blocks: Sequence[MappedBlock]) -> None:
        self.blocks = blocks

    def read(self, rows: np.ndarray, views: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        there = np.stack([block.mask[rows] for block in self.blocks])
        views = np.where(views < len(self.blocks), views, 0)  # texts have one view, whatever photos have
        views = np.where(there[views, np.arange(len(rows))], views, 0)
        parts = {int(view): np.flatnonzero(views == view) for view in np.unique(views)}
        found = {view: self.blocks[view].batch(rows[here]) for view, here in parts.items()}
        longest = max(mask.shape[1] for _, mask in found.values())
        hidden = torch.zeros(len(rows), longest, self.blocks[0].width)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for view, here in parts.items():
            values, tokens = found[view]
            places = torch.from_numpy(here)
            hidden[places, : values.shape[1]] = torch.from_numpy(values).float()
            mask[places, : values.shape[1]] = torch.from_numpy(tokens)
        return hidden, mask


class SampleReader:
    """What a tower's whole forward pass takes, made of texts or decoded photos; views beyond 0 are augmented."""

    def __init__(
        self,
        samples: Sequence[Sample],
        modality: str,
        prepare: Callable[[Any], Any],
        collate: Callable[[list[Any]], Any],
        draft: int = 0,
    ) -> None:
        self.samples, self.modality, self.prepare, self.collate = samples, modality, prepare, collate
        self.draft = draft

    def read(self, rows: np.ndarray, views: np.ndarray) -> Any:
        shown = [
            content_of(self.samples[row], self.modality, view, self.draft)
            for row, view in zip(rows.tolist(), views.tolist(), strict=True)
        ]
        return self.collate([self.prepare(content) for content in shown])


def content_of(sample: Sample, modality: str, view: int = 0, draft: int = 0) -> Any:
    """The text or the RGB picture, augmented in a view beyond 0. Raises `RunError` where it can no longer be read."""
    if modality == "text":
        return sample.text
    try:
        assert sample.image is not None  # the cache has a vector of it
        data = sample.image.read_bytes()
    except OSError as error:
        raise RunError(f"{sample.image}: {error.strerror}; it was there when it was extracted: restore it") from error
    picture, reason = decode_image(data, draft)
    if picture is None:
        raise RunError(f"{sample.image}: {reason}; it was readable when it was extracted: restore it")
    return augment(picture, view_name(view), content_key(data)) if view else picture


def pixels(picture: Image.Image) -> torch.Tensor:
    """(3 * 224 * 224) of an RGB picture: short side to 256, the middle 224 x 224, ImageNet's mean and deviation.

    An augmented picture is 256 x 256 already, so its middle is nearly all of it.
    """
    scale = RESIZED / min(picture.size)
    width, height = (max(RESIZED, round(side * scale)) for side in picture.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    values = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
    return torch.from_numpy(((values - MEAN) / STD).transpose(2, 0, 1).reshape(-1).copy())
