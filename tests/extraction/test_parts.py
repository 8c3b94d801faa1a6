"""Where most photos of a data set are absent or cannot be read, every step says so; where all are, none goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfeat.audit.audit import audit_data
from mmfeat.errors import DataError, HeadError
from mmfeat.extraction.extract import extract_features
from mmfeat.extraction.forecast import forecast_extraction
from mmfeat.extraction.missing import Counts, Parts
from mmfeat.samples.dataset import read_samples
from mmfeat.sweep.train import train_heads
from tests.audit.audited import photo, write_folder
from tests.sweep.small_sweeps import NO_HEADS, QUICK, SMALL

BUILT_IN = ["hashing", "hog"]
PAGE = b"<html>404</html>"
PAGES = [PAGE, *(b"<html>%d</html>" % number for number in range(5)), PAGE]  # the first stands in place of two photos


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Function that writes twelve samples, whose first photos are these and whose other ones are photos."""
    monkeypatch.chdir(tmp_path)

    def write(*first: bytes | None) -> Path:
        photos = [*first, *(photo(number) for number in range(12 - len(first)))]
        samples = [(f"s{n:02}", f"text number {n}", image, "ab"[n % 2]) for n, image in enumerate(photos)]
        return write_folder(tmp_path / "set", samples)

    return write


def heads(data: Path) -> Any:
    return train_heads(data, BUILT_IN, plan=QUICK, protocol=SMALL, **{**NO_HEADS, "modalities": ["both"]})


def complaints(result: Any) -> list[str]:
    return [note for note in result.notes if "the first" in note]


def test_more_than_half_is_said_with_the_first_path(data: Callable[..., Path]) -> None:
    folder = data(*PAGES)
    line = f"7 of 12 photos cannot be read; the first is {folder}/data/s00.jpg: not an image"
    assert complaints(forecast_extraction(folder, BUILT_IN).samples) == [line.replace(";", " (judged by 12);", 1)]
    for _ in range(2):  # as it is encoded, and as it is stored
        assert complaints(extract_features(folder, BUILT_IN).samples) == [line]
        assert complaints(forecast_extraction(folder, BUILT_IN).samples) == [line]
    assert complaints(audit_data(folder)) == [line]
    lacking = f"7 of 12 labelled samples have no vector of hog-dac7103e (first: {folder}/data/s00.jpg: not an image)"
    assert lacking in heads(folder).notes


def test_half_is_not_worth_a_line(data: Callable[..., Path]) -> None:
    folder = data(*PAGES[:6])
    assert not complaints(extract_features(folder, BUILT_IN).samples)
    assert not complaints(extract_features(folder, BUILT_IN).samples)
    assert not complaints(audit_data(folder))
    assert not any("no vector" in note for note in heads(folder).notes)


def test_nothing_that_can_be_read_is_an_error(data: Callable[..., Path]) -> None:
    folder = data(*(b"%%PDF %d" % number for number in range(12)))
    first = f"the first is {folder}/data/s00.jpg: not an image; put photos that open in their place"
    for call, judged in (
        (forecast_extraction, " (judged by 12)"),
        *[(extract_features, "")] * 2,
        (forecast_extraction, ""),
    ):
        with pytest.raises(DataError) as error:
            call(folder, BUILT_IN)
        assert str(error.value) == f"{folder}: none of 12 photos can be read{judged}; {first}"
    assert complaints(audit_data(folder)) == [f"none of 12 photos can be read; {first.partition('; put')[0]}"]
    with pytest.raises(HeadError, match=r"no labelled sample has a vector of hog-dac7103e \(first: .*s00.jpg: not an"):
        heads(folder)
    for number in range(12):  # the remedy works
        (folder / "data" / f"s{number:02}.jpg").write_bytes(photo(number))
    assert not complaints(extract_features(folder, BUILT_IN).samples)


def test_absent_photos_of_a_folder_are_said_with_the_first_path(data: Callable[..., Path]) -> None:
    folder = data(*[None] * 7)
    line = f"7 of 12 photos are not found; the first path tried is {folder}/data/s00.jpg"
    assert complaints(extract_features(folder, BUILT_IN).samples) == complaints(read_samples(folder)) == [line]
    for number in range(7, 12):
        (folder / "data" / f"s{number:02}.jpg").unlink()
    with pytest.raises(DataError, match=r"no sample has a photo; the first path tried is .*/data/s00.jpg; put photos"):
        extract_features(folder, BUILT_IN)
    for number in range(12):
        (folder / "data" / f"s{number:02}.jpg").write_bytes(photo(number))
        (folder / "data" / f"s{number:02}.txt").unlink()
    with pytest.raises(
        DataError, match=r"no sample has a text; .*/data/s00.txt; .* or leave hashing out of --encoders"
    ):
        extract_features(folder, BUILT_IN)
    assert extract_features(folder, ["hog"]).new.total() == 7


def test_a_table_of_files_that_are_no_photos_may_name_another_column(tmp_path: Path) -> None:
    (tmp_path / "page").write_bytes(PAGE)
    (table := tmp_path / "t.csv").write_text("id,text,image\n1,one,page\n2,two,page\n")
    with pytest.raises(DataError, match=r"none of 2 photos .* or name other ones with --columns image="):
        extract_features(table, BUILT_IN, cache=tmp_path / "cache")


def test_what_is_lost_goes_through_json() -> None:
    counts = Counts(parts={"image": Parts(3, 2, ("a.jpg", "not an image"))})
    assert Counts.from_json(counts.to_json()) == counts
