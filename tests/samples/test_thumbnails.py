"""A second look at photos: products on plain ground are told apart, a photo that was saved again is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from mmfeat.samples.dataset import Sample
from mmfeat.samples.duplicates import NEAR_PHOTO, duplicate_links, near_hashes
from mmfeat.samples.keys import content_keys, hash_photo, image_hashes
from mmfeat.samples.thumbnails import SecondLook, thumbnail

SHADES = [(150, 40, 40), (40, 40, 150), (40, 110, 40), (120, 60, 130), (90, 90, 90)]


def shoe(colour: tuple[int, int, int], size: tuple[int, int] = (320, 240)) -> Image.Image:
    """A product on white ground."""
    image = Image.new("RGB", (320, 240), "white")
    draw = ImageDraw.Draw(image)
    draw.polygon([(60, 150), (120, 80), (170, 120), (270, 150), (270, 170), (60, 170)], fill=colour)
    draw.rectangle((60, 170, 270, 182), fill=(70, 60, 50))
    return image.resize(size, Image.Resampling.LANCZOS)


def links(samples: list[Sample], path: Path | None = None) -> set[tuple[int, int]]:
    keys = content_keys(samples, "image")
    hashes = image_hashes(samples, keys, Path("nowhere") / "hashes")
    found = duplicate_links(samples, keys.keys, hashes, SecondLook(samples, keys.keys, path))
    return {(min(pair), max(pair)) for pair in found[NEAR_PHOTO].tolist()}


def saved(folder: Path, images: list[tuple[Image.Image, str, int]]) -> list[Sample]:
    for image, name, quality in images:
        image.save(folder / name, quality=quality)
    return [Sample(name, image=folder / name) for _, name, _ in images]


def test_products_of_one_shape_share_a_hash_but_are_no_duplicates(tmp_path: Path) -> None:
    samples = saved(tmp_path, [(shoe(colour), f"{row}.jpg", 90) for row, colour in enumerate(SHADES)])
    hashes = np.array([hash_photo(sample.image.read_bytes()) for sample in samples if sample.image], np.uint64)
    assert len(near_hashes(hashes)) >= len(SHADES) - 1  # by hash alone all of them were one photo
    assert links(samples) == set()


@pytest.mark.parametrize(("name", "size", "quality"), [("a.jpg", (320, 240), 40), ("s.webp", (200, 150), 70)])
def test_a_photo_saved_again_is_found_among_many_of_the_same_hash(
    tmp_path: Path, name: str, size: tuple[int, int], quality: int
) -> None:
    rng = np.random.default_rng(0)
    shades = [
        (int(r), int(g), int(b))
        for r, g, b in rng.permutation(np.mgrid[20:160:45, 20:160:45, 20:160:45].T.reshape(-1, 3))
    ]
    images = [(shoe(shade), f"{row}.jpg", 95) for row, shade in enumerate(shades)]
    samples = saved(tmp_path, [*images, (shoe(shades[30], size), name, quality)])
    assert links(samples) == {(30, len(shades))}


def test_only_candidates_are_read_and_each_once(tmp_path: Path) -> None:
    other = Image.fromarray(np.random.default_rng(1).integers(0, 255, (6, 8, 3), np.uint8)).resize((320, 240))
    samples = saved(tmp_path, [(shoe(SHADES[0]), "0.jpg", 90), (shoe(SHADES[1]), "1.jpg", 90), (other, "2.jpg", 90)])
    keys, path = content_keys(samples, "image"), tmp_path / "thumbnails"
    hashes = image_hashes(samples, keys, tmp_path / "hashes")
    look = SecondLook(samples, keys.keys, path)
    first = duplicate_links(samples, keys.keys, hashes, look)
    assert len(look._file) == 2
    for row in range(3):
        (tmp_path / f"{row}.jpg").unlink()
    cells, known = SecondLook(samples, keys.keys, path)(np.arange(3))
    assert known.tolist() == [True, True, False]  # the third photo resembles none and was never asked for
    again = duplicate_links(samples, keys.keys, hashes, SecondLook(samples, keys.keys, path))
    assert all((first[rule] == again[rule]).all() for rule in first)
    assert cells.shape == (3, 192)


def test_a_photo_that_is_gone_or_changed_is_neither_compared_nor_remembered(tmp_path: Path) -> None:
    samples = saved(tmp_path, [(shoe(SHADES[0]), f"{row}.jpg", 90 - row) for row in range(3)])
    keys = content_keys(samples, "image").keys
    shoe(SHADES[1]).save(tmp_path / "1.jpg")
    (tmp_path / "2.jpg").unlink()
    look = SecondLook(samples, keys, tmp_path / "thumbnails")
    assert look(np.arange(3))[1].tolist() == [True, False, False]
    assert len(look._file) == 1


def test_bytes_that_are_no_photo_have_no_thumbnail() -> None:
    assert thumbnail(b"no photo") == thumbnail(b"") == b""
