"""`mmfeat submit`, `predict` and `serve`: predictions of a saved run, as a file, a table, text for a pipe, or by HTTP.
`mmfeat neighbours`: the samples nearest to a sample, a text or a photo."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfeat.cli import flags
from mmfeat.cli.console import ConsoleProgress, err, fits, one_line, out, show_notes, show_overlooked, show_table
from mmfeat.cli.flags import (
    LATEST_READING,
    AnyData,
    AnyRun,
    CacheFolder,
    Device,
    Head,
    Heads,
    Modalities,
    Parameters,
    names,
    option,
    reading,
    requests,
    takes,
)
from mmfeat.errors import CacheMissError, ConfigError
from mmfeat.system.wording import counted, head_label, interval, shown, size_of

if TYPE_CHECKING:
    from mmfeat.prediction.model import Model
    from mmfeat.prediction.nearest import Neighbours
    from mmfeat.prediction.output_file import OutputFormat
    from mmfeat.prediction.predict import Predicted
    from mmfeat.prediction.submit import Submission
    from mmfeat.runs.entry import Scores
    from mmfeat.serve.service import Nearest


FEW = 20  # more samples are printed as CSV, also on a terminal
SCORED = 30  # labelled samples from which a score is printed
FIRST = ["most probable", "second", "third"]  # classes in the table, where the terminal has no room for all
LOOPBACK = ("127.", "::1")
SHOWN = 5  # neighbours in an answer over HTTP


def show_submission(result: Submission) -> None:
    """Print the share of each label beside those out of fold and in training, warnings, and the paths of the files."""
    head = head_label(result.head, result.modalities)
    out.print(f"{result.rows:,} predictions for {shown(result.data)} by {head}")
    header = "label", "predicted", *(["out of fold"] if result.out_of_fold else []), "in training"
    shares = [result.predicted, *([result.out_of_fold] if result.out_of_fold else []), result.trained]
    form = "{:.6g}" if result.run.config.is_regression else "{:.1%}"
    rows = [(label, *(form.format(share.get(label, 0.0)) for share in shares)) for label in result.trained]
    show_table(header, rows, header[:1:-1])
    show_notes(warnings_of(result))
    out.print(f"run {result.run.folder}")
    out.print(f"leaderboard {result.run.leaderboard_file}")
    out.print(f"submission {result.path}")
    out.print("next: hand it in; mmfeat report shows what to expect of it")


def warnings_of(result: Submission) -> list[str]:
    """The scores on labelled samples, if any, and what to know before the submission is handed in, a line each."""
    lines = [*([_scored(result.scores)] if result.scores else []), *result.notes]
    if result.data_changed:
        lines.append("labels, texts or photos changed since this run was trained; mmfeat heads trains anew")
    if result.without_features:
        count, example = len(result.without_features), result.without_features[0]
        what = f"{counted(count, 'sample')} {'has' if count == 1 else 'have'} neither text nor image"
        lines.append(f"{what} that could be read (first: {example})")
    return lines


def _scored(scores: Scores) -> str:
    if scores.samples < SCORED:
        return f"{counted(scores.samples, 'labelled sample')}: too few for a score, which takes {SCORED}"
    both = (f"{scores.titles[name]} {interval(scores.score(name))}" for name in reversed(scores.main_names[:2]))
    return f"{scores.samples:,} labelled samples: {', '.join(both)}"


def show_head(result: Predicted) -> None:
    """Print to standard error which head predicts, its scores on labelled samples, and warnings."""
    err.print(f"{head_label(result.head, result.modalities)} of {result.run.folder}")
    if result.scores is not None:
        err.print(_scored(result.scores))
    for line in result.notes:
        err.print(f"note: {line}")


def show_few(result: Predicted) -> None:
    """Print a table with label and probabilities of each sample, and a note on labels that are not the likeliest."""
    predictions, classes = result.predictions, result.predictions.classes
    header, rows = ["sample", "label"], [list(pair) for pair in zip(predictions.ids, predictions.labels, strict=True)]
    if not predictions.numeric:
        probabilities = predictions.probabilities.tolist()
        every = [[*row, *(f"{p:.3f}" for p in ps)] for row, ps in zip(rows, probabilities, strict=True)]
        if fits([*header, *classes], every):
            header, rows = [*header, *classes], every
        else:
            header += FIRST[: len(classes)]
            for row, ps in zip(rows, probabilities, strict=True):
                ranked = sorted(zip(ps, classes, strict=True), reverse=True)
                row += [f"{name} {p:.3f}" for p, name in ranked[: len(FIRST)]]
    show_table(header, rows, header[:2:-1])
    if not (predictions.numeric or predictions.multilabel):
        top = predictions.probabilities.max(axis=1, where=predictions.chosen, initial=0.0)
        if other := int((top < predictions.probabilities.max(axis=1)).sum()):
            what = "label is" if other == 1 else "labels are"
            out.print(f"note: {other} {what} not the most probable class: the run's decision is adjusted for the score")


_COLUMNS = (
    "Pairs name the columns of your table, as for extract: id=...,text=...; two plain names those of the file "
    "written: guid,tag."
)
_FORMAT = "csv, tsv or jsonl.  [default: as the suffix of --out, else csv]"
_MOVED = option("Where the weights of the run are now, if they moved: bert:FOLDER,...", str | None)
_PROBA = option("Write a calibrated probability for each class as well.", bool)
_FILES = "Photos, each with its .txt beside it; .txt files; a folder of them; or a table as data."
# The parameters of both commands: the run that predicts, and the form of the file.
_PARAMETERS: Parameters = {
    "run": (AnyRun, None),
    "heads": (flags.Heads, "heads"),
    "head": (flags.Head, None),
    "modalities": (flags.Modalities, None),
    "encoders": (_MOVED, None),
    "cache": (flags.RunCache, None),
    **LATEST_READING,
    "columns": (option(_COLUMNS, str | None), None),
    "header": (option("Write a first line with the names of the columns.", bool), True),
    "format": (option(_FORMAT, str | None), None),
    "proba": (_PROBA, False),
    "device": (Device, "auto"),
    "runtime": (flags.RuntimeFlag, "auto"),
    "workers": (flags.Workers, 0),
}
SUBMIT_PARAMETERS: Parameters = {
    "run": (AnyRun, None),
    "data": (option("Folder or table.  [default: the test data of extract, else that of the run]", str | None), None),
    "out": (option("The file to write.  [default: submission, as the format]", str | None), None),
    **_PARAMETERS,
}
PREDICT_PARAMETERS: Parameters = {
    "files": (Annotated[list[str] | None, typer.Argument(help=_FILES)], None),
    "text": (option("The text of one pair.", str | None), None),
    "image": (option("The photo of one pair.", str | None), None),
    "data": (option("Folder or table; every sample of it is predicted.", str | None), None),
    "run": (AnyRun, None),
    "out": (option("The file to write.  [default: print]", str | None), None),
    **_PARAMETERS,
    "proba": (_PROBA, True),
}


@takes(SUBMIT_PARAMETERS, "no submission was written; vectors that were computed are kept")
def submit(context: typer.Context, **values: Any) -> None:
    """Predict the test data or the unlabelled samples. A checked file has id and label of each.

    \b
    mmfeat submit --run heads/RUN --out submission.csv
    mmfeat submit --columns id,label --proba --out submission.jsonl
    """
    from mmfeat.prediction.submit import write_submission

    values["columns"], written = split_columns(values)
    for name in set(LATEST_READING) - {"columns"}:
        del values[name]
    values["encoders"] = requests(values["encoders"] or "")
    result = write_submission(**values, **written, progress=ConsoleProgress())
    if values["run"] is None:
        show_overlooked(result.run, values["head"], values["modalities"])
    show_submission(result)


@takes(PREDICT_PARAMETERS, "no predictions were written; vectors that were computed are kept")
def predict(context: typer.Context, **values: Any) -> None:
    """Predict new texts and photos. One pair, some files, or a data set.

    A terminal shows a few samples as a table; otherwise CSV goes to standard output, and notes to standard error.

    \b
    mmfeat predict --run heads/RUN --text "what a day" --image photo.jpg
    mmfeat predict photos/*.jpg --out predictions.csv
    mmfeat predict new.csv > predictions.csv
    """
    from mmfeat.prediction.inputs import is_table
    from mmfeat.prediction.predict import check_inputs

    if values["data"] is None and len(values["files"] or []) == 1 and is_table(values["files"][0]):
        values["data"] = values.pop("files")[0]
    files, data, text, image = values.get("files") or [], values["data"], values["text"], values["image"]
    table, written = split_columns(values)
    data_only = {"cache": values["cache"], "columns": table, "workers": values["workers"]}
    data_only["runtime"] = values["runtime"]
    check_inputs(files, data, text, image, {f"--{name}": v for name, v in data_only.items() if v != "auto"})
    target, output = _target(values, written)
    run, which = values["run"], {name: values[name] for name in ("heads", "head", "modalities", "device")}
    which["encoders"] = requests(values["encoders"] or "")
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
    output = output if written else replace(output, names=result.names)
    _deliver(result, target, output, plain=values["format"] is not None)


def split_columns(values: Mapping[str, Any]) -> tuple[dict[str, str] | None, dict[str, Any]]:
    """Split `--columns` into names in the input table (or None) and `names` in the file that is written (or nothing).

    `id=guid` names a column of the input table; a plain name is a column to write. The flags of reading go with the
    names in the table.
    """
    given = names(values["columns"] or "")
    table, written = [name for name in given if "=" in name], [name for name in given if "=" not in name]
    return flags.reading({**values, "columns": ",".join(table)}), {"names": tuple(written)} if written else {}


def _target(values: dict[str, Any], written: dict[str, Any]) -> tuple[Path | None, OutputFormat]:
    """Return the file to write, if any, and its format, and raise the errors of both before any work is done."""
    from mmfeat.prediction.inputs import text_beside
    from mmfeat.prediction.output_file import OutputFormat, checked_target, choose_format

    file, files = values["out"], values.get("files") or []
    output = OutputFormat(
        choose_format(file, values["format"]), values["header"], **written, probabilities=values["proba"]
    )
    texts = [text_beside(Path(name)) for name in files if Path(name).name]
    inputs = filter(None, [*files, *texts, values["image"], values["data"]])
    return None if file is None else checked_target(file, *inputs), output


def _deliver(result: Predicted, target: Path | None, output: OutputFormat, plain: bool) -> None:
    """Write the file, or print a table of few samples on a terminal and otherwise the text of the file."""
    from mmfeat.prediction.output_file import checked_target, prediction_text, write_prediction_file

    if result.predictions.numeric:  # which have no probabilities of classes
        output = replace(output, probabilities=False)
    if target is not None:
        checked_target(target, result.run.folder, result.run.config.data)
        write_prediction_file(target, result.predictions, output)
        show_head(result)
        out.print(f"predictions {target}")
        return
    show_head(result)
    if out.is_terminal and not plain and len(result.predictions) <= FEW:
        show_few(result)
        return
    text = prediction_text(result.predictions, output)
    sys.stdout.buffer.write(text.encode(errors="surrogateescape"))  # UTF-8, and the very bytes of a path
    sys.stdout.buffer.flush()


NEIGHBOURS_PARAMETERS: Parameters = {
    "id": (Annotated[str | None, typer.Argument(metavar="ID", help="The id of a sample.")], None),
    "text": (option("A text in place of an id; compared with photos where a model has both towers.", str | None), None),
    "image": (option("A photo in place of an id.", str | None), None),
    "encoder": (
        option("Encoder whose vectors are compared, as clip.text.  [default: the first that can]", str | None),
        None,
    ),
    "count": (option("Number of samples to find.", int, least=1), 10),
    "out": (option("Write a page with photos as well.", str | None), None),
    "data": (AnyData, None),
    "cache": (CacheFolder, "cache"),
    **LATEST_READING,
    "device": (Device, "auto"),
}


@flags.takes(NEIGHBOURS_PARAMETERS, "nothing was written")
def neighbours(context: typer.Context, **values: Any) -> None:
    """Find the samples nearest to a sample, a text or a photo. The vectors are those of the latest extraction.

    \b
    mmfeat neighbours 4597 --encoder bert
    mmfeat neighbours --text "a dog in the snow" --out page.html
    """
    from mmfeat.prediction.nearest import neighbours as find

    names = ("id", "text", "image", "data", "encoder", "count", "cache", "device")
    found = find(**{name: values[name] for name in names}, columns=reading(values), progress=ConsoleProgress())
    show_neighbours(found)
    if values["out"]:
        from mmfeat.report.page import write_neighbours

        size = write_neighbours(found, values["out"])
        out.print(f"page {values['out']} ({size_of(size)}; opens without a network)")
    out.print(
        f"next: {'open it in a browser' if values['out'] else 'the same command with --out page.html shows photos'}"
    )


def show_neighbours(found: Neighbours) -> None:
    rows = []
    for sample, cosine in zip(found.samples, found.similarities, strict=True):
        rows.append((f"{cosine:.3f}", sample.id, sample.label or "", one_line(sample.text or "")))
    out.print(f"nearest to {found.query.id} by {found.encoder}")
    show_table(("cosine", "id", "label", "text"), rows)
    show_notes(found.notes)


_NEIGHBOURS = f"Number of nearest training samples in an answer.  [default: {SHOWN}; 0 with a --host open to others]"
SERVE_PARAMETERS: Parameters = {
    "folder": (Annotated[str | None, typer.Argument(metavar="RUN", help="The same as --run.")], None),
    "run": (AnyRun, None),
    "host": (option("Address to listen on; 0.0.0.0 is open to the network."), "127.0.0.1"),
    "port": (option("Port to listen on; 0 is a free one.", int, least=0), 8000),
    "neighbours": (option(_NEIGHBOURS, int | None, least=0), None),
    "heads": (Heads, "heads"),
    "head": (Head, None),
    "modalities": (Modalities, None),
    "encoders": (_MOVED, None),
    "device": (Device, "auto"),
}


@takes(SERVE_PARAMETERS, "nothing was served")
def serve(context: typer.Context, **values: Any) -> None:
    """Answer pairs of text and photo over HTTP. The answers are those of `mmfeat predict`; a page lets you try it.

    \b
    mmfeat serve heads/RUN --port 8000
    curl -F text="what a day" -F image=@photo.jpg http://127.0.0.1:8000/predict
    """
    from mmfeat.prediction.model import load
    from mmfeat.serve.app import check_installed, listen, make_server
    from mmfeat.serve.service import Service

    run, host = values["run"] or values["folder"], values["host"]
    if values["run"] and values["folder"]:
        raise ConfigError(f"{values['folder']} and --run {values['run']} both name a run; give one of them")
    check_installed()
    which = {name: values[name] for name in ("heads", "head", "modalities", "device")}
    model = load(run, **which, encoders=requests(values["encoders"] or ""))
    with listen(host, values["port"]) as opened:
        address, port = opened.getsockname()[:2]
        is_open = not address.startswith(LOOPBACK)
        count = values["neighbours"] if values["neighbours"] is not None else 0 if is_open else SHOWN
        service = Service(model, nearest=_nearest(model, count))
        service.warm()
        if run is None:
            show_overlooked(model.run, values["head"], values["modalities"])
        if is_open:
            err.print("note: whoever reaches this machine can ask, unencrypted; --host 127.0.0.1 keeps it to yourself")
        out.print(f"{head_label(model.entry.head, model.entry.modalities)} of {model.run.folder}")
        out.print(f"serving http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops)")
        with suppress(KeyboardInterrupt):
            make_server(service, host, err.print).run(sockets=[opened])
        out.print("stopped")


def _nearest(model: Model, count: int) -> Nearest | None:
    """The search for so many neighbours, None for 0 and, with a note, where the cache is gone."""
    from mmfeat.serve.service import Nearest

    try:
        return Nearest(model, count) if count else None
    except CacheMissError as error:
        err.print(f"note: answers are without neighbours: {error}")
        return None
