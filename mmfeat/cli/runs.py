"""`mmfeat runs`: list, show, compare, reproduce and delete runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mmfeat.cli.console import ConsoleProgress, err, out, show_notes, show_partitions, show_table, show_verdict
from mmfeat.cli.flags import Device, Heads, Helped, Modalities, Trainings, interruptible
from mmfeat.errors import RunError
from mmfeat.system.wording import counted, duration, gain, interval, shown, size_of

if TYPE_CHECKING:
    from mmfeat.reproduce import Reproduction
    from mmfeat.runs.compare import Comparison, RunTest
    from mmfeat.runs.folders import RunFolder
    from mmfeat.runs.run import Run


SHOWN_ENTRIES = 5
SHOWN_FILES = 5
LONGEST = 48  # letters of a setting in the table; longer ones are cut


def show_runs(folders: Sequence[RunFolder], heads: str) -> None:
    """Print one line for each folder of a run, and the reasons why some of them are not finished runs."""
    if not folders:
        out.print(f"no runs in {heads}")
        return
    titles, rows = {folder.run.leaderboard[0].headline_title for folder in folders if folder.run}, []
    for folder in folders:
        data = Path(str(folder.recorded.get("data", ""))).name
        best, score, entries = "-", "no run", ""
        if folder.run:
            first = folder.run.leaderboard[0]
            best, entries = first.label, str(len(folder.run.leaderboard))
            score = interval(first.headline) + (f" {first.headline_title}" if len(titles) > 1 else "")
        row = (folder.name, data, folder.kind, best, score, entries, _date(folder.date), size_of(folder.bytes))
        rows.append(row)
    header = "run", "data", "kind", "best", titles.pop() if len(titles) == 1 else "score", "entries", "date", "size"
    show_table(header, rows, ("size", "entries", "kind", "date", "data"))
    for folder in folders:
        if folder.reason:
            out.print(f"{folder.name}: {folder.reason}")
        if folder.run is None and (command := folder.recorded.get("record", {}).get("command")):
            out.print(f"  {command}")
    finished = [folder.folder for folder in folders if folder.run]
    out.print(f"next: {f'mmfeat runs show {_quoted(finished[0])}' if finished else 'mmfeat heads'}")


def show_run(run: Run, files: Mapping[str, int]) -> None:
    """Print all facts of a run in a compact form; `files` maps the names of its files to their sizes."""
    from mmfeat.runs.compare import read_partitions

    out.print(f"run {run.folder}")
    facts = _facts(run)
    wide = max(len(name) for name, _ in facts) + 2
    for name, value in facts:
        out.print(f"{name:{wide}}{value}", hang=wide)
    for tower in run.config.encoders:
        spec = tower.spec
        out.print(f"  {tower.request} ({spec.modality}, {spec.output}, {spec.arithmetic})")
    _show_leaderboard(run)
    if (more := len(run.leaderboard) - SHOWN_ENTRIES) > 0:
        out.print(f"and {more} more in {run.leaderboard_file}")
    if partitions := read_partitions(run):
        show_partitions(partitions, SHOWN_ENTRIES)
        out.print(f"further partitions: {', '.join(partitions.runs[1:])}")
    total = sum(files.values())
    listed = ", ".join(f"{name} {size_of(size)}" for name, size in list(files.items())[:SHOWN_FILES])
    out.print(f"files: {len(files):,}, {size_of(total)} ({listed}, ...)")
    out.print(f"next: mmfeat runs reproduce {_quoted(run.folder)} --out reproduced")


def show_comparison(comparison: Comparison) -> None:
    """Print the settings that differ, the scores side by side, the tests against the first run, and the verdict."""
    from mmfeat.runs.compare import flag_of
    from mmfeat.runs.verdict import verdict_on

    names = [f"[{number}]" for number in range(1, len(comparison.runs) + 1)]
    for name, run in zip(names, comparison.runs, strict=True):
        out.print(f"{name} {run.folder}")
    if comparison.settings:
        show_table(
            ("setting", *names), [(flag_of(name), *map(_short, values)) for name, values in comparison.settings.items()]
        )
    else:
        out.print("no setting differs")
    rows, shown_scores = [], comparison.entries[0].main_names[:2]
    for name, entry, test in zip(names, comparison.entries, comparison.tests, strict=True):
        scores = [*(interval(entry.score(score)) for score in shown_scores), f"{entry.samples:,}"]
        rows.append((name, entry.label, *scores, *_test(test)))
    titles = [comparison.entries[0].titles[score] for score in shown_scores]
    show_table(
        ("", "head", *titles, "samples", "over [1]", "p (Holm)", "tie"), rows, ("samples", titles[1], "p (Holm)", "tie")
    )
    for name, reason in zip(names, comparison.reasons, strict=True):
        if reason:
            out.print(f"{name} is not comparable with [1]: {reason}")
    if comparison.otherwise != comparison.scored:
        scored, other = names[comparison.scored], names[comparison.otherwise]
        out.print(
            f"{counted(comparison.relabelled, 'label')} differ; the scores above are against the labels of {scored}"
        )
        for name, test in zip(names, comparison.tests, strict=True):
            if test and test.otherwise:
                out.print(f"against the labels of {other}: {name} is {gain(test.otherwise)} over [1]")
        out.print("scores are too high where corrections follow the proposals of the head that is scored")
    if any(comparison.tests):
        out.print("95 % bootstrap intervals; paired bootstrap on the samples that both have out of fold")
        if not comparison.preselected:
            out.print("each is the best of its run by these scores, so its score is slightly too high (or name --head)")
    show_verdict(verdict_on(comparison))


def show_reproduction(reproduction: Reproduction) -> None:
    """Print whether a run that was trained again is identical, and otherwise which files and scores differ."""
    if reproduction.reused:
        out.print("it was reproduced before; compared again")
    if reproduction.identical:
        compared = f"{reproduction.files:,} files of predictions and weights, {len(reproduction.scores)} scores"
        out.print(f"identical bit for bit: {compared}")
    else:
        out.print(f"not identical: {len(reproduction.different):,} of {reproduction.files:,} files differ")
        for name in reproduction.different[:SHOWN_FILES]:
            out.print(f"  {name}")
        rows = [
            (name, *("-" if value is None else f"{value:.6f}" for value in scores))
            for name, scores in reproduction.scores.items()
            if scores[0] != scores[1]
        ]
        if rows:
            before = f"{reproduction.run.leaderboard[0].headline_title} before"
            show_table(("entry", before, "after"), rows)
    for name, (before, after) in reproduction.changed.items():
        out.print(f"{name}: {before} then, {after} now")
    show_notes(reproduction.notes)
    out.print(f"run {shown(str(reproduction.run.folder.resolve()))}")


def _facts(run: Run) -> list[tuple[str, str]]:
    config, record, protocol, fixed = run.config, run.record, run.config.protocol, run.config.corrections
    counts = ", ".join(f"{name} {count:,}" for name, count in run.results.class_counts.items())
    begun = datetime.fromisoformat(record.started) if record.started else None
    folds = {"kfold": f"{len(config.folds)} folds", "given": "the data's own split"}.get(protocol.kind, "holdout")
    labelled = f"{run.results.labelled:,} labelled" + (f": {counts}" if counts else "")
    facts = [
        ("data", f"{shown(config.data)} ({labelled}), hash {config.data_hash[:8]}"),
        (
            "protocol",
            f"{folds}, {counted(protocol.seeds, 'seed')} from {protocol.seed}, splits {config.splits_hash[:8]}",
        ),
        ("labels", f"{fixed.count:,} corrected by {shown(fixed.file)}, hash {fixed.sha256[:8]}" if fixed else ""),
        ("rare classes", str(config.rare or "")),
        ("class names", ", ".join(f"{name}={text}" for name, text in (config.class_names or {}).items())),
        ("table", ", ".join(column.label for column in config.table or ())),
        ("cache", shown(config.cache)),
        ("parent", config.parent or ""),
        ("command", record.command),
        ("date", f"{_date(begun)}, {duration(record.seconds)}" if begun else ""),
        ("machine", ", ".join(f"{name} {value}" for name, value in record.machine.items())),
        ("versions", ", ".join(f"{name} {value}" for name, value in record.versions.items()) or config.version),
        ("encoders", ", ".join(record.fingerprints)),
    ]
    return [(name, value) for name, value in facts if value]


def _show_leaderboard(run: Run) -> None:
    rows = []
    for entry in run.leaderboard[:SHOWN_ENTRIES]:
        rows.append((entry.head, entry.modalities, *(interval(entry.score(name)) for name in entry.main_names)))
    titles = [run.leaderboard[0].titles[name] for name in run.leaderboard[0].main_names]
    show_table(("head", "on", *titles), rows, titles[:0:-1])


def _test(test: RunTest | None) -> list[str]:
    if test is None:
        return ["", "", ""]
    return [gain(test.difference), f"{test.p_holm:.3f}", "tie" if test.tie else ""]


WORDS = {"True": "yes", "False": "no", "None": "auto"}


def _short(text: str) -> str:
    text = WORDS.get(text, text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _date(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%d %H:%M")


NAME = "runs"
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, compare, repeat and delete runs.")

Latest = Annotated[str | None, typer.Argument(metavar="RUN", help="A run folder, or its name.  [default: the latest]")]
One = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, its name, or the beginning or end of its name.")]
_TWO = "Run folders, or their names.  [default: the latest and the one before on its data and folds]"
LatestTwo = Annotated[list[str] | None, typer.Argument(metavar="RUN", help=_TWO)]
Some = Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders, or their names.")]


@app.command("ls", cls=Helped)
@interruptible("nothing was changed")
def list_all(
    heads: Heads = "heads",
    data: Annotated[str | None, typer.Option("--data", help="Show only runs on this data.")] = None,
) -> None:
    """List the runs, the newest first. Also those that are not finished or cannot be read.

    \b
    mmfeat runs ls
    """
    from mmfeat.runs.folders import list_runs

    show_runs(list_runs(heads, data), heads)


@app.command(cls=Helped)
@interruptible("nothing was changed")
def show(run: Latest = None, heads: Heads = "heads") -> None:
    """Show a run: its parts, its command and its scores.

    \b
    mmfeat runs show heads/RUN
    """
    from mmfeat.runs.run import comparable_runs, find_run

    whole = find_run(run, heads) if run else comparable_runs(Path(heads))[-1]
    paths = [path for path in sorted(whole.folder.rglob("*")) if path.is_file()]
    show_run(whole, {str(path.relative_to(whole.folder)): path.stat().st_size for path in paths})


@app.command(cls=Helped)
@interruptible("nothing was changed")
def compare(
    runs: LatestTwo = None,
    heads: Heads = "heads",
    head: Annotated[str | None, typer.Option(help="Compare this head of each run.  [default: its best]")] = None,
    modalities: Modalities = None,
) -> None:
    """Show in what runs differ, their scores and paired tests. The tests are against the first run.

    \b
    mmfeat runs compare heads/RUN-A heads/RUN-B
    """
    from mmfeat.runs.compare import compare_runs
    from mmfeat.runs.run import comparable_runs, find_run

    compared = [find_run(run, heads) for run in runs or ()] or comparable_runs(Path(heads))[-2:]
    show_comparison(compare_runs(compared, head, modalities))
    out.print(f"next: mmfeat report --compare {' '.join(_quoted(run.folder) for run in compared)}")


@app.command(cls=Helped)
@interruptible("what was finished is kept, the same command goes on from there")
def reproduce(
    context: typer.Context,
    run: One,
    out_folder: Annotated[str, typer.Option("--out", help="Folder to write the new run into.")] = "reproduced",
    heads: Heads = "heads",
    cache: Annotated[str | None, typer.Option("--cache", help="Feature cache.  [default: the run's]")] = None,
    device: Device = "auto",
    workers: Trainings = 0,
) -> None:
    """Train a run anew from its own configuration. Exit code 1 unless the result is identical.

    \b
    mmfeat runs reproduce heads/RUN --out reproduced
    """
    from mmfeat.reproduce import reproduce_run
    from mmfeat.runs.run import find_run

    reproduction = reproduce_run(
        find_run(run, heads),
        out_folder,
        cache=cache,
        device=device,
        workers=workers,
        progress=ConsoleProgress(),
        command=context.obj or "",
    )
    show_reproduction(reproduction)
    out.print(f"next: mmfeat runs compare {_quoted(reproduction.original.folder)} {_quoted(reproduction.run.folder)}")
    if not reproduction.identical:
        raise typer.Exit(1)


@app.command(cls=Helped)
@interruptible("what was not deleted yet is still there")
def rm(
    runs: Some,
    heads: Heads = "heads",
    force: Annotated[
        bool, typer.Option("--force", help="Delete a run even if another one was fine-tuned from it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete without asking.")] = False,
) -> None:
    """Delete run folders. Asks on a terminal; elsewhere --yes is needed.

    \b
    mmfeat runs rm heads/RUN
    """
    from mmfeat.runs.folders import check_deletable, delete_runs, folder_bytes

    folders = check_deletable(runs, heads, force)
    for folder in folders:
        out.print(f"{folder} ({size_of(folder_bytes(folder))})")
    many = counted(len(folders), "run")
    if not yes and not (err.is_terminal and typer.confirm(f"delete {many} in {heads}?", err=True)):
        raise RunError("nothing was deleted; the same command with --yes deletes what is listed")
    freed = delete_runs([folder.name for folder in folders], heads, force)
    out.print(f"deleted {many}, {size_of(freed)}; mmfeat cache gc lists vectors that no run needs any more")


def _quoted(folder: object) -> str:
    return shlex.quote(shown(str(folder)))
