"""`mmfeat export`: a run's head as ONNX, with its encoders where torch can export them, and a model card."""

from __future__ import annotations

import shlex
from typing import Any

import typer

from mmfeat.cli import flags
from mmfeat.cli.console import ConsoleProgress, out, show_overlooked
from mmfeat.cli.flags import AnyRun, Device, Heads, Modalities, Parameters, RunCache, RunData, interruptible, option
from mmfeat.system.wording import head_label, size_of

PARAMETERS: Parameters = {
    "run": (AnyRun, None),
    "data": (RunData, None),
    "out": (option("Folder to write.  [default: export/RUN]", str | None), None),
    "heads": (Heads, "heads"),
    "head": (option("A head of the run.  [default: the best that can be]", str | None), None),
    "modalities": (Modalities, None),
    "cache": (RunCache, None),
    "model": (option("Export the encoders too, as model.onnx.", bool, "--model/--no-model"), True),
    "device": (Device, "auto"),
}


@flags.takes(PARAMETERS)
@interruptible("nothing was written")
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
