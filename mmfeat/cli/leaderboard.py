"""The result of a sweep on the screen: leaderboard, ablation, confusion matrix, search and cost."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.measure import Measurement
from rich.table import Table

from mmfeat.cli.console import out
from mmfeat.runs.leaderboard import ablation
from mmfeat.system.wording import gain, interval

if TYPE_CHECKING:
    from mmfeat.runs.run import Run
    from mmfeat.sweep.train import Sweep


SHOWN_ROWS = 20
SHOWN_CLASSES = 5
SHOWN_OPTIMISM = 0.0005  # macro-F1; a smaller optimism is not printed
COLUMNS = 80
NEAR = (0, 1, 0, 0)  # padding that keeps the leaderboard within 80 columns


def show_sweep(sweep: Sweep) -> None:
    """Print the leaderboard, the ablation, the confusion matrix of the best entry, and the path of the run."""
    run = sweep.run
    if sweep.reused:
        out.print("nothing to do: this configuration was trained on this data before")
    if sweep.new_splits is not None:
        out.print(f"splits written to {sweep.new_splits}; later runs with --split-dir {sweep.new_splits} reuse them")
    for note in sweep.notes:
        out.print(f"note: {note}")
    out.print(_leaderboard(run, len(run.classes) <= SHOWN_CLASSES))
    if (more := len(run.leaderboard) - SHOWN_ROWS) > 0:
        out.print(f"and {more} more in the file")
    out.print(_explanation(run))
    if table := _ablation(run):
        out.print(table)
    if table := _confusion(run):
        out.print(table)
    _show_search(run)
    _show_cost(run, sweep)
    out.print(f"leaderboard {run.leaderboard_file}")


def _leaderboard(run: Run, by_class: bool) -> Table:
    """Return the leaderboard within 80 columns, for which it may lose the F1 by class; the CSV file has everything."""
    header = ["", "head", "on", "macro-F1", "seeds", "accuracy", *(["F1 by class"] if by_class else []), "p"]
    table = Table(*header, box=None, padding=NEAR, pad_edge=False)
    for number, entry in enumerate(run.leaderboard[:SHOWN_ROWS]):
        seeds = entry.seeds["macro_f1"]
        spread = f"±{seeds.std:.3f}" if len(seeds.values) > 1 else ""
        scores = " ".join(_short(entry.classes[name].f1.value) for name in run.classes)
        table.add_row(
            "=" if entry.tie else "",
            entry.head,
            entry.modalities,
            interval(entry.macro_f1),
            spread,
            f"{entry.accuracy.value:.3f}",
            *([scores] if by_class else []),
            _p_value(entry.behind_best.p_holm) if number and entry.behind_best else "",
        )
    return _leaderboard(run, False) if by_class and not _fits(table) else table


def _fits(table: Table) -> bool:
    """Whether a table needs no more than 80 columns, so that none of its cells is wrapped."""
    return Measurement.get(out, out.options.update(width=10 * COLUMNS), table).maximum <= COLUMNS


def _explanation(run: Run) -> str:
    samples = f"{run.leaderboard[0].samples:,} samples"
    from mmfeat.evaluation.splits import HOLDOUT

    folds = f"{samples} of the holdout's test part" if run.config.folds == (HOLDOUT,) else f"{samples} out of fold"
    classes = f"; classes: {', '.join(run.classes)}" if len(run.classes) <= SHOWN_CLASSES else ""
    return f"{folds}, 95 % bootstrap intervals; = ties with the first (paired bootstrap, Holm){classes}"


def _ablation(run: Run) -> Table | None:
    """Return macro-F1 of each head by modality set, and the gain of both over the better single modality."""
    heads = ablation(run.leaderboard)
    if not heads:
        return None
    sets = [name for name in ("both", "text", "image") if any(name in entries for entries in heads.values())]
    table = Table("ablation", *sets, "both over the better one", "p", box=None, padding=(0, 2, 0, 0))
    for head, entries in heads.items():
        cells = [f"{entries[name].macro_f1.value:.3f}" if name in entries else "" for name in sets]
        test = entries["both"].gain if "both" in entries else None
        table.add_row(head, *cells, *([gain(test), _p_value(test.p_holm)] if test else []))
    return table


def _confusion(run: Run) -> Table | None:
    """Return the confusion matrix of the best entry, with true labels in rows."""
    best = run.leaderboard[0]
    if len(run.classes) > SHOWN_CLASSES or run.config.task != "multiclass":
        return None
    table = Table(best.label, *(f"-> {name}" for name in run.classes), box=None)
    for name, row in zip(run.classes, best.confusion, strict=True):
        total = max(sum(row), 1)
        table.add_row(name, *(f"{count:,.0f} ({count / total:.0%})" for count in row))
    return table if _fits(table) else None


def _show_search(run: Run) -> None:
    """Print the chosen settings, and the optimism: what choosing them on the test rows would have added."""
    entries = [entry for entry in run.leaderboard if entry.optimism is not None and entry.head != "prior"]
    searched = [entry for entry in entries if (entry.trials or 1) > 1]
    if cut := [entry for entry in entries if entry.search_over is False]:
        out.print(f"--time-limit cut the search of {len(cut)} entries short; the same command goes on with it")
    for entry in searched[:SHOWN_ROWS]:
        varied = {name: getattr(entry.settings, name) for name in (run.config.plan or {})["space"]}
        chosen = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in varied.items()
        )
        out.print(f"{entry.label}: best of {entry.trials} settings: {chosen}")
    worst = max(entries, key=lambda entry: entry.optimism or 0.0, default=None)
    if worst and (worst.optimism or 0.0) >= SHOWN_OPTIMISM:
        out.print(
            f"optimism: {worst.optimism:+.3f} macro-F1 at most ({worst.label}), which "
            "choosing settings and thresholds on the scored rows would have added; they were chosen on others"
        )


def _show_cost(run: Run, sweep: Sweep) -> None:
    """Print the parameters and the share of the time of each head, and the path of the run."""
    seconds: dict[str, float] = {}
    for entry in run.leaderboard:
        seconds[entry.head] = seconds.get(entry.head, 0.0) + entry.seconds
    total = max(sum(seconds.values()), 1e-9)
    shares = ", ".join(
        f"{head} {value / total:.0%}"
        for head, value in sorted(seconds.items(), key=lambda item: -item[1])
        if value / total >= 0.01
    )
    sizes: dict[str, int] = {}
    for entry in run.leaderboard:
        if entry.parameters:
            sizes[entry.head] = max(sizes.get(entry.head, 0), entry.parameters)
    if sizes:
        out.print("parameters: " + ", ".join(f"{head} {count:,}" for head, count in sizes.items()))
    out.print(f"time: {shares}")
    out.print(f"run {run.folder} ({sweep.seconds:.1f} s)")


def _short(score: float, digits: int = 2) -> str:
    """Write a score without its leading zero: .85 for 0.85, and 1.0 for 1."""
    text = f"{score:.{digits}f}"
    return text.removeprefix("0") if score < 1 else text[: digits + 1]


def _p_value(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else "<.001"
