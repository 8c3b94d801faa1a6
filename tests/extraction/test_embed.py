"""`embed`: texts and photos in every form of a Python program give the cached vectors, aligned, in one call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

import mmfeat
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import describe_encoders
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, DataError
from mmfeat.samples.dataset import Sample

TEXTS = ["what a wonderful day", None, "so tired of the bus"]
FORMS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "name": str,
    "bytes": Path.read_bytes,
    "pillow": Image.open,
    "array": lambda path: np.asarray(Image.open(path)),
}


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embed") / "cache"


def test_vectors_are_those_of_the_cache(cache: Path) -> None:
    """Those that `Cache.load` gives for the same contents, float32, NaN where a text is missing."""
    vectors = mmfeat.embed(TEXTS, encoder="hashing", cache=cache)
    assert vectors.dtype == np.float32
    assert np.isnan(vectors).all(1).tolist() == [False, True, False]
    options = EncoderOptions(cleaning="none", exif="upright", background="white", dtype="float32")
    (tower,) = describe_encoders(["hashing"], options)
    stored = Cache(cache, "frame").load([Sample("x", text) for text in TEXTS], [tower.spec])
    np.testing.assert_array_equal(stored.blocks[0].vectors, vectors)


@pytest.mark.parametrize("form", FORMS)
def test_a_photo_may_have_any_form(form: str, photo: Path, cache: Path) -> None:
    image, expected = FORMS[form](photo), mmfeat.embed(images=[photo], encoder="hog", cache=None)
    alone = mmfeat.embed(images=image, encoder="hog", cache=cache)
    assert alone.shape == (expected.shape[1],)
    np.testing.assert_allclose(mmfeat.embed(images=[image], encoder="hog", cache=cache), expected, atol=1e-6)
    np.testing.assert_allclose(alone, expected[0], atol=1e-6)


def test_both_are_aligned_and_broken_photos_are_told(photo: Path, cache: Path) -> None:
    with pytest.warns(UserWarning, match=r"1 of 3 photos cannot be encoded \(number 2: not an image\)") as told:
        texts, images = mmfeat.embed(TEXTS, [photo, None, b"no photo"], "hashing,hog", cache)
    assert told[0].filename == __file__
    assert len(texts) == len(images) == 3
    assert np.isnan(images).all(1).tolist() == [False, True, True]
    both = mmfeat.embed(images=[photo], encoder=["hog", "hog"], cache=cache)
    assert len(both) == 1


def test_one_encoder_of_both_towers(tiny_clip: Path, photo: Path, cache: Path) -> None:
    texts, images = mmfeat.embed("what a day", photo, f"clip:{tiny_clip}", cache)
    assert texts.shape == images.shape
    np.testing.assert_array_equal(mmfeat.embed("what a day", encoder=f"clip:{tiny_clip}", cache=cache), texts)


@pytest.mark.parametrize("kind", [pd.DataFrame, pa.table, "polars"])
def test_frames_and_their_columns(kind: Any, photo: Path, cache: Path) -> None:
    make = pytest.importorskip("polars").DataFrame if kind == "polars" else kind
    frame = make({"caption": TEXTS, "image": [str(photo)] * 3})
    texts, images = mmfeat.embed(frame, frame, "hashing,hog", cache)
    np.testing.assert_array_equal(texts, mmfeat.embed(TEXTS, encoder="hashing", cache=cache))
    np.testing.assert_array_equal(texts, mmfeat.embed(frame["caption"], encoder="hashing", cache=cache))
    assert not np.isnan(images).any()


def test_nothing_is_encoded_twice_whoever_did_it(tmp_path: Path) -> None:
    texts = [text for text in TEXTS if text]
    result = mmfeat.extract_features(
        pd.DataFrame({"text": texts}), ["hashing"], cache=tmp_path, options=EncoderOptions(dtype="float32")
    )
    files = sorted(result.folder.rglob("*.h5"))
    mmfeat.embed(texts, encoder="hashing", cache=tmp_path)
    assert sorted(result.folder.rglob("*.h5")) == files
    mmfeat.embed([*texts, "new"], encoder="hashing", cache=tmp_path)
    assert len(sorted(result.folder.rglob("*.h5"))) == len(files) + 1


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"texts": 3}, DataError, "texts: int is neither"),
        ({"texts": [3]}, DataError, r"texts\[0\]: int is no text"),
        ({"texts": []}, DataError, "the list is empty"),
        ({"texts": [None]}, DataError, "all 1 texts are None"),
        ({"texts": "a", "encoder": "hog"}, ConfigError, "encoder hog: it takes no texts; name one"),
        ({"texts": "a", "images": ["b", "c"]}, DataError, "1 texts but 2 images"),
        ({"images": np.zeros((3, 9, 9), np.uint8)}, DataError, r"an array \(3, 9, 9\) of uint8 is no image"),
        ({"images": "nowhere.jpg"}, DataError, "1 of 1 photos cannot be encoded .*nowhere.jpg: image file not found"),
        ({"texts": pd.DataFrame({"a": ["x"], "b": ["y"]})}, DataError, "a frame with the columns a, b; give one"),
    ],
)
def test_what_cannot_be_encoded_is_told_in_one_line(
    arguments: dict[str, Any], error: type[Exception], message: str, cache: Path
) -> None:
    with pytest.raises(error, match=message) as refusal:
        mmfeat.embed(**{"encoder": "hashing,hog", "cache": cache, **arguments})
    assert "\n" not in str(refusal.value)
