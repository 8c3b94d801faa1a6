"""The model: a saved run that predicts new pairs of text and image from Python, as often as a service asks.

model = mmfeat.load("heads/RUN")
model.predict(["what a day"], ["photo.jpg"])        # ["positive"]
model.predict_proba(texts="only a text")            # (1, C) calibrated probabilities, columns as in model.classes
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mmfeat.embedder import Embedded, Embedder
from mmfeat.errors import DataError
from mmfeat.hardware import resolve_device
from mmfeat.images import MemoryFile, picture_bytes
from mmfeat.inference import predict_features, unseen, unseen_note
from mmfeat.prediction_file import Predictions
from mmfeat.predictor import FinalHeads, towers_of
from mmfeat.progress import Progress
from mmfeat.remote import RemoteFile, is_remote
from mmfeat.run_folders import choose_run
from mmfeat.runs import Run, checked_towers
from mmfeat.samples import PART, Photo, Sample
from mmfeat.texts import without_surrogates

if TYPE_CHECKING:
    from PIL import Image

Text: TypeAlias = "str | None"
Picture: TypeAlias = "str | Path | bytes | Image.Image | None"


def load(
    run: str | Path | Run | None = None,
    *,
    heads: str | Path = "heads",
    head: str | None = None,
    modalities: str | None = None,
    device: str = "auto",
) -> Model:
    """The model of a run: a folder, or by default the best of the latest runs under `heads`.

    `head` and `modalities` name another entry of its leaderboard than the best. Raises `RunError` where there is no
    such run or head, or where weights of its encoders have changed.
    """
    chosen = run if isinstance(run, Run) else choose_run(run, heads, None, head, modalities)
    return Model(chosen, chosen.entry(head, modalities), device)


class Model:
    """One entry of a run: its encoders and heads are loaded when a call first needs them, and stay.

    Nothing is cached between calls, on disk neither. It may be called from several threads: calls wait for each other,
    since tokenizers and the device are not to be shared. Processes load a model each, after they have started.
    """

    def __init__(self, run: Run, entry: Mapping[str, Any], device: str = "auto") -> None:
        self.run, self.entry, self.device = run, entry, resolve_device(device)
        self._embedder = Embedder(checked_towers(run, towers_of(run, entry)), self.device)
        self._heads = FinalHeads(run)
        self._lock = threading.Lock()

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the columns of `predict_proba`."""
        return self.run.classes

    def predict(
        self, texts: str | Iterable[Text] | None = None, images: Picture | Iterable[Picture] = None
    ) -> list[str]:
        """N labels, for several labels a sample `a|b` or a lone `|`, as `predict_proba` takes samples.

        It is the choice of the run's decision, adjusted for macro-F1: not always the most probable class.
        """
        return self._predicted(texts, images).labels

    def predict_proba(
        self, texts: str | Iterable[Text] | None = None, images: Picture | Iterable[Picture] = None
    ) -> np.ndarray:
        """(N, C) calibrated probabilities; rows add up to 1 unless the run has several labels a sample.

        `texts` and `images` are one each or N each; either may be left out, and None stands for one that a sample
        lacks. An image is a path, a URL, the bytes of a file, or a PIL image. One that is missing or broken counts as
        lacking, with a `UserWarning`. Raises `DataError` for lists of different length.
        """
        return self._predicted(texts, images).probabilities

    def predict_samples(
        self, samples: Sequence[Sample], progress: Progress | None = None
    ) -> tuple[Predictions, Embedded]:
        """Predictions for samples, and what was seen of them."""
        with self._lock:
            seen = self._embedder.embed(samples, progress)
            found = predict_features(self.run, self.entry, seen.features, samples, self.device, self._heads)
        return found, seen

    def _predicted(self, texts: Any, images: Any) -> Predictions:
        samples = as_samples(texts, images)
        if not samples:
            nothing = np.empty((0, len(self.classes)))
            return Predictions((), nothing.astype(bool), nothing, self.classes, self.run.config["task"] == "multilabel")
        found, seen = self.predict_samples(samples)
        for line in unread(samples, seen):
            warnings.warn(line, stacklevel=3)
        return found


def unread(samples: Sequence[Sample], seen: Embedded) -> list[str]:
    """Lines about parts that were given and cannot be read, and about samples of which nothing is seen at all."""
    lines = []
    for modality, reasons in seen.reasons.items():
        if broken := [number for number, reason in enumerate(reasons) if reason]:
            first = f"{samples[broken[0]].id}: {reasons[broken[0]]}"
            lines.append(f"{len(broken):,} of {len(samples):,} samples predicted without {PART[modality]} ({first})")
    lines += unseen_note(unseen(seen.features), len(samples), seen.reasons)
    return lines


def as_samples(texts: str | Iterable[Text] | None, images: Picture | Iterable[Picture]) -> list[Sample]:
    """Samples of one text, one image, one pair, or of lists of them. Raises `DataError` where they do not fit."""
    lists = [_listed(texts, "texts"), _listed(images, "images")]
    counts = {len(each) for each in lists if each is not None}
    if not counts:
        raise DataError("neither texts nor images; give one of them, or both")
    if len(counts) > 1:
        raise DataError(f"{len(lists[0] or ())} texts but {len(lists[1] or ())} images; None stands for one that lacks")
    (count,) = counts
    columns = [each if each is not None else [None] * count for each in lists]
    return [_sample(number, text, image) for number, (text, image) in enumerate(zip(*columns, strict=True))]


def _listed(values: Any, name: str) -> list[Any] | None:
    """A list of values; a single one is a list of one. None where nothing was given."""
    if values is None:
        return None
    if isinstance(values, str | Path | bytes) or hasattr(values, "convert"):  # a PIL image
        return [values]
    try:
        return list(values)
    except TypeError:
        raise DataError(f"{name}: {type(values).__name__} is neither one of them nor a list") from None


def _sample(number: int, text: Any, image: Any) -> Sample:
    """A blank text and a photo that is not there are missing, with the reason; None is missing without one."""
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
    """(what a sample holds, "") of an image in any form, or (None, why there is none, "" for None)."""
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
    there = os.path.isfile(image)
    return (Path(image), "") if there else (None, "image file not found")


def _is_missing(value: Any) -> bool:
    """None, or the NaN of a data frame."""
    return value is None or (isinstance(value, float) and value != value)
