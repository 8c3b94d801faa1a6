"""The model: a saved run that predicts new pairs of text and image from Python, as often as a service asks.

model = mmfeat.load("heads/RUN")
model.predict(["what a day"], ["photo.jpg"])        # ["positive"]
model.predict_proba(texts="only a text")            # (1, C) calibrated probabilities, columns as in model.classes
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.encoders.names import listed
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import ConfigError, DataError
from mmfeat.extraction.embed import Embedded, Embedder
from mmfeat.extraction.extract import DEFAULT_ENCODERS, ExtractSettings, extract_features
from mmfeat.prediction.final_heads import (
    ELSEWHERE,
    EntryPredictor,
    predict_features,
    read_for,
    table_of,
    unseen,
    unseen_note,
    with_places,
)
from mmfeat.prediction.output_file import Predictions
from mmfeat.runs.entry import Entry
from mmfeat.runs.run import Run, checked_towers, choose_run
from mmfeat.samples.dataset import PART, Data, Sample
from mmfeat.samples.loose import Picture, Row, Text, as_samples, is_rows
from mmfeat.samples.objects import passing
from mmfeat.samples.table_columns import TABLE, TableColumn
from mmfeat.sweep.train import train_heads
from mmfeat.system.hardware import resolve_device
from mmfeat.system.notebook import Shown
from mmfeat.system.wording import Progress, interval


def load(
    run: str | Path | Run | None = None,
    *,
    heads: str | Path = "heads",
    head: str | None = None,
    modalities: str | None = None,
    encoders: Sequence[str] = (),
    device: str = "auto",
) -> Model:
    """The model of a run, which is named by its folder or by default the best of the latest runs under `heads`.

    `head` and `modalities` choose an entry, by default the recommended one; `encoders` says where weights of the run
    lie now, if they have moved. Raises `RunError` where there is no such run or entry, or where weights of
    its encoders have changed.
    """
    chosen = run if isinstance(run, Run) else choose_run(run, heads, None, head, modalities)
    chosen = with_places(chosen, encoders)
    return Model(chosen, chosen.predicting(head, modalities), device)


def fit(
    data: Data,
    encoders: str | Sequence[str] = DEFAULT_ENCODERS,
    *,
    cache: str | Path = "cache",
    out: str | Path = "heads",
    options: EncoderOptions | None = None,
    columns: Mapping[str, str] | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> Model:
    """Encode `data`, train and rank heads on the vectors, and return the model of the best entry.

    This is `extract_features`, `train_heads` and `load`; other `settings` go to `train_heads`. What is in `cache` and
    `out` is not done again. The leaderboard is `model.run.leaderboard`.
    """
    named = listed(encoders)
    shared: dict[str, Any] = {"cache": cache, "options": options, "columns": columns, "progress": progress}
    extract_features(data, named, settings=ExtractSettings(device), **shared)
    return load(train_heads(data, named, out=out, device=device, **shared, **settings).run, device=device)


class Model(Shown):
    """One entry of a run, whose encoders and heads are loaded at the first call that needs them and kept in memory.

    No vectors are cached. Several threads may call one model: their calls run one after the other, since threads
    cannot share tokenizers and the device. Processes cannot share a model: each process loads one after it has started.
    """

    def __init__(self, run: Run, entry: Entry, device: str = "auto") -> None:
        self.run, self.entry, self.device = run, entry, resolve_device(device)
        self._predictor = EntryPredictor(run, entry, self.device)
        self._embedder = Embedder(checked_towers(run, self._predictor.towers, ELSEWHERE), self.device)
        self.table = table_of(run, entry)
        self._lock = threading.Lock()

    def facts(self) -> list[str]:
        score = f"{self.entry.headline_title} {interval(self.entry.headline)}"
        return [self.entry.label, score, str(self.run.folder), *self.classes]

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the columns of `predict_proba`."""
        return self.run.classes

    def predict(
        self,
        texts: str | Iterable[Text] | Any = None,
        images: Picture | Iterable[Picture] = None,
        table: Row | Iterable[Row] = None,
    ) -> list[Any]:
        """N labels, `a|b` or a lone `|` for multi-label runs, numbers of a regression; the arguments are those of
        `predict_proba`.

        A label is the choice of the entry's decision, adjusted for macro-F1, and not always the most probable class.
        """
        predictions = self._predicted(texts, images, table)
        return predictions.chosen[:, 0].tolist() if self.run.config.is_regression else predictions.labels

    def predict_proba(
        self,
        texts: str | Iterable[Text] | Any = None,
        images: Picture | Iterable[Picture] = None,
        table: Row | Iterable[Row] = None,
    ) -> np.ndarray:
        """(N, C) calibrated probabilities; rows add up to 1 unless the run has several labels a sample.

        `texts` and `images` are one value, or a list or series of N values. Either may be left out, and None stands for
        a text or image that a sample lacks; `table` maps names of columns to cells, for one sample or for each in a
        list. An image is a path, a URL, the bytes of a file, a PIL image or a uint8 array (H, W, 3). In place of all
        three, whole rows may be given: a frame, an Arrow table or a list of dicts, with columns as in the run. A
        missing file or a broken image counts as lacking, with a `UserWarning`. Raises `DataError` for lists of
        different length, and `ConfigError` for a regression, which has no classes.
        """
        if self.run.config.is_regression:
            raise ConfigError(f"{self.run.folder}: a regression has no probabilities of classes; use predict")
        return self._predicted(texts, images, table).probabilities

    def predict_samples(
        self, samples: Sequence[Sample], progress: Progress | None = None
    ) -> tuple[Predictions, Embedded]:
        """The predictions for samples, and their vectors with the reasons of missing ones."""
        with self._lock:
            embedded = self._embedder.embed(samples, progress)
            features = embedded.features.with_table(self.table, samples)
            return predict_features(self._predictor, features, samples), replace(embedded, features=features)

    def _predicted(self, texts: Any, images: Any, table: Any) -> Predictions:
        if not is_rows(texts):
            samples = as_samples(texts, images, table, [column.name for column in self.table])
            gone = [f"{sample.id}: {sample.image_error}" for sample in samples if sample.image_error]
            if gone and all(tower.spec.part != "image" for tower in self._embedder.towers):
                what = f"{len(gone):,} of {len(samples):,} photos cannot be read ({gone[0]})"
                warnings.warn(f"{what}; this head uses no photos", stacklevel=3)
            return self._warned(samples)
        if images is not None or table is not None:
            raise DataError("rows given beside images or a table; give the rows alone, or lists of texts and images")
        if not len(texts):
            return self._warned(())
        with passing(texts) as name:
            return self._warned(read_for(name, None, self.run.config).samples)

    def _warned(self, samples: Sequence[Sample]) -> Predictions:
        """The predictions for samples, with a `UserWarning` for what was missing."""
        if not samples:
            empty = np.empty((0, len(self.classes)))
            none = empty if self.run.config.is_regression else empty.astype(bool)
            return Predictions((), none, empty, self.classes, self.run.config.is_multilabel)
        predictions, embedded = self.predict_samples(samples)
        for line in unread(samples, embedded, self.table):
            warnings.warn(line, stacklevel=4)
        return predictions


def unread(samples: Sequence[Sample], embedded: Embedded, table: Sequence[TableColumn] = ()) -> list[str]:
    """Lines about texts and photos that cannot be read, and about samples without a part or any input of the head."""
    lines = []
    if table and (lacking := sum(sample.table is None for sample in samples)):
        names = ", ".join(column.name for column in table)
        lines.append(f"{lacking:,} of {len(samples):,} samples predicted without {PART[TABLE]} ({names})")
    for modality, reasons in embedded.reasons.items():
        if broken := [number for number, reason in enumerate(reasons) if reason]:
            first = f"{samples[broken[0]].id}: {reasons[broken[0]]}"
            lines.append(f"{len(broken):,} of {len(samples):,} samples predicted without {PART[modality]} ({first})")
    return lines + unseen_note(unseen(embedded.features), len(samples), embedded.reasons)
