"""Modalities: the gain of text and image together, and the modality that decides each sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.report.plots import SERIES, new_drawing
from mmfeat.report.results import SINGLE, Results
from mmfeat.report.section import Figure, Section, Table, gain, interval, p_value, title_of
from mmfeat.runs.entry import Entry
from mmfeat.runs.leaderboard import ablation

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


WHO = ("neither", "text", "image", "both")


def ablation_section(results: Results) -> Section | None:
    """macro-F1 of each head on text, image and both."""
    found = ablation(results.run.leaderboard)
    if not found:
        return None
    rows = [
        [
            head,
            *(interval(entries[name].macro_f1) if name in entries else "" for name in ("both", *SINGLE)),
            *_gained(entries.get("both")),
        ]
        for head, entries in found.items()
    ]
    header = ["head", "both", "text", "image", "both over the better one", "p"]
    return Section(
        "ablation",
        "Ablation",
        ["What a head gains from seeing both, against the better single one: paired bootstrap, Holm over the heads."],
        tables=[Table("ablation", "macro-F1 by modality", header, rows)],
    )


def _gained(both: Entry | None) -> tuple[str, str]:
    """The gain over the better single modality and its p-value, "" without a single modality."""
    test = both.gain if both else None
    return (gain(test), p_value(test.p_holm)) if test else ("", "")


@dataclass(frozen=True)
class Attribution:
    """Who decides each of N samples: `who` (N,) indexes `WHO`; `right` maps both, text and image to (N,) bool.

    A modality decides where the head would say something else without it, which its twin on the other one tells.
    """

    who: np.ndarray
    right: dict[str, np.ndarray]
    title: str


def attribute(results: Results) -> Attribution | None:
    """The attribution of the best head that was also trained on text and on image alone; None without such a head."""
    entry = results.alike
    if entry is None:
        return None
    found = {name: results.predictions(results.run.entry(entry.head, name)) for name in SINGLE}
    found["both"] = results.predictions(entry)
    voted = {name: each.voted for name, each in found.items()}
    text_flips = (voted["both"] != voted["image"]).any(1)
    image_flips = (voted["both"] != voted["text"]).any(1)
    return Attribution(
        text_flips + 2 * image_flips, {name: each.right for name, each in found.items()}, title_of(entry)
    )


def attribution_section(results: Results) -> Section:
    """Number of samples that each modality decides, and the share of right decisions."""
    title = "Attribution"
    found = attribute(results)
    if found is None:
        return Section("attribution", title, ["This needs a head that was trained on text, on image and on both."])
    rows = []
    for number, name in enumerate(WHO):
        here = found.who == number
        shares = [f"{found.right[each][here].mean():.0%}" if here.any() else "" for each in ("both", *SINGLE)]
        rows.append([name, f"{here.sum():,} ({here.mean():.0%})", *shares])
    header = ["flipped by", "samples", "both right", "text right", "image right"]
    words = (
        f"{found.title} beside the same head trained on text alone and on image alone. A modality flips a sample where "
        "the head says something else without it: neither (all three agree), text, image, or both (each is needed)."
    )
    return Section(
        "attribution", title, [words], [_bars(found)], [Table("attribution", "Samples by who flips them", header, rows)]
    )


def _bars(found: Attribution) -> Figure:
    def draw() -> Drawing:
        drawing, (axes,) = new_drawing(1.9)
        right = [int((found.right["both"] & (found.who == number)).sum()) for number in range(len(WHO))]
        wrong = [int((~found.right["both"] & (found.who == number)).sum()) for number in range(len(WHO))]
        axes.barh(WHO, right, color=SERIES[0], label="right")
        axes.barh(WHO, wrong, left=right, color=SERIES[1], label="wrong")
        axes.invert_yaxis()
        axes.set_xlabel("samples")
        axes.grid(axis="y", visible=False)
        axes.legend(loc="lower right")
        return drawing

    return Figure("attribution", "Samples by the modality that flips them", "the table below has the counts", draw)
