import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfeat.samples import keys
from mmfeat.samples.dataset import Sample
from mmfeat.samples.duplicates import PHOTO_DISTANCE
from mmfeat.samples.keys import HASH_ENTRY, HASH_HEADER, RecordFile, content_keys, hash_photo, image_hashes


def photo(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Something with shapes of all sizes, as photos have."""
    rng = np.random.default_rng(seed)
    layers = [rng.uniform(0, 255, (side, side)).astype(np.uint8) for side in (3, 6, 12, 40)]
    grown = [np.asarray(Image.fromarray(layer).resize(size, Image.Resampling.BICUBIC), float) for layer in layers]
    grey = np.average(grown, axis=0, weights=[4, 3, 2, 1])
    return Image.fromarray(np.stack([grey, grey * 0.8, 255 - grey], axis=2).astype(np.uint8))


def distance(one: int | None, other: int | None) -> int:
    assert one is not None
    assert other is not None
    return (one ^ other).bit_count()


@pytest.fixture
def original(tmp_path: Path) -> Path:
    photo(0).save(tmp_path / "original.png")
    return tmp_path / "original.png"


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("again.jpg", (320, 240), {"quality": 40}),
        ("small.jpg", (150, 112), {"quality": 80}),
        ("large.jpg", (1300, 975), {"quality": 80}),
        ("grey.webp", (320, 240), {"quality": 60}),
    ],
)
def test_a_photo_saved_again_keeps_its_hash(
    original: Path, name: str, size: tuple[int, int], options: dict[str, int]
) -> None:
    path = original.with_name(name)
    changed = photo(0).resize(size, Image.Resampling.LANCZOS)
    (changed.convert("L") if name.startswith("grey") else changed).save(path, **options)
    assert distance(hash_photo(original.read_bytes()), hash_photo(path.read_bytes())) <= PHOTO_DISTANCE


def test_other_photos_are_far(tmp_path: Path) -> None:
    hashes = []
    for seed in range(20):
        photo(seed).save(tmp_path / f"{seed}.jpg")
        hashes.append(hash_photo((tmp_path / f"{seed}.jpg").read_bytes()))
    assert min(distance(one, other) for row, one in enumerate(hashes) for other in hashes[:row]) > 2 * PHOTO_DISTANCE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_camera_may_be_turned(tmp_path: Path, original: Path, orientation: int) -> None:
    """As Pillow turns it; two files of one scene have one hash."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    undo = {6: 8, 8: 6}.get(orientation, orientation)
    source = io.BytesIO()
    turned_exif = Image.Exif()
    turned_exif[0x0112] = undo
    photo(0).save(source, "PNG", exif=turned_exif)
    from PIL import ImageOps

    stored = ImageOps.exif_transpose(Image.open(source))
    assert stored is not None
    stored.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    assert (
        distance(hash_photo(original.read_bytes()), hash_photo((tmp_path / "turned.jpg").read_bytes()))
        <= PHOTO_DISTANCE
    )


def gradient() -> Image.Image:
    return Image.fromarray(np.tile(np.linspace(0, 255, 300), (200, 1)).astype(np.uint8))


@pytest.mark.parametrize("make", [lambda: Image.new("RGB", (90, 70), "red"), gradient, lambda: photo(0, (500, 4))])
def test_flat_and_thin_pictures_have_no_hash(tmp_path: Path, make: Callable[[], Image.Image]) -> None:
    make().save(tmp_path / "flat.jpg")
    assert hash_photo((tmp_path / "flat.jpg").read_bytes()) is None


def test_broken_files_have_no_hash(tmp_path: Path, original: Path) -> None:
    whole = io.BytesIO()
    photo(1).save(whole, "JPEG")
    for number, data in enumerate([b"", b"no image", whole.getvalue()[:2000], original.read_bytes()[:500]]):
        (tmp_path / f"{number}.jpg").write_bytes(data)
        assert hash_photo((tmp_path / f"{number}.jpg").read_bytes()) is None


@pytest.fixture
def pictures(tmp_path: Path) -> list[Sample]:
    for seed in range(4):
        photo(seed).save(tmp_path / f"{seed}.jpg")
    (tmp_path / "4.jpg").write_bytes((tmp_path / "0.jpg").read_bytes())
    (tmp_path / "5.jpg").write_bytes(b"broken")
    return [*(Sample(str(n), image=tmp_path / f"{n}.jpg") for n in range(6)), Sample("6", image_error="no image file")]


def test_photos_are_hashed_once(tmp_path: Path, pictures: list[Sample]) -> None:
    keys, path = content_keys(pictures, "image"), tmp_path / "hashes"
    hashes, known = image_hashes(pictures, keys, path)
    assert hashes.dtype == np.uint64
    assert known.tolist() == [True] * 5 + [False] * 2
    assert hashes.tolist() == [hash_photo(s.image.read_bytes()) or 0 if s.image else 0 for s in pictures]
    assert len(RecordFile(path, HASH_ENTRY, HASH_HEADER)) == 5  # four photos and one that has no hash
    for sample in pictures:
        if sample.image:
            sample.image.unlink()
    again = image_hashes(pictures[::-1], type(keys)(keys.keys[::-1], keys.present[::-1], keys.reasons[::-1]), path)
    assert again[0].tolist() == hashes[::-1].tolist()
    assert again[1].tolist() == known[::-1].tolist()


def test_a_photo_that_changed_since_it_was_keyed_is_not_remembered(tmp_path: Path, pictures: list[Sample]) -> None:
    keys = content_keys(pictures, "image")
    photo(9).save(tmp_path / "1.jpg")
    (tmp_path / "2.jpg").unlink()
    known = image_hashes(pictures, keys, tmp_path / "hashes")[1]
    assert known.tolist() == [True, False, False, True, True, False, False]
    assert len(RecordFile(tmp_path / "hashes", HASH_ENTRY, HASH_HEADER)) == 3


def damage(data: bytes, how: str) -> bytes:
    if how == "cut":
        return data[:-1]
    if how == "flipped":
        return data[:-20] + bytes([data[-20] ^ 1]) + data[-19:]
    if how == "of another version":
        return data.replace(b"hashes 1\n", b"hashes 0\n")
    return {"empty": b"", "foreign": b"something else" * 100}[how]


@pytest.mark.parametrize("how", ["cut", "flipped", "of another version", "empty", "foreign"])
def test_a_damaged_file_is_ignored_and_written_anew(tmp_path: Path, pictures: list[Sample], how: str) -> None:
    keys, path = content_keys(pictures, "image"), tmp_path / "hashes"
    expected = image_hashes(pictures, keys, path)
    good = path.read_bytes()
    path.write_bytes(damage(good, how))
    assert len(RecordFile(path, HASH_ENTRY, HASH_HEADER)) == 0
    found = image_hashes(pictures, keys, path)
    assert found[0].tolist() == expected[0].tolist()
    assert path.read_bytes() == good


def test_hashes_of_others_are_kept_and_a_missing_folder_is_not_made(tmp_path: Path, pictures: list[Sample]) -> None:
    keys = content_keys(pictures, "image")
    one, other = (RecordFile(tmp_path / "hashes", HASH_ENTRY, HASH_HEADER) for _ in range(2))
    one.append(b"a" * 32, 5, True)
    other.append(b"b" * 32, 0, False)
    one.save()
    other.save()
    found, present = RecordFile(tmp_path / "hashes", HASH_ENTRY, HASH_HEADER).lookup(
        np.array([b"b" * 32, b"a" * 32, b"c" * 32])
    )
    assert present.tolist() == [True, True, False]
    assert found["hash"][:2].tolist() == [0, 5]
    assert image_hashes(pictures, keys, tmp_path / "nowhere" / "hashes")[1].sum() == 5
    assert not (tmp_path / "nowhere").exists()


def test_hashes_survive_an_interrupted_run(
    tmp_path: Path, pictures: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting:
        """Progress that is stopped after the first step."""

        def step(self, title: str, total: int) -> "Interrupting":
            return self

        def __enter__(self) -> Callable[[int], None]:
            def advance(steps: int) -> None:
                raise KeyboardInterrupt

            return advance

        def __exit__(self, *_: object) -> None:
            return None

    monkeypatch.setattr(keys, "STEP", 2)
    with pytest.raises(KeyboardInterrupt):
        image_hashes(pictures, content_keys(pictures, "image"), tmp_path / "hashes", Interrupting())
    assert len(RecordFile(tmp_path / "hashes", HASH_ENTRY, HASH_HEADER)) == 2
