"""Image models and two towers of transformers: each gives the vector of the library's own processor and call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import Encoder, EncoderOptions
from tests.encoders.tiny_hf import KINDS, write_hf
from tests.encoders.tiny_models import TEXTS, contents

PLAIN = {"dtype": "float32", "cleaning": "none"}
TWO_TOWERS = ("clip", "siglip", "siglip2")
OTHER_VECTORS = {  # kind -> the class that saved it, and its vector where that is no `pooler_output` of AutoModel
    "vit-classifier": ("AutoModel", lambda output: output.last_hidden_state[:, 0]),
    "vit_msn": ("AutoModel", lambda output: output.last_hidden_state[:, 0]),
    "ijepa": ("AutoModel", lambda output: output.last_hidden_state.mean(1)),
    "clip-projection": ("CLIPVisionModelWithProjection", lambda output: output.image_embeds),
}
IMAGES = [kind for kind in KINDS if kind not in (*TWO_TOWERS, "vit_mae")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that writes the model of a kind once and returns its folder."""
    written: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in written:
            written[kind] = write_hf(tmp_path_factory.mktemp("hf") / kind, kind)
        return written[kind]

    return folder


def pictures() -> list[Image.Image]:
    """Pictures of all sizes, one of them high and narrow."""
    narrow = np.random.default_rng(9).integers(0, 256, (90, 33, 3), np.uint8)
    return [*contents("image"), Image.fromarray(narrow)]


def published(folder: Path, kind: str, modality: str) -> np.ndarray:
    """The vectors by transformers alone, one call a sample."""
    transformers = quiet_transformers()
    import torch

    loader, vector = OTHER_VECTORS.get(kind, ("AutoModel", lambda output: output.pooler_output))
    model = getattr(transformers, loader).from_pretrained(folder).eval()
    is_double = kind in TWO_TOWERS
    processor = (transformers.AutoProcessor if is_double else transformers.AutoImageProcessor).from_pretrained(folder)
    padding = {"padding": True, "max_length": 77} if kind == "clip" else {"padding": "max_length", "max_length": 64}
    rows = []
    for content in pictures() if modality == "image" else TEXTS:
        with torch.no_grad():
            if modality == "text":
                inputs = processor(text=[content], return_tensors="pt", truncation=True, **padding)
                output = model.get_text_features(**inputs)
            else:
                inputs = processor(images=content, return_tensors="pt")
                output = model.get_image_features(**inputs) if is_double else model(**inputs)
        rows.append(vector(output)[0].flatten().numpy())
    return np.stack(rows)


def encoders(request: str, **options: Any) -> list[Encoder]:
    return load_encoders(describe_encoders([request], EncoderOptions(**{**PLAIN, **options})), "cpu")


def vectors(encoder: Encoder) -> list[Any]:
    """The values of all outputs for one batch of all contents."""
    given = pictures() if encoder.modality == "image" else TEXTS
    return encoder.embed([encoder.prepare(content) for content in given])


@pytest.mark.parametrize("kind", TWO_TOWERS)
def test_both_towers_equal_transformers(kind: str, folders: Any) -> None:
    image, text = encoders(f"hf:{folders(kind)}")
    assert (image.specs[0].tower, text.specs[0].tower) == ("hf.image", "hf.text")
    np.testing.assert_allclose(vectors(image)[0], published(folders(kind), kind, "image"), atol=1e-5)
    np.testing.assert_allclose(vectors(text)[0], published(folders(kind), kind, "text"), atol=1e-5)


@pytest.mark.parametrize("kind", IMAGES)
def test_image_models_equal_transformers(kind: str, folders: Any) -> None:
    (image,) = encoders(f"hf:{folders(kind)}")
    ours = vectors(image)[0]
    np.testing.assert_allclose(ours, published(folders(kind), kind, "image"), atol=1e-5)
    assert np.abs(ours[0] - ours[1]).max() > 1e-4
