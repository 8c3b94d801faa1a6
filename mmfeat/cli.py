"""The command line: each command builds a configuration and calls one function of the library."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mmfeat.config import read_config
from mmfeat.console import ConsoleProgress, err, out, show_extraction, show_submission, show_sweep, shown
from mmfeat.errors import ConfigError, MmfeatError
from mmfeat.version import __version__

if TYPE_CHECKING:
    from mmfeat.requests import Request

app = typer.Typer(
    name="mmfeat",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
Command = TypeVar("Command", bound=Callable[..., None])
_debug = False

Data = Annotated[str, typer.Option("--data", help="Folder (train.txt, data/) or CSV, TSV, JSONL, Parquet table.")]
AnyData = Annotated[str | None, typer.Option("--data", help="Folder or table.  [default: that of the latest step]")]
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
Dtype = Annotated[str, typer.Option("--dtype", help="Arithmetic: auto, float32, bfloat16 or float16.")]
Cleaning = Annotated[str, typer.Option("--cleaning", help="Text cleaning: tweet or none.")]
Pooling = Annotated[str, typer.Option("--pooling", help="BERT pooling: mean, cls or pooler.")]
MaxLength = Annotated[int, typer.Option("--max-length", help="BERT: most tokens of a text.")]
Workers = Annotated[int, typer.Option("--workers", help="Reading threads; 0 is one a core.", min=0)]
Seed = Annotated[int, typer.Option("--seed", help="Fixes everything that is random.", min=0)]


def reported(interrupted: str) -> Callable[[Command], Command]:
    """One line and an exit code instead of a traceback: 1 for a failure, 130 for an interrupt."""

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except typer.Exit:
                raise
            except KeyboardInterrupt:
                err.print(f"interrupted; {interrupted}")
                raise typer.Exit(130) from None
            except Exception as error:
                if _debug:
                    raise
                err.print(f"mmfeat: {_one_line(error)}")
                raise typer.Exit(1) from None

        return wrapper  # type: ignore[return-value]

    return decorate


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MmfeatError):
        return text
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; check the path and its rights"
    return f"{type(error).__name__}: {text}; --debug shows where"


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"mmfeat {__version__}")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    config: Annotated[str | None, typer.Option("--config", help="TOML file with any flags; flags win.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Encode texts and images once with frozen encoders, then train fusion heads in seconds.

    \b
    mmfeat extract --data tweets --encoders clip,bert,resnet50
    mmfeat heads --fusion concat
    mmfeat submit
    """
    global _debug
    _debug = debug
    if config is not None:
        reported("nothing was done")(_load_config)(context, Path(config))


@app.command()
@reported("every vector that was computed is kept, the same command goes on from there")
def extract(
    data: Data,
    encoders: Encoders = "clip,bert,resnet50",
    cache: CacheFolder = "cache",
    columns: Columns = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    cleaning: Cleaning = "tweet",
    pooling: Pooling = "mean",
    max_length: MaxLength = 128,
    workers: Workers = 0,
    batch_size: Annotated[int, typer.Option(help="Samples a forward pass; 0 suits the device.", min=0)] = 0,
) -> None:
    """Encode what the cache lacks; a rerun continues, or says that there is nothing to do.

    \b
    mmfeat extract --data tweets --encoders clip,bert:./my-bert
    """
    from mmfeat.encoders import EncoderOptions
    from mmfeat.extract import extract_features

    result = extract_features(
        data,
        _names(encoders),
        cache=cache,
        options=EncoderOptions(dtype, cleaning, pooling, max_length),
        columns=_pairs(columns),
        device=device,
        workers=workers,
        batch_size=batch_size,
        progress=ConsoleProgress(),
    )
    show_extraction(result)
    out.print(f"next: mmfeat heads --data {data}")


@app.command()
@reported("the same command trains these heads from the start")
def heads(
    fusion: Annotated[str, typer.Option(help="Fusions: all, none, or some of concat.")] = "all",
    baselines: Annotated[str, typer.Option(help="Baselines beside them: all, none, or some of logistic.")] = "all",
    modalities: Annotated[str, typer.Option(help="Each head on some of both,text,image.")] = "both,text,image",
    data: AnyData = None,
    encoders: AnyEncoders = None,
    cache: CacheFolder = "cache",
    out_folder: Annotated[str, typer.Option("--out", help="Folder of the runs.")] = "heads",
    columns: AnyColumns = None,
    folds: Annotated[int, typer.Option(help="Folds of the cross-validation.", min=2)] = 5,
    group: Annotated[bool, typer.Option("--group/--no-group", help="Keep equal texts and photos in one fold.")] = True,
    split_dir: Annotated[str | None, typer.Option(help="Reuse the folds.csv of this folder.")] = None,
    epochs: Annotated[int, typer.Option(help="Most epochs; macro-F1 stops earlier.", min=1)] = 12,
    batch_size: Annotated[int, typer.Option(help="Samples a step.", min=2)] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 3e-4,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.05,
    dropout: Annotated[float, typer.Option(help="In the hidden layers.", min=0.0, max=0.99)] = 0.5,
    class_weights: Annotated[str, typer.Option(help="Against imbalance: none, inverse or sqrt.")] = "sqrt",
    seed: Seed = 42,
    device: Device = "auto",
    dtype: Annotated[str | None, typer.Option(help="As for extract.  [default: the latest's]")] = None,
    cleaning: Annotated[str | None, typer.Option(help="As for extract.  [default: the latest's]")] = None,
    pooling: Annotated[str | None, typer.Option(help="As for extract.  [default: the latest's]")] = None,
    max_length: Annotated[int | None, typer.Option(help="As for extract.  [default: the latest's]")] = None,
) -> None:
    """Cross-validate heads on the cached vectors and rank them.

    \b
    mmfeat heads --fusion concat --folds 5
    """
    from mmfeat.heads.settings import HeadSettings

    given = {"dtype": dtype, "cleaning": cleaning, "pooling": pooling, "max_length": max_length}
    request = _request(data, encoders, cache, columns, given)
    from mmfeat.sweep import train_heads

    sweep = train_heads(
        request.data,
        request.encoders,
        cache=cache,
        out=out_folder,
        options=request.options,
        columns=request.columns,
        fusion=_names(fusion),
        baselines=_names(baselines),
        modalities=_names(modalities),
        folds=folds,
        grouped=group,
        split_dir=split_dir,
        settings=HeadSettings(
            learning_rate, weight_decay, dropout, batch_size, epochs, class_weights=class_weights, seed=seed
        ),
        device=device,
        progress=ConsoleProgress(),
    )
    show_sweep(sweep)
    out.print(f"next: mmfeat submit --run {sweep.run.folder}")


@app.command()
@reported("no submission was written")
def submit(
    run: Annotated[str | None, typer.Option(help="A run folder.  [default: the best on the data]")] = None,
    data: AnyData = None,
    out_file: Annotated[str, typer.Option("--out", help="The file to write.")] = "submission.csv",
    head: Annotated[str | None, typer.Option(help="A head of the run.  [default: the best]")] = None,
    modalities: Annotated[str | None, typer.Option(help="both, text or image.  [default: the best]")] = None,
    cache: Annotated[str | None, typer.Option("--cache", help="Feature cache.  [default: the run's]")] = None,
    columns: AnyColumns = None,
    device: Device = "auto",
    workers: Workers = 0,
) -> None:
    """Predict the unlabelled samples and write guid,tag rows, checked before they are written.

    \b
    mmfeat submit --run heads/RUN --out submission.csv
    """
    from mmfeat.submit import write_submission

    result = write_submission(
        run,
        data=data,
        out=out_file,
        head=head,
        modalities=modalities,
        cache=cache,
        columns=_pairs(columns) if columns else None,
        device=device,
        workers=workers,
        progress=ConsoleProgress(),
    )
    show_submission(result)


@app.command()
@reported("the same command writes the rest")
def demo(
    out_folder: Annotated[str, typer.Option("--out", help="Folder to write.")] = "demo",
    pairs: Annotated[int, typer.Option(help="Number of pairs.", min=60)] = 600,
    seed: Seed = 7,
) -> None:
    """Write a small generated data set with drawn pictures, texts, and the ugliness of real data.

    \b
    mmfeat demo --out demo
    """
    from mmfeat.demo import write_demo

    folder = write_demo(out_folder, pairs, seed)
    out.print(f"{pairs:,} generated pairs in {folder}")
    out.print(f"next: mmfeat extract --data {folder} --encoders hashing,hog")


def main() -> None:
    """Entry point. `--debug` and `--config FILE` may stand anywhere."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill saves what Ctrl-C saves
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the reader has threads of its own
    app(args=_global_flags_first(sys.argv[1:]))


def _global_flags_first(arguments: list[str]) -> list[str]:
    first: list[str] = []
    rest: list[str] = []
    source = iter(arguments)
    for argument in source:
        if argument == "--debug" or argument.startswith("--config="):
            first.append(argument)
        elif argument == "--config":
            first += [argument, *[value for value in [next(source, None)] if value is not None]]
        else:
            rest.append(argument)
    return first + rest


def _load_config(context: typer.Context, path: Path) -> None:
    """Give the file's values to the commands as defaults."""
    commands: dict[str, Any] = context.command.commands  # type: ignore[attr-defined]
    flags = {
        name: {option.opts[0].lstrip("-"): option.name for option in command.params}
        for name, command in commands.items()
    }
    context.default_map = read_config(path, flags)


def _request(data: str | None, encoders: str | None, cache: str, columns: str | None, given: dict[str, Any]) -> Request:
    """What is named in full, or the latest extraction's request with what is named in its place."""
    from mmfeat.requests import latest_request, new_request

    if data is not None and encoders is not None:
        return new_request(data, _names(encoders), _pairs(columns or ""), given)
    request = latest_request(cache, data)
    request = request.changed(_names(encoders) if encoders else None, _pairs(columns) if columns else None, given)
    out.print(f"using {shown(request.data)} with {', '.join(map(shown, request.encoders))}")
    return request


def _names(value: str) -> list[str]:
    return [name.strip() for name in value.split(",") if name.strip()]


def _pairs(value: str) -> dict[str, str]:
    """`id=guid,text=caption` as a mapping."""
    pairs = [pair.partition("=") for pair in _names(value)]
    if broken := [name for name, equals, column in pairs if not equals or not column]:
        raise ConfigError(f"--columns {','.join(broken)}: write id=...,text=...,image=...,label=...")
    return {name: column for name, _, column in pairs}


if __name__ == "__main__":
    main()
