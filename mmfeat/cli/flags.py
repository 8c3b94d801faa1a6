"""Flags: annotations and tables of parameters that several commands share, and the values that flags stand for."""

from __future__ import annotations

import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mmfeat.cli.console import err, out
from mmfeat.errors import ConfigError
from mmfeat.system.files import no_such_data
from mmfeat.system.remote import exists
from mmfeat.system.wording import shown

if TYPE_CHECKING:
    from mmfeat.extraction.requests import Request
    from mmfeat.runs.run import Run


Command = TypeVar("Command", bound=Callable[..., None])
Parameters = dict[str, tuple[Any, Any]]  # parameter -> its annotation with the option, and its default
LONGEST_REASON = 240  # letters of an error of MLflow


def option(text: str, kind: Any = str, *names: str, least: int | None = None) -> Any:
    """Make the annotation of an option with a help text, a type, names other than the parameter's, and a minimum."""
    return Annotated[kind, typer.Option(*names, help=text, min=least)]


PLACE = "place"  # the parameter of data that are named without `--data`
Place = Annotated[str | None, typer.Argument(metavar="DATA", help="The same as --data.")]
Data = option(
    "Folder, archive or table, in a layout of docs/data.md; pattern, list, URL or hf:NAME.", str | None, "--data"
)
AnyData = option("Folder or table.  [default: that of the latest extraction]", str | None, "--data")
AnyRun = option("A run folder.  [default: the best on the latest data and folds]", str | None, "--run")
RunData = option("Folder or table.  [default: that of the run]", str | None, "--data")
RunCache = option("Feature cache.  [default: that of the run]", str | None, "--cache")
Heads = option("Folder of the runs.", str, "--heads")
Head = option("A head of the run.  [default: the best]", str | None, "--head")
Modalities = option("both, text, image, table or ensemble.  [default: the best]", str | None, "--modalities")
Encoders = option("family[:variant],...: st, bert, hf, clip, timm, resnet50, hashing, hog, lexicon.", str, "--encoders")
AnyEncoders = option("As for extract.  [default: the latest extraction's]", str | None, "--encoders")
CacheFolder = option("Folder of the feature cache.", str, "--cache")
ColumnsFlag = option("Names of your columns: id=,text=,image=,label=,table=; A+B joins two.", str, "--columns")
Device = option("auto, cpu, cuda, cuda:N or mps.", str, "--device")
RuntimeFlag = option(
    "What runs encoders on a CPU: torch, compile, onnxruntime, openvino; auto: the fastest.", str, "--runtime"
)
AnyColumns = option("As for extract.  [default: the latest's]", str | None, "--columns")
EngineFlag = option("local or ray.", str, "--engine")
RayAddress = option("Address of a Ray cluster.  [default: this machine]", str | None, "--ray-address")
Workers = option("Processes that read, or Ray's workers; 0: by the machine.", int, "--workers", least=0)
Trainings = option("Trainings at the same time; 0: one for each core.", int, "--workers", least=0)
Mlflow = option(
    "Log the run to the MLflow server or database at this URI: http://HOST:5000, sqlite:///mlflow.db.",
    str | None,
    "--mlflow",
)
Seed = option("Fixes everything that is random.", int, "--seed", least=0)

# The flags of encoders: parameter -> its type, help, least value, and default in `mmfeat extract`.
_OUTPUTS = "pooled, tokens, prefix:N (input of the N-th last layer), bert=tokens, ..."
_CLEANING = "Text cleaning: auto (tweet for tweets), tweet, tweet-cased or none; st=none, ..."
_DRAFT = "Decode large JPEGs at a reduced size of at least so many pixels; 0: in full."
_BACKGROUND = "Ground of transparent photos: white, #rrggbb or none; auto: as before, else white."
_ENCODER_FLAGS: dict[str, tuple[Any, str, int | None, Any]] = {
    "dtype": (str, "Arithmetic of encoders: auto, float32, bfloat16 or float16.", None, "auto"),
    "cleaning": (str, _CLEANING, None, "auto"),
    "pooling": (str, "BERT pooling: mean, cls, max, last, pooler, auto; bert=cls, ...", None, "mean"),
    "max_length": (str, "Longest text in tokens; 0: 128 for bert, the checkpoint's for st; st=256, ...", None, 0),
    "prompt": (str, "Name of an st checkpoint's prompt; none for no prompt.  [default: the checkpoint's]", None, ""),
    "truncate_dim": (str, "Keep so many first dimensions of an st vector; 0: all; st=256, ...", None, 0),
    "image_size": (
        str,
        "Pixels that an image model sees: 336 or 224x448 (height x width); timm=384, ...",
        None,
        "model",
    ),
    "image_pooling": (str, "Pooling of image models: cls, mean, cls+mean, or model: their own; ...", None, "model"),
    "layers": (str, "Pool the mean of the last N hidden states; bert=4, ...", None, 1),
    "outputs": (str, _OUTPUTS, None, "pooled"),
    "views": (int, "Number of augmented views of each photo, beside the plain one.", 0, 0),
    "draft": (int, _DRAFT, 0, 0),
    "exif": (str, "Turn photos upright by EXIF, or keep them as stored; auto: as before, else upright.", None, "auto"),
    "background": (str, _BACKGROUND, None, "auto"),
}


def _encoder_parameters(latest: bool) -> Parameters:
    """Return the flags of encoders; with `latest`, a flag that is not given means the latest extraction's value."""
    parameters: Parameters = {}
    for name, (kind, text, least, default) in _ENCODER_FLAGS.items():
        text = "As for extract.  [default: the latest's]" if latest else text
        annotation = option(text, kind | None if latest else kind, least=least)
        parameters[name] = (annotation, None if latest else default)
    return parameters


# The flags of reading: parameter -> its help. With --columns, they make up the `columns` of the library's functions.
_READING_FLAGS = {
    "encoding": "Encoding of texts that are not UTF-8.  [default: guessed]",
    "delimiter": "What separates cells: a character, or tab, comma, semicolon, pipe.  [default: the file's]",
    "quoting": "How a table is quoted: csv, backslash, none; auto: what the file supports.  [default: auto]",
    "image_root": "Folder or URL that the paths of photos begin in.  [default: the table's folder]",
    "image_pattern": "Paths of photos by columns, as in '{id}.jpg' or 'pics/{shop}/{sku}.png'.",
    "images": "Several photos of a sample: the first one, or the mean of their vectors.  [default: mean]",
    "no_label": "Words for a missing label.  [default: null,nan,na,n/a,<na>,none]",
}


def _reading_parameters(columns: Any, default: str | None) -> Parameters:
    reading = {name: (option(text, str | None), None) for name, text in _READING_FLAGS.items()}
    return {"columns": (columns, default), **reading}


READING_PARAMETERS = _reading_parameters(ColumnsFlag, "")
LATEST_READING = _reading_parameters(AnyColumns, None)


def reading(values: Mapping[str, Any], before: Mapping[str, str] | None = None) -> dict[str, str] | None:
    """Return the columns and the flags of reading that were given over those `before`, or None if none was given.

    Names of columns replace all the names before.
    """
    flags_given = (*_READING_FLAGS, "labels")
    given = {name.replace("_", "-"): v for name in flags_given if (v := values.get(name)) is not None}
    columns = pairs(values["columns"]) if values.get("columns") else {}
    if not columns and not given:
        return None
    flags = {name.replace("_", "-") for name in _READING_FLAGS}
    return {name: v for name, v in (before or {}).items() if not columns or name in flags} | columns | given


Labels = option("A table of ids and labels that replace those of the data.", str | None, "--labels")

ENCODER_PARAMETERS = _encoder_parameters(latest=False)
LATEST_PARAMETERS = _encoder_parameters(latest=True)
# The flags of commands that need an earlier extraction.
REQUEST_PARAMETERS: Parameters = {
    "data": (AnyData, None),
    "encoders": (AnyEncoders, None),
    "cache": (CacheFolder, "cache"),
    **LATEST_READING,
    "device": (Device, "auto"),
    **LATEST_PARAMETERS,
}


def takes(parameters: Parameters) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `(context, **values)` the flags in a table of parameters.

    A command with `--data` and no argument of its own takes the data as its argument too.
    """
    is_argument = [
        isinstance(annotation.__metadata__[0], typer.models.ArgumentInfo) for annotation, _ in parameters.values()
    ]
    if "data" in parameters and not any(is_argument):
        parameters = {PLACE: (Place, None), **parameters}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        options = [
            inspect.Parameter(name, kind, annotation=annotation, default=default)
            for name, (annotation, default) in parameters.items()
        ]
        first = inspect.Parameter("context", kind, annotation=typer.Context)

        @functools.wraps(command)
        def wrapper(context: typer.Context, **values: Any) -> None:
            if PLACE in values:
                context.params["data"] = _data_of(context, context.params.pop(PLACE))
                del values[PLACE]
            context.params.update(_for_these_encoders(context, values))
            command(context, **{name: context.params[name] for name in values})

        wrapper.__signature__ = inspect.Signature([first, *options])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in (first, *options)}
        return wrapper

    return decorate


def _data_of(context: typer.Context, place: str | None) -> str | None:
    """The data that are named with or without `--data`."""
    data: str | None = context.params["data"]
    source = context.get_parameter_source("data")
    if place and data not in (None, place) and source is not None and source.name == "COMMANDLINE":
        raise ConfigError(f"{place} and --data {data} both name the data; give one of them")
    return place or data


def _for_these_encoders(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder options of a configuration file, without those of encoders that the command line does not name."""
    options = {name: str(values[name]) for name in _ENCODER_FLAGS if name in values}
    of_file = {name: text for name, text in options.items() if ":" in text and _is_of_file(context, name)}
    if not of_file or not values.get("encoders"):
        return {}
    from mmfeat.encoders.registry import kept_for
    from mmfeat.encoders.spec import NAMED, EncoderOptions

    given: dict[str, Any] = {name: text for name, text in of_file.items() if name in NAMED}
    kept = kept_for(requests(values["encoders"]), EncoderOptions(**given))
    return {name: str(getattr(kept, name)) for name in given}


def _is_of_file(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


def encoder_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of the encoder flags; None where a flag was not given."""
    options = {name: values.get(name) for name in _ENCODER_FLAGS}
    return options | {"outputs": None if options["outputs"] is None else tuple(names(options["outputs"]))}


class Interrupted(KeyboardInterrupt):
    """The interrupt of a command; its text says what is kept."""


def interruptible(kept: str) -> Callable[[Command], Command]:
    """Make a command that is interrupted raise `Interrupted` with the text `kept`."""

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
    """Log a finished run to MLflow at `uri`, if given; any error becomes a warning, since the run itself is whole."""
    if uri is None:
        return
    from mmfeat.runs.mlflow_log import log_run

    try:
        id = log_run(run, uri)
    except Exception as error:  # servers, networks and databases raise errors of many kinds
        first: BaseException = error  # a client wraps what the network says in messages of its own
        while cause := first.__cause__ or first.__context__:
            first = cause
        reason = f"{uri}: {first.strerror}" if isinstance(first, OSError) and first.strerror else str(error)
        reason = textwrap.shorten(reason, LONGEST_REASON, placeholder=" ...") or type(error).__name__
        err.print(f"warning: the run is whole but was not logged to MLflow: {reason}")
    else:
        out.print(f"mlflow run {id} ({uri})")


def find_request(values: Mapping[str, Any]) -> Request:
    """Return the request that the values of flags describe; a flag that is not given means the latest extraction's."""
    from mmfeat.extraction.requests import all_requests, latest_request, new_request

    data, encoders = values.get("data"), values.get("encoders")
    if data is not None and not exists(data):
        raise no_such_data(data)
    if data is not None and encoders is not None:
        return new_request(data, requests(encoders), reading(values) or {}, encoder_options(values))
    request = latest_request(values["cache"], data)
    columns = reading(values, request.columns)
    request = request.changed(requests(encoders) if encoders else None, columns, encoder_options(values))
    chosen = f"using {shown(request.data)} with {', '.join(map(shown, request.encoders))}"
    sets = {other.data for other in all_requests(values["cache"])} if data is None else ()
    out.print(f"{chosen}: the latest of {len(sets)} data sets; --data names another" if len(sets) > 1 else chosen)
    return request


def names(value: str) -> list[str]:
    """Split a comma-separated list."""
    return [name.strip() for name in value.split(",") if name.strip()]


def requests(value: str) -> list[str]:
    """Split a list of encoders, whose paths may hold commas."""
    from mmfeat.encoders.names import split_requests

    return split_requests(value)


def pairs(value: str) -> dict[str, str]:
    """Read `id=guid,text=caption` as a mapping; raises `ConfigError` for anything else.

    What follows `table=price` without a name of its own is another column of the table: `table=price,brand`.
    """
    pairs: list[tuple[str, str, str]] = []
    for name, equals, column in (pair.partition("=") for pair in names(value)):
        if pairs and pairs[-1][0] == "table" and not equals:
            pairs[-1] = "table", "=", f"{pairs[-1][2]}+{name}"
        else:
            pairs.append((name, equals, column))
    if broken := [name for name, equals, column in pairs if not equals or not column]:
        raise ConfigError(f"--columns {','.join(broken)}: write id=...,text=...,image=...,label=...")
    return {name: column for name, _, column in pairs}


# Presets of `mmfeat heads`: published recipes as values of flags; a flag that is given wins over its preset.
PRESETS: dict[str, Mapping[str, Any]] = {
    # Fusions of BERT and ResNet-50 on an 8:2 holdout, with a grid over batch size, learning rate and dropout, and
    # cross-attention to one pooled vector. Extract with --encoders bert,resnet50 --pooling pooler --max-length 32.
    "bert-resnet50": {
        "fusion": "late,cross-attention",
        "baselines": "none",
        "attend": "pooled",
        "protocol": "holdout",
        "split": "8:2",
        "seeds": 1,
        "learning_rate": "1e-5,1.5e-5,2e-5",
        "attention_learning_rate": "1e-5",
        "dropout": "0.3,0.4,0.5",
        "batch_size": "16,32",
        "weight_decay": "0.01",
        "class_weights": "none",
        "epochs": "6",
        "patience": "3",
        "monitor": "macro-f1",
        "logit_adjustment": "0",
    },
    # Heads on frozen CLIP on an 8:1:1 holdout. Extract with --encoders clip --outputs pooled,tokens.
    "frozen-clip": {
        "fusion": "all",
        "baselines": "none",
        "protocol": "holdout",
        "split": "8:1:1",
        "seeds": 1,
        "learning_rate": "3e-4",
        "attention_learning_rate": "1e-4",
        "dropout": "0.5",
        "batch_size": "16",
        "weight_decay": "0.05",
        "class_weights": "sqrt",
        "epochs": "12",
        "patience": "3",
        "monitor": "macro-f1",
        "logit_adjustment": "0",
    },
}

FORMER = {"system-a": "bert-resnet50", "system-b": "frozen-clip"}  # names that are still taken


def preset_values(name: str) -> Mapping[str, Any]:
    """Return the values of a preset by parameter name; raises `ConfigError` for an unknown preset."""
    name = FORMER.get(name, name)
    if name not in PRESETS:
        raise ConfigError(f"--preset {name}: use one of {', '.join(PRESETS)}")
    return PRESETS[name]
