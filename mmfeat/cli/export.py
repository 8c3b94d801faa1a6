"""`mmfeat export`: a run's head as ONNX, with its encoders where torch can, and a model card."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from mmfeat.cli.console import ConsoleProgress, out, show_overlooked
from mmfeat.cli.flags import AnyRun, Device, RunCache, RunData, interruptible
from mmfeat.system.wording import head_label, size_of


@interruptible("nothing was written")
def export(
    run: AnyRun = None,
    data: RunData = None,
    out_folder: Annotated[str | None, typer.Option("--out", help="Folder to write.  [default: export/RUN]")] = None,
    heads: Annotated[str, typer.Option(help="Folder of the runs.")] = "heads",
    head: Annotated[str | None, typer.Option(help="A head of the run.  [default: the best that can be]")] = None,
    modalities: Annotated[str | None, typer.Option(help="both, text, image or ensemble.  [default: the best]")] = None,
    cache: RunCache = None,
    model: Annotated[bool, typer.Option("--model/--no-model", help="Also the encoders, as model.onnx.")] = True,
    device: Device = "auto",
) -> None:
    """Write ONNX graphs that are checked against mmfeat's own predictions, and a model card.

    \b
    mmfeat export --run heads/RUN --out export/RUN
    """
    from mmfeat.export.export import export_run

    result = export_run(
        run,
        out=out_folder,
        heads=heads,
        head=head,
        modalities=modalities,
        data=data,
        cache=cache,
        model=model,
        device=device,
        progress=ConsoleProgress(),
    )
    for name, reason in result.passed_over:
        out.print(f"note: {name} is better and cannot be exported: {reason}")
    if run is None:
        show_overlooked(result.run, head, modalities)
    out.print(f"{head_label(result.head, result.modalities)} of {result.run.folder}")
    out.print(f"head.onnx: onnxruntime agrees within {result.difference:.1e} on {result.rows:,} samples")
    if result.model_difference is not None:
        out.print(f"model.onnx: encoders and head, onnxruntime agrees within {result.model_difference:.1e}")
    elif model:
        out.print(f"no model.onnx: {result.no_model}; head.onnx takes vectors")
    for name, size in result.files.items():
        out.print(f"  {name} {size_of(size)}")
    out.print(f"export {result.folder}")
    out.print(f"next: read {shlex.quote(str(result.folder / 'MODEL_CARD.md'))}; it has an example that runs")
