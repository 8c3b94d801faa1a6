"""Built-in image encoder: histogram of oriented gradients and colour histograms (scikit-image).

Needs no download. HOG after Dalal and Triggs (CVPR 2005) over a 96 x 96 picture, 900 dimensions, beside a
32-bin histogram of each HSV channel, 96 dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mmfeat.encoders.spec import Encoder, EncoderOptions, EncoderSpec
from mmfeat.errors import EncoderError
from mmfeat.system.files import canonical_json

SIDE = 96
BINS = 32


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of the one image tower; its arithmetic is always float32."""
    if variant:
        raise EncoderError(f"{family}:{variant}: this encoder has no variants; name it {family}")
    return [
        EncoderSpec(
            family="hog",
            modality="image",
            variant="",
            weights="builtin:1",
            preprocessing=canonical_json({"resize": [SIDE, SIDE], "interpolation": "bilinear"}),
            arithmetic="float32",
            storage="float32",
        )
    ]


def load(variant: str, specs: list[EncoderSpec]) -> Encoder:
    """The encoder, whose whole work is in `prepare`, which readers run beside other encoders."""
    return Encoder(tuple(specs), describe_picture, lambda batch: lambda: [np.stack(batch)], light=True, early=True)


def describe_picture(image: Any) -> np.ndarray:
    """(996,) float32 of one RGB PIL image."""
    from PIL import Image
    from skimage.feature import hog

    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    gradients = hog(np.asarray(small.convert("L")), orientations=9, pixels_per_cell=(16, 16), cells_per_block=(2, 2))
    channels = np.asarray(small.convert("HSV")).reshape(-1, 3).T
    colours = [np.histogram(channel, bins=BINS, range=(0, 256))[0] / (SIDE * SIDE) for channel in channels]
    return np.concatenate([gradients, *colours]).astype(np.float32)
