"""Flags: one name for one thing in every command, as tables for the commands that share them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mmfeat.cli.console import err, out
from mmfeat.errors import ConfigError, DataError
from mmfeat.system.remote import exists
from mmfeat.system.wording import shown, without_passwords

if TYPE_CHECKING:
    from mmfeat.extraction.requests import Request
    from mmfeat.runs.run import Run


Command = TypeVar("Command", bound=Callable[..., None])
Parameters = dict[str, tuple[Any, Any]]  # parameter -> its annotation with the option, and its default
LONGEST_REASON = 240

Data = Annotated[
    str, typer.Option("--data", help="Folder (train.txt, data/) or CSV, TSV, JSONL, Parquet table; or its URL.")
]
AnyData = Annotated[
    str | None, typer.Option("--data", help="Folder or table.  [default: that of the latest extraction]")
]
AnyRun = Annotated[
    str | None, typer.Option("--run", help="A run folder.  [default: the best on the latest data and folds]")
]
RunData = Annotated[str | None, typer.Option("--data", help="Folder or table.  [default: that of the run]")]
RunCache = Annotated[str | None, typer.Option("--cache", help="Feature cache.  [default: that of the run]")]
Encoders = Annotated[
    str, typer.Option("--encoders", help="family[:variant],...: clip, bert, resnet50, timm, hashing, hog.")
]
AnyEncoders = Annotated[
    str | None, typer.Option("--encoders", help="As for extract.  [default: the latest extraction's]")
]
CacheFolder = Annotated[str, typer.Option("--cache", help="Folder of the feature cache.")]
Columns = Annotated[str, typer.Option("--columns", help="Names in your table: id=...,text=...,image=...,label=...")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
AnyColumns = Annotated[str | None, typer.Option("--columns", help="As for extract.  [default: the latest's]")]
Engine = Annotated[str, typer.Option("--engine", help="local or ray.")]
RayAddress = Annotated[str | None, typer.Option("--ray-address", help="A Ray cluster.  [default: this machine]")]
Workers = Annotated[int, typer.Option("--workers", help="Readers, or Ray's workers; 0 suits the machine.", min=0)]
Mlflow = Annotated[
    str | None, typer.Option("--mlflow", help="Tell MLflow there of the run: http://HOST:5000, sqlite:///mlflow.db.")
]
Seed = Annotated[int, typer.Option("--seed", help="Fixes everything that is random.", min=0)]

# The flags of encoders: parameter -> its type, help, least value, and default in `mmfeat extract`.
_OUTPUTS = "pooled, tokens, prefix:N (input of the N-th last layer), bert=tokens, ..."
_DRAFT = "Decode large JPEGs reduced, with no less than so many pixels; 0 in full."
_ENCODER_FLAGS: dict[str, tuple[Any, str, int | None, Any]] = {
    "dtype": (str, "Arithmetic: auto, float32, bfloat16 or float16.", None, "auto"),
    "cleaning": (str, "Text cleaning: tweet or none.", None, "tweet"),
    "pooling": (str, "BERT pooling: mean, cls or pooler.", None, "mean"),
    "max_length": (int, "BERT: most tokens of a text.", None, 128),
    "outputs": (str, _OUTPUTS, None, "pooled"),
    "views": (int, "Augmented views of each photo, beside the plain one.", 0, 0),
    "draft": (int, _DRAFT, 0, 0),
}


def _encoder_parameters(latest: bool) -> Parameters:
    """Return the flags of encoders; with `latest`, a flag that is not given means the latest extraction's value."""
    parameters: Parameters = {}
    for name, (kind, text, least, default) in _ENCODER_FLAGS.items():
        text = "As for extract.  [default: the latest's]" if latest else text
        option = typer.Option(f"--{name.replace('_', '-')}", help=text, min=least)
        parameters[name] = (Annotated[kind | None if latest else kind, option], None if latest else default)
    return parameters


ENCODER_PARAMETERS = _encoder_parameters(latest=False)
LATEST_PARAMETERS = _encoder_parameters(latest=True)
# The flags of a command about an extraction that was made before.
REQUEST_PARAMETERS: Parameters = {
    "data": (AnyData, None),
    "encoders": (AnyEncoders, None),
    "cache": (CacheFolder, "cache"),
    "columns": (AnyColumns, None),
    "device": (Device, "auto"),
    **LATEST_PARAMETERS,
}


def takes(parameters: Parameters) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `(context, **values)` the flags of a table."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        options = [
            inspect.Parameter(name, kind, annotation=annotation, default=default)
            for name, (annotation, default) in parameters.items()
        ]
        first = inspect.Parameter("context", kind, annotation=typer.Context)
        command.__signature__ = inspect.Signature([first, *options])  # type: ignore[attr-defined]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in (first, *options)}
        return command

    return decorate


def encoder_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the flags of encoders; None where a flag was not given."""
    outputs = None if values["outputs"] is None else tuple(names(values["outputs"]))
    return {**{name: values[name] for name in _ENCODER_FLAGS}, "outputs": outputs}


class Interrupted(KeyboardInterrupt):
    """An interrupt of a command; its text says what is kept."""


def interruptible(kept: str) -> Callable[[Command], Command]:
    """Say what is kept where a command is interrupted."""

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except (KeyboardInterrupt, typer.Abort):
                raise Interrupted(kept) from None

        return wrapper  # type: ignore[return-value]

    return decorate


def tell_mlflow(run: Run, uri: str | None) -> None:
    """Log a finished run; whatever goes wrong there is a warning, for the run itself is safe."""
    if uri is None:
        return
    from mmfeat.runs.mlflow_log import log_run

    try:
        found = log_run(run, uri)
    except Exception as error:  # of any server, network or database
        reason = without_passwords(" ".join(str(error).split()))[:LONGEST_REASON] or type(error).__name__
        err.print(f"warning: MLflow was not told of the run, which is whole: {reason}")
    else:
        out.print(f"mlflow run {found} ({without_passwords(uri)})")


def find_request(
    data: str | None, encoders: str | None, cache: str, columns: str | None, given: dict[str, Any]
) -> Request:
    """What is named in full, or the latest extraction's request with what is named in its place."""
    from mmfeat.extraction.requests import latest_request, new_request

    if data is not None and not exists(data):
        raise DataError(f"{data}: no such folder or table; check --data")
    if data is not None and encoders is not None:
        return new_request(data, names(encoders), pairs(columns or ""), given)
    request = latest_request(cache, data)
    request = request.changed(names(encoders) if encoders else None, pairs(columns) if columns else None, given)
    out.print(f"using {shown(request.data)} with {', '.join(map(shown, request.encoders))}")
    return request


def names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


def pairs(value: str) -> dict[str, str]:
    """`id=guid,text=caption` as a mapping."""
    pairs = [pair.partition("=") for pair in names(value)]
    if broken := [name for name, equals, column in pairs if not equals or not column]:
        raise ConfigError(f"--columns {','.join(broken)}: write id=...,text=...,image=...,label=...")
    return {name: column for name, _, column in pairs}
