"""Contents of samples: texts decoded and cleaned; augmented views, the same for the same content and name, different
otherwise, and never out of bounds."""

from __future__ import annotations

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mmfeat.errors import ConfigError
from mmfeat.samples.contents import (
    CLEANING,
    JUDGED,
    augment,
    clean_tweet,
    crop_box,
    tweet_share,
    view_name,
)

KEY = b"\x01" * 32


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("RT @Bob_1: SO happy!! http://t.co/aB1 #SunnyDay", "rt : so happy!! sunnyday"),
        ("  a\t\nb  ", "a b"),
        ("☀ keep emoji, and punctuation.", "☀ keep emoji, and punctuation."),
        ("https://only.url", ""),
        ("#太好了", "太好了"),
    ],
)
def test_tweet_cleaning(raw: str, clean: str) -> None:
    assert clean_tweet(raw) == clean
    assert CLEANING["tweet-cased"](raw).lower() == clean
    assert CLEANING["none"](raw) == raw


def test_the_case_of_a_tweet_can_be_kept() -> None:
    assert CLEANING["tweet-cased"]("US beats us @Bob  #GoTeam http://x.y") == "US beats us GoTeam"


def test_tweets_are_told_by_links_mentions_and_hashtags() -> None:
    assert tweet_share(["see https://x.y", "@Bob hi", "so #happy", "(#ok)", "#太好了", "#2go"]) == (1.0, 6)
    assert tweet_share(["me@shop.com", "C#minor", "the #1", "5 @ 10", "a # b", "plain", ""]) == (0.0, 7)
    assert tweet_share([]) == (0.0, 0)
    assert tweet_share(f"#a{number}" if number < JUDGED else "plain" for number in range(2 * JUDGED)) == (1.0, JUDGED)


def picture(width: int = 90, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_a_view_is_fixed_by_content_and_name() -> None:
    image = picture()
    first = np.asarray(augment(image, "train:1", KEY))
    augment(image, "train:2", KEY)  # what was drawn before plays no part
    np.testing.assert_array_equal(first, np.asarray(augment(image, "train:1", KEY)))
    for view, key in (("train:2", KEY), ("train:1", b"\x02" * 32)):
        assert (np.asarray(augment(image, view, key)) != first).any()


def test_a_view_is_the_same_in_another_process() -> None:
    code = (
        "import hashlib, numpy as np\nfrom PIL import Image\nfrom mmfeat.samples.contents import augment\nimport sys\n"
        "gray = Image.fromarray(np.arange(5400, dtype=np.uint32).astype(np.uint8).reshape(30, 60, 3))\n"
        "print(hashlib.sha256(augment(gray, 'train:3', b'k').tobytes()).hexdigest(), 'torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    gray = Image.fromarray(np.arange(5400, dtype=np.uint32).astype(np.uint8).reshape(30, 60, 3))
    ours = hashlib.sha256(augment(gray, "train:3", b"k").tobytes()).hexdigest()
    assert answer.stdout.split() == [ours, "False"], answer.stderr


def test_the_random_choices_never_change() -> None:
    """Cached vectors of an earlier version must stay comparable: a change here needs another policy name."""
    rng = np.random.default_rng(7)
    boxes = [crop_box(640, 480, rng) for _ in range(3)]
    assert boxes == [(33, 1, 631, 477), (0, 15, 572, 477), (6, 2, 619, 465)]


def test_no_view_is_the_picture_itself() -> None:
    image = picture()
    assert augment(image, "none", KEY) is image


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (1, 100), (100, 1), (7, 5), (640, 480), (3000, 40)])
def test_a_crop_stays_inside(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        left, top, right, bottom = crop_box(*size, rng)
        assert 0 <= left < right <= size[0]
        assert 0 <= top < bottom <= size[1]
        if min(size) >= 40 and size[0] <= 2 * size[1]:
            assert 0.79 <= (right - left) * (bottom - top) / (size[0] * size[1]) <= 1
            assert 0.74 <= (right - left) / (bottom - top) <= 1.35
    view = augment(picture(*size), "train:1", KEY)
    assert (view.size, view.mode) == ((256, 256), "RGB")


def test_every_choice_varies_within_its_bounds() -> None:
    """A picture that is dark on the left: half of the views are flipped, and all stay close to it."""
    pixels = np.full((100, 100, 3), (200, 120, 80), dtype=np.uint8)
    pixels[:, :50] //= 2
    views = [np.asarray(augment(Image.fromarray(pixels), view_name(n), KEY), dtype=float) for n in range(1, 101)]
    flipped = sum(view[:, :80].mean() > view[:, -80:].mean() for view in views)
    assert 35 <= flipped <= 65
    means = np.array([view.mean((0, 1)) for view in views]) / pixels.mean((0, 1))
    assert means.std(axis=0).min() > 0.02  # brightness and hue move
    assert 0.7 < means.min() < means.max() < 1.4


@pytest.mark.parametrize("view", ["test:1", "train", "train:", "train:0", "train:x", "train:-1", "", "none:1"])
def test_an_unknown_view_names_the_known_ones(view: str) -> None:
    with pytest.raises(ConfigError, match=r"use none or train:N, N from 1"):
        augment(picture(), view, KEY)
