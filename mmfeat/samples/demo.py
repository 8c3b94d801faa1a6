"""A generated data set in the folder layout, with the ugliness of real data.

A text says how somebody feels, a drawn picture shows the weather, and the label is the sum of both: neither modality
alone decides the label.
"""

from __future__ import annotations

import io
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmfeat.errors import DataError
from mmfeat.system.files import read_json, write_atomic, write_json

if TYPE_CHECKING:
    from PIL import Image


PAIRS, UNLABELLED = 600, 60
SEED = 7
LABEL_NOISE = 0.04
MARKER = "demo.json"
SIDE = 96

MOODS = {
    1: ("what a wonderful day", "so happy about this", "best trip ever", "love every minute", "太好了 so glad"),
    0: ("just another day", "on the way to work", "waiting for the bus", "here we are again", "今天 as usual"),
    -1: ("worst day ever", "so tired of this", "nothing works today", "I hate waiting", "太糟糕了 so sad"),
}
EXTRAS = ("", " #weather", " @friend", " http://t.co/abc", " RT @news:", " !!", " #monday http://t.co/x1")
SKIES = {1: (120, 190, 250), 0: (170, 175, 185), -1: (60, 65, 85)}


@dataclass(frozen=True)
class Pair:
    id: str
    text: bytes
    picture: bytes
    suffix: str
    label: str


def write_demo(folder: str | Path, pairs: int = PAIRS, seed: int = SEED) -> Path:
    """Write the data set to `folder`; the same seed gives the same bytes. A finished data set is kept.

    Raises `DataError` if the folder holds anything else: nothing of the user's is overwritten.
    """
    folder = Path(folder)
    recipe = {"made_by": "mmfeat demo", "pairs": pairs, "seed": seed}
    marker = read_json(folder / MARKER) if (folder / MARKER).is_file() else None
    if marker == {**recipe, "complete": True}:
        return folder
    interrupted = marker == {**recipe, "complete": False}
    if folder.exists() and not interrupted and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: not empty and not this demo; name another folder with --out, or remove it")
    write_json(folder / MARKER, {**recipe, "complete": False})
    data = folder / "data"
    data.mkdir(exist_ok=True)
    samples = _pairs(pairs, random.Random(seed))
    for number, pair in enumerate(samples):
        picture = pair.picture[: len(pair.picture) // 3] if number == 3 else pair.picture  # sample 3 is truncated
        (data / f"{pair.id}{pair.suffix}").write_bytes(picture)
        if number != 5:  # sample 5 has no text
            (data / f"{pair.id}.txt").write_bytes(pair.text)
    labelled = pairs - min(UNLABELLED, pairs // 10)
    _write_list(folder / "train.txt", [(pair.id, pair.label) for pair in samples[:labelled]])
    _write_list(folder / "test_without_label.txt", [(pair.id, "null") for pair in samples[labelled:]])
    write_json(folder / MARKER, {**recipe, "complete": True})
    return folder


def _write_list(path: Path, rows: list[tuple[str, str]]) -> None:
    write_atomic(path, "".join(f"{id},{tag}\n" for id, tag in [("guid", "tag"), *rows]).encode())


def _pairs(count: int, rng: random.Random) -> list[Pair]:
    samples: list[Pair] = []
    for number in range(count):
        id = str(1000 + number)
        if number % 40 == 39:  # a repost: the same text and photo under another id
            samples.append(replace(samples[rng.randrange(len(samples))], id=id))
            continue
        mood, weather = rng.choice((1, 0, -1)), rng.choice((1, 0, -1))
        text = f"{rng.choice(MOODS[mood])}{rng.choice(EXTRAS)} {rng.randrange(1000)}"
        encoding = "gb18030" if rng.random() < 0.25 else "utf-8"
        suffix = rng.choice((".jpg", ".jpg", ".JPG", ".png"))
        picture = _encoded(draw(weather, rng), suffix)
        samples.append(Pair(id, text.encode(encoding), picture, suffix, _label(mood, weather, rng)))
    return samples


def _label(mood: int, weather: int, rng: random.Random) -> str:
    if rng.random() < LABEL_NOISE:
        return rng.choice(("positive", "neutral", "negative"))
    total = mood + weather
    return "positive" if total > 0 else "negative" if total < 0 else "neutral"


def draw(weather: int, rng: random.Random) -> Image.Image:
    """A sun (1), a cloud (0) or rain (-1) somewhere in a sky, over a field."""
    from PIL import Image, ImageDraw

    sky = tuple(max(0, min(255, channel + rng.randint(-25, 25))) for channel in SKIES[weather])
    picture = Image.new("RGB", (SIDE + rng.randrange(40), SIDE + rng.randrange(40)), sky)
    pen = ImageDraw.Draw(picture)
    width, height = picture.size
    pen.rectangle((0, height * 0.75, width, height), fill=(rng.randint(60, 110), rng.randint(110, 160), 60))
    x, y, size = rng.uniform(0.2, 0.6) * width, rng.uniform(0.1, 0.35) * height, rng.uniform(18, 30)
    if weather == 1:
        pen.ellipse((x, y, x + size, y + size), fill=(255, 220, 60))
    else:
        for step in range(3):
            left = x + step * size * 0.4
            grey = (225, 225, 230) if weather == 0 else (110, 110, 120)
            pen.ellipse((left, y, left + size, y + size * 0.7), fill=grey)
    if weather == -1:
        for _ in range(40):
            left, top = rng.uniform(0, width), rng.uniform(y + size * 0.7, height)
            pen.line((left, top, left - 2, top + 7), fill=(170, 190, 230))
    return picture


def _encoded(picture: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG" if suffix == ".png" else "JPEG", quality=88)
    return buffer.getvalue()
