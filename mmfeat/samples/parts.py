"""Parts: how many texts or photos of a data set can be read, and what the user is told where most of them cannot."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mmfeat.errors import DataError
from mmfeat.samples.dataset import PART, Sample


def place_of(sample: Sample, modality: str) -> str:
    """What a message calls the photo or text of a sample."""
    return str(sample.image) if modality == "image" and sample.image else f"sample {sample.id}"


@dataclass
class Parts:
    """Counts of the texts or photos that samples have, and of those that cannot be read or encoded.

    `first` is the place of one of the latter, and its reason.
    """

    count: int = 0
    lost: int = 0
    first: tuple[str, str] = ("", "")

    def lose(self, sample: Sample, modality: str, reason: str, samples: int = 1) -> None:
        """Count the part of one sample, or of several with this content, as lost."""
        self.lost += samples
        if not self.first[0]:
            self.first = (place_of(sample, modality), reason)

    def add(self, other: Parts) -> None:
        """Add the counts of other samples."""
        self.count += other.count
        self.lost += other.lost
        self.first = self.first if self.first[0] else other.first

    def notes(self, modality: str, judged: str = "") -> list[str]:
        """A line where more than half of the parts are lost, with how that is known in `judged`; else none."""
        if self.lost * 2 <= self.count:
            return []
        (where, reason), of = self.first, f"of {self.count:,} {PART[modality]}s"
        what = f"{self.lost:,} {of} cannot" if self.lost < self.count else f"none {of} can"
        return [f"{what} be read{judged}; the first is {where}: {reason}"]

    def check(self, source: str, modality: str, judged: str = "") -> list[str]:
        """The notes. Raises `DataError` where all parts are lost."""
        notes = self.notes(modality, judged)
        if not notes or self.lost < self.count:
            return notes
        others = "" if os.path.isdir(source) else ", or name other ones with --columns image=..."
        remedy = f"put photos that open in their place{others}" if modality == "image" else "use another encoder"
        raise DataError(f"{source}: {notes[0]}; {remedy}")
