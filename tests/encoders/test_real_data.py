"""Exactness on real pretrained weights and real pairs.

Set MMFEAT_REAL_DATA to a folder with `mvsa/` (the folder layout) and `weights/all-MiniLM-L6-v2`,
`weights/mobilenetv1_100-imagenet`; without it these tests skip.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfeat.encoders.registry import describe_encoders, load_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.samples.contents import clean_tweet
from mmfeat.samples.dataset import SampleSet, read_samples

ROOT = Path(os.environ.get("MMFEAT_REAL_DATA", "nowhere"))
BERT, TIMM = ROOT / "weights" / "all-MiniLM-L6-v2", ROOT / "weights" / "mobilenetv1_100-imagenet"
ROWS = 96

pytestmark = pytest.mark.skipif(not BERT.is_dir(), reason="MMFEAT_REAL_DATA names no folder with mvsa/ and weights/")


@pytest.fixture(scope="module")
def samples() -> SampleSet:
    import_torchvision()
    return read_samples(ROOT / "mvsa")


def pictures(samples: SampleSet) -> list:
    return [Image.open(sample.image).convert("RGB") for sample in samples.samples[:ROWS] if sample.image]


def texts(samples: SampleSet) -> list[str]:
    return [sample.text or "" for sample in samples.samples[:ROWS]]


def ours(request: str, dtype: str, contents: list) -> np.ndarray:
    (encoder,) = load_encoders(describe_encoders([request], EncoderOptions(dtype=dtype, cleaning="tweet")), "cpu")
    prepared = [encoder.prepare(content) for content in contents]
    return np.concatenate([encoder.embed(prepared[start : start + 16])[0] for start in range(0, len(prepared), 16)])


def text_reference(samples: SampleSet) -> np.ndarray:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(BERT)
    model = transformers.AutoModel.from_pretrained(BERT).float().eval()
    cleaned = [clean_tweet(text) for text in texts(samples)]
    inputs = tokenizer(cleaned, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return ((hidden * mask).sum(1) / mask.sum(1)).numpy()


def image_reference(samples: SampleSet) -> np.ndarray:
    import timm

    model = timm.create_model(f"local-dir:{TIMM}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        return torch.cat([model(transform(picture)[None]) for picture in pictures(samples)]).numpy()


def check(request: str, contents: list, reference: np.ndarray, half_dtypes: tuple[str, ...]) -> None:
    np.testing.assert_allclose(ours(request, "float32", contents), reference, atol=1e-5)
    for dtype in half_dtypes:
        half = ours(request, dtype, contents)
        cosine = (half * reference).sum(1) / np.linalg.norm(half, axis=1) / np.linalg.norm(reference, axis=1)
        assert cosine.min() >= 0.999, (dtype, np.sort(cosine)[:5])


def test_photos(samples: SampleSet) -> None:
    """In bfloat16 this network falls to 0.991, which is why `auto` never chooses it for convolutions."""
    check(f"timm:{TIMM}", pictures(samples), image_reference(samples), ("float16",))


def test_tweets(samples: SampleSet) -> None:
    check(f"bert:{BERT}", texts(samples), text_reference(samples), ("bfloat16", "float16"))
