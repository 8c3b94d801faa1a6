"""The command line: each command builds a configuration and calls one function of the library."""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mmfeat import cli_audit, cli_cache, cli_export, cli_finetune, cli_heads, cli_predict, cli_report, cli_runs, flags
from mmfeat.config import read_config
from mmfeat.console import ConsoleProgress, err, out, show_extraction, show_forecast
from mmfeat.flags import (
    INTERRUPTED,
    CacheFolder,
    Cleaning,
    Columns,
    Data,
    Device,
    Draft,
    Dtype,
    Encoders,
    Engine,
    MaxLength,
    Outputs,
    Pooling,
    RayAddress,
    Seed,
    Views,
    Workers,
    names,
    pairs,
    reported,
)
from mmfeat.version import __version__

app = typer.Typer(
    name="mmfeat",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
_UsageError: Any = typer.BadParameter.__base__  # typer does not export it
GROUPS = {cli_cache.NAME: cli_cache.app, cli_runs.NAME: cli_runs.app}
for _name, _group in GROUPS.items():
    app.add_typer(_group, name=_name)


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
    mmfeat heads --fusion all
    mmfeat finetune --unfreeze text:1
    mmfeat submit
    mmfeat predict --text "what a day" --image photo.jpg
    """
    flags.debug = debug
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
    outputs: Outputs = "pooled",
    views: Views = 0,
    draft: Draft = 0,
    retry_failed: Annotated[bool, typer.Option(help="Try again what could not be read or encoded.")] = False,
    workers: Workers = 0,
    batch_size: Annotated[int, typer.Option(help="Samples a forward pass; 0 suits the device.", min=0)] = 0,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile pooled encoders; takes a minute.")] = False,
    engine: Engine = "local",
    ray_address: RayAddress = None,
    dry_run: Annotated[bool, typer.Option(help="Say what is missing, how long it takes and how large it is.")] = False,
) -> None:
    """Encode what the cache lacks; a rerun continues, or says that there is nothing to do.

    \b
    mmfeat extract --data tweets --encoders clip,bert:./my-bert --outputs pooled,clip=tokens
    """
    from mmfeat.cluster import check_engine
    from mmfeat.encoders import EncoderOptions
    from mmfeat.extract import extract_features
    from mmfeat.extractor import ExtractSettings

    check_engine(engine, ray_address)
    asked: dict[str, Any] = {
        "cache": cache,
        "options": EncoderOptions(
            dtype, cleaning, pooling, max_length, outputs=tuple(names(outputs)), views=views, draft=draft
        ),
        "columns": pairs(columns),
        "settings": ExtractSettings(device, workers, batch_size, compiled, retry_failed),
        "progress": ConsoleProgress(),
    }
    if dry_run:
        from mmfeat.forecast import forecast_extraction

        show_forecast(forecast_extraction(data, names(encoders), **asked))
        if engine != "local":
            out.print(f"that is one process of this machine; N workers of {engine} divide the time by about N")
        return
    result = extract_features(data, names(encoders), engine=engine, ray_address=ray_address, **asked)
    show_extraction(result)
    elsewhere = f" --cache {shlex.quote(cache)}" if cache != "cache" else ""
    few = len(result.samples.labels) < 2  # heads cannot be trained on them
    out.print(f"next: mmfeat {'predict' if few else 'heads'} --data {shlex.quote(data)}{elsewhere}")


app.command()(cli_audit.audit)
app.command()(cli_heads.heads)
app.command()(cli_finetune.finetune)
app.command()(cli_report.report)
app.command()(cli_export.export)


app.command()(cli_predict.submit)
app.command()(cli_predict.predict)


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
    """Entry point. `--debug` and `--config FILE` may stand anywhere; exit code 2 for what is no command or flag."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill saves what Ctrl-C saves
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the reader has threads of its own
    gc.set_threshold(100_000)  # a million samples are no garbage, and looking for some among them takes seconds
    flags.typed = sys.argv[1:]
    code = _run(_global_flags_first(sys.argv[1:]))
    if code == INTERRUPTED and "ray" in sys.modules:
        _leave_at_once(INTERRUPTED)
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """The exit code; one line where a command or a flag is wrong, as for any other error."""
    try:
        return app(args=arguments, prog_name=app.info.name, standalone_mode=False) or 0
    except _UsageError as error:
        message = error.format_message()
        if "\n" in message:  # help, for a command that cannot do without arguments
            err.print(message)
        else:
            command = error.ctx.command_path if error.ctx else app.info.name
            err.print(f"mmfeat: {message.rstrip('.?')}; {command} -h shows what there is")
        return 2


def _leave_at_once(code: int) -> None:
    """Where Ray was interrupted while it started, its threads crash an interpreter that winds down."""
    atexit._run_exitfuncs()  # Ray's end the processes that it began
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
    """Give the file's values to the commands as defaults; `cache ls` has the table [cache-ls]."""
    commands: dict[str, Any] = dict(context.command.commands)  # type: ignore[attr-defined]
    inner = {group: list(commands[group].commands) for group in GROUPS}
    for group in GROUPS:
        commands |= {f"{group}-{name}": command for name, command in commands.pop(group).commands.items()}
    known = {
        name: {option.opts[0].lstrip("-"): option.name for option in command.params if option.opts[0].startswith("-")}
        for name, command in commands.items()
    }
    values: dict[str, Any] = read_config(path, known)
    for group, names_of_group in inner.items():
        values[group] = {name: values.pop(f"{group}-{name}") for name in names_of_group}
    context.default_map = values


if __name__ == "__main__":
    main()
