"""The result of an extraction: counts, and the vectors as a frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.cache.features import Features
from mmfeat.cache.store import Cache
from mmfeat.encoders.registry import Tower
from mmfeat.extraction.arithmetic import Evidence
from mmfeat.extraction.missing import Counts
from mmfeat.extraction.requests import Decision
from mmfeat.samples.dataset import SampleSet, read_samples
from mmfeat.samples.rows import Overview
from mmfeat.system.notebook import Cells, Frame, Shown
from mmfeat.system.wording import counted, duration

if TYPE_CHECKING:
    import pyarrow

    from mmfeat.extraction.extract import ExtractSettings


@dataclass(kw_only=True, repr=False)
class Extraction(Frame, Shown, Counts):
    """Result of an extraction: samples, encoders, cache folder of the data set, counts, and the decision on the
    cleaning where a text encoder follows it, and by request the evidence on which `auto` settled the dtype. `test` is
    the extraction of the test data, if named; `lost` notes what is mostly unreadable.
    """

    samples: Overview
    towers: Sequence[Tower]
    folder: Path
    settings: ExtractSettings
    engine: str
    seconds: float
    decision: Decision | None = None
    evidence: Mapping[str, Evidence] = field(default_factory=dict)
    test: Extraction | None = None
    columns: Mapping[str, str] = field(default_factory=dict)  # of the samples
    lost: tuple[str, ...] = ()

    @property
    def nothing_to_do(self) -> bool:
        """Whether the cache lacked nothing."""
        return not any(self.new.values()) and not self.failed

    def load(self) -> tuple[SampleSet, Features]:
        """The samples, read again, and their vectors, as `Cache.load` has them."""
        samples = read_samples(self.samples.source, self.columns)
        store = Cache(self.folder.parent, self.folder.name)
        return samples, store.load(samples.samples, [tower.spec for tower in self.towers])

    def to_arrow(self) -> pyarrow.Table:
        """id, text, image, label, and the pooled vectors of each encoder in a column, NaN where a sample has none."""
        import pyarrow

        samples, features = self.load()
        cells = [
            (sample.id, sample.text, None if sample.image is None else str(sample.image), sample.label)
            for sample in samples
        ]
        columns = {
            name: pyarrow.array(column, pyarrow.string())
            for name, column in zip(("id", "text", "image", "label"), zip(*cells, strict=True), strict=True)
        }
        names = {tower.spec.folder_name: tower.spec.name for tower in self.towers if tower.spec.view == "none"}
        for block in features.blocks:
            flat = pyarrow.array(block.vectors.astype(np.float32).ravel())
            columns[names.get(block.name, block.name)] = pyarrow.FixedSizeListArray.from_arrays(flat, block.width)
        return pyarrow.table(columns)

    def facts(self) -> list[str]:
        new = f"{sum(self.new.values()):,} new vectors in {duration(self.seconds)}"
        return [self.samples.name, counted(len(self.samples), "sample"), new, str(self.folder)]

    def cells(self) -> Cells:
        specs = [tower.spec for tower in self.towers]
        counts = (self.new, self.stored, self.unreadable)
        rows = [(spec.name, spec.output, *(count[spec.folder_name] for count in counts)) for spec in specs]
        return [("encoder", "output", "new", "stored", "unreadable"), *rows]
