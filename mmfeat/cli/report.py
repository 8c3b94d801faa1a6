"""`mmfeat report`: the flags of the page and of the files for papers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from mmfeat.cli.console import ConsoleProgress, out, show_overlooked
from mmfeat.cli.flags import interruptible, pairs
from mmfeat.errors import ConfigError
from mmfeat.system.wording import counted, size_of

if TYPE_CHECKING:
    from mmfeat.report.report import Report


Runs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[RUN]...", help="A run folder.  [default: the best on the latest data and folds]"),
]
Photos = Annotated[
    int | None, typer.Option("--photos", help="Most photos in the page, errors first.  [default: 1500]", min=0)
]


@interruptible("no report was written")
def report(
    runs: Runs = None,
    compare: Annotated[bool, typer.Option("--compare", help="Set the runs that are named side by side.")] = False,
    run: Annotated[str | None, typer.Option(help="The same as naming it first.")] = None,
    out_file: Annotated[str | None, typer.Option("--out", help="The page.  [default: report.html in the run]")] = None,
    heads: Annotated[str, typer.Option(help="Folder of the runs.")] = "heads",
    head: Annotated[str | None, typer.Option(help="A head of the run, looked at closely.  [default: the best]")] = None,
    modalities: Annotated[str | None, typer.Option(help="both, text, image or ensemble.  [default: the best]")] = None,
    data: Annotated[str | None, typer.Option(help="Where the data lie now, if they were moved.")] = None,
    columns: Annotated[str | None, typer.Option(help="As for extract.  [default: the run's]")] = None,
    audit: Annotated[str | None, typer.Option(help="Folder of the audits.  [default: audit]")] = None,
    photos: Photos = None,
    latex: Annotated[bool, typer.Option("--latex", help="Write the tables as LaTeX too.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Write the tables as CSV too.")] = False,
    png: Annotated[bool, typer.Option("--png", help="Write the figures as PNG too.")] = False,
) -> None:
    """One HTML page about a run that opens without a network; with --compare about several.

    \b
    mmfeat report heads/RUN --png --latex
    mmfeat report --compare heads/RUN heads/OTHER
    """
    from mmfeat.report.report import AUDIT, PHOTOS, Papers, write_comparison, write_report
    from mmfeat.runs.run import find_run

    named = [*([run] if run else []), *(runs or [])]
    if len(named) > 1 and not compare:
        raise ConfigError(f"{len(named)} runs are named; give one, or --compare to set them side by side")
    if compare:
        _check_compared({"--data": data, "--columns": columns, "--audit": audit, "--photos": photos})
    found = [find_run(each, heads).folder for each in named]
    papers = Papers(latex, csv, png)
    if compare:
        result = write_comparison(
            found, out=out_file or "comparison.html", head=head, modalities=modalities, papers=papers
        )
    else:
        result = write_report(
            found[0] if found else None,
            out=out_file,
            heads=heads,
            head=head,
            modalities=modalities,
            data=data,
            columns=pairs(columns) if columns else None,
            audit=audit or AUDIT,
            photos=PHOTOS if photos is None else photos,
            papers=papers,
            progress=ConsoleProgress(),
        )
    _show(result)
    if not named:
        show_overlooked(result.runs[0], head, modalities)


def _check_compared(of_one: Mapping[str, object]) -> None:
    """Raise `ConfigError` for flags that are about one run."""
    if unused := next((flag for flag, value in of_one.items() if value is not None), ""):
        raise ConfigError(f"{unused} goes with one run; a comparison shows no samples, leave it out")


def _show(result: Report) -> None:
    """What is in the page, and where it lies."""
    if result.files:
        out.print(f"{counted(len(result.files), 'file')} for papers in {result.files[0].parent}")
    if result.samples:
        out.print(f"{result.samples:,} samples, {result.photos:,} with their photo")
    for run in result.runs:
        out.print(f"run {run.folder}")
    for note in result.notes:
        out.print(f"note: {note}")
    out.print(f"report {result.path} ({size_of(result.bytes)}; opens without a network)")
    if len(result.runs) == 1:
        out.print(f"next: mmfeat submit --run {shlex.quote(str(result.runs[0].folder))}")
    else:
        out.print("next: open it in a browser")
