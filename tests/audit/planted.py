"""A made shop: 800 listings of 8 kinds with a drawn photo, of which 40 have a wrong kind, and 100 to predict.

    python -m tests.audit.planted FOLDER     # FOLDER/listings.csv, FOLDER/photos, and FOLDER/planted.csv with the truth

Twelve listings are there twice; 16 photos are cut off and cannot be read. The same seed makes the same files.
"""

from __future__ import annotations

import csv
import random
import sys
from pathlib import Path

LISTINGS, WAITING, PLANTED, BROKEN, TWICE = 800, 100, 40, 16, 12
SEED = 23
COLUMNS = "id=sku,text=title,image=photo,label=category"
SIDE = 96
MAKERS = ("Alder", "Birk", "Corvo", "Dunmore", "Elm & Co", "Fjord")
WORDS = ("classic", "for every day", "gift", "limited edition", "new season", "on offer", "handmade", "best seller")
# kind -> nouns; the shape and the colour of its photo
KINDS = {
    "bags": (("tote bag", "backpack", "shoulder bag", "weekender"), "rectangle", (150, 95, 55)),
    "cups": (("coffee cup", "mug", "espresso set", "travel mug"), "ellipse", (70, 130, 180)),
    "hats": (("wool hat", "sun hat", "beanie", "cap"), "arc", (180, 60, 80)),
    "lamps": (("desk lamp", "floor lamp", "night light", "lantern"), "triangle", (235, 200, 80)),
    "plants": (("fern in a pot", "cactus", "bonsai", "herb garden"), "leaves", (60, 140, 70)),
    "rugs": (("woven rug", "doormat", "runner", "play mat"), "stripes", (170, 110, 160)),
    "shoes": (("running shoes", "sandals", "leather boots", "sneakers"), "slope", (60, 60, 70)),
    "watches": (("wrist watch", "chronograph", "smart watch", "pocket watch"), "ring", (190, 190, 200)),
}


def make_shop(folder: Path, seed: int = SEED) -> dict[str, str]:
    """Write the shop into `folder`; return id -> true kind of the listings whose kind is wrong."""
    rng = random.Random(seed)
    (folder / "photos").mkdir(parents=True)
    rows = [_listing(folder, number, rng) for number in range(LISTINGS + WAITING - TWICE)]
    for number in range(TWICE):  # the same listing under another number
        rows.insert(rng.randrange(1, LISTINGS - TWICE), ["again-" + rows[number * 7][0], *rows[number * 7][1:]])
    planted = {}
    for row in rng.sample([row for row in rows[:LISTINGS] if not row[0].startswith("again")], PLANTED):
        planted[row[0]] = row[3]
        row[3] = rng.choice([kind for kind in KINDS if kind != row[3]])
    for row in rng.sample(rows, BROKEN):
        photo = folder / row[2]
        photo.write_bytes(photo.read_bytes()[:-300])
    for row in rows[LISTINGS:]:
        row[3] = ""
    _write(folder / "listings.csv", ["sku", "title", "photo", "category"], rows)
    _write(folder / "planted.csv", ["sku", "category"], [list(pair) for pair in planted.items()])
    return planted


def _listing(folder: Path, number: int, rng: random.Random) -> list[str]:
    kind = rng.choice(list(KINDS))
    nouns, shape, colour = KINDS[kind]
    title = f"{rng.choice(MAKERS)} {rng.choice(nouns)} {rng.choice(WORDS)}"
    if rng.random() < 0.08:  # a seller in a hurry: the photo alone says what it is
        title = f"{rng.choice(MAKERS)} {rng.choice(WORDS)}"
    photo = f"photos/{number:04}.jpg"
    _draw(shape, colour, rng).save(folder / photo, quality=85)
    return [f"{1000 + number}", title, photo, kind]


def _draw(shape: str, colour: tuple[int, int, int], rng: random.Random) -> object:
    from PIL import Image, ImageDraw

    wall = tuple(rng.randint(205, 250) for _ in range(3))
    picture = Image.new("RGB", (SIDE, SIDE), wall)
    pen = ImageDraw.Draw(picture)
    paint = tuple(max(0, min(255, channel + rng.randint(-45, 45))) for channel in colour)
    size, left, top = rng.randint(40, 60), rng.randint(8, 26), rng.randint(8, 26)
    box = (left, top, left + size, top + size)
    middle = (left + size / 2, top + size / 2)
    if shape == "rectangle":
        pen.arc((left + size * 0.25, top - 8, left + size * 0.75, top + 20), 180, 360, fill=paint, width=4)
        pen.rectangle((left, top + 8, left + size, top + size), fill=paint)
    elif shape == "ellipse":
        pen.ellipse(box, fill=paint)
        pen.arc((left + size - 8, top + 12, left + size + 14, top + size - 12), 270, 90, fill=paint, width=4)
    elif shape == "arc":
        pen.pieslice(box, 180, 360, fill=paint)
        pen.rectangle((left - 6, middle[1] - 4, left + size + 6, middle[1] + 2), fill=paint)
    elif shape == "triangle":
        pen.polygon([(middle[0], top), (left, middle[1]), (left + size, middle[1])], fill=paint)
        pen.rectangle((middle[0] - 2, middle[1], middle[0] + 2, top + size), fill=(90, 90, 90))
    elif shape == "leaves":
        for turn in range(5):
            shift = (turn - 2) * size / 5
            pen.line([(middle[0], top + size), (middle[0] + shift, top + abs(shift) / 2)], fill=paint, width=6)
    elif shape == "stripes":
        for step in range(0, size, 8):
            pen.rectangle((left, top + step, left + size, top + step + 4), fill=paint)
    elif shape == "slope":
        pen.polygon(
            [(left, top + size), (left, middle[1]), (middle[0], middle[1] + 6), (left + size, top + size)], paint
        )
    else:
        pen.ellipse(box, outline=paint, width=7)
        pen.line([middle, (middle[0], top + 10)], fill=(40, 40, 40), width=2)
    return picture


def _write(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


if __name__ == "__main__":
    make_shop(Path(sys.argv[1]))
