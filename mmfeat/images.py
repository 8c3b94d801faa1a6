"""Images: from bytes on disk to one RGB picture, or the reason why there is none."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

MAX_ASPECT = 100  # resizing the short side of a thinner picture would take gigabytes


def decode_image(data: bytes) -> tuple[Image.Image | None, str]:
    """(RGB PIL image, "") or (None, why it cannot be decoded). A truncated file is not half a picture."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        return None, "empty image file"
    try:
        image = Image.open(io.BytesIO(data))
        if max(image.size) > MAX_ASPECT * min(image.size):
            return None, f"no photo: {image.width} x {image.height} pixels"
        return image.convert("RGB"), ""
    except UnidentifiedImageError:
        return None, "not an image"
    except MemoryError:
        raise  # the machine's trouble, not the picture's
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        return None, f"broken image: {error}"[:200]
