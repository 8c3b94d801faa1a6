"""`mmfeat report`: the flags of the page and of the files for papers."""

from __future__ import annotations

from typing import Annotated

import typer

from mmfeat.console import ConsoleProgress, out
from mmfeat.errors import ConfigError
from mmfeat.flags import AnyColumns, pairs, reported
from mmfeat.wording import size_of


@reported("no report was written")
def report(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN]...", help="A run folder.  [default: the best]")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Set the runs that are named side by side.")] = False,
    run: Annotated[str | None, typer.Option(help="The same as naming it first.")] = None,
    out_file: Annotated[str | None, typer.Option("--out", help="The page.  [default: report.html in the run]")] = None,
    heads: Annotated[str, typer.Option(help="Folder of the runs.")] = "heads",
    head: Annotated[str | None, typer.Option(help="A head of the run, looked at closely.  [default: the best]")] = None,
    modalities: Annotated[str | None, typer.Option(help="both, text, image or ensemble.  [default: the best]")] = None,
    data: Annotated[str | None, typer.Option(help="Where the data lie now, if they were moved.")] = None,
    columns: AnyColumns = None,
    photos: Annotated[int, typer.Option(help="Most photos in the page, errors first.", min=0)] = 1500,
    latex: Annotated[bool, typer.Option("--latex", help="Write the tables as LaTeX too.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Write the tables as CSV too.")] = False,
    png: Annotated[bool, typer.Option("--png", help="Write the figures as PNG too.")] = False,
) -> None:
    """One HTML page about a run that opens without a network; with --compare about several.

    \b
    mmfeat report heads/RUN --png --latex
    mmfeat report --compare heads/RUN heads/OTHER
    """
    from mmfeat.report.write import write_report

    named = [*([run] if run else []), *(runs or [])]
    if len(named) > 1 and not compare:
        raise ConfigError(f"{len(named)} runs are named; give one, or --compare to set them side by side")
    result = write_report(
        named[0] if named else None,
        others=named[1:],
        compare=compare,
        out=out_file,
        heads=heads,
        head=head,
        modalities=modalities,
        data=data,
        columns=pairs(columns) if columns else None,
        photos=photos,
        latex=latex,
        csv=csv,
        png=png,
        progress=ConsoleProgress(),
    )
    if result.files:
        out.print(f"{len(result.files)} files for papers in {result.files[0].parent}")
    out.print(
        f"{result.samples:,} samples, {result.photos:,} with their photo; {size_of(result.bytes)}, no network needed"
    )
    out.print(f"run {result.run.folder}")
    out.print(f"report {result.path}")
    out.print("next: open it in a browser; mmfeat submit writes the predictions")
