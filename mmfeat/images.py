"""Images: from bytes on disk to one RGB picture, or the reason why there is none."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_ASPECT = 100  # resizing the short side of a thinner picture would take gigabytes


@dataclass(frozen=True)
class MemoryFile:
    """A photo that lies in no file; like a path, as far as samples need one."""

    data: bytes = field(repr=False)
    name: str = "photo"

    def __str__(self) -> str:
        return self.name

    def read_bytes(self) -> bytes:
        return self.data


def decode_image(data: bytes, draft: int = 0) -> tuple[Image.Image | None, str]:
    """(RGB PIL image, "") or (None, why it cannot be decoded). A truncated file is not half a picture.

    With `draft` a JPEG is decoded at a half, a quarter or an eighth of its size, as long as its short side keeps that
    many pixels: many times as fast for a large photo, and nearly what resizing it would give.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        return None, "empty image file"
    try:
        image = Image.open(io.BytesIO(data))
        if max(image.size) > MAX_ASPECT * min(image.size):
            return None, f"no photo: {image.width} x {image.height} pixels"
        if 0 < draft < min(image.size):
            short = min(image.size)
            image.draft(None, (image.width * draft // short, image.height * draft // short))
        return image.convert("RGB"), ""
    except UnidentifiedImageError:
        return None, "not an image"
    except MemoryError:
        raise  # the machine's trouble, not the picture's
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        return None, f"broken image: {error}"[:200]


def picture_bytes(picture: Image.Image) -> bytes:
    """A PIL image as the bytes of a file that decodes to the very same RGB pixels."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "BMP")
    return file.getvalue()
