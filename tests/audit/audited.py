"""Small data sets with known faults, for the audit."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
from PIL import Image

Sample = tuple[str, "bytes | str | None", "bytes | None", str]  # id, text, photo, label (empty: unlabelled)


def picture(seed: int, side: tuple[int, int] = (160, 120)) -> Image.Image:
    """A smooth picture of its own, which no other seed's resembles."""
    noise = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(noise).resize(side, Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(seed: int) -> bytes:
    return saved(picture(seed), quality=90)


def again(seed: int) -> bytes:
    """The photo saved smaller and more compressed."""
    return saved(picture(seed).resize((120, 90)), quality=60)


def write_folder(folder: Path, samples: list[Sample], suffix: str = ".jpg") -> Path:
    """The samples in the folder layout."""
    (folder / "data").mkdir(parents=True)
    lines = {"train.txt": ["guid,tag"], "test_without_label.txt": ["guid,tag"]}
    for id, text, image, label in samples:
        lines["train.txt" if label else "test_without_label.txt"].append(f"{id},{label or 'null'}")
        if text is not None:
            (folder / "data" / f"{id}.txt").write_bytes(text.encode() if isinstance(text, str) else text)
        if image is not None:
            (folder / "data" / f"{id}{suffix}").write_bytes(image)
    for name, each in lines.items():
        if len(each) > 1:
            (folder / name).write_text("\n".join(each) + "\n")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


LONG = "the ferry was late again and the whole town stood in the rain"
FAULTY: list[Sample] = [
    ("a1", f"{LONG} http://t.co/1", photo(1), "neg"),
    ("a2", f"@you {LONG}", again(1), "pos"),  # the same pair again, saved smaller, with another label
    ("b1", "a quiet morning at the lake with fresh coffee and bread", photo(2), "pos"),
    ("b2", "RT @x: a quiet morning at the lake with fresh coffee and bread!", photo(3), "pos"),  # near text
    ("c1", "nothing works", photo(4), "neg"),
    ("c2", "everything is fine", photo(4), "neg"),  # equal photo
    ("d1", "http://t.co/2", photo(5), "neg"),  # nothing but a link, as below: no duplicates
    ("d2", "RT @someone: http://t.co/3", photo(6), "pos"),
    ("e1", "one of a kind", photo(7), "pos"),
    ("u1", LONG, photo(1), ""),  # to predict, and a twin of a1
]
