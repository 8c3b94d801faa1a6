"""Sections of a report: words, tables, figures and cards of samples, written as a page, LaTeX, CSV and PNG; and what
they are about: a run, one of its entries, the out-of-fold predictions, and the samples, if present."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from mmfeat.errors import DataError
from mmfeat.evaluation.metrics import wilson
from mmfeat.runs.entry import Entry, Interval
from mmfeat.runs.record import OutOfFold
from mmfeat.runs.run import Run
from mmfeat.samples.dataset import Sample, SampleSet, read_samples
from mmfeat.samples.photos import Decoding, decode_image
from mmfeat.system import wording

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


MOST_CLASSES = 40  # largest table of classes by classes
PHOTO_SIDE = 160  # pixels
LARGE_SIDE = 320  # pixels of photos that one looks at first
PHOTO_QUALITY = 55
LETTERS = 280  # most letters of the text of a card
SINGLE = ("text", "image")


@dataclass(frozen=True)
class Table:
    """A table of text cells; `shades` in [0, 1] colour the cells, and the rows with an index in `strong` are bold."""

    name: str
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    shades: Sequence[Sequence[float]] | None = None
    strong: frozenset[int] = frozenset()
    folded: bool = False  # the page hides the table behind its caption
    links: Sequence[Sequence[str]] | None = None  # addresses in the page of the cells, "" without

    def shade(self, row: int, column: int) -> float:
        return self.shades[row][column] if self.shades else 0.0

    def link(self, row: int, column: int) -> str:
        return self.links[row][column] if self.links else ""


@dataclass(frozen=True)
class Figure:
    """A plot that `draw` makes on demand; `says` describes the plot to readers who cannot see it."""

    name: str
    caption: str
    says: str
    draw: Callable[[], Drawing]


@dataclass(frozen=True)
class Card:
    """A sample with a title, its text, a line of facts, and its photo as a WebP in base64, "" where it cannot be read
    and None without one."""

    title: str
    text: str
    facts: str
    photo: str | None


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs (`words`), figures, tables and cards below; `commands` are lines for a shell.

    `links` are (address in the page, words). The page folds a section away that few look for, and sets two sections
    side by side that are `half` as wide as the page.
    """

    name: str
    title: str
    words: Sequence[str] = ()
    figures: Sequence[Figure] = ()
    tables: Sequence[Table] = ()
    commands: Sequence[str] = field(default=())
    cards: Sequence[Card] = ()
    links: Sequence[tuple[str, str]] = ()
    folded: bool = False
    half: bool = False


def in_gallery(**filters: str) -> str:
    """The address of the gallery with these filters set, as the script of the page reads it."""
    return f"#gallery?{urlencode(filters)}"


def interval(score: wording.Estimate) -> str:
    """A score as `0.617 [.598, .638]`; "" for a score that is not defined."""
    return wording.interval(score, ", ")


def gain(difference: wording.Estimate) -> str:
    """A difference as `+0.055 [+0.040, +0.071]`."""
    return wording.gain(difference, ", ")


def share(value: float, count: float) -> str:
    """Text of a share of `count` samples with its 95 % Wilson interval."""
    low, high = wilson(value, count)
    return interval(Interval(float(value), float(low), float(high)))


def number(value: float | None) -> str:
    """A rounded value; "" for a value that is not defined."""
    return "" if value is None else f"{value:.3f}"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def title_of(entry: Entry) -> str:
    """The name of an entry, as in `concat on text`; the name of an ensemble has no modality."""
    return entry.head if entry.is_ensemble else entry.label


def make_card(sample: Sample | None, title: str, facts: str, letters: int = LETTERS) -> Card:
    """The card of a sample; of a sample that is gone, a card with title and facts alone."""
    return Card(title, shortened(sample, letters), facts, photo_of(sample) if sample else None)


def shortened(sample: Sample | None, letters: int) -> str:
    text = (sample.text or "") if sample else ""
    return text if len(text) <= letters else f"{text[:letters]}…" if letters else ""


def photo_of(sample: Sample, side: int = LARGE_SIDE) -> str | None:
    """The small photo of a sample in base64; "" where it cannot be read, None where there is none."""
    return None if sample.image is None else base64.b64encode(thumbnail(sample, side)).decode()


def thumbnail(sample: Sample, side: int = PHOTO_SIDE) -> bytes:
    """A WebP of the photo, at most `side` pixels wide and high, without metadata; empty for an unreadable photo."""
    assert sample.image is not None
    try:
        image, _ = decode_image(sample.image.read_bytes(), Decoding(side))
    except OSError:
        return b""
    if image is None:
        return b""
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=PHOTO_QUALITY, method=4)
    return buffer.getvalue()


@dataclass
class Subject:
    """A run and the one of its entries that a report examines; `data` and `columns` say where its samples are."""

    run: Run
    entry: Entry
    data: str
    columns: Mapping[str, str]
    _read: dict[Path, OutOfFold] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        run: Run,
        head: str | None = None,
        modalities: str | None = None,
        data: str | None = None,
        columns: Mapping[str, str] | None = None,
    ) -> Subject:
        """The subject with the named or the recommended entry; `data` is where the data of the run are now."""
        source = run.config.data if data is None else data
        return cls(run, run.predicting(head, modalities), source, columns or run.config.columns)

    def predictions(self, entry: Entry | None = None) -> OutOfFold:
        """The out-of-fold predictions of an entry, by default of the report's entry."""
        entry = self.entry if entry is None else entry
        folder = self.run.head_folder(entry)
        if folder not in self._read:
            self._read[folder] = self.run.out_of_fold(entry)
        return self._read[folder]

    @property
    def alike(self) -> Entry | None:
        """The best entry on text and image whose head was also trained on text and on image alone, or None; None also
        where a table is a third modality, and for numbers, which no modality flips."""
        if self.run.config.table or self.run.config.is_regression:
            return None
        heads = [{entry.head for entry in self.run.matching(modalities=name)} for name in SINGLE]
        both = [entry for entry in (self.entry, *self.run.leaderboard) if entry.modalities == "both"]
        return next((entry for entry in both if all(entry.head in alone for alone in heads)), None)

    @cached_property
    def samples(self) -> SampleSet | None:
        try:
            return self.run.config.known(read_samples(self.data, self.columns))
        except (DataError, OSError):
            return None

    @cached_property
    def by_id(self) -> dict[str, Sample]:
        return {sample.id: sample for sample in self.samples or ()}
