"""Inputs of a prediction: samples made from one pair of text and image, or from loose files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from mmfeat.errors import DataError
from mmfeat.samples.contents import without_surrogates
from mmfeat.samples.dataset import Sample, SampleSet
from mmfeat.samples.encodings import Decoder
from mmfeat.samples.folders import IMAGE_SUFFIXES, TEST_LIST, TRAIN_LIST, read_texts
from mmfeat.samples.loose import as_photo
from mmfeat.samples.table_files import SUFFIXES, table_suffix

TEXT_SUFFIX = ".txt"


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


def is_table(path: str | Path) -> bool:
    return table_suffix(str(path)) in SUFFIXES and Path(path).suffix.lower() != TEXT_SUFFIX


def _check_file(path: Path) -> None:
    if is_table(path):
        raise DataError(f"{path}: a table of samples is named with --data {path}")
    if path.suffix.lower() not in (*IMAGE_SUFFIXES, TEXT_SUFFIX):
        raise DataError(f"{path}: neither a photo ({', '.join(IMAGE_SUFFIXES)}) nor a {TEXT_SUFFIX}; name such files")
    if not os.path.isfile(path):
        raise DataError(f"{path}: no such file; check its name")
