"""`mmfeat submit` and `mmfeat predict`: a saved run predicts, and the same flags say how that is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mmfeat.cli.console import ConsoleProgress, err, out
from mmfeat.cli.flags import AnyRun, Device, RunCache, RunData, Workers, names, pairs, reported
from mmfeat.cli.runs import show_overlooked
from mmfeat.system.wording import head_label, interval, shown

if TYPE_CHECKING:
    from mmfeat.prediction.predict import Predicted
    from mmfeat.prediction.submit import Submission


FEW = 20  # samples that a terminal shows as a table
SHOWN_CLASSES = 8  # whose probabilities have columns of their own; of more classes the first are named
SHOWN_FIRST = 3


def show_submission(result: Submission) -> None:
    """Label distribution beside that out of fold and the training prior, warnings, and the files."""
    head = head_label(result.head, result.modalities)
    out.print(f"{result.rows:,} predictions for {shown(result.data)} by {head}")
    table = Table("label", "predicted", *(["out of fold"] if result.out_of_fold else []), "in training", box=None)
    for label, share in result.trained.items():
        seen = [f"{result.out_of_fold.get(label, 0.0):.1%}"] if result.out_of_fold else []
        table.add_row(label, f"{result.predicted.get(label, 0.0):.1%}", *seen, f"{share:.1%}")
    out.print(table)
    for line in result.notes:
        out.print(f"note: {line}")
    if result.data_changed:
        out.print("note: labels, texts or photos changed since this run was trained; mmfeat heads trains anew")
    if result.without_features:
        count, example = len(result.without_features), result.without_features[0]
        out.print(f"{count:,} samples have neither text nor image that could be read (first: {example})")
    out.print(f"run {result.run.folder}")
    out.print(f"leaderboard {result.run.leaderboard_file}")
    out.print(f"submission {result.path}")
    out.print("next: hand it in; mmfeat report shows what to expect of it")


def show_notes(result: Predicted) -> None:
    """Who predicts, how right it is where labels tell, and what to be warned of: all beside what is printed."""
    err.print(f"{head_label(result.head, result.modalities)} of {result.run.folder}")
    if result.scores is not None:
        f1, accuracy = (interval(result.scores.score(name)) for name in ("macro_f1", "accuracy"))
        err.print(f"{result.scores.samples:,} labelled samples: accuracy {accuracy}, macro-F1 {f1}")
    for line in result.notes:
        err.print(f"note: {line}")


def show_few(result: Predicted) -> None:
    """A line a sample: label and probabilities."""
    found, classes = result.predictions, result.predictions.classes
    columns = classes if len(classes) <= SHOWN_CLASSES else ("most probable",)
    table = Table("sample", "label", *columns, box=None)
    for id, label, row in zip(found.ids, found.labels, found.probabilities.tolist(), strict=True):
        cells = [f"{value:.3f}" for value in row]
        if len(classes) > SHOWN_CLASSES:
            first = sorted(zip(row, classes, strict=True), reverse=True)[:SHOWN_FIRST]
            cells = [", ".join(f"{name} {value:.3f}" for value, name in first)]
        table.add_row(id, label, *cells)
    out.print(table)


_COLUMNS = (
    "Pairs name the columns of your table, as for extract: id=...,text=...; two plain names those of the file "
    "written: guid,tag."
)
Heads = Annotated[str, typer.Option("--heads", help="Folder of the runs.")]
Head = Annotated[str | None, typer.Option("--head", help="A head of the run.  [default: the best]")]
Modalities = Annotated[
    str | None, typer.Option("--modalities", help="both, text, image or ensemble.  [default: the best]")
]
ReadAndWritten = Annotated[str | None, typer.Option("--columns", help=_COLUMNS)]
Header = Annotated[bool, typer.Option("--header/--no-header", help="First line with the names of the columns.")]
Format = Annotated[
    str | None, typer.Option("--format", help="csv, tsv or jsonl.  [default: as the suffix of --out, else csv]")
]
Proba = Annotated[bool, typer.Option("--proba/--no-proba", help="A calibrated probability for each class as well.")]


@reported("no submission was written; vectors that were computed are kept")
def submit(
    run: AnyRun = None,
    data: RunData = None,
    out_file: Annotated[
        str | None, typer.Option("--out", help="The file to write.  [default: submission, as the format]")
    ] = None,
    heads: Heads = "heads",
    head: Head = None,
    modalities: Modalities = None,
    cache: RunCache = None,
    columns: ReadAndWritten = None,
    header: Header = True,
    format: Format = None,
    proba: Proba = False,
    device: Device = "auto",
    workers: Workers = 0,
) -> None:
    """Predict the unlabelled samples and write guid,tag rows, checked before they are written.

    \b
    mmfeat submit --run heads/RUN --out submission.csv
    mmfeat submit --columns id,label --proba --out submission.jsonl
    """
    from mmfeat.prediction.submit import write_submission

    table, written = split_columns(columns)
    result = write_submission(
        run,
        data=data,
        out=out_file,
        heads=heads,
        head=head,
        modalities=modalities,
        cache=cache,
        columns=table,
        header=header,
        format=format,
        proba=proba,
        device=device,
        workers=workers,
        progress=ConsoleProgress(),
        **written,
    )
    if run is None:
        show_overlooked(result.run, head, modalities)
    show_submission(result)


@reported("no predictions were written; vectors that were computed are kept")
def predict(
    files: Annotated[
        list[str] | None, typer.Argument(help="Photos, each with its .txt beside it; .txt files; a folder of them.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="The text of one pair.")] = None,
    image: Annotated[str | None, typer.Option("--image", help="The photo of one pair.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Folder or table, of which every sample is predicted.")
    ] = None,
    run: AnyRun = None,
    out_file: Annotated[str | None, typer.Option("--out", help="The file to write.  [default: print]")] = None,
    heads: Heads = "heads",
    head: Head = None,
    modalities: Modalities = None,
    cache: RunCache = None,
    columns: ReadAndWritten = None,
    header: Header = True,
    format: Format = None,
    proba: Proba = True,
    device: Device = "auto",
    workers: Workers = 0,
) -> None:
    """Predict new pairs of text and image through a saved run: one pair, some files, or a data set.

    A terminal shows a few samples as a table; otherwise CSV goes to standard output, and notes to standard error.

    \b
    mmfeat predict --run heads/RUN --text "what a day" --image photo.jpg
    mmfeat predict photos/*.jpg --out predictions.csv
    mmfeat predict --data new.csv > predictions.csv
    """
    from mmfeat.prediction.inputs import text_beside
    from mmfeat.prediction.predict import check_inputs

    table, written = split_columns(columns)
    data_flags = {"--cache": cache, "--columns": table, "--workers": workers}
    check_inputs(files or [], data, text, image, data_flags)
    kept = [*(files or []), *(text_beside(Path(file)) for file in files or [] if Path(file).name), image, data]
    target, layout = _target(out_file, kept, format, header, proba, written)
    where: dict[str, Any] = {"heads": heads, "head": head, "modalities": modalities, "device": device}
    if data is not None:
        from mmfeat.prediction.predict import predict_data

        more: dict[str, Any] = {"cache": cache, "columns": table, "workers": workers, "progress": ConsoleProgress()}
        result = predict_data(data, run, **where, **more)
    else:
        from mmfeat.prediction.inputs import pair_of, samples_of_files
        from mmfeat.prediction.model import load
        from mmfeat.prediction.predict import predict_files

        samples = samples_of_files(files) if files else pair_of(text, image)
        result = predict_files(load(run, **where), samples, ConsoleProgress())
    if run is None:
        show_overlooked(result.run, head, modalities)
    _deliver(result, target, layout, plain=format is not None)


def split_columns(columns: str | None) -> tuple[dict[str, str] | None, dict[str, Any]]:
    """`--columns` as (names in the input table or None, names in the file written if any).

    `id=guid` says what a column of the table is called, a plain name is a column to write.
    """
    given = names(columns or "")
    table, written = [each for each in given if "=" in each], [each for each in given if "=" not in each]
    return pairs(",".join(table)) if table else None, {"names": tuple(written)} if written else {}


def _target(
    out_file: str | None, kept: list[Any], format: str | None, header: bool, proba: bool, written: dict[str, Any]
) -> tuple[Any, Any]:
    """(path or None, layout), found wrong before any work is done."""
    from mmfeat.prediction.output_file import OutputFormat, checked_target, choose_format

    layout = OutputFormat(choose_format(out_file, format), header, probabilities=proba, **written)
    return None if out_file is None else checked_target(out_file, *[each for each in kept if each]), layout


def _deliver(result: Predicted, target: Any, layout: Any, plain: bool) -> None:
    """Into the file; a table for a few samples on a terminal; else the text of the file, for a pipe."""
    from mmfeat.prediction.output_file import checked_target, prediction_text, write_prediction_file

    if target is not None:
        checked_target(target, result.run.folder, result.run.config.data)
        write_prediction_file(target, result.predictions, layout)
        show_notes(result)
        out.print(f"predictions {target}")
        return
    show_notes(result)
    if out.is_terminal and not plain and len(result.predictions) <= FEW:
        show_few(result)
        return
    text = prediction_text(result.predictions, layout)
    try:
        sys.stdout.buffer.write(text.encode(errors="surrogateescape"))  # UTF-8 as in a file; a path as it is named
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # who reads had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
