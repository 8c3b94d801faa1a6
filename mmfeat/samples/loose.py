"""Loose texts, photos and rows of a Python program as samples: one alone, lists, series, columns of frames."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mmfeat.errors import DataError
from mmfeat.samples.contents import MemoryFile, without_surrogates
from mmfeat.samples.dataset import Photo, Sample
from mmfeat.samples.photos import picture_bytes
from mmfeat.samples.table_columns import find_column, usual_name
from mmfeat.system.remote import RemoteFile, is_remote

if TYPE_CHECKING:
    from PIL import Image

Text: TypeAlias = "str | None"
Row: TypeAlias = "Mapping[str, object] | None"
Picture: TypeAlias = "str | Path | bytes | Image.Image | np.ndarray | None"


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
        raise DataError(f"{told}; give as many of each, with None where a sample lacks one")
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
    if not isinstance(row, Mapping):
        raise DataError(f"table[{number}]: {type(row).__name__} is no row; give dicts from column to cell")
    if odd := [name for name in row if name not in columns]:
        raise DataError(f"table[{number}]: no column {odd[0]!r} in the run; it has {', '.join(columns) or 'no table'}")
    return tuple(None if _is_missing(row.get(name)) else str(row[name]).strip() or None for name in columns)


def is_rows(values: Any) -> bool:
    """Whether values are whole rows: a frame, an Arrow table, a data set of `datasets` or a list of dicts."""
    is_list = isinstance(values, list) and len(values) > 0 and all(isinstance(row, Mapping) for row in values)
    return is_list or hasattr(values, "columns") or hasattr(values, "column_names")


def is_single(value: Any) -> bool:
    """Whether a value is one text, image or row, and no list of them."""
    if isinstance(value, np.ndarray):
        return value.ndim in (2, 3) and value.dtype != object
    return isinstance(value, str | os.PathLike | bytes | bytearray | Mapping) or hasattr(value, "convert")  # Pillow


def _listed(values: Any, name: str) -> list[Any] | None:
    """The values as a list, a single value as a list of length 1, and None for None; of a frame one column."""
    if values is None:
        return None
    if is_single(values):
        return [values]
    if is_rows(values) and not isinstance(values, list):
        values = values[_column(name, list(getattr(values, "column_names", values.columns)))]
    try:
        return list(values.to_pylist() if hasattr(values, "to_pylist") else values)  # an Arrow array has scalars
    except TypeError:
        raise DataError(f"{name}: {type(values).__name__} is neither one of them nor a list") from None


def _column(name: str, names: Sequence[str]) -> str:
    """The column of a frame that holds texts or images. Raises `DataError` where that is not clear."""
    part = name.removesuffix("s")
    found = names[0] if len(names) == 1 else find_column(part, names) or usual_name(part, names)
    if found is None:
        raise DataError(f"{name}: a frame with the columns {', '.join(names)}; give one of them, as in frame['NAME']")
    return found


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
    if isinstance(image, Mapping):  # as `datasets` writes images
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes | bytearray):
        return MemoryFile(bytes(image), name), ""
    if isinstance(image, np.ndarray):
        image = _picture(image, name)
    if hasattr(image, "convert"):
        return MemoryFile(picture_bytes(image), name), ""
    if is_remote(image):
        return RemoteFile(image), ""
    if not isinstance(image, str | os.PathLike):
        kinds = "a path, a URL, bytes, a PIL image, a uint8 array (H, W, 3) or None"
        raise DataError(f"{name}: {type(image).__name__} is no image; give {kinds}")
    return (Path(image), "") if os.path.isfile(image) else (None, "image file not found")


def _picture(array: np.ndarray, name: str) -> Image.Image:
    """A PIL image of the pixels (H, W) or (H, W, C), C of 1, 3 or 4. Raises `DataError` for another shape or type."""
    from PIL import Image

    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype != np.uint8 or not array.size or array.shape[2:] not in ((), (3,), (4,)):
        shape = f"an array {array.shape} of {array.dtype}"
        raise DataError(f"{name}: {shape} is no image; give uint8 (0 to 255) in the order (height, width, channels)")
    return Image.fromarray(array)


def _is_missing(value: Any) -> bool:
    """Whether a value is None, or the NaN or NA of a data frame."""
    return value is None or (isinstance(value, float) and value != value) or type(value).__name__ == "NAType"
