"""Cards: a sample as a person looks at it, with its photo made small."""

from __future__ import annotations

import base64
import io

from mmfeat.report.section import Card
from mmfeat.samples.dataset import Sample
from mmfeat.samples.photos import Decoding, decode_image

PHOTO_SIDE = 160  # pixels
LARGE_SIDE = 320  # pixels of photos that one looks at first
PHOTO_QUALITY = 55
LETTERS = 280  # most letters of the text of a card


def make_card(sample: Sample | None, title: str, facts: str, letters: int = LETTERS) -> Card:
    """The card of a sample; of a sample that is gone, a card with title and facts alone."""
    return Card(title, shortened(sample, letters), facts, photo_of(sample) if sample else None)


def shortened(sample: Sample | None, letters: int) -> str:
    """The first letters of the text of a sample; "" without a text."""
    text = (sample.text or "") if sample else ""
    return text if len(text) <= letters else f"{text[:letters]}…" if letters else ""


def photo_of(sample: Sample, side: int = LARGE_SIDE) -> str | None:
    """The small photo of a sample in base64; "" where it cannot be read, None where there is none."""
    return None if sample.image is None else base64.b64encode(thumbnail(sample, side)).decode()


def thumbnail(sample: Sample, side: int = PHOTO_SIDE) -> bytes:
    """A WebP of the photo, at most `side` pixels wide and high, without metadata; empty for an unreadable photo."""
    assert sample.image is not None
    try:
        image, _ = decode_image(sample.image.read_bytes(), Decoding(side))
    except OSError:
        return b""
    if image is None:
        return b""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=PHOTO_QUALITY, method=4)
    return buffer.getvalue()
