"""Runs side by side: scores, paired tests, different settings, and scores by class."""

from __future__ import annotations

from collections.abc import Sequence

from mmfeat.report.plots import SERIES, score_figure
from mmfeat.report.section import Section, Table, gain, interval, p_value, title_of
from mmfeat.runs.compare import Comparison


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
