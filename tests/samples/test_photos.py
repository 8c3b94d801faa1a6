"""Photos as people see them: turned upright, laid on white, with the grey levels of more than 8 bits; good files that
Pillow refuses are read, and files that are no photos reach no other program.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from mmfeat.samples.photos import NONE, STORED, Decoding, decode_image, picture_bytes

AS_PILLOW = Decoding(exif=STORED, background=NONE)
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def saved(picture: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def pixels(data: bytes, decoding: Decoding | None = None) -> np.ndarray:
    picture, error = decode_image(data, decoding)
    assert picture is not None, error
    assert picture.mode == "RGB"
    return np.asarray(picture)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """30 x 20, different in every corner."""
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def with_orientation(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_photo_is_turned_upright(photo: Image.Image, turn: int, format: str) -> None:
    data = saved(photo, format, exif=with_orientation(turn), **LOSSLESS[format])
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(pixels(data), shown)
    assert np.array_equal(pixels(data, AS_PILLOW), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
    assert turn < 5 or pixels(data).shape == (30, 20, 3)


def test_a_reduced_jpeg_is_turned_too() -> None:
    smooth = Image.linear_gradient("L").resize((640, 320)).convert("RGB")
    turned = pixels(saved(smooth, "JPEG", exif=with_orientation(6)), Decoding(draft=100))
    assert turned.shape == (320, 160, 3)


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12", b"Exif\0\0rubbish", b"x"])
def test_a_damaged_exif_block_costs_no_photo(photo: Image.Image, exif: bytes) -> None:
    assert np.array_equal(pixels(saved(photo, exif=exif)), np.asarray(photo))


@pytest.fixture(scope="module")
def logo() -> tuple[Image.Image, np.ndarray]:
    """A dark disc on nothing, over noise that nobody sees; and the disc on white."""
    y, x = np.mgrid[0:40, 0:40]
    disc = (x - 20) ** 2 + (y - 20) ** 2 < 200
    layers = np.random.default_rng(0).integers(0, 256, (40, 40, 4), dtype=np.uint8)
    layers[..., 3], layers[disc] = 0, (20, 20, 20, 255)
    return Image.fromarray(layers), np.where(disc[..., None], np.uint8(20), np.uint8([255, 255, 255]))


def test_transparent_photos_lie_on_white(logo: tuple[Image.Image, np.ndarray]) -> None:
    picture, on_white = logo
    palette = Image.fromarray((on_white[..., 0] == 255).astype(np.uint8), "L").convert("P")
    palette.putpalette([20, 20, 20, 0, 0, 0])
    grey = Image.fromarray(np.where(on_white[..., 0] == 20, np.uint8(20), np.uint8(0)))
    dark = Image.merge("RGB", [grey] * 3)
    files = {
        "png": saved(picture),
        "webp": saved(picture, "WEBP", lossless=True),
        "tiff": saved(picture, "TIFF"),
        "la": saved(picture.convert("LA")),
        "palette": saved(palette, transparency=1),
        "palette with many": saved(palette, transparency=b"\xff\x00"),
        "gif": saved(palette, "GIF", transparency=1),
        "grey with one": saved(grey, transparency=0),
        "rgb with one": saved(dark, transparency=(0, 0, 0)),
    }
    for name, data in files.items():
        assert np.array_equal(pixels(data), on_white), name
        assert np.array_equal(pixels(data, AS_PILLOW), np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))), name


def test_the_background_is_any_colour_and_shines_through(logo: tuple[Image.Image, np.ndarray]) -> None:
    picture, on_white = logo
    green = pixels(saved(picture), Decoding(background="#00ff7f"))
    assert np.array_equal(green[0, 0], (0, 255, 127))
    half = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert pixels(saved(half))[0, 0, 0] == 127
    below = pixels(saved(picture), Decoding(background=NONE))
    assert np.array_equal(below, np.asarray(picture)[..., :3])
    assert not np.array_equal(below, on_white)


@pytest.fixture(scope="module")
def grey() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def big_endian(grey: np.ndarray) -> bytes:
    """A TIFF of big-endian 16-bit grey, which Pillow does not write."""
    height, width = grey.shape
    data = grey.astype(">u2").tobytes()
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    entries = [struct.pack(">HHIHH", tag, 3, 1, value, 0) for tag, value in (*tags, (279, len(data)))]
    return b"MM\0*" + struct.pack(">I", 8 + len(data)) + data + struct.pack(">H", 9) + b"".join(entries) + b"\0" * 4


def test_pictures_of_more_than_8_bits_keep_their_levels(grey: np.ndarray) -> None:
    deep = grey.astype(np.uint16) * 257
    files = {
        "png": saved(Image.fromarray(deep)),
        "tiff": saved(Image.fromarray(deep), "TIFF"),
        "big-endian": big_endian(deep),
        "int32": saved(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "float of 16 bits": saved(Image.fromarray(deep.astype(np.float32)), "TIFF"),
        "float to 1": saved(Image.fromarray((deep / 65535).astype(np.float32)), "TIFF"),
        "float of 8 bits": saved(Image.fromarray(grey.astype(np.float32)), "TIFF"),
        "12 bits": saved(Image.fromarray(np.rint(grey * (4095 / 255)).astype(np.uint16))),
        "negative": saved(Image.fromarray(grey.astype(np.int32) * 5 - 1024), "TIFF"),
        "large": saved(Image.fromarray(grey.astype(np.int32) * 8_000_000), "TIFF"),
    }
    for name, data in files.items():
        assert np.array_equal(pixels(data), np.stack([grey] * 3, -1)), name


def test_a_dark_picture_of_16_bits_stays_dark() -> None:
    """The scale is that of the format, not that of the picture."""
    dark = np.full((8, 8), 20000, np.uint16)
    assert (pixels(saved(Image.fromarray(dark))) == 78).all()


def test_what_is_no_number_is_black(grey: np.ndarray) -> None:
    holes = (grey / 255).astype(np.float32)
    holes[0, :3] = np.nan, np.inf, -np.inf
    shown = pixels(saved(Image.fromarray(holes), "TIFF"))
    assert (shown[0, :3] == 0).all()
    assert np.array_equal(shown[1:, :, 0], grey[1:])
    assert decode_image(saved(Image.new("F", (4, 4), float("nan")), "TIFF"))[1] == "broken image: no pixel has a value"


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_pictures_are_those_of_pillow(photo: Image.Image, mode: str) -> None:
    format = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    data = saved(photo.convert(mode), format)
    assert np.array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#0000ff")]
    data = saved(
        frames[0], format, save_all=True, append_images=frames[1:], **({"lossless": True} if format == "WEBP" else {})
    )
    assert (pixels(data) == (255, 0, 0)).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


MUCH = zlib.compress(b"a" * 2_000_000)
CHUNKS = {
    "zTXt": chunk(b"zTXt", b"XML:com.adobe.xmp\0\0" + MUCH),
    "iTXt": chunk(b"iTXt", b"workflow\0\1\0\0\0" + MUCH),
    "iCCP": chunk(b"iCCP", b"icc\0\0" + MUCH),
    "tEXt": chunk(b"tEXt", b"parameters\0" + b"a" * 2_000_000) * 40,
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", CHUNKS)
def test_a_png_with_much_text_or_a_large_profile_is_read(photo: Image.Image, kind: str, last: bool) -> None:
    plain = saved(photo, exif=with_orientation(3))
    place = len(plain) - 12 if last else 33  # before IEND, or behind IHDR
    data = plain[:place] + CHUNKS[kind] + plain[place:]
    limits = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES
    assert np.array_equal(pixels(data), np.asarray(photo)[::-1, ::-1])
    assert limits == (PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, ImageFile.LOAD_TRUNCATED_IMAGES)
    assert last or decode_image(data[: -len(plain) // 2])[0] is None


def test_a_bomb_is_refused() -> None:
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + CHUNKS["zTXt"] + chunk(b"IDAT", MUCH) + chunk(b"IEND", b"")
    picture, error = decode_image(bomb)
    assert picture is None
    assert "400000000 pixels" in error


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        b"%PDF-1.4\n%\xe2\xe3\n",
        b"<!DOCTYPE html><html>403</html>",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\xd7\xcd\xc6\x9a" + b"\0" * 60,
    ],
)
def test_only_photos_are_opened(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("Ghostscript was asked"))
    assert decode_image(data) == (None, "not an image")


@pytest.mark.parametrize("decoding", [Decoding(), AS_PILLOW, Decoding(background="#102030")])
def test_a_picture_in_memory_is_that_of_its_file(
    photo: Image.Image, logo: tuple[Image.Image, np.ndarray], grey: np.ndarray, decoding: Decoding
) -> None:
    deep = grey.astype(np.uint16) * 257
    palette = logo[0].convert("RGB").convert("P")
    for name, data in {
        "rgb": saved(photo),
        "turned": saved(photo, exif=with_orientation(6)),
        "turned tiff": saved(photo, "TIFF", exif=with_orientation(6)),
        "transparent": saved(logo[0]),
        "palette": saved(palette, transparency=3),
        "16 bits": saved(Image.fromarray(deep)),
        "big-endian": big_endian(deep),
        "int32": saved(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "float": saved(Image.fromarray(deep.astype(np.float32) / 70000), "TIFF"),
    }.items():
        again = picture_bytes(Image.open(io.BytesIO(data)))
        assert np.array_equal(pixels(again, decoding), pixels(data, decoding)), name


def test_a_decoding_is_part_of_the_spec_and_that_of_before_is_none(tmp_path: Path) -> None:
    from mmfeat.encoders.registry import describe_encoders
    from mmfeat.encoders.spec import EncoderOptions

    def spec(**options: str):
        return describe_encoders(["hog"], EncoderOptions(dtype="float32", **options))[0].spec

    before = spec(exif="stored", background="none")
    assert before.decoding == AS_PILLOW
    assert "exif" not in before.preprocessing
    assert spec().decoding == spec(exif="upright", background="white").decoding == Decoding()
    names = {s.fingerprint for s in (before, spec(), spec(exif="stored"), spec(background="#102030"))}
    assert len(names) == 4
    assert len({s.transform for s in (before, spec(), spec(exif="stored"))}) == 1
    assert spec().decoded(AS_PILLOW) == before
