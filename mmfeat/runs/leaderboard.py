"""The leaderboard as files, and the ablation: the scores of each head by modality set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfeat.heads.registry import TWINS
from mmfeat.system.files import csv_text, write_atomic, write_json
from mmfeat.system.notebook import Cells, CsvFrame, Frame, Shown
from mmfeat.system.wording import interval

if TYPE_CHECKING:
    import pyarrow

    from mmfeat.runs.entry import Entry


LEADERBOARD = "leaderboard"
BOTH = "both"  # stands for all modalities that a run has
MODALITY_SETS = (BOTH, "text", "image", "table")
AUTO = "auto"  # heads on both, and on one modality those that matter
INTERVAL = (("value", ""), ("low", "_low"), ("high", "_high"))  # part of a score -> end of its column's name


class Leaderboard(Frame, Shown, tuple["Entry", ...]):
    """The entries of a run, best first; as a frame they are `leaderboard.csv`."""

    def to_arrow(self) -> pyarrow.Table:
        """Rank, head, modalities, all scores with intervals, and tests against the best, rounded as in the file."""
        text = leaderboard_csv(self, list(self[0].classes))
        return CsvFrame(text.encode(), ("head", "modalities")).to_arrow()

    def facts(self) -> list[str]:
        best = self[0]
        first = f"first {best.label}, {best.headline_title} {interval(best.headline)}"
        return [f"{len(self):,} on the leaderboard", first]

    def cells(self) -> Cells:
        names = self[0].main_names
        rows = [
            (entry.head, entry.modalities, *(interval(entry.score(name)) for name in names), "=" if entry.tie else "")
            for entry in self
        ]
        return [("head", "on", *(self[0].titles[name] for name in names), "ties with the first"), *rows]


def write_leaderboard(folder: Path, leaderboard: Sequence[Entry], classes: Sequence[str]) -> None:
    write_json(folder / f"{LEADERBOARD}.json", [entry.to_json() for entry in leaderboard])
    write_atomic(folder / f"{LEADERBOARD}.csv", leaderboard_csv(leaderboard, classes).encode())


def leaderboard_csv(leaderboard: Sequence[Entry], classes: Sequence[str]) -> str:
    """Write all scores with their intervals as CSV, one line for each entry."""
    lines = [{"rank": rank, **_columns(entry, classes)} for rank, entry in enumerate(leaderboard, 1)]
    return csv_text(list(lines[0]), [[line.get(name, "") for name in lines[0]] for line in lines])


def _columns(entry: Entry, classes: Sequence[str]) -> dict[str, Any]:
    seeds = entry.by_seed
    scores = {
        f"{name}{suffix}": _cell(getattr(entry.score(name), part))
        for name in entry.score_names
        for part, suffix in INTERVAL
    }
    by_class: dict[str, str] = {}
    for name, row in entry.classes.items():
        values = {"precision": row.precision, "recall": row.recall, "f1": row.f1.value}
        by_class |= {f"{score}_{name}": _cell(value) for score, value in values.items()}
    parts = {"": "value", **{f"_{part}": part for part in ("low", "high", "p", "p_holm", "mcnemar", "mcnemar_holm")}}
    behind = {f"behind_best{suffix}": _cell(getattr(entry.behind_best, part)) for suffix, part in parts.items()}
    return {
        "head": entry.head,
        "modalities": entry.modalities,
        **scores,
        "seeds": len(seeds.values),
        "seeds_std": _cell(seeds.std),
        "dropped": entry.dropped or "",
        **by_class,
        **behind,
        "tie": entry.tie,
        **{f"picked{suffix}": _cell(getattr(entry.picked, part, None)) for part, suffix in INTERVAL},
        "trials": "" if entry.trials is None else entry.trials,
        "optimism": _cell(entry.optimism),
        "parameters": entry.parameters or "",
    }


def ablation(leaderboard: Sequence[Entry]) -> dict[str, dict[str, Entry]]:
    """Map each head with more than one modality set to its entries: head -> modality set -> entry.

    A head without an entry of its own on one modality shares that of its twin (`TWINS`).
    """
    table: dict[str, dict[str, Entry]] = {}
    for entry in leaderboard:
        table.setdefault(entry.head, {})[entry.modalities] = entry
    for head, twin in TWINS.items():
        if head in table:
            table[head] = {**table.get(twin, {}), **table[head]}
    return {head: entries for head, entries in table.items() if len(entries) > 1}


def ablation_csv(leaderboard: Sequence[Entry], classes: Sequence[str]) -> str:
    """Write the ablation as CSV, one line for each head, modality set and true class.

    A line holds the F1 of the class and how many of its samples were predicted as each class.
    """
    gains = ("value", "low", "high", "p_holm")
    lines = [
        [
            head,
            modalities,
            _cell(entry.headline.value),
            *(_cell(getattr(entry.gain, name, None)) for name in gains),
            name,
            f1,
            *went,
        ]
        for head, entries in ablation(leaderboard).items()
        for modalities, entry in entries.items()
        for name, f1, went in _by_class(entry, classes)
    ]
    header = [
        "head",
        "modalities",
        leaderboard[0].headline_name,
        "gain",
        "gain_low",
        "gain_high",
        "gain_p_holm",
        "label",
        "f1",
    ]
    return csv_text([*header, *(f"predicted_{name}" for name in classes)], lines)


def _by_class(entry: Entry, classes: Sequence[str]) -> list[tuple[str, str, list[str]]]:
    """Name, F1 and confusion of each class; one line without them for a regression."""
    if not entry.classes:
        return [("", "", [""] * len(classes))]
    rows = zip(classes, _confusion(entry, len(classes)), strict=True)
    return [(name, _cell(entry.classes[name].f1.value), went) for name, went in rows]


def _confusion(entry: Entry, classes: int) -> list[list[str]]:
    """The rows of the confusion matrix as text; empty cells for multi-label tasks, which have no such matrix."""
    table = entry.confusion
    if table and isinstance(table[0][0], list):
        return [[""] * classes for _ in table]
    return [[f"{count:.1f}" for count in row] for row in table]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
