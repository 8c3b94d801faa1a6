"""Modalities: the gain of text and image together, and the modality that decides each sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.evaluation.significance import LEVEL
from mmfeat.report.plots import SERIES, new_drawing
from mmfeat.report.section import SINGLE, Figure, Section, Subject, Table, gain, p_value, title_of
from mmfeat.runs.entry import Entry
from mmfeat.runs.leaderboard import MODALITY_SETS, ablation
from mmfeat.samples.table_columns import TABLE
from mmfeat.system.wording import rounded

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


WHO = ("neither", "text", "image", "both")


def ablation_section(subject: Subject) -> Section | None:
    heads = ablation(subject.run.leaderboard)
    if not heads:
        return None
    sets = [name for name in MODALITY_SETS if name != TABLE or subject.run.config.table]
    rows = []
    for head, entries in heads.items():
        scores = [rounded(entries[name].headline.value) if name in entries else "" for name in sets]
        test = entries["both"].gain if "both" in entries else None
        rows.append([head, *scores, *((gain(test), p_value(test.p_holm)) if test else ("", ""))])
    header = ["head", *sets, "both over the better one", "p-value"]
    return Section(
        "ablation",
        "Text and photo",
        [_worth(subject.entry, subject.run.leaderboard)],
        tables=[Table("ablation", f"{subject.entry.headline_title} by what the head sees", header, rows)],
        half=True,
    )


def _worth(shown: Entry, entries: Sequence[Entry]) -> str:
    """What seeing everything brings the entry that is shown, or else the best entry that was tested for it."""
    entry = next((entry for entry in (shown, *entries) if entry.gain), None)
    if entry is None or entry.gain is None:
        return "The same head on each part and on all of them."
    better = f"{gain(entry.gain)} over {entry.gain.over} alone (p-value {p_value(entry.gain.p_holm)})"
    real = "more than chance would make it" if entry.gain.p_holm < LEVEL else "which may be chance"
    return f"Seeing everything gives {entry.head} {better}, {real}. The same for each head that saw parts alone:"


@dataclass(frozen=True)
class Attribution:
    """The modality that decides each of N samples: `who` (N,) indexes `WHO`; `right` maps both, text and image to (N,).

    A modality decides a sample where the same head, trained on the other modality alone, predicts something else.
    `title` is the name of the head.
    """

    who: np.ndarray
    right: dict[str, np.ndarray]
    title: str


def attribute(subject: Subject) -> Attribution | None:
    """The attribution of the best head that was also trained on text and on image alone; None without such a head."""
    entry = subject.alike
    if entry is None:
        return None
    predictions = {name: subject.predictions(subject.run.entry(entry.head, name)) for name in SINGLE}
    predictions["both"] = subject.predictions(entry)
    voted = {name: predicted.voted for name, predicted in predictions.items()}
    text_flips = (voted["both"] != voted["image"]).any(1)
    image_flips = (voted["both"] != voted["text"]).any(1)
    right = {name: predicted.right for name, predicted in predictions.items()}
    return Attribution(text_flips + 2 * image_flips, right, title_of(entry))


def attribution_section(subject: Subject) -> Section | None:
    """The section with the number of samples that each modality decides, and the shares of right predictions."""
    attribution = attribute(subject)
    if attribution is None:
        return None
    rows = []
    for number, name in enumerate(WHO):
        rows_of = attribution.who == number
        right = (attribution.right[seen][rows_of] for seen in ("both", *SINGLE))
        shares = [f"{part.mean():.0%}" if len(part) else "" for part in right]
        rows.append([name, f"{rows_of.sum():,} ({rows_of.mean():.0%})", *shares])
    header = ["decided by", "samples", "right on both", "right on text", "right on image"]
    words = (
        f"{attribution.title} beside the same head trained on text alone and on image alone. image: without the photo "
        "the answer changes; text: without the text; both: either change it; neither: all three agree."
    )
    tables = [Table("attribution", "How often it is right there", header, rows)]
    return Section("attribution", "Which input decides", [words], [_bars(attribution)], tables, half=True)


def _bars(attribution: Attribution) -> Figure:
    def draw() -> Drawing:
        drawing, (axes,) = new_drawing(1.9)
        right = [int((attribution.right["both"] & (attribution.who == number)).sum()) for number in range(len(WHO))]
        wrong = [int((~attribution.right["both"] & (attribution.who == number)).sum()) for number in range(len(WHO))]
        axes.barh(WHO, right, color=SERIES[0], label="right")
        axes.barh(WHO, wrong, left=right, color=SERIES[1], label="wrong")
        axes.invert_yaxis()
        axes.set_xlabel("samples")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")
        return drawing

    return Figure("attribution", "Samples by the input that decides", "the table below has the counts", draw)
