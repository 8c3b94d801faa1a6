"""`mmfeat submit` and `mmfeat predict`: a saved run predicts, and the same flags say how that is written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mmfeat.cli.console import ConsoleProgress, err, out, show_overlooked
from mmfeat.cli.flags import (
    AnyRun,
    Device,
    Parameters,
    RunCache,
    RunData,
    Workers,
    interruptible,
    names,
    pairs,
    takes,
)
from mmfeat.system.wording import head_label, interval, shown

if TYPE_CHECKING:
    from mmfeat.prediction.output_file import OutputFormat
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
_OUT = Annotated[str | None, typer.Option("--out", help="The file to write.  [default: submission, as the format]")]
_MODALITIES = typer.Option("--modalities", help="both, text, image or ensemble.  [default: the best]")
_PROBA = typer.Option("--proba/--no-proba", help="A calibrated probability for each class as well.")
# What submit and predict share: which run predicts, and how the file is written.
_PARAMETERS: Parameters = {
    "run": (AnyRun, None),
    "heads": (Annotated[str, typer.Option("--heads", help="Folder of the runs.")], "heads"),
    "head": (Annotated[str | None, typer.Option("--head", help="A head of the run.  [default: the best]")], None),
    "modalities": (Annotated[str | None, _MODALITIES], None),
    "cache": (RunCache, None),
    "columns": (Annotated[str | None, typer.Option("--columns", help=_COLUMNS)], None),
    "header": (
        Annotated[bool, typer.Option("--header/--no-header", help="First line with the names of the columns.")],
        True,
    ),
    "format": (
        Annotated[
            str | None, typer.Option("--format", help="csv, tsv or jsonl.  [default: as the suffix of --out, else csv]")
        ],
        None,
    ),
    "proba": (Annotated[bool, _PROBA], False),
    "device": (Device, "auto"),
    "workers": (Workers, 0),
}
SUBMIT_PARAMETERS: Parameters = {
    "run": (AnyRun, None),
    "data": (RunData, None),
    "out": (_OUT, None),
    **_PARAMETERS,
}
PREDICT_PARAMETERS: Parameters = {
    "files": (
        Annotated[
            list[str] | None, typer.Argument(help="Photos, each with its .txt beside it; .txt files; a folder of them.")
        ],
        None,
    ),
    "text": (Annotated[str | None, typer.Option("--text", help="The text of one pair.")], None),
    "image": (Annotated[str | None, typer.Option("--image", help="The photo of one pair.")], None),
    "data": (
        Annotated[str | None, typer.Option("--data", help="Folder or table, of which every sample is predicted.")],
        None,
    ),
    "run": (AnyRun, None),
    "out": (Annotated[str | None, typer.Option("--out", help="The file to write.  [default: print]")], None),
    **_PARAMETERS,
    "proba": (Annotated[bool, _PROBA], True),
}


@takes(SUBMIT_PARAMETERS)
@interruptible("no submission was written; vectors that were computed are kept")
def submit(context: typer.Context, **values: Any) -> None:
    """Predict the unlabelled samples and write guid,tag rows, checked before they are written.

    \b
    mmfeat submit --run heads/RUN --out submission.csv
    mmfeat submit --columns id,label --proba --out submission.jsonl
    """
    from mmfeat.prediction.submit import write_submission

    values["columns"], written = split_columns(values["columns"])
    result = write_submission(**values, **written, progress=ConsoleProgress())
    if values["run"] is None:
        show_overlooked(result.run, values["head"], values["modalities"])
    show_submission(result)


@takes(PREDICT_PARAMETERS)
@interruptible("no predictions were written; vectors that were computed are kept")
def predict(context: typer.Context, **values: Any) -> None:
    """Predict new pairs of text and image through a saved run: one pair, some files, or a data set.

    A terminal shows a few samples as a table; otherwise CSV goes to standard output, and notes to standard error.

    \b
    mmfeat predict --run heads/RUN --text "what a day" --image photo.jpg
    mmfeat predict photos/*.jpg --out predictions.csv
    mmfeat predict --data new.csv > predictions.csv
    """
    from mmfeat.prediction.predict import check_inputs

    files, data, text, image = values["files"] or [], values["data"], values["text"], values["image"]
    table, written = split_columns(values["columns"])
    data_only = {"cache": values["cache"], "columns": table, "workers": values["workers"]}
    check_inputs(files, data, text, image, {f"--{name}": value for name, value in data_only.items()})
    target, layout = _target(values, written)
    run, which = values["run"], {name: values[name] for name in ("heads", "head", "modalities", "device")}
    if data is not None:
        from mmfeat.prediction.predict import predict_data

        result = predict_data(data, run, **which, **data_only, progress=ConsoleProgress())
    else:
        from mmfeat.prediction.inputs import pair_of, samples_of_files
        from mmfeat.prediction.model import load
        from mmfeat.prediction.predict import predict_files

        samples = samples_of_files(files) if files else pair_of(text, image)
        result = predict_files(load(run, **which), samples, ConsoleProgress())
    if run is None:
        show_overlooked(result.run, values["head"], values["modalities"])
    _deliver(result, target, layout, plain=values["format"] is not None)


def split_columns(columns: str | None) -> tuple[dict[str, str] | None, dict[str, Any]]:
    """`--columns` as (names in the input table or None, names in the file written if any).

    `id=guid` says what a column of the table is called, a plain name is a column to write.
    """
    given = names(columns or "")
    table, written = [each for each in given if "=" in each], [each for each in given if "=" not in each]
    return pairs(",".join(table)) if table else None, {"names": tuple(written)} if written else {}


def _target(values: dict[str, Any], written: dict[str, Any]) -> tuple[Path | None, OutputFormat]:
    """The file to write, if any, and its format: what is wrong with them is said before any work is done."""
    from mmfeat.prediction.inputs import text_beside
    from mmfeat.prediction.output_file import OutputFormat, checked_target, choose_format

    file, files = values["out"], values["files"] or []
    layout = OutputFormat(
        choose_format(file, values["format"]), values["header"], **written, probabilities=values["proba"]
    )
    inputs = [*files, *(text_beside(Path(each)) for each in files if Path(each).name), values["image"], values["data"]]
    return None if file is None else checked_target(file, *filter(None, inputs)), layout


def _deliver(result: Predicted, target: Path | None, layout: OutputFormat, plain: bool) -> None:
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
