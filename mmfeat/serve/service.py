"""The service: one model that answers pairs of text and photo, one after the other in a thread of its own."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from mmfeat.errors import DataError
from mmfeat.prediction.model import Model, unread
from mmfeat.samples.loose import as_samples
from mmfeat.samples.photos import picture_bytes, read_photo
from mmfeat.serve.nearest import Nearest


@dataclass(frozen=True)
class Limits:
    """What a request may ask for. `seconds` count from the head of a request to its answer; `requests` is how many may
    be read, wait or be answered at one time."""

    body: int = 20_000_000  # bytes
    pixels: int = 50_000_000
    text: int = 20_000  # characters
    seconds: float = 60.0
    requests: int = 16


@dataclass(frozen=True)
class Pair:
    """One request: a text, the bytes of a photo, and cells of a table by the names of their columns."""

    text: str | None = None
    image: bytes | None = None
    table: dict[str, str | int | float | None] | None = None


class Service:
    """Answers pairs by `model` within `limits`, with neighbours by `nearest` where it is given.

    `slots` are the requests that may come yet; whoever takes one gives it back, or `submit`s a pair, which does.
    """

    def __init__(self, model: Model, limits: Limits | None = None, nearest: Nearest | None = None) -> None:
        self.model, self.limits, self._nearest = model, limits or Limits(), nearest
        self.slots = threading.BoundedSemaphore(self.limits.requests)
        self._thread = ThreadPoolExecutor(1)

    @property
    def facts(self) -> dict[str, Any]:
        """What a client needs to know of the service."""
        entry = self.model.entry
        return {
            "status": "ok",
            "run": self.model.run.name,
            "head": entry.label,
            "modalities": entry.modalities,
            "classes": list(self.model.classes),
            "table": [column.name for column in self.model.table],
            "limits": asdict(self.limits),
        }

    def submit(self, pair: Pair) -> Future[dict[str, Any]]:
        """The future answer to a pair."""
        future = self._thread.submit(self.answer, pair)
        future.add_done_callback(lambda _: self.slots.release())
        return future

    def warm(self) -> None:
        """Load encoders and heads, by an answer that nobody reads."""
        from PIL import Image

        self.answer(Pair("a text", picture_bytes(Image.new("RGB", (64, 64)))))

    def answer(self, pair: Pair) -> dict[str, Any]:
        """The label as `mmfeat predict` decides it, a probability of each class, unless the label is a number, and the
        nearest training samples.

        Raises `DataError` for an empty pair, for a text or photo above the limits, and for bytes that are no photo.
        """
        text = pair.text if pair.text and pair.text.strip() else None
        if text is None and not pair.image and not pair.table:
            raise DataError("neither text nor image: nothing to predict from; send one of them, or both")
        if text and len(text) > self.limits.text:
            raise DataError(f"text: {len(text):,} characters, more than {self.limits.text:,}; send less of it")
        if pair.image:
            self._check_pixels(pair.image)
        samples = as_samples(text, pair.image or None, pair.table, [column.name for column in self.model.table])
        predictions, embedded = self.model.predict_samples(samples)
        if broken := "; ".join(f"{name}: {why}" for name, (why,) in embedded.reasons.items() if why):
            raise DataError(f"{broken}; send another one, or none")
        return {
            "label": predictions.labels[0],
            "probabilities": {} if predictions.numeric else _named(predictions.classes, predictions.probabilities[0]),
            "neighbours": self._nearest.of(embedded.features) if self._nearest else [],
            "notes": unread(samples, embedded, self.model.table),
        }

    def _check_pixels(self, image: bytes) -> None:
        """Raise `DataError` for bytes that are no photo, and for more pixels than the limit."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a large photo
                width, height = read_photo(image, lambda photo: photo.size)
        except Exception as error:  # decoders raise whatever a broken file makes them raise
            raise DataError("image: not a photo that can be read; send a JPEG, PNG or WebP") from error
        if width * height > self.limits.pixels:
            raise DataError(f"image: {width} x {height} pixels, more than {self.limits.pixels:,}; send a smaller one")


def _named(classes: tuple[str, ...], values: Any) -> Mapping[str, float]:
    return dict(zip(classes, values.tolist(), strict=True))
