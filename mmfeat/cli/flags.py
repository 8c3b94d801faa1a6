"""Flags: annotations and tables of parameters that several commands share, the values that flags stand for, and their
help: in panels, with types in plain words, and seldom used ones only under `--help-all`."""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperCommand

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
Data = option("Folder, archive or table, in a layout of docs/data.md; pattern, list, URL or hf:NAME.", str | None)
AnyData = option("Folder or table.  [default: that of the latest extraction]", str | None)
AnyRun = option("A run folder.  [default: the best on the latest data and folds]", str | None)
RunData = option("Folder or table.  [default: that of the run]", str | None)
RunCache = option("Feature cache.  [default: that of the run]", str | None)
Heads = option("Folder of the runs.")
Head = option("A head of the run.  [default: the best]", str | None)
Modalities = option("both, text, image, table or ensemble.  [default: the best]", str | None)
Encoders = option("family[:variant],...: st, bert, hf, clip, timm, resnet50, hashing, hog, lexicon.")
AnyEncoders = option("As for extract.  [default: the latest extraction's]", str | None)
CacheFolder = option("Folder of the feature cache.")
ColumnsFlag = option("Names of your columns: id=,text=,image=,label=,table=; A+B joins two.")
Device = option("auto, cpu, cuda, cuda:N or mps.")
RuntimeFlag = option("What runs encoders on a CPU: torch, compile, onnxruntime, openvino; auto: the fastest.")
AnyColumns = option("As for extract.  [default: the latest's]", str | None)
EngineFlag = option("local or ray.")
RayAddress = option("Address of a Ray cluster.  [default: this machine]", str | None)
Workers = option("Processes that read, or Ray's workers; 0: by the machine.", int, least=0)
Trainings = option("Trainings at the same time; 0: one for each core.", int, least=0)
Mlflow = option(
    "Log the run to the MLflow server or database at this URI: http://HOST:5000, sqlite:///mlflow.db.", str | None
)
Seed = option("Fixes everything that is random.", int, least=0)

# The flags of encoders: parameter -> its type, help, least value, and default in `mmfeat extract`.
_OUTPUTS = "pooled, tokens, prefix:N (input of the N-th last layer), bert=tokens, ..."
_CLEANING = "Text cleaning: auto (tweet for tweets), tweet, tweet-cased or none; st=none, ..."
_DRAFT = "Decode large JPEGs at a reduced size of at least so many pixels; 0: in full."
_BACKGROUND = "Ground of transparent photos: white, #rrggbb or none; auto: as before, else white."
_IMAGE_SIZE = "Pixels that an image model sees: 336 or 224x448 (height x width); timm=384, ..."
_ENCODER_FLAGS: dict[str, tuple[Any, str, int | None, Any]] = {
    "dtype": (str, "Arithmetic of encoders: auto, float32, bfloat16 or float16.", None, "auto"),
    "cleaning": (str, _CLEANING, None, "auto"),
    "pooling": (str, "BERT pooling: mean, cls, max, last, pooler, auto; bert=cls, ...", None, "mean"),
    "max_length": (str, "Longest text in tokens; 0: 128 for bert, the checkpoint's for st; st=256, ...", None, 0),
    "prompt": (str, "Name of an st checkpoint's prompt; none for no prompt.  [default: the checkpoint's]", None, ""),
    "truncate_dim": (str, "Keep so many first dimensions of an st vector; 0: all; st=256, ...", None, 0),
    "image_size": (str, _IMAGE_SIZE, None, "model"),
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


Labels = option("A table of ids and labels that replace those of the data.", str | None)

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


def takes(parameters: Parameters, kept: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `(context, **values)` the flags in a table of parameters, and make it `interruptible`.

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
        interrupted = interruptible(kept)(command)

        @functools.wraps(command)
        def wrapper(context: typer.Context, **values: Any) -> None:
            if PLACE in values:
                context.params["data"] = _data_of(context, context.params.pop(PLACE))
                del values[PLACE]
            context.params.update(_for_these_encoders(context, values))
            interrupted(context, **{name: context.params[name] for name in values})

        wrapper.__signature__ = inspect.Signature([first, *options])  # type: ignore[attr-defined]
        wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in (first, *options)}
        return wrapper

    return decorate


def _data_of(context: typer.Context, place: str | None) -> str | None:
    data: str | None = context.params["data"]
    if place and data not in (None, place) and source_of(context, "data") == "COMMANDLINE":
        raise ConfigError(f"{place} and --data {data} both name the data; give one of them")
    return place or data


def source_of(context: typer.Context, name: str) -> str:
    """Where the value of a parameter is from: COMMANDLINE, DEFAULT_MAP (a configuration file) or DEFAULT."""
    source = context.get_parameter_source(name)
    return source.name if source else "DEFAULT"


def _for_these_encoders(context: typer.Context, values: Mapping[str, Any]) -> dict[str, Any]:
    """The encoder options of a configuration file, without those of encoders that the command line does not name."""
    options = {name: str(values[name]) for name in _ENCODER_FLAGS if name in values}
    of_file = {n: text for n, text in options.items() if ":" in text and source_of(context, n) == "DEFAULT_MAP"}
    if not of_file or not values.get("encoders"):
        return {}
    from mmfeat.encoders.registry import kept_for
    from mmfeat.encoders.spec import NAMED, EncoderOptions

    given: dict[str, Any] = {name: text for name, text in of_file.items() if name in NAMED}
    kept = kept_for(requests(values["encoders"]), EncoderOptions(**given))
    return {name: str(getattr(kept, name)) for name in given}


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
    parts = [name for name, _, _ in pairs]
    if twice := next((part for part in parts if parts.count(part) > 1), ""):
        raise ConfigError(f"--columns: {twice} is named twice; name it once, text=A+B makes one text of two columns")
    return {name: column for name, _, column in pairs}


HELP_ALL = "--help-all"
MANY = 25  # flags; with fewer a command has one panel
OTHERS = "Options"
# Panel -> its parameters in any command, in the order of the help; all others stand under `OTHERS`.
PANELS = {
    "Data": "data test run encoders cache out heads labels columns encoding delimiter quoting image_root image_pattern "
    "images no_label retry_failed dry_run",
    "What to train": "fusion baselines modalities head preset unfreeze projection ensembles task order rare refit",
    "How to score": "protocol folds fold_seeds seeds all_seeds split group split_dir seed",
    "Search": "search trials time_limit",
    "Training": "learning_rate attention_learning_rate lr_encoder lr_attention lr_head layer_decay weight_decay warmup "
    "schedule clip_norm dropout modality_dropout label_smoothing class_weights loss focal_gamma batch_size accumulate "
    "epochs patience monitor init logit_adjustment attend class_names templates gradual augment lora path",
    "Machine": "device runtime workers engine ray_address products mlflow amp gradient_checkpointing "
    "checkpoint_seconds",
    "Encoders": "dtype cleaning pooling max_length prompt truncate_dim image_size image_pooling layers outputs views "
    "draft exif background",
}
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names.split()}
_SELDOM = (
    "encoding delimiter quoting image_pattern images no_label fold_seeds all_seeds attention_learning_rate "
    "modality_dropout label_smoothing focal_gamma init attend templates products engine ray_address mlflow prompt "
    "truncate_dim draft exif background lr_attention layer_decay warmup schedule clip_norm accumulate gradual "
    "checkpoint_seconds"
)
SELDOM = frozenset(_SELDOM.split())
LATEST = "the latest's]"  # ends the help of a flag that is as in the latest extraction
_WORDS = {"str": "text", "int": "whole number", "float": "number"}
_FOLDERS = ("cache", "heads", "run", "split_dir")


class Helped(TyperCommand):
    """A command whose help is grouped; `--help-all` shows the seldom used flags of one with many flags too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if HELP_ALL in args:
            ctx.meta[HELP_ALL] = True
            args = ["--help"]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        parameters = self.get_params(ctx)
        is_long = len(parameters) > MANY
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{name: [] for name in PANELS}, OTHERS: []}
        left = 0
        for parameter in parameters:
            if is_long and HELP_ALL not in ctx.meta and _is_seldom(parameter):
                left += 1
            elif record := parameter.get_help_record(ctx):
                panel = PANEL_OF.get(parameter.name or "", OTHERS) if is_long else OTHERS
                is_argument = parameter.param_type_name == "argument"
                panels["Arguments" if is_argument else panel].append(in_words(record, parameter.name or ""))
        if left:
            panels[OTHERS].append((HELP_ALL, f"Show {left} more flags, which are seldom needed."))
        for panel, rows in panels.items():
            if rows:
                with formatter.section(panel):
                    formatter.write_dl(rows)


def _is_seldom(parameter: Any) -> bool:
    is_latest = parameter.name != "columns" and (getattr(parameter, "help", None) or "").endswith(LATEST)
    return parameter.name in SELDOM or is_latest


def in_words(record: tuple[str, str], name: str) -> tuple[str, str]:
    """The flag with its type and the help with its bounds in words."""
    flag, text = record
    if not flag.startswith("-"):  # an argument
        return flag.partition(" ")[0], text
    flag = re.sub(r"<(str|int|float)( range)?>", lambda type: f"<{_WORDS[type[1]]}>", flag)
    flag = flag.replace("<text>", "<folder>") if name in _FOLDERS else flag
    return flag, re.sub(r"x>=", "at least ", re.sub(r"(; x>=0(?=\])|\s*\[x>=0\])", "", text))
