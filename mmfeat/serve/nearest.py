"""The labelled samples of a run whose cached vectors are nearest to those of a pair."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from mmfeat.cache.features import Features
from mmfeat.cache.store import Cache
from mmfeat.errors import CacheMissError, MmfeatError
from mmfeat.prediction.final_heads import towers_of
from mmfeat.prediction.model import Model
from mmfeat.prediction.nearest import similarities
from mmfeat.report.card import LETTERS, PHOTO_SIDE, photo_of
from mmfeat.samples.corrections import read_corrected
from mmfeat.samples.dataset import MODALITIES, Sample


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
