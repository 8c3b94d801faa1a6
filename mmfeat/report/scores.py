"""Scores of all heads: leaderboard, paired tests, scores by class, and confusions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.evaluation.significance import LEVEL, compare_pairs
from mmfeat.report.plots import SERIES, new_drawing, short, whiskers
from mmfeat.report.section import MOST_CLASSES, Figure, Section, Table, gain, interval, number, p_value, share, title_of
from mmfeat.report.subject import SINGLE, Subject
from mmfeat.runs.entry import ClassScores, Entry
from mmfeat.system.wording import SCORE_NAMES

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


PLOTTED = 16  # entries in the plot of the leaderboard
PAIRED = 10  # entries in the table of paired tests
BY_CLASS = 5  # entries in the plot of scores by class
SHOWN_SCORES = ("kappa", "macro_f1", "accuracy", "auroc", "log_loss", "r2", "mae", "rmse", "spearman")
CONFUSED = 60  # pairs of classes in a list of confusions


def leaderboard_section(subject: Subject) -> Section:
    """The section with all entries, best first, and the entries that tie with the best."""
    entries = subject.run.leaderboard
    title = entries[0].headline_title
    samples = f"{entries[0].samples:,} samples out of fold, 95 % bootstrap intervals"
    if len(entries) == 1:
        words = [f"{title_of(entries[0])} alone: {title} {interval(entries[0].headline)}.", f"{samples}."]
    else:
        ties = sum(bool(entry.tie) for entry in entries[1:])
        best = f"{title_of(entries[0])} is the best of {len(entries)}: {title} {interval(entries[0].headline)}."
        tie = f"{ties} more tie with it (=): the difference is within noise." if ties else "No other ties with it."
        words = [
            f"{best} {tie}",
            f"{samples}, paired bootstrap against the first; p is adjusted for all pairs, since any head may come "
            "first by chance.",
        ]
    if entries[0].picked and len(entries) > 1:
        words.append(f"To be picked takes some luck: expect {interval(entries[0].picked)} of it on new samples.")
    if any(entry.dropped for entry in entries):
        words.append("1 seed: clearly worse than the first after one seed, so it was not trained with the others.")
    return Section("leaderboard", "Leaderboard", words, [forest(entries[:PLOTTED])], [_leaderboard(entries)])


def forest(entries: Sequence[Entry]) -> Figure:
    def draw() -> Drawing:
        drawing, (axes,) = new_drawing(0.7 + 0.22 * len(entries))
        colours = [SERIES[0] if number == 0 or entry.tie else SERIES[7] for number, entry in enumerate(entries)]
        whiskers(axes, [entry.headline for entry in entries], [title_of(entry) for entry in entries], colours)
        axes.set_xlabel(entries[0].headline_title)
        axes.axvline(entries[0].headline.value, color=SERIES[0], linewidth=0.8, linestyle=":")
        return drawing

    caption = f"{entries[0].headline_title} with 95 % intervals; blue: the best and what ties with it"
    says = f"{title_of(entries[0])} at {interval(entries[0].headline)}; the table below has all values"
    return Figure("leaderboard", caption, says, draw)


def _leaderboard(entries: Sequence[Entry]) -> Table:
    first, *others = [name for name in entries[0].score_names if name in SHOWN_SCORES]
    header = ["", "head", "on", SCORE_NAMES[first], "± seeds", "behind the first", "p"]
    header += [SCORE_NAMES[name] for name in others]
    rows = []
    for rank, entry in enumerate(entries):
        seeds = entry.by_seed
        alone = "1 seed" if entry.dropped else ""
        rows.append(
            [
                "=" if entry.tie else "",
                entry.head,
                entry.modalities,
                interval(entry.headline),
                number(seeds.std) if len(seeds.values) > 1 else alone,
                gain(entry.behind_best) if rank and entry.behind_best else "",
                p_value(entry.behind_best.p_holm) if rank and entry.behind_best else "",
                *(interval(entry.score(name)) for name in others),
            ]
        )
    strong = frozenset(rank for rank, entry in enumerate(entries) if entry.tie or not rank)
    return Table("leaderboard", "All entries, best first", header, rows, strong=strong)


def significance_section(subject: Subject) -> Section | None:
    """The section with paired tests of the best entries against each other."""
    entries = subject.run.leaderboard[:PAIRED]
    if len(entries) < 2:
        return None
    predictions = [subject.predictions(entry) for entry in entries]
    first = predictions[0]
    differences, p = compare_pairs(first.targets, [predicted.chosen for predicted in predictions], first.groups)
    rows, shades = [], []
    for row, entry in enumerate(entries):
        cells = [
            f"{difference.value:+.3f}" + ("*" if p[row, column] < LEVEL else "")
            for column, difference in enumerate(differences[row])
        ]
        cells[row] = ""
        rows.append([title_of(entry), *cells])
        shades.append([0.0, *(float(1 - value) if value < LEVEL else 0.0 for value in p[row])])
    names = [str(rank) for rank in range(1, len(entries) + 1)]
    numbered = [[f"{rank}  {row[0]}", *row[1:]] for rank, row in zip(names, rows, strict=True)]
    title = entries[0].headline_title
    caption = f"{title} of the row less that of the column; * and blue: p below {LEVEL}, adjusted for all pairs"
    pairs = len(entries) * (len(entries) - 1) // 2
    proven = int((p < LEVEL).sum()) // 2
    return Section(
        "significance",
        "Significance",
        [f"Of {pairs} pairs, {proven} differ by more than noise (paired bootstrap of the same samples)."],
        tables=[Table("significance", caption, ["", *names], numbered, shades)],
    )


def classes_section(subject: Subject) -> Section:
    """The section with precision, recall and F1 of each class."""
    entry, classes = subject.entry, subject.run.classes
    header = ["class", "samples", "precision", "recall", "F1"]
    rows = [_of_class(name, entry.classes[name], chosen) for name, chosen in zip(classes, _chosen(entry), strict=True)]
    present = [name for name in classes if entry.classes[name].support]
    weakest = min(present, key=lambda name: entry.classes[name].f1.value)
    words = [f"{title_of(entry)} is weakest on {weakest}: F1 {interval(entry.classes[weakest].f1)}."]
    if absent := [name for name in classes if name not in present]:
        words.append(f"No sample out of fold is {', '.join(absent)}: that counts as F1 0 in every macro-F1.")
    entries = [entry, *(other for other in subject.run.leaderboard if other is not entry)][:BY_CLASS]
    figures = [_by_class(entries, classes)] if len(classes) <= len(SERIES) else []
    return Section(
        "classes", "Classes", words, figures, [Table("classes", f"Classes of {title_of(entry)}", header, rows)]
    )


def _of_class(name: str, scores: ClassScores, chosen: float) -> list[str]:
    """The row of a class, which was `chosen` for so many samples; without samples, a class has no scores."""
    if not scores.support:
        return [name, "0", *[""] * 3]
    shares = share(scores.precision, chosen), share(scores.recall, scores.support)
    return [name, f"{scores.support:,}", *shares, interval(scores.f1)]


def _chosen(entry: Entry) -> list[float]:
    """The number of samples for which each class was chosen, the mean over seeds."""
    counts = np.array(entry.confusion)
    return (counts.sum(0) if counts.ndim == 2 else counts[:, :, 1].sum(1)).tolist()


def _by_class(entries: Sequence[Entry], classes: Sequence[str]) -> Figure:
    def draw() -> Drawing:
        drawing, axes = new_drawing(0.8 + 0.24 * len(entries), len(classes), sharex=True, sharey=True)
        for panel, name in zip(axes, classes, strict=True):
            scores = [entry.classes[name].f1 for entry in entries]
            whiskers(
                panel, scores, [title_of(entry) for entry in entries], [SERIES[0]] + [SERIES[7]] * len(entries[1:])
            )
            panel.set_title(short(name))
            panel.set_xlabel("F1")
        return drawing

    return Figure("classes", "F1 by class with 95 % intervals", "the values of the first stand in the table", draw)


def confusion_section(subject: Subject) -> Section:
    """The section with confusions of the entry, and of the best head on text and on image alone."""
    alike = subject.alike
    twins = [] if alike is None else [subject.run.entry(alike.head, name) for name in SINGLE]
    shown = [subject.entry, *(twin for twin in twins if twin is not subject.entry)]
    make = _binary if subject.run.config.is_multilabel else confusion
    tables = [make(entry, subject.run.classes, index) for index, entry in enumerate(shown)]
    words = "Rows are labels, columns predictions, mean over seeds; the share is of the row."
    return Section("confusion", "Confusion", [words], tables=tables)


def confusion(entry: Entry, classes: Sequence[str], index: int) -> Table:
    counts = np.array(entry.confusion)
    if len(classes) > MOST_CLASSES:
        return _confused(counts, entry, classes, index)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-9)
    rows = [
        [name, *(f"{count:,.0f} ({part:.0%})" for count, part in zip(line, parts, strict=True))]
        for name, line, parts in zip(classes, counts, shares, strict=True)
    ]
    shades = [[0.0, *parts] for parts in shares.tolist()]
    return Table(_confusion_name(entry, index), title_of(entry), ["", *(f"→ {name}" for name in classes)], rows, shades)


def _confused(counts: np.ndarray, entry: Entry, classes: Sequence[str], index: int) -> Table:
    """The table of the most frequent confusions, for more classes than a matrix can show."""
    wrong = counts * (1 - np.eye(len(classes)))
    order = np.argsort(-wrong, axis=None, kind="stable")[:CONFUSED]
    rows = []
    for label, taken in (divmod(int(index), len(classes)) for index in order if wrong.flat[index] > 0):
        number = counts[label, taken]
        rows.append([classes[label], classes[taken], f"{number:,.0f} ({number / counts[label].sum():.0%})"])
    caption = f"{title_of(entry)}, the most frequent errors"
    return Table(_confusion_name(entry, index), caption, ["label", "taken for", "samples"], rows)


def _binary(entry: Entry, classes: Sequence[str], index: int) -> Table:
    rows = [
        [name, *(f"{count:,.0f}" for count in (hits, missed, false, rest))]
        for name, ((rest, false), (missed, hits)) in zip(classes, entry.confusion, strict=True)
    ]
    header = ["class", "found", "missed", "wrongly found", "rightly not"]
    return Table(_confusion_name(entry, index), title_of(entry), header, rows)


def _confusion_name(entry: Entry, index: int) -> str:
    return f"confusion-{title_of(entry).replace(' on ', '-')}" if index else "confusion"
