"""Contents of samples as an encoder sees them: cleaned texts, and augmented views of pictures."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.errors import ConfigError

if TYPE_CHECKING:
    from PIL import Image

_URL = re.compile(r"http\S+")
_MENTION = re.compile(r"@\w+")
_HASHTAG = re.compile(r"#(\w+)")
_SPACE = re.compile(r"\s+")
_TWEET_MARK = re.compile(r"http\S+|(?<!\w)@\w+|(?<!\w)#\d*[^\W\d]")  # no e-mail address, C# or #1

TWEETS = 0.3  # texts are tweets from this share of texts that have a link, a mention or a hashtag
JUDGED = 10_000  # the first texts are judged: rows that are added at the end change nothing

KEY_LENGTH = 32
CROP_ATTEMPTS = 10  # random crops that are tried until one fits
# The random choices of a view. Colours change by a factor from 1 - x to 1 + x, hue by -x to x turns.
VIEW_SIDE = 256  # side of the square view; an encoder's evaluation transform follows
AREA = (0.8, 1.0)  # share of the picture that the crop covers
ASPECT = (3 / 4, 4 / 3)  # width / height of the crop
FLIP = 0.5  # probability of a flip
BRIGHTNESS = CONTRAST = SATURATION = 0.1
HUE = 0.02


def without_surrogates(text: str) -> str:
    """The text without lone surrogates, which JSON and a command line may hold and UTF-8 does not."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def clean_cased_tweet(text: str) -> str:
    """Drop URLs and @mentions, keep a hashtag's word, collapse white space."""
    text = _HASHTAG.sub(r"\1", _MENTION.sub("", _URL.sub("", text)))
    return _SPACE.sub(" ", text).strip()


def clean_tweet(text: str) -> str:
    """Clean as `clean_cased_tweet` and lower-case."""
    return clean_cased_tweet(text).lower()


CLEANING: dict[str, Callable[[str], str]] = {"tweet": clean_tweet, "tweet-cased": clean_cased_tweet, "none": str}


def tweet_share(texts: Iterable[str]) -> tuple[float, int]:
    """(Share of the first `JUDGED` texts that have a link, a mention or a hashtag; number of these texts)."""
    marked = [_TWEET_MARK.search(text) is not None for text in islice(texts, JUDGED)]
    return sum(marked) / max(1, len(marked)), len(marked)


def content_key(data: bytes) -> bytes:
    """The key under which a vector is stored: the first 32 hexadecimal digits of the content's SHA-256, as ASCII."""
    return hashlib.sha256(data).hexdigest()[:KEY_LENGTH].encode()


def joined_key(keys: Sequence[tuple[bytes | None, str]]) -> tuple[bytes | None, str]:
    """(content key, "") of several contents, or (None, the reason of the first) where none of them has a key."""
    known = [key for key, _ in keys if key]
    if len(known) < 2:
        return (known[0], "") if known else keys[0]
    return content_key(b"".join(known)), ""


@dataclass(frozen=True)
class MemoryFile:
    """A photo in memory, with those methods of a path that samples need."""

    data: bytes = field(repr=False)
    name: str = "photo"

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        return self.data


def view_name(number: int) -> str:
    """The name of the `number`-th augmented view, counted from 1."""
    return f"train:{number}"


def view_number(name: str) -> int:
    """The number of a view, 0 for the plain picture."""
    return 0 if name == "none" else int(name.rpartition(":")[2])


def augment(picture: Image.Image, view: str, key: bytes) -> Image.Image:
    """The view of an RGB picture with this content key; "none" is the picture itself."""
    from PIL import Image

    if view == "none":
        return picture
    if not re.fullmatch("train:[1-9][0-9]*", view):
        raise ConfigError(f"no view {view!r}; use none or train:N, N from 1")
    # Only `random()` is drawn: numpy keeps no other stream equal between its versions.
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(view.encode() + b"\0" + key).digest(), "big"))
    image = picture.crop(crop_box(picture.width, picture.height, rng))
    image = image.resize((VIEW_SIDE, VIEW_SIDE), Image.Resampling.BICUBIC)
    if rng.random() < FLIP:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return _jitter(image, rng)


def crop_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of a random part; if none fits, the middle at the nearest allowed aspect."""
    for _ in range(CROP_ATTEMPTS):
        area = width * height * _uniform(rng, *AREA)
        aspect = math.exp(_uniform(rng, *map(math.log, ASPECT)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    narrowest, widest = ASPECT
    w, h = min(width, max(1, round(height * widest))), min(height, max(1, round(width / narrowest)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Change brightness, contrast, saturation and hue, in random order."""
    from PIL import ImageEnhance

    def factor(strength: float) -> float:
        return _uniform(rng, 1 - strength, 1 + strength)

    changes: list[Callable[[Image.Image], Image.Image]] = [
        lambda image: ImageEnhance.Brightness(image).enhance(factor(BRIGHTNESS)),
        lambda image: ImageEnhance.Contrast(image).enhance(factor(CONTRAST)),
        lambda image: ImageEnhance.Color(image).enhance(factor(SATURATION)),
        lambda image: _shift_hue(image, _uniform(rng, -HUE, HUE)),
    ]
    for change in sorted(changes, key=lambda _: rng.random()):
        image = change(image)
    return image


def _shift_hue(image: Image.Image, turns: float) -> Image.Image:
    from PIL import Image

    hue, saturation, value = image.convert("HSV").split()
    shifted = np.asarray(hue, dtype=np.int16) + round(turns * 255)
    return Image.merge("HSV", (Image.fromarray((shifted % 256).astype(np.uint8)), saturation, value)).convert("RGB")


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * rng.random()
