"""`mmfeat report`: an HTML page about one run or several, and its tables and figures as files for papers; `mmfeat
export`: a head of a run as ONNX, with its encoders where torch can export them, and a model card."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfeat.cli.console import ConsoleProgress, out, show_notes, show_overlooked
from mmfeat.cli.flags import (
    LATEST_READING,
    AnyRun,
    Device,
    Heads,
    Modalities,
    Parameters,
    RunCache,
    RunData,
    option,
    reading,
    takes,
)
from mmfeat.errors import ConfigError
from mmfeat.system.wording import counted, head_label, size_of

if TYPE_CHECKING:
    from mmfeat.report.report import Report


_RUNS = "A run folder.  [default: the best on the latest data and folds]"
PARAMETERS: Parameters = {
    "runs": (Annotated[list[str] | None, typer.Argument(metavar="RUN", help=_RUNS)], None),
    "compare": (option("Compare the runs that are named, side by side.", bool, "--compare"), False),
    "run": (option("The same as RUN.", str | None), None),
    "out": (option("The HTML file to write.  [default: report.html in the run]", str | None), None),
    "heads": (Heads, "heads"),
    "head": (option("The head of the run to look at closely.  [default: the recommended]", str | None), None),
    "modalities": (Modalities, None),
    "data": (option("Where the data are now, if they were moved.", str | None), None),
    **LATEST_READING,
    "audit": (option("Folder of the audits.  [default: audit]", str | None), None),
    "photos": (
        option("Largest number of photos in the page, errors first.  [default: 1500]", int | None, least=0),
        None,
    ),
    "latex": (option("Write the tables as LaTeX too.", bool, "--latex"), False),
    "csv": (option("Write the tables as CSV too.", bool, "--csv"), False),
    "png": (option("Write the figures as PNG too.", bool, "--png"), False),
}
OF_ONE_RUN = ("data", *LATEST_READING, "audit", "photos")


@takes(PARAMETERS, "no report was written")
def report(context: typer.Context, **values: Any) -> None:
    """Write a page about a run. It opens without a network; with --compare it sets several runs side by side.

    \b
    mmfeat report heads/RUN --png --latex
    mmfeat report --compare heads/RUN heads/OTHER
    """
    from mmfeat.report.report import Papers, write_comparison, write_report
    from mmfeat.runs.run import find_run

    named = [*([values["run"]] if values["run"] else []), *(values["runs"] or [])]
    if len(named) > 1 and not values["compare"]:
        raise ConfigError(f"{len(named)} runs are named; give one, or --compare to set them side by side")
    given = {name: values[name] for name in OF_ONE_RUN if values[name] is not None}
    if values["compare"] and given:
        raise ConfigError(
            f"--{next(iter(given)).replace('_', '-')} goes with one run; a comparison shows no samples, leave it out"
        )
    folders = [find_run(name, values["heads"]).folder for name in named]
    entry = {name: values[name] for name in ("head", "modalities")}
    papers = Papers(values["latex"], values["csv"], values["png"])
    if values["compare"]:
        result = write_comparison(folders, out=values["out"] or "comparison.html", **entry, papers=papers)
    else:
        given = {name: value for name, value in given.items() if name not in LATEST_READING}
        given |= {"columns": reading(values)}
        given |= {"out": values["out"], "heads": values["heads"]}
        result = write_report(next(iter(folders), None), **entry, **given, papers=papers, progress=ConsoleProgress())
    _show(result)
    if not named:
        show_overlooked(result.runs[0], **entry)


def _show(result: Report) -> None:
    if result.files:
        out.print(f"{counted(len(result.files), 'file')} for papers in {result.files[0].parent}")
    if result.samples:
        waiting = f", {result.waiting:,} to predict," if result.waiting else ""
        out.print(f"{result.samples:,} samples{waiting} and {result.photos:,} photos")
    for run in result.runs:
        out.print(f"run {run.folder}")
    show_notes(result.notes)
    out.print(f"report {result.path} ({size_of(result.bytes)}; opens without a network)")
    if len(result.runs) == 1:
        from mmfeat.runs.verdict import prediction_step

        out.print(f"next: {prediction_step(result.runs[0])}")
    else:
        out.print("next: open it in a browser")


EXPORT_PARAMETERS: Parameters = {
    "run": (AnyRun, None),
    "data": (RunData, None),
    "out": (option("Folder to write.  [default: export/RUN]", str | None), None),
    "heads": (Heads, "heads"),
    "head": (option("A head of the run.  [default: the best that can be]", str | None), None),
    "modalities": (Modalities, None),
    "cache": (RunCache, None),
    "model": (option("Export the encoders too, as model.onnx.", bool), True),
    "device": (Device, "auto"),
}


@takes(EXPORT_PARAMETERS, "nothing was written")
def export(context: typer.Context, **values: Any) -> None:
    """Write a run as ONNX, with a model card. The graphs are checked against mmfeat's own predictions.

    \b
    mmfeat export --run heads/RUN --out export/RUN
    """
    from mmfeat.export.export import CARD, export_run

    result = export_run(**values, progress=ConsoleProgress())
    for name, reason in result.passed_over:
        out.print(f"note: {name} comes first and cannot be exported: {reason}")
    if values["run"] is None:
        show_overlooked(result.run, values["head"], values["modalities"])
    out.print(f"{head_label(result.head, result.modalities)} of {result.run.folder}")
    out.print(f"head.onnx: onnxruntime agrees within {result.difference:.1e} on {result.rows:,} samples")
    if result.model_difference is not None:
        out.print(f"model.onnx: encoders and head, onnxruntime agrees within {result.model_difference:.1e}")
    elif values["model"]:
        out.print(f"no model.onnx: {result.no_model}; head.onnx takes vectors")
    for name, size in result.files.items():
        out.print(f"  {name} {size_of(size)}")
    out.print(f"export {result.folder}")
    out.print(f"next: read {shlex.quote(str(result.folder / CARD))}; it has an example that runs")
