"""`mmfeat runs`: which runs there are, what one is made of, how several differ, and away with some."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from mmfeat.console import ConsoleProgress, err, out, shown, size_of
from mmfeat.console_runs import show_comparison, show_reproduction, show_run, show_runs
from mmfeat.errors import RunError
from mmfeat.flags import Device, command_line, reported
from mmfeat.wording import counted

NAME = "runs"
app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, compare, repeat and delete runs.")

Heads = Annotated[str, typer.Option("--heads", help="Folder of the runs.")]
One = Annotated[str, typer.Argument(metavar="RUN", help="A run folder, its name, or the beginning or end of that.")]
Some = Annotated[list[str], typer.Argument(metavar="RUN", help="Run folders, or their names.")]


@app.command("ls")
@reported("nothing was changed")
def list_all(
    heads: Heads = "heads",
    data: Annotated[str | None, typer.Option("--data", help="Only runs on this data.")] = None,
) -> None:
    """List the runs, the newest first. Also those that are not finished or cannot be read.

    \b
    mmfeat runs ls
    """
    from mmfeat.run_folders import list_runs

    show_runs(list_runs(heads, data), heads)


@app.command()
@reported("nothing was changed")
def show(run: One, heads: Heads = "heads") -> None:
    """Show what a run is made of, its scores, and the commands that make it again.

    \b
    mmfeat runs show heads/RUN
    """
    from mmfeat.commands import told_commands
    from mmfeat.run_folders import find_run

    found = find_run(run, heads)
    paths = [path for path in sorted(found.folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(found.folder)): path.stat().st_size for path in paths}
    show_run(found, told_commands(found), files)


@app.command()
@reported("nothing was changed")
def compare(
    runs: Some,
    heads: Heads = "heads",
    head: Annotated[str | None, typer.Option(help="This head of each run.  [default: its best]")] = None,
    modalities: Annotated[str | None, typer.Option(help="both, text, image or ensemble.  [default: the best]")] = None,
) -> None:
    """Show in what runs differ, their scores, and paired tests against the first.

    \b
    mmfeat runs compare heads/RUN-A heads/RUN-B
    """
    from mmfeat.comparison import compare_runs
    from mmfeat.run_folders import find_run

    found = [find_run(run, heads) for run in runs]
    show_comparison(compare_runs(found, head, modalities))
    out.print(f"next: mmfeat report --compare {' '.join(_quoted(run.folder) for run in found)}")


@app.command()
@reported("what was finished is kept, the same command goes on from there")
def reproduce(
    run: One,
    out_folder: Annotated[str, typer.Option("--out", help="Folder to write the new run in.")] = "reproduced",
    heads: Heads = "heads",
    cache: Annotated[str | None, typer.Option("--cache", help="Feature cache.  [default: the run's]")] = None,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(help="Trainings side by side; 0 is one a core.", min=0)] = 0,
) -> None:
    """Train a run anew from its own configuration. Exit code 1 unless the result is identical.

    \b
    mmfeat runs reproduce heads/RUN --out reproduced
    """
    from mmfeat.reproduce import reproduce_run
    from mmfeat.run_folders import find_run

    found = reproduce_run(
        find_run(run, heads),
        out_folder,
        cache=cache,
        device=device,
        workers=workers,
        progress=ConsoleProgress(),
        command=command_line(),
    )
    show_reproduction(found)
    out.print(f"next: mmfeat runs compare {_quoted(found.original.folder)} {_quoted(found.run.folder)}")
    if not found.identical:
        raise typer.Exit(1)


@app.command()
@reported("what was not deleted yet is still there")
def rm(
    runs: Some,
    heads: Heads = "heads",
    force: Annotated[bool, typer.Option("--force", help="Also a run that another one was fine-tuned from.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete run folders. Asks on a terminal; elsewhere --yes is needed.

    \b
    mmfeat runs rm heads/RUN
    """
    from mmfeat.run_folders import check_deletable, delete_runs, folder_bytes

    places = check_deletable(runs, heads, force)
    for place in places:
        out.print(f"{place} ({size_of(folder_bytes(place))})")
    many = counted(len(places), "run")
    if not yes and not (err.is_terminal and typer.confirm(f"delete {many} in {heads}?", err=True)):
        raise RunError("nothing was deleted; the same command with --yes deletes what is listed")
    freed = delete_runs([place.name for place in places], heads, force)
    out.print(f"deleted {many}, {size_of(freed)}; mmfeat cache gc finds vectors that no run needs now")


def _quoted(folder: object) -> str:
    return shlex.quote(shown(str(folder)))
