"""Photos: from the bytes of a file to the RGB picture that an encoder sees, or to the reason for no picture."""

from __future__ import annotations

import functools
import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

# Only these are opened: Pillow hands PostScript to Ghostscript, and other formats to programs of the machine.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "ICNS", "PSD", "QOI"),
    *("SGI", "PCX", "TGA"),
)
MAX_ASPECT = 100  # resizing the short side of a thinner picture would take gigabytes
STORED, UPRIGHT = "stored", "upright"  # whether a picture is turned as its EXIF block asks
NONE, WHITE = "none", "white"  # what shows through transparent pixels: the colours below them, or a colour

_ORIENTATION = 0x0112
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that hold texts and a colour profile
_TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
_WHITES = (255, 1023, 4095, 16383, 65535)  # greatest values of 8, 10, 12, 14 and 16 bits


@dataclass(frozen=True)
class Decoding:
    """How a photo becomes an RGB picture: a part of the spec of an encoder.

    With `draft` a JPEG is decoded at a half, a quarter or an eighth of its size, as long as its short side keeps that
    many pixels: many times as fast for a large photo, and nearly the same as resizing the photo. `exif` is one of
    `STORED` and `UPRIGHT`; `background` is `NONE`, `WHITE` or `#rrggbb`. `STORED` with `NONE` is Pillow's own
    `convert("RGB")`, which also turns all that is brighter than 8 bits white.
    """

    draft: int = 0
    exif: str = UPRIGHT
    background: str = WHITE

    @property
    def is_plain(self) -> bool:
        """Whether Pillow's own `convert("RGB")` is asked for."""
        return (self.exif, self.background) == (STORED, NONE)


def decode_image(data: bytes, decoding: Decoding | None = None) -> tuple[Image.Image | None, str]:
    """(RGB PIL image, "") or (None, the reason for no image). A truncated file is not half a picture."""
    from PIL import UnidentifiedImageError

    if not data:
        return None, "empty image file"
    try:
        return read_photo(data, lambda image: _decoded(image, decoding or Decoding()))
    except UnidentifiedImageError:
        return None, "not an image"
    except MemoryError:
        raise  # no fault of the picture
    except Exception as error:  # decoders raise whatever a broken file makes them raise
        return None, f"broken image: {error}"[:200]


def read_photo(data: bytes, work: Callable[[Image.Image], T]) -> T:
    """The result of `work` on the photo in `data`, opened but not decoded. Raises whatever decoders raise.

    Pillow refuses a PNG with texts or a profile above a size, which are no part of the picture: such a PNG is read
    without them.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return work(image)
    except MemoryError:
        raise
    except Exception:
        if (lean := _without_texts(data)) == data:
            raise
    with Image.open(io.BytesIO(lean), formats=_formats()) as image:
        return work(image)


@functools.cache
def _formats() -> list[str]:
    """Those of `FORMATS` that this version of Pillow reads."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _without_texts(data: bytes) -> bytes:
    """The bytes of a PNG without chunks of text and profile; bytes of another file as they are."""
    if not data.startswith(_SIGNATURE):
        return data
    kept, place = [_SIGNATURE], len(_SIGNATURE)
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind not in _TEXTS:
            kept.append(data[place : place + length + 12])
        place += length + 12
    return b"".join(kept)


def _decoded(image: Image.Image, decoding: Decoding) -> tuple[Image.Image | None, str]:
    if max(image.size) > MAX_ASPECT * min(image.size):
        return None, f"no photo: {image.width} x {image.height} pixels"
    if 0 < decoding.draft < min(image.size):
        draft, short = decoding.draft, min(image.size)
        image.draft(None, (image.width * draft // short, image.height * draft // short))
    if decoding.is_plain:
        return image.convert("RGB"), ""
    image.load()  # before the orientation is read: Pillow turns a TIFF itself, and reads chunks after the pixels
    turn = orientation(image) if decoding.exif == UPRIGHT else 1
    return upright(_rgb(image, decoding.background), turn), ""


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of a picture, 1 for one that is upright or whose EXIF block cannot be read."""
    try:
        turn = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged block raises errors of many kinds; the pixels are sound
        return 1
    return turn if turn in range(1, 9) else 1


def upright(image: Image.Image, turn: int) -> Image.Image:
    """A picture with this EXIF orientation, turned or mirrored as people see it."""
    from PIL.Image import Transpose

    mirrored = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM)
    lying = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)
    return image if turn == 1 else image.transpose((*mirrored, *lying)[turn - 2])


def _rgb(image: Image.Image, background: str) -> Image.Image:
    """The picture in RGB, of 8 bits, laid on a background where it is transparent."""
    from PIL import Image

    if _is_deep(image):
        return _eight_bits(image).convert("RGB")
    if background == NONE or not _is_transparent(image):
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """The grey levels of a picture of more than 8 bits, from 0 to 255.

    Whole numbers are those of 8, 10, 12, 14 or 16 bits, the fewest that hold all of them; fractions up to 1 are shares
    of white; for others black is the least value of the picture, and white the greatest. What is no number is black.
    """
    from PIL import Image

    values = np.asarray(image, np.float32)
    finite = np.isfinite(values)
    if not finite.any():
        raise ValueError("no pixel has a value")
    known = values[finite]
    low, high = float(known.min()), float(known.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    elif low >= 0 and high <= _WHITES[-1] and np.array_equal(known, np.rint(known)):
        low, high = 0.0, float(next(white for white in _WHITES if high <= white))
    scaled = np.where(finite, values - low, 0) * (255 / (high - low or 1.0))
    return Image.fromarray(np.rint(scaled).astype(np.uint8))


def picture_bytes(picture: Image.Image) -> bytes:
    """A PIL image as the bytes of a file that decodes to the very same picture, whatever the `Decoding`."""
    from PIL import Image

    picture.load()
    file, turn = io.BytesIO(), orientation(picture)
    if _is_deep(picture):
        picture.save(file, "TIFF")
    elif turn == 1 and not _is_transparent(picture):
        picture.convert("RGB").save(file, "BMP")
    else:
        exif = Image.Exif()
        exif[_ORIENTATION] = turn
        picture.convert("RGBA" if _is_transparent(picture) else "RGB").save(file, "PNG", exif=exif)
    return file.getvalue()


def _is_deep(image: Image.Image) -> bool:
    """Whether a grey picture has more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;")


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in _TRANSPARENT or "transparency" in image.info
