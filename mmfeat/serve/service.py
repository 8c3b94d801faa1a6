"""The service: one model that answers pairs of text and photo, one after the other in a thread of its own, beside the
labelled samples of its run that are nearest to them."""

from __future__ import annotations

import functools
import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mmfeat.cache.features import Features
from mmfeat.cache.store import Cache
from mmfeat.errors import CacheMissError, DataError, MmfeatError
from mmfeat.prediction.final_heads import towers_of
from mmfeat.prediction.model import Model, unread
from mmfeat.prediction.nearest import similarities
from mmfeat.report.section import LETTERS, PHOTO_SIDE, photo_of
from mmfeat.samples.corrections import read_corrected
from mmfeat.samples.dataset import MODALITIES, Sample
from mmfeat.samples.loose import as_samples
from mmfeat.samples.photos import picture_bytes, read_photo


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


class Nearest:
    """The search among the samples that trained `model`, by the encoders of its head that give one vector a sample.

    Raises `CacheMissError` where data or vectors are gone.
    """

    def __init__(self, model: Model, count: int) -> None:
        config, specs = model.run.config, [tower.spec for tower in towers_of(model.run, model.entry)]
        try:
            known, given = read_corrected(config.data, config.reading)
            self.count, self.samples = count, config.known(known, given).labelled
            store = Cache(config.cache, known.name)
            with store.index(writes=False) as index:
                keys = {name: store.content_keys(self.samples, name, index=index) for name in MODALITIES}
            self._blocks = [
                store.map(self.samples, spec, keys[spec.modality], allow_missing=True)
                for spec in specs
                if (spec.output, spec.view) == ("pooled", "none")
            ]
        except (MmfeatError, OSError) as error:
            raise CacheMissError(f"no vectors of training samples ({error})") from error
        if not any(block.mask.any() for block in self._blocks):
            raise CacheMissError(f"no vectors of training samples in {store.folder}")

    def of(self, features: Features) -> list[dict[str, Any]]:
        """The samples nearest to the first row of the features, nearest first.

        The similarity is the mean cosine over the encoders that have a vector of the row; what a sample lacks counts 0.
        """
        seen = {block.name: block.vectors[0] for block in features.blocks if block.mask[0]}
        cosines = [similarities(block, seen[block.name]) for block in self._blocks if block.name in seen]
        if not cosines:
            return []
        mean = np.nan_to_num(cosines).mean(axis=0)
        order = np.argsort(-mean, kind="stable")[: self.count].tolist()
        return [{"similarity": float(mean[row]), **_shown(self.samples[row])} for row in order]


@functools.lru_cache(maxsize=1000)
def _shown(sample: Sample) -> dict[str, Any]:
    """A sample for the page: the first words of its text, and a thumbnail as a URL, "" without a photo."""
    photo, text = photo_of(sample, PHOTO_SIDE) or "", (sample.text or "")[:LETTERS]
    return {"id": sample.id, "label": sample.label, "text": text, "photo": photo and f"data:image/webp;base64,{photo}"}


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
        shares = predictions.probabilities[0].tolist()
        return {
            "label": predictions.labels[0],
            "probabilities": {} if predictions.numeric else dict(zip(predictions.classes, shares, strict=True)),
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
