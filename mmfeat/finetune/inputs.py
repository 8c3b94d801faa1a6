"""Inputs of moving towers, hidden states of a cached prefix or texts and photos. The CPU reads the inputs of a training
step while earlier steps train."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmfeat.cache.features import MappedBlock
from mmfeat.errors import RunError
from mmfeat.samples.contents import augment, view_name
from mmfeat.samples.dataset import Sample, content_key
from mmfeat.samples.photos import Decoding, decode_image

SIDE = 224  # early fusion sees SIDE x SIDE pixels
RESIZED = 256  # the short side before the middle is cut out
MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet's mean and deviation of each channel
STD = np.array([0.229, 0.224, 0.225], np.float32)
FRESH_VIEWS = 2**20  # the number of augmented views that `--augment` draws from


@dataclass(frozen=True)
class PartialInputs:
    """Inputs of a tower for the samples at `positions` of a batch of `size` samples, None where there are none."""

    size: int
    positions: np.ndarray
    inputs: Any


@dataclass(frozen=True)
class PrefixReader:
    """Reads hidden states (B, T, D) float32 and their mask (B, T) from the cached prefixes: `blocks[0]` holds the plain
    samples, `blocks[v]` augmented view v."""

    blocks: Sequence[MappedBlock]

    def read(self, rows: np.ndarray, views: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the samples at these rows, each in a view (0: not augmented)."""
        cached = np.stack([block.mask[rows] for block in self.blocks])
        views = np.where(views < len(self.blocks), views, 0)  # texts have no augmented views, photos may have some
        views = np.where(cached[views, np.arange(len(rows))], views, 0)
        parts = {int(view): np.flatnonzero(views == view) for view in np.unique(views)}
        batches = {view: self.blocks[view].batch(rows[positions]) for view, positions in parts.items()}
        longest = max(mask.shape[1] for _, mask in batches.values())
        hidden = torch.zeros(len(rows), longest, self.blocks[0].width)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for view, positions in parts.items():
            values, present = batches[view]
            index = torch.from_numpy(positions)
            hidden[index, : values.shape[1]] = torch.from_numpy(values).float()
            mask[index, : values.shape[1]] = torch.from_numpy(present)
        return hidden, mask


@dataclass(frozen=True)
class SampleReader:
    """Makes the inputs of a tower's whole forward pass from texts or decoded photos; views beyond 0 are augmented."""

    samples: Sequence[Sample]
    modality: str
    prepare: Callable[[Any], Any]
    collate: Callable[[list[Any]], Any]
    decoding: Decoding | None = None

    def read(self, rows: np.ndarray, views: np.ndarray) -> Any:
        """Read the samples at these rows, each in a view (0: not augmented)."""
        pairs = zip(rows.tolist(), views.tolist(), strict=True)
        contents = [content_of(self.samples[row], self.modality, view, self.decoding) for row, view in pairs]
        return self.collate([self.prepare(content) for content in contents])


def content_of(sample: Sample, modality: str, view: int = 0, decoding: Decoding | None = None) -> Any:
    """The text or the RGB picture of a sample, augmented in a view beyond 0. Raises `RunError` for a photo that can no
    longer be read."""
    if modality == "text":
        return sample.text
    try:
        assert sample.image is not None  # only samples with a vector of a photo are read
        data = sample.image.read_bytes()
    except OSError as error:
        raise RunError(f"{sample.image}: {error.strerror}; it was there when it was extracted: restore it") from error
    picture, reason = decode_image(data, decoding)
    if picture is None:
        raise RunError(f"{sample.image}: {reason}; it was readable when it was extracted: restore it")
    return augment(picture, view_name(view), content_key(data)) if view else picture


def pixels(picture: Image.Image) -> torch.Tensor:
    """The pixels (3 * 224 * 224) of an RGB picture: the short side is resized to 256, the middle 224 x 224 pixels are
    cut out and standardised, (x - MEAN) / STD.

    An augmented picture is 256 x 256 already, so the middle is nearly the whole picture.
    """
    scale = RESIZED / min(picture.size)
    width, height = (max(RESIZED, round(side * scale)) for side in picture.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    values = np.asarray(resized.crop((left, top, left + SIDE, top + SIDE)), np.float32) / 255
    return torch.from_numpy(((values - MEAN) / STD).transpose(2, 0, 1).reshape(-1).copy())
