"""Inputs of a prediction: samples made from texts and images in memory, from one pair, or from loose files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mmfeat.errors import DataError
from mmfeat.samples.contents import MemoryFile, without_surrogates
from mmfeat.samples.dataset import Photo, Sample, SampleSet
from mmfeat.samples.encodings import Decoder
from mmfeat.samples.folders import IMAGE_SUFFIXES, TEST_LIST, TRAIN_LIST, read_texts
from mmfeat.samples.photos import picture_bytes
from mmfeat.samples.table_files import SUFFIXES, table_suffix
from mmfeat.system.remote import RemoteFile, is_remote

if TYPE_CHECKING:
    from PIL import Image


TEXT_SUFFIX = ".txt"
Text: TypeAlias = "str | None"
Row: TypeAlias = "Mapping[str, object] | None"
Picture: TypeAlias = "str | Path | bytes | Image.Image | None"


def as_samples(
    texts: str | Iterable[Text] | None,
    images: Picture | Iterable[Picture],
    table: Row | Iterable[Row] = None,
    columns: Sequence[str] = (),
) -> list[Sample]:
    """The samples of one text, one image or one pair, or of lists, with rows of a table that has these `columns`.

    Raises `DataError` for lists of different length.
    """
    lists = {"texts": _listed(texts, "texts"), "images": _listed(images, "images"), "rows": _listed(table, "table")}
    counts = {name: len(values) for name, values in lists.items() if values is not None}
    if not counts:
        raise DataError("neither texts nor images; give one of them, or both")
    if len({*counts.values()}) > 1:
        told = " but ".join(f"{count} {name}" for name, count in counts.items())
        raise DataError(f"{told}; None stands for one that lacks")
    count = next(iter(counts.values()))
    parts = [values if values is not None else [None] * count for values in lists.values()]
    return [
        replace(_sample(number, text, image), table=_row(number, row, columns))
        for number, (text, image, row) in enumerate(zip(*parts, strict=True))
    ]


def _row(number: int, row: Row, columns: Sequence[str]) -> tuple[str | None, ...] | None:
    """The cells of one row in the order of `columns`. Raises `DataError` for another column."""
    if row is None:
        return None
    if odd := [name for name in row if name not in columns]:
        raise DataError(f"table[{number}]: no column {odd[0]!r} in the run; it has {', '.join(columns) or 'no table'}")
    return tuple(None if _is_missing(row.get(name)) else str(row[name]).strip() or None for name in columns)


def _listed(values: Any, name: str) -> list[Any] | None:
    """The values as a list, a single value as a list of length 1, and None for None."""
    if values is None:
        return None
    if isinstance(values, str | Path | bytes | Mapping) or hasattr(values, "convert"):  # a PIL image
        return [values]
    try:
        return list(values)
    except TypeError:
        raise DataError(f"{name}: {type(values).__name__} is neither one of them nor a list") from None


def _sample(number: int, text: Any, image: Any) -> Sample:
    """The sample of a text and an image. A blank text or an absent file is missing with a reason, None without one."""
    if _is_missing(text):
        text = None
    if text is not None and not isinstance(text, str):
        raise DataError(f"texts[{number}]: {type(text).__name__} is no text; give str or None")
    text_error = "empty text" if text is not None and not text.strip() else ""
    photo, image_error = as_photo(image, f"images[{number}]")
    if image_error:
        image_error = f"{image}: {image_error}"
    words = None if text is None or text_error else without_surrogates(text)
    return Sample(str(number), words, photo, None, text_error, image_error)


def as_photo(image: Any, name: str) -> tuple[Photo | None, str]:
    """(photo of a sample, "") for an image in any form, or (None, reason); the reason is "" for a missing value."""
    if _is_missing(image):
        return None, ""
    if isinstance(image, bytes):
        return MemoryFile(image, name), ""
    if hasattr(image, "convert"):
        return MemoryFile(picture_bytes(image), name), ""
    if is_remote(image):
        return RemoteFile(image), ""
    if not isinstance(image, str | Path):
        raise DataError(f"{name}: {type(image).__name__} is no image; give a path, bytes, a PIL image or None")
    return (Path(image), "") if os.path.isfile(image) else (None, "image file not found")


def _is_missing(value: Any) -> bool:
    """Whether a value is None or the NaN of a data frame."""
    return value is None or (isinstance(value, float) and value != value)


def pair_of(text: str | None, image: str | None) -> SampleSet:
    """One sample of a text, an image or both. Raises `DataError` for an image that is no file or for an empty pair."""
    photo, _ = as_photo(image or None, "image")
    if image and photo is None:
        raise DataError(f"--image {image}: no such file; check its name")
    words = without_surrogates(text) if text and text.strip() else None
    if words is None and photo is None:
        raise DataError("an empty text: nothing to predict from; give --text or --image")
    text_error = "empty text" if text is not None and words is None else ""
    return SampleSet("pair", "", (Sample(image or "text", words, photo, None, text_error),))


def samples_of_files(files: Sequence[str | Path]) -> SampleSet:
    """A sample for each photo, with the text of the `.txt` file beside the photo, and for each other `.txt` file.

    A folder stands for the photos and texts in that folder. Ids are the paths as given; a path that is named twice
    gives one sample. Raises `DataError` for other files.
    """
    paths = list(dict.fromkeys(path for file in files for path in _expanded(Path(file))))
    for path in paths:
        _check_file(path)
    taken = {path.with_suffix("") for path in paths if _is_photo(path)}
    paths = [path for path in paths if _is_photo(path) or path.with_suffix("") not in taken]
    files_of_text = [text_beside(path) if _is_photo(path) else path for path in paths]
    decoder = Decoder()
    samples = [
        Sample(str(path), text, path if _is_photo(path) else None, None, error if file else "")
        for path, file, (text, error) in zip(paths, files_of_text, read_texts(files_of_text, decoder), strict=True)
    ]
    return SampleSet("files", "", tuple(samples), dict(decoder.counts), notes=tuple(decoder.notes))


def text_beside(photo: Path) -> Path | None:
    """The `.txt` file beside a photo, None without one."""
    names = (photo.with_suffix(suffix) for suffix in (TEXT_SUFFIX, TEXT_SUFFIX.upper()))
    return next(filter(os.path.isfile, names), None)


def _expanded(path: Path) -> list[Path]:
    """The photos and texts in a folder, sorted; any other path alone. Raises `DataError` for a data set."""
    if not os.path.isdir(path):
        return [path]
    inside = sorted(path.iterdir())
    if any(file.name in (TRAIN_LIST, TEST_LIST) for file in inside):
        raise DataError(f"{path}: a folder with a list of samples is named with --data {path}")
    files = [file for file in inside if file.suffix.lower() in (*IMAGE_SUFFIXES, TEXT_SUFFIX) and file.is_file()]
    if not files:
        raise DataError(f"{path}: neither photos ({', '.join(IMAGE_SUFFIXES)}) nor {TEXT_SUFFIX} files in this folder")
    return files


def _is_photo(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _check_file(path: Path) -> None:
    if table_suffix(str(path)) in SUFFIXES and path.suffix.lower() != TEXT_SUFFIX:
        raise DataError(f"{path}: a table of samples is named with --data {path}")
    if path.suffix.lower() not in (*IMAGE_SUFFIXES, TEXT_SUFFIX):
        raise DataError(f"{path}: neither a photo ({', '.join(IMAGE_SUFFIXES)}) nor a {TEXT_SUFFIX}; name such files")
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; check its name")
