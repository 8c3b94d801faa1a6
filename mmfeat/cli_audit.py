"""`mmfeat audit`: the flags of the audit."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from mmfeat.console import ConsoleProgress, out, shown
from mmfeat.console_audit import show_audit
from mmfeat.errors import CacheMissError, ConfigError
from mmfeat.flags import AnyColumns, AnyData, CacheFolder, Seed, pairs, reported

Workers = Annotated[int, typer.Option("--workers", help="Photos read at once; 0 suits the machine.", min=0)]


@reported("no audit was written")
def audit(
    data: AnyData = None,
    columns: AnyColumns = None,
    split_dir: Annotated[
        str | None, typer.Option(help="Splits whose leaks are looked for, as of a run.  [default: the run's]")
    ] = None,
    run: Annotated[
        str | None, typer.Option(help="A run that judges the labels, or none.  [default: the best on the data]")
    ] = None,
    heads: Annotated[str, typer.Option(help="Folder of the runs.")] = "heads",
    cache: CacheFolder = "cache",
    out_folder: Annotated[str, typer.Option("--out", help="Folder of the audits, one folder a data set.")] = "audit",
    workers: Workers = 0,
    seed: Seed = 42,
) -> None:
    """Find duplicates, conflicting labels, leaks, odd files and likely label errors; nothing is changed.

    \b
    mmfeat audit --data tweets --split-dir splits
    """
    place, named, extracted = _place(data, columns, cache)
    from mmfeat.audit.run import audit_data

    found = audit_data(
        place,
        columns=named,
        split_dir=split_dir,
        run=run,
        heads=heads,
        out=out_folder,
        workers=workers,
        seed=seed,
        progress=ConsoleProgress(),
    )
    show_audit(found)
    judged = found.label_errors
    step = f"{'heads' if extracted else 'extract'} --data {shlex.quote(shown(place))}"
    if judged:
        step = f"report --run {shlex.quote(judged['run'])}"
    out.print(f"next: mmfeat {step}")


def _place(data: str | None, columns: str | None, cache: str) -> tuple[str, dict[str, str], bool]:
    """The data and the names of their columns, as given or as the latest extraction had them; whether there is one."""
    from mmfeat.requests import latest_request

    named = pairs(columns) if columns else None
    try:
        request = latest_request(cache, data)
    except CacheMissError as error:
        if data is None:
            raise ConfigError(
                f"nothing was extracted into {cache}, so --data is needed: a folder or a table"
            ) from error
        return data, named or {}, False
    if data is None:
        out.print(f"using {shown(request.data)}")
    return data or request.data, request.columns if named is None else named, True
