"""Training: learning curves, effects of settings, and stage 2 against stage 1."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.errors import RunError
from mmfeat.evaluation.significance import holm
from mmfeat.report.plots import SERIES, new_drawing, score_figure
from mmfeat.report.section import Figure, Section, Subject, Table, gain, interval, number, p_value, title_of
from mmfeat.runs.entry import Entry
from mmfeat.runs.record import read_trial
from mmfeat.runs.run import CURVES, Run
from mmfeat.system.wording import SCORE_NAMES, head_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing


PLOTTED = 4  # entries in the plot of learning curves
MOST_VALUES = 12  # a setting with more numbers than these is shown by quartiles
CURVE_NAMES = {"loss": "training loss", "validation_loss": "validation loss"}
SCORE_CURVES = {f"validation_{name}": SCORE_NAMES[name] for name in ("macro_f1", "kappa", "r2")}
Curves = Mapping[str, Mapping[int, Sequence[float]]]  # name -> epoch -> values of all folds and seeds


def curves_section(subject: Subject) -> Section | None:
    """The section with loss and validation score by epoch of the best heads that have epochs."""
    curves = ((title_of(entry), read_curves(subject.run, entry)) for entry in subject.run.leaderboard)
    shown = dict([(title, by_name) for title, by_name in curves if by_name][:PLOTTED])
    if not shown:
        return None
    words = "The mean over folds and seeds; the band goes from lowest to highest. Early stopping ends some sooner."
    figures = [_curves(title, curves, index) for index, (title, curves) in enumerate(shown.items())]
    return Section("curves", "Learning curves", [words], figures, folded=True)


def read_curves(run: Run, entry: Entry) -> Curves:
    """The curves of an entry; empty for baselines and ensembles, which have no epochs."""
    path = run.head_folder(entry) / CURVES
    curves: dict[str, dict[int, list[float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in (row for row in csv.DictReader(file) if row.get("epoch")):
                for name in filter(row.get, (*CURVE_NAMES, *SCORE_CURVES)):
                    curves.setdefault(name, defaultdict(list))[int(float(row["epoch"]))].append(float(row[name]))
    except OSError:
        return {}
    except (ValueError, csv.Error) as error:
        raise RunError(f"{path}: not a table of curves ({error}); train it again") from error
    return curves


def _curves(title: str, curves: Curves, index: int) -> Figure:
    def draw() -> Drawing:
        drawing, (left, right) = new_drawing(2.1, 2)
        for colour, name in zip((SERIES[7], SERIES[0]), ("loss", "validation_loss"), strict=True):
            _line(left, curves.get(name, {}), colour, CURVE_NAMES[name])
        for name in SCORE_CURVES.keys() & curves:
            _line(right, curves[name], SERIES[2], f"validation {SCORE_CURVES[name]}")
        for panel in (left, right):
            panel.legend(fontsize=7)
            panel.set_xlabel("epoch")
            panel.locator_params(axis="x", integer=True)
        return drawing

    name = f"curves-{index + 1}" if index else "curves"
    return Figure(name, f"{title}: loss and score by epoch", "two curves of losses, one of scores", draw)


def _line(axes: Axes, values: Mapping[int, Sequence[float]], colour: str, name: str) -> None:
    if not values:
        return
    epochs = sorted(values)
    axes.plot([e + 1 for e in epochs], [np.mean(values[e]) for e in epochs], color=colour, label=name, marker=".")
    low, high = [min(values[e]) for e in epochs], [max(values[e]) for e in epochs]
    axes.fill_between([e + 1 for e in epochs], low, high, color=colour, alpha=0.15, linewidth=0)


def effects_section(subject: Subject) -> Section | None:
    trials = {title_of(entry): list(read_trials(subject.run, entry)) for entry in subject.run.leaderboard}
    groups, correlations = [], []
    for title, results in trials.items():
        for name in varied([settings for settings, _ in results]):
            groups += [[title, name, *row] for row in group_means(results, name)]
            if rho_and_p := correlation(results, name):
                correlations.append((title, name, *rho_and_p))
    if not groups:
        return None
    header = ["head", "setting", "value", "trials", "mean", "standard deviation", "best"]
    caption = f"{subject.entry.headline_title} on validation rows by value of a setting"
    tables = [Table("settings", caption, header, groups, folded=len(groups) > 40)]
    if correlations:
        plan = subject.run.config.plan
        tables.append(_correlations(correlations, adaptive=plan is not None and plan.method == "optuna"))
    words = "All scores here are of validation rows: nothing was chosen on the rows that are scored."
    return Section("settings", "Settings that were tried", [words], tables=tables, folded=True)


def read_trials(run: Run, entry: Entry) -> Iterator[tuple[dict[str, Any], float]]:
    """(settings, mean score on validation rows) of each trial of an entry."""
    for path in sorted(Path(run.head_folder(entry) / "trials").glob("*.json")):
        record = read_trial(path.with_suffix(""))
        yield dict(record["settings"]), float(np.mean(record["scores"]))


def varied(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in (settings[0] if settings else ()) if len({str(values[name]) for values in settings}) > 1]


def group_means(trials: Sequence[tuple[Mapping[str, Any], float]], name: str) -> list[list[str]]:
    """Rows of value, number of trials, mean, standard deviation and best score; many numbers become quartiles."""
    groups: dict[Any, list[float]] = defaultdict(list)
    for settings, score in trials:
        groups[settings[name]].append(score)
    if len(groups) > MOST_VALUES and all(isinstance(value, int | float) for value in groups):
        groups = _quartiles(trials, name)
    ordered = sorted(groups.items(), key=lambda group: (isinstance(group[0], str), group[0]))
    return [
        [
            f"{value:g}" if isinstance(value, float) else str(value),
            str(len(scores)),
            number(float(np.mean(scores))),
            number(float(np.std(scores, ddof=1))) if len(scores) > 1 else "",
            number(max(scores)),
        ]
        for value, scores in ordered
    ]


def _quartiles(trials: Sequence[tuple[Mapping[str, Any], float]], name: str) -> dict[Any, list[float]]:
    ordered = sorted(trials, key=lambda trial: trial[0][name])
    parts = np.array_split(np.arange(len(ordered)), 4)
    groups: dict[Any, list[float]] = {}
    for quartile, part in enumerate(parts, 1):
        low, high = ordered[part[0]][0][name], ordered[part[-1]][0][name]
        groups[f"{quartile}. {low:.3g} to {high:.3g}"] = [ordered[row][1] for row in part]
    return groups


def correlation(trials: Sequence[tuple[Mapping[str, Any], float]], name: str) -> tuple[float, float] | None:
    """Spearman's rho of a setting and the score, and its p-value; None for words, constants and fewer than 4 trials."""
    from scipy.stats import spearmanr

    values, scores = [settings[name] for settings, _ in trials], [score for _, score in trials]
    if len(trials) < 4 or not all(isinstance(value, int | float) for value in values):
        return None
    if len(set(values)) < 2 or len(set(scores)) < 2:  # scipy would warn on the user's terminal
        return None
    result = spearmanr(values, scores)
    return float(result.statistic), float(result.pvalue)


def _correlations(correlations: Sequence[tuple[str, str, float, float]], adaptive: bool) -> Table:
    """The table of (head, setting, rho, p), without p for an `adaptive` search, whose trials are not independent."""
    caption = "Rank correlation of a setting with the score"
    if adaptive:
        header = ["head", "setting", "Spearman's rho"]
        rows = [[title, name, f"{rho:+.2f}"] for title, name, rho, _ in correlations]
        return Table("correlations", caption, header, rows)
    adjusted = holm([p for *_, p in correlations])
    rows = [
        [title, name, f"{rho:+.2f}", p_value(p)]
        for (title, name, rho, _), p in zip(correlations, adjusted, strict=True)
    ]
    return Table("correlations", f"{caption}; p after Holm", ["head", "setting", "Spearman's rho", "p"], rows)


def stages_section(subject: Subject) -> Section | None:
    run = subject.run
    if not run.is_finetuned:
        return None
    entries = sorted(run.leaderboard, key=lambda entry: entry.over_stage_1 is not None)
    rows = [
        [
            entry.head,
            interval(entry.macro_f1),
            gain(entry.over_stage_1) if entry.over_stage_1 else "",
            p_value(entry.over_stage_1.p_holm) if entry.over_stage_1 else "",
            *(number((entry.scores or {}).get(name)) for name in ("train", "validation", "test")),
        ]
        for entry in entries
    ]
    words = [f"Stage 1 is {head_label(entries[0].fusion, entries[0].modalities)} of {run.config.parent}."]
    words += [f"Warning: {run.results.warning}."] if run.results.warning else []
    header = ["stage", "macro-F1", "over stage 1", "p-value", "training rows", "validation", "test"]
    caption = "The last three are macro-F1 without adjustment: a gap between them shows learning by heart"
    scores, names = [entry.macro_f1 for entry in entries], [entry.head for entry in entries]
    colours, says = [SERIES[7]] + [SERIES[0]] * len(entries[1:]), "the table below has the values"
    figure = score_figure("stages", "macro-F1 of the stages", says, scores, names, colours)
    return Section("stages", "Stage 1 and stage 2", words, [figure], [Table("stages", caption, header, rows)])
