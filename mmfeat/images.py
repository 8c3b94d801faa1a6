"""Images: from bytes on disk to one RGB picture, or the reason why there is none."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image


def decode_image(data: bytes) -> tuple[Image.Image | None, str]:
    """(RGB PIL image, "") or (None, why it cannot be decoded). A truncated file is not half a picture."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        return None, "empty image file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF blocks and palettes warn, and decode all the same
            return Image.open(io.BytesIO(data)).convert("RGB"), ""
    except UnidentifiedImageError:
        return None, "not an image"
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        return None, f"broken image: {error}"[:200]
