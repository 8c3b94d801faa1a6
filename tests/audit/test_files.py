"""Odd texts and photos: what is told of each, and that sound ones are left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmfeat.audit.audit import audit_data
from mmfeat.audit.photos import inspect_photo, inspect_photos
from mmfeat.audit.texts import main_script, text_findings, text_languages, text_profile
from mmfeat.samples.dataset import Sample, content_key
from mmfeat.samples.keys import hash_photo
from mmfeat.system.wording import Silent
from tests.audit.audited import photo, picture, rows, saved, write_folder


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


def frames() -> bytes:
    return saved(picture(1), "WEBP", save_all=True, append_images=[picture(2)], duration=100, lossless=True)


PHOTOS = {
    "sound.jpg": (photo(1), None),
    "grey.jpg": (saved(picture(1).convert("L")), None),
    "sound.webp": (saved(picture(1), "WEBP"), None),
    "empty.jpg": (b"", "broken"),
    "text.jpg": (b"<html>not found</html>", "broken"),
    "cut.jpg": (photo(1)[:1500], "truncated"),
    "tiny.png": (saved(picture(1, (20, 40)), "PNG"), "tiny"),
    "wide.jpg": (saved(picture(1, (600, 100))), "extreme shape"),
    "line.png": (saved(picture(1, (3000, 10)), "PNG"), "extreme shape"),
    "ink.jpg": (saved(picture(1).convert("CMYK")), "colours"),
    "clear.png": (saved(picture(1).convert("RGBA"), "PNG"), "colours"),
    "turned.jpg": (saved(picture(1), exif=exif(6)), "turned"),
    "moving.webp": (frames(), "animated"),
    "really.png": (photo(1), "misnamed"),
    "black.jpg": (saved(Image.new("RGB", (200, 200))), "flat"),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_what_is_odd_about_a_photo(name: str, tmp_path: Path) -> None:
    data, expected = PHOTOS[name]
    (tmp_path / name).write_bytes(data)
    found = inspect_photo(Sample("1", image=tmp_path / name))
    kinds = [what for what, _ in found.findings]
    assert (kinds == []) if expected is None else expected in kinds, found.findings
    assert all(detail for _, detail in found.findings)
    assert found.key == content_key(data)
    assert found.hash == hash_photo((tmp_path / name).read_bytes())


def test_a_faint_drawing_is_not_called_flat(tmp_path: Path) -> None:
    """No hash tells it from others, but there is something to be seen."""
    image = Image.new("RGB", (300, 300), "white")
    image.paste((60, 20, 90), (130, 130, 170, 170))
    (tmp_path / "a.png").write_bytes(saved(image, "PNG"))
    assert inspect_photo(Sample("1", image=tmp_path / "a.png")).findings == ()


def test_missing_and_unreadable_photos_have_their_reasons(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    assert inspect_photo(Sample("1", image=tmp_path / "folder.jpg")).findings[0] == ("unreadable", "Is a directory")
    assert inspect_photo(Sample("1", image_error="no image file")).findings == (("missing", "no image file"),)


def test_photos_come_in_order_and_progress_counts_each(tmp_path: Path) -> None:
    samples = []
    for number in range(150):
        (tmp_path / f"{number}.jpg").write_bytes(photo(number % 7))
        samples.append(Sample(str(number), image=tmp_path / f"{number}.jpg"))
    found = inspect_photos(samples, 4, Silent())
    assert found.keys.keys.tolist() == [content_key(photo(number % 7)) for number in range(150)]
    assert len(np.unique(found.hashes[0])) == 7
    assert found.sizes == [(160, 120)] * 150


TEXTS = {
    "a sound text, isn't it? :)": [],
    "what???": [],
    "really?! 😀 très bien, señor": [],
    ":)": [],
    "see http://t.co/a?b=c and http://t.co/x": [],
    "@a @b http://t.co/x": ["emptied"],
    "RT @a: http://t.co/x": ["emptied"],
    "he said itâ€™s cafÃ© time": ["garbled"],
    "鈥檛 is how an apostrophe looks in GBK": ["garbled"],
    "le m閐ecin est là": ["garbled"],
    "Ð¿ÑÐ¸Ð²ÐµÑ, Привет": ["garbled"],
    "今天 iPhone 很好 and 天 alone, café naïve Привет": [],
    "el a\ufffdo pasado": ["lost characters"],
    "el a?o pasado": ["lost characters"],
    "so happy ????": ["lost characters"],
    "a bell\x07": ["control characters"],
    "word " * 500: ["very long"],
}


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_what_is_odd_about_a_text(text: str) -> None:
    findings = text_findings([Sample("1", text), *(Sample(id, "a usual text") for id in "234")])
    assert [what for what, _ in findings[0]] == TEXTS[text]
    assert findings[1:] == [()] * 3
    assert all(detail.isprintable() for _, detail in findings[0])


def test_scripts_are_those_of_most_letters() -> None:
    texts = ["so happy", "今天太好了 lol", "Привет мир", "12 :) 😀", "@friend http://t.co/a"]
    assert [main_script(text) for text in texts] == ["latin", "cjk", "cyrillic", "none", "none"]
    profile = text_profile([*texts, "RT @x: so #happy"])
    assert profile["scripts"]["latin"] == pytest.approx(2 / 6)
    assert profile["marks"] == pytest.approx(
        {"link": 1 / 6, "mention": 2 / 6, "hashtag": 1 / 6, "retweet": 1 / 6, "emoji": 1 / 6}
    )
    assert profile["characters"]["max"] == 21


def test_languages_with_py3langid() -> None:
    pytest.importorskip("py3langid")
    found = text_languages(["what a wonderful and sunny day at the sea", "das ist aber ein schöner Tag am See", "lol"])
    assert found == pytest.approx({"en": 1 / 3, "de": 1 / 3, "unsure": 1 / 3})


def test_without_py3langid_one_line_says_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    audit = audit_data(write_folder(tmp_path / "d", [("1", "so happy", None, "a")]), out=tmp_path / "audit")
    assert [note for note in audit.notes if "py3langid" in note and "[audit]" in note]
    assert "languages" not in audit.profile["all"]["text"]


def test_odd_files_are_listed_with_place_and_detail(tmp_path: Path) -> None:
    samples = [
        ("1", "fine", photo(1), "a"),
        ("2", "fine too", photo(1)[:900], "b"),
        ("3", b"caf\xe9 ol\xe9", None, "b"),
    ]
    audit = audit_data(write_folder(tmp_path / "d", samples), out=tmp_path / "audit")
    found = rows(audit.folder / "files.csv")
    assert [(row["id"], row["modality"], row["what"]) for row in found] == [
        ("3", "image", "missing"),
        ("2", "image", "truncated"),
    ]
    assert "truncated" in found[1]["detail"]
    assert found[1]["file"].endswith("2.jpg")
    assert {(each["what"], each["count"], each["id"]) for each in audit.odd} == {
        ("missing", 1, "3"),
        ("truncated", 1, "2"),
    }
    assert audit.encodings == {"utf-8": 2, "cp1252": 1}
    assert audit.profile["all"]["image"]["width"]["median"] == 160
