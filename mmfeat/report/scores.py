"""Scores of all heads and of runs side by side: leaderboard, paired tests, scores by class, and confusions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mmfeat.evaluation.significance import LEVEL, compare_pairs
from mmfeat.report.plots import SERIES, new_drawing, score_figure, whiskers
from mmfeat.report.section import (
    MOST_CLASSES,
    SINGLE,
    Figure,
    Section,
    Subject,
    Table,
    gain,
    in_gallery,
    interval,
    number,
    p_value,
    share,
    title_of,
)
from mmfeat.runs.compare import Comparison, Partitions, read_partitions
from mmfeat.runs.entry import ClassScores, Entry

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


PLOTTED = 16  # entries in the plot of the leaderboard
PAIRED = 10  # entries in the table of paired tests
NARROW = 5  # classes of a matrix that fits half the page
CONFUSED = 60  # pairs of classes in a list of confusions


def leaderboard_section(subject: Subject) -> Section:
    entries = subject.run.leaderboard
    title, best = entries[0].headline_title, title_of(entries[0])
    if len(entries) == 1:
        words = [f"{best} is the only entry: {title} {interval(entries[0].headline)}."]
    else:
        ties = sum(bool(entry.tie) for entry in entries[1:])
        tie = f"{ties} of the others, marked =, may be as good" if ties else "No other entry may be as good"
        words = [
            f"{best} comes first of {len(entries)}: {title} {interval(entries[0].headline)}. {tie}: a difference "
            "counts as real if it is larger than chance would make it (p-value below 0.05, adjusted for all pairs)."
        ]
    if entries[0].picked and len(entries) > 1:
        words.append(
            f"The winner was picked on these samples, so its score is slightly too high: expect "
            f"{interval(entries[0].picked)} on new ones."
        )
    if any(entry.dropped for entry in entries):
        words.append("Entries with 1 seed were clearly worse after their first seed and were not trained again.")
    tables = [_ranking(entries), _leaderboard(entries, read_partitions(subject.run))]
    return Section("leaderboard", "Leaderboard", words, [forest(entries)], tables)


def forest(ranked: Sequence[Entry], plotted: int = PLOTTED) -> Figure:
    entries = ranked[:plotted]

    def draw() -> Drawing:
        drawing, (axes,) = new_drawing(0.7 + 0.22 * len(entries))
        colours = [SERIES[0] if number == 0 or entry.tie else SERIES[7] for number, entry in enumerate(entries)]
        whiskers(axes, [entry.headline for entry in entries], [title_of(entry) for entry in entries], colours)
        axes.set_xlabel(entries[0].headline_title)
        axes.axvline(entries[0].headline.value, color=SERIES[0], linewidth=0.8, linestyle=":")
        return drawing

    caption = f"{entries[0].headline_title} with 95 % intervals; blue: the best and what ties with it"
    if len(entries) < len(ranked):
        caption += f"; the first {len(entries)} of {len(ranked)} entries"
    says = f"{title_of(entries[0])} at {interval(entries[0].headline)}; the table below has all values"
    return Figure("leaderboard", caption, says, draw)


def _ranking(entries: Sequence[Entry]) -> Table:
    names = entries[0].main_names[:2]
    rows = [
        ["=" if entry.tie else "", entry.head, entry.modalities, *(interval(entry.score(name)) for name in names)]
        for entry in entries
    ]
    header = ["", "head", "on", *(entries[0].titles[name] for name in names)]
    return Table("ranking", "All entries, best first", header, rows, strong=_ties(entries))


def _ties(entries: Sequence[Entry]) -> frozenset[int]:
    return frozenset(rank for rank, entry in enumerate(entries) if entry.tie or not rank)


def _leaderboard(entries: Sequence[Entry], partitions: Partitions | None) -> Table:
    """Every score, and the mean and range of the first one over several partitions into folds, where there are any."""
    spreads = {one.label: f"{one.mean:.3f} ({one.span})" for one in partitions.entries} if partitions else {}
    first, *others = entries[0].score_names
    header = ["", "head", "on", entries[0].titles[first], "± seeds", "behind the first", "p-value"]
    header += [f"mean over {len(partitions.runs)} partitions"] if partitions else []
    header += [entries[0].titles[name] for name in others]
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
                *([spreads.get(entry.label, "")] if partitions else []),
                *(interval(entry.score(name)) for name in others),
            ]
        )
    return Table("leaderboard", "Every score of every entry", header, rows, strong=_ties(entries), folded=True)


def significance_section(subject: Subject) -> Section | None:
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
    caption = f"{title} of the row minus that of the column; * and blue: real, p-value below {LEVEL} for all pairs"
    pairs = len(entries) * (len(entries) - 1) // 2
    proven = int((p < LEVEL).sum()) // 2
    return Section(
        "significance",
        "Which differences are real",
        [f"Of {pairs} pairs of entries, {proven} differ by more than chance (paired bootstrap of the same samples)."],
        tables=[Table("significance", caption, ["entry", *names], numbered, shades)],
        folded=True,
    )


def classes_section(subject: Subject) -> Section:
    entry, classes = subject.entry, subject.run.classes
    header = ["class", "samples", "precision", "recall", "F1"]
    rows = [_of_class(name, entry.classes[name], chosen) for name, chosen in zip(classes, _chosen(entry), strict=True)]
    present = [name for name in classes if entry.classes[name].support]
    weakest = min(present, key=lambda name: entry.classes[name].f1.value)
    words = [f"{title_of(entry)} is weakest on {weakest}: F1 {interval(entry.classes[weakest].f1)}."]
    if absent := [name for name in classes if name not in present]:
        words.append(f"No sample out of fold is {', '.join(absent)}: that counts as F1 0 in every macro-F1.")
    scores = [entry.classes[name].f1 for name in classes]
    figure = score_figure("classes", "F1", "the table has the values", scores, classes, SERIES[:1] * len(classes))
    figures = [figure] if len(classes) <= PLOTTED else []
    tables = [Table("classes", f"Classes of {title_of(entry)}", header, rows)]
    return Section("classes", "Classes", words, figures, tables, half=len(classes) <= NARROW)


def _of_class(name: str, scores: ClassScores, chosen: float) -> list[str]:
    if not scores.support:
        return [name, "0", *[""] * 3]
    shares = share(scores.precision, chosen), share(scores.recall, scores.support)
    return [name, f"{scores.support:,}", *shares, interval(scores.f1)]


def _chosen(entry: Entry) -> list[float]:
    """The number of samples for which each class was chosen, the mean over seeds."""
    counts = np.array(entry.confusion)
    return (counts.sum(0) if counts.ndim == 2 else counts[:, :, 1].sum(1)).tolist()


def confusion_section(subject: Subject) -> Section:
    """The section with confusions of the entry, and of the best head on text and on image alone."""
    alike = subject.alike
    twins = [] if alike is None else [subject.run.entry(alike.head, name) for name in SINGLE]
    shown = [subject.entry, *(twin for twin in twins if twin is not subject.entry)]
    make = _binary if subject.run.config.is_multilabel else confusion
    tables = [make(entry, subject.run.classes, index) for index, entry in enumerate(shown)]
    tables = [tables[0], *(replace(table, folded=True) for table in tables[1:])]
    words = "A row for each label, a column for each prediction: how many samples, and the share of the row."
    if tables[0].links:
        words += " A number leads to its samples."
    return Section("confusion", "Confusion", [words], tables=tables, half=len(subject.run.classes) <= NARROW)


def confusion(entry: Entry, classes: Sequence[str], index: int) -> Table:
    counts = np.array(entry.confusion)
    if len(classes) > MOST_CLASSES:
        return _confused(counts, entry, classes, index)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-9)
    rows, links = [], []
    for name, line, parts in zip(classes, counts, shares, strict=True):
        cells = list(zip(classes, line, parts, strict=True))
        rows.append([name, *(f"{count:,.0f} ({part:.0%})" if count >= 0.5 else "0" for _, count, part in cells)])
        there = [in_gallery(status="all", label=name, prediction=chosen) for chosen in classes]
        links.append(["", *(link if count >= 0.5 else "" for link, count in zip(there, line, strict=True))])
    shades = [[0.0, *parts] for parts in shares.tolist()]
    header = ["label", *(f"→ {name}" for name in classes)]
    return Table(_confusion_name(entry, index), title_of(entry), header, rows, shades, links=None if index else links)


def _confused(counts: np.ndarray, entry: Entry, classes: Sequence[str], index: int) -> Table:
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


def comparison_sections(comparison: Comparison) -> list[Section]:
    """The sections of a comparison: scores and tests against the first run, different settings, and classes."""
    names = names_of_runs(comparison)
    rows, shown = [], comparison.entries[0].main_names[:2]
    for run, name, entry, test, reason in zip(
        comparison.runs, names, comparison.entries, comparison.tests, comparison.reasons, strict=True
    ):
        scores = [interval(entry.score(score)) for score in shown]
        tested = [gain(test.difference), p_value(test.p_holm), "=" if test.tie else ""] if test else ["", "", ""]
        rows.append(
            [name, title_of(entry), *scores, *tested, reason or ("" if run is comparison.runs[0] else "paired")]
        )
    titles = [comparison.entries[0].titles[score] for score in shown]
    header = ["run", "head", *titles, "over the first", "p-value", "tie", "test"]
    words = [
        "One entry of each run against that of the first, on the samples that both predicted out of fold (paired "
        "bootstrap; p-values are adjusted for the number of runs)."
    ]
    if not comparison.preselected:
        words[0] += " Each was picked as the best of its run on these samples, so its score is slightly too high."
    if comparison.otherwise != comparison.scored:
        scored, other = names[comparison.scored], names[comparison.otherwise]
        words.append(
            f"{comparison.relabelled:,} labels differ; all scores and tests here are against those of {scored}."
        )
        others = [test.otherwise if test else None for test in comparison.tests]
        words += [
            f"Against the labels of {other}: {name} {gain(difference)} over the first."
            for name, difference in zip(names, others, strict=True)
            if difference
        ]
    if not comparison.fair:
        words.append("Not all of them can be compared: scores on other data or folds say nothing about each other.")
    table = Table("comparison", "Runs side by side", header, rows)
    title, says = comparison.entries[0].headline_title, "the table has the values"
    colours = [SERIES[0]] + [SERIES[7]] * len(names[1:])
    figure = score_figure("comparison", title, says, [e.headline for e in comparison.entries], names, colours)
    return [
        Section("comparison", "Comparison", words, [figure], [table]),
        _settings(comparison, names),
        *([] if comparison.entries[0].r2 else [_classes(comparison, names)]),
    ]


def names_of_runs(comparison: Comparison) -> list[str]:
    """The names of the run folders, with the folder above where two names are equal."""
    names = [run.folder.name for run in comparison.runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in comparison.runs]


def _settings(comparison: Comparison, names: Sequence[str]) -> Section:
    rows = [[name, *values] for name, values in comparison.settings.items()]
    words = [] if rows else ["All their settings are equal."]
    tables = [Table("differences", "What differs", ["setting", *names], rows)] if rows else []
    return Section("differences", "Settings that differ", words, tables=tables)


def _classes(comparison: Comparison, names: Sequence[str]) -> Section:
    classes = list(dict.fromkeys(name for run in comparison.runs for name in run.classes))
    rows = [
        [name, *(interval(entry.classes[name].f1) if name in entry.classes else "" for entry in comparison.entries)]
        for name in classes
    ]
    return Section("classes", "Classes", tables=[Table("classes", "F1 by class", ["class", *names], rows)])
