"""The `mmfeat` command: its subcommands, the configuration file, and errors as one line."""

from __future__ import annotations

import atexit
import difflib
import errno
import gc
import os
import shlex
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mmfeat.cli import audit as cli_audit
from mmfeat.cli import cache as cli_cache
from mmfeat.cli import encoders as cli_encoders
from mmfeat.cli import extract as cli_extract
from mmfeat.cli import finetune as cli_finetune
from mmfeat.cli import heads as cli_heads
from mmfeat.cli import predict as cli_predict
from mmfeat.cli import report as cli_report
from mmfeat.cli import run as cli_run
from mmfeat.cli import runs as cli_runs
from mmfeat.cli.console import err, lasting_streams, out
from mmfeat.cli.flags import Helped, Interrupted, in_words, interruptible
from mmfeat.errors import ConfigError, MmfeatError
from mmfeat.system.trust import keep_private
from mmfeat.system.trust import trust_remote_code as trusted
from mmfeat.system.web import TIMEOUT
from mmfeat.version import __version__

ENCODERS = "encoders"
INTERRUPTED = 130  # the exit code of a shell for SIGINT


def read_config(path: Path, flags: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """Read a TOML file of flag values: command -> parameter -> value.

    `flags` maps each command to its flags, without dashes, and these to parameter names. A top-level key counts for
    every command that has the flag, a table for the command of its name; `encoders` may be a table of tables, one an
    encoder with its options. Raises `ConfigError` for anything else.
    """
    flags = {name: names for name, names in flags.items() if name != ENCODERS}  # in a file that is the flag
    read = _dashed(_read_toml(path))
    values = {
        name: _dashed(value) if name in flags and isinstance(value, dict) else value for name, value in read.items()
    }
    broken = [name for name in flags if not isinstance(values.get(name, {}), dict)]
    broken += ["out"] * ("out" in values)
    if broken:
        raise ConfigError(f"{path}: {', '.join(broken)} means something else for each command; write a table, [heads]")
    common = {key: value for key, value in values.items() if key not in flags}
    if tables := [key for key, value in common.items() if isinstance(value, dict) and key != ENCODERS]:
        meant = _meant(tables[0], [*flags, ENCODERS]) or f"tables are {', '.join(f'[{name}]' for name in flags)}"
        raise ConfigError(f"{path}: no command {', '.join(tables)}; {meant}")
    known = {flag for names in flags.values() for flag in names}
    unknown = [key for key in common if key not in known]
    unknown += [f"{name}.{key}" for name in flags for key in values.get(name, {}) if key not in flags[name]]
    if unknown:
        meant = _meant(unknown[0].rpartition(".")[2], known)
        raise ConfigError(
            f'{path}: no flag {", ".join(unknown)}; keys are flag names, as in encoders = "clip,bert"'
            + (f"; {meant}" if meant else "")
        )
    return {
        name: _of_command(_as_flags(path, {**common, **values.get(name, {})}), names) for name, names in flags.items()
    }


def _as_flags(path: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a command with the tables of encoders as flags: their names, and `NAME=VALUE` pairs of options."""
    if not isinstance(tables := values.get(ENCODERS), dict):
        return values
    from mmfeat.encoders.registry import whole_request
    from mmfeat.encoders.spec import NAMED, written

    known = [name.replace("_", "-") for name in NAMED if name != "convolutional_dtype"]
    flags: dict[str, Any] = {**values, ENCODERS: list(tables)}
    for encoder, options in tables.items():
        where = f'{path}: [{ENCODERS}."{encoder}"]'
        if not isinstance(options, dict):
            raise ConfigError(f"{where} is a table of the options of one encoder; put {encoder} = ... into a table")
        for key, value in _dashed(options).items():
            if key not in known:
                raise ConfigError(
                    f"{where}: no option {key} of one encoder; {_meant(key, known) or 'use ' + ', '.join(known)}"
                )
            if isinstance(value, dict | list | bool):
                raise ConfigError(f"{where}: {key} takes one value; write it as a text or a number")
            before = f"{flags[key]}," if key in flags else ""
            flags[key] = before + written({whole_request(encoder): value})
    return flags


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]}?" if close else ""


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --config names a TOML file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable TOML file ({error})") from error


def _dashed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.replace("_", "-"): value for key, value in values.items()}


def _of_command(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names[flag]: _flag_text(value) for flag, value in values.items() if flag in names}


def _flag_text(value: Any) -> Any:
    """`a,b` for a list, `name=value,...` for a table, in which a name or value with `,` or `=` stands in quotes."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if not isinstance(value, dict):
        return value
    pairs = [[f'"{part}"' if {",", "="} & set(str(part)) else str(part) for part in pair] for pair in value.items()]
    return ",".join(map("=".join, pairs))


class Commands(TyperGroup):
    """The group of all commands: an error is one line and exit code 1, an interrupt one line and exit code 130.

    `--debug` shows the traceback. Errors about commands and flags themselves are raised for `_run`.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted as interrupt:
            err.print(f"interrupted; {interrupt}")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            if ctx.params["debug"] or isinstance(error, typer.Exit) or hasattr(error, "format_message"):
                raise
            err.print(f"mmfeat: {_one_line(error)}")
            raise typer.Exit(1) from None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, MmfeatError):
        return text
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}; check the path and its rights"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # a library writes without naming the file
        return f"{error.strerror}, maybe for temporary files; free some space, or let TMPDIR name another folder"
    return f"{type(error).__name__}: {text}; --debug shows where"


app = typer.Typer(
    name="mmfeat",
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
GROUPS = {cli_runs.NAME: cli_runs.app, cli_cache.NAME: cli_cache.app}
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
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the code that a checkpoint brings; read it first.")
    ] = False,
    url_timeout: Annotated[
        float | None, typer.Option("--url-timeout", help="Seconds to wait for a silent server.", min=0.1)
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Encode texts and images once with frozen encoders, then train fusion heads in seconds.

    \b
    mmfeat run listings.csv
    mmfeat extract --data tweets --encoders clip,bert,resnet50
    mmfeat heads --fusion all
    mmfeat finetune --unfreeze text:1
    mmfeat submit
    mmfeat predict --text "what a day" --image photo.jpg
    """
    if url_timeout is not None:
        os.environ[TIMEOUT] = str(url_timeout)
    if trust_remote_code:
        context.with_resource(trusted())
    if config is not None:
        interruptible("nothing was done")(_load_config)(context, Path(config))


for _command in (  # in the order of use
    *(cli_run.run, cli_extract.extract, cli_audit.audit, cli_heads.heads, cli_report.report, cli_finetune.finetune),
    *(cli_predict.submit, cli_predict.predict, cli_predict.neighbours, cli_predict.serve, cli_report.export),
    *(cli_encoders.encoders, cli_extract.demo),
):
    app.command(cls=Helped)(_command)


def main() -> None:
    """Run the command line; the flags of `mmfeat` itself may stand anywhere. The exit code of a wrong flag is 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM keeps as much as Ctrl-C
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    keep_private()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # texts are tokenized in the reader's own threads
    gc.set_threshold(100_000)  # a collection among a million samples takes seconds
    at_once: list[int] = []
    atexit.register(_leave, at_once)  # runs last, since functions run in the reverse order of registration
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # no file of the working folder is a module of a process we start
    with lasting_streams() as lost:
        code = _run(_global_flags_first(sys.argv[1:]), typed=shlex.join(["mmfeat", *sys.argv[1:]]))
    if lost:
        err.print(f"mmfeat: standard output took no more lines ({lost[0]}); the work itself is done")
        code = code or 1
    if code == INTERRUPTED and "ray" in sys.modules:
        at_once.append(code)
    sys.exit(code)


def _run(arguments: list[str], typed: str) -> int:
    """Run a command and return its exit code; a run that it makes records the line `typed`.

    An error about a command or a flag is printed as one line.
    """
    try:
        return app(args=arguments, prog_name=app.info.name, standalone_mode=False, obj=typed) or 0
    except Exception as error:
        if not hasattr(error, "format_message"):  # the error is not about a command or flag
            raise
        message = _wrong_number(error) or error.format_message()
        if "\n" in message:  # the help of a command that was called without its arguments
            err.print(message)
        else:
            usage = getattr(error, "ctx", None)
            command = usage.command_path if usage else app.info.name
            err.print(f"mmfeat: {message.rstrip('.?')}; {command} -h shows what there is")
        return 2


def _wrong_number(error: Any) -> str:
    """`--folds 1: write a whole number, at least 2` for an error of pydantic about the value of a flag, else ""."""
    if not hasattr(error.__cause__, "errors") or not (record := error.param.get_help_record(error.ctx)):
        return ""
    name, _, kind = in_words(record, error.param.name)[0].rstrip(">").partition(" <")
    wrong = error.__cause__.errors()[0]
    least = f", at least {wrong['ctx']['ge']:g}" if "ge" in wrong.get("ctx", ()) else ""
    return f"{name} {wrong['input']}: write a {kind}{least}"


def _leave(at_once: list[int]) -> None:
    """End the process at once with the exit code in `at_once`, if any, after Ray has ended its own processes.

    If Ray was interrupted while it started, its threads crash an interpreter that shuts down normally.
    """
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(at_once[0])


def _global_flags_first(arguments: list[str]) -> list[str]:
    """Move the flags of `mmfeat` itself before the name of the command, where typer expects them."""
    first: list[str] = []
    rest: list[str] = []
    source = iter(arguments)
    for argument in source:
        if argument in ("--debug", "--trust-remote-code") or argument.startswith(("--config=", "--url-timeout=")):
            first.append(argument)
        elif argument in ("--config", "--url-timeout"):
            first += [argument, *[value for value in [next(source, None)] if value is not None]]
        else:
            rest.append(argument)
    return first + rest


def _load_config(context: typer.Context, path: Path) -> None:
    """Make the values of a file the defaults of the commands; the table of `cache ls` is [cache-ls]."""
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
