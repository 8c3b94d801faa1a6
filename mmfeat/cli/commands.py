"""Commands: the lines that make a run again, with the flags that differ from their defaults."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfeat.cli.finetune import PARAMETERS as FINETUNE
from mmfeat.cli.finetune import SETTINGS as FINETUNE_SETTINGS
from mmfeat.cli.heads import PARAMETERS as HEADS
from mmfeat.cli.heads import SETTINGS
from mmfeat.encoders.spec import EncoderOptions
from mmfeat.errors import RunError
from mmfeat.finetune.arguments import finetune_arguments
from mmfeat.finetune.settings import ALL, EVERY_TOWER
from mmfeat.heads.registry import DEFAULTS
from mmfeat.runs.run import Run, read_run
from mmfeat.sweep.arguments import heads_arguments, requests_of
from mmfeat.system.wording import shown


def commands_of(run: Run) -> list[str]:
    """extract, heads and for a second stage finetune, as one would type them here."""
    if not run.is_finetuned:
        return [_extract(run), _heads(run)]
    arguments = finetune_arguments(run)
    return [*commands_of(read_run(arguments["run"])), _finetune(run, arguments)]


def told_commands(run: Run) -> list[str]:
    """These commands, or as a comment why the run cannot tell them: its parent is elsewhere, or it is an older one."""
    try:
        return commands_of(run)
    except RunError as error:
        return [f"# {error}"]


def _extract(run: Run) -> str:
    return _line("extract", {**_named(run), **_encoder_options(run.options), "columns": _columns(run)})


def _heads(run: Run) -> str:
    arguments = heads_arguments(run)
    protocol, plan = arguments["protocol"], arguments["plan"]
    asked: dict[str, Any] = {
        **_named(run),
        **{name: ",".join(arguments[name]) for name in ("fusion", "baselines", "modalities")},
        **{name: arguments[name] for name in ("ensembles", "task", "attend")},
        "columns": _columns(run),
        "out": _unless(str(run.folder.parent), "heads"),
        "protocol": protocol.kind,
        "folds": protocol.folds,
        "seeds": protocol.seeds,
        "split": ":".join(f"{share:g}" for share in protocol.shares),
        "group": protocol.grouped,
        "split_dir": shown(os.path.abspath(protocol.split_dir)) if protocol.split_dir else None,
        "seed": protocol.seed,
        "search": plan.method,
        "trials": plan.trials,
        "refit": plan.refit,
        "logit_adjustment": "auto" if plan.adjustment is None else f"{plan.adjustment!r}",
        **_encoder_options(run.options),
    }
    for name in SETTINGS:
        value = getattr(plan.settings, name)
        asked[name] = _text(value) if value != getattr(DEFAULTS, name) else None
    for name, values in plan.space.items():
        asked[name] = str(values) if not isinstance(values, tuple) else ",".join(map(_text, values))
    return _line("heads", asked, {name: default for name, (_, default) in HEADS.items()})


def _finetune(run: Run, arguments: Mapping[str, Any]) -> str:
    settings = arguments["settings"]
    asked: dict[str, Any] = {
        "run": shown(os.path.abspath(arguments["run"])),
        "unfreeze": _unfrozen(settings.unfreeze),
        **{name: arguments[name] for name in ("fusion", "head", "modalities", "seeds", "views")},
        **{name: getattr(settings, name) for name in FINETUNE_SETTINGS},
        "out": _unless(str(run.folder.parent), "heads"),
    }
    return _line("finetune", asked, {name: default for name, (_, default) in FINETUNE.items()})


def _named(run: Run) -> dict[str, Any]:
    return {
        "data": shown(run.config.data),
        "encoders": ",".join(map(shown, requests_of(run))),
        "cache": _unless(run.config.cache, "cache"),
    }


def _encoder_options(options: EncoderOptions) -> dict[str, Any]:
    """What differs from the defaults; where `auto` chose two kinds of arithmetic, only `auto` says so."""
    defaults = EncoderOptions()
    names = ("cleaning", "pooling", "max_length", "views", "draft")
    found = {name: getattr(options, name) for name in names if getattr(options, name) != getattr(defaults, name)}
    if options.outputs != defaults.outputs:
        found["outputs"] = ",".join(options.outputs)
    if options.dtype == options.convolutional_dtype:
        found["dtype"] = options.dtype
    return found


def _columns(run: Run) -> str | None:
    return ",".join(f"{name}={column}" for name, column in run.config.columns.items()) or None


def _unfrozen(unfreeze: tuple[tuple[str, int], ...]) -> str:
    if unfreeze == ((EVERY_TOWER, ALL),):
        return EVERY_TOWER
    return ",".join(f"{name}:{'all' if count == ALL else count}" for name, count in unfreeze) or "none"


def _unless(place: str, usual: str) -> str | None:
    """A folder, None where it is the usual one."""
    return None if Path(place).resolve() == Path(usual).resolve() else shown(os.path.abspath(place))


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _line(command: str, asked: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> str:
    words = ["mmfeat", command]
    for name, value in asked.items():
        flag = name.replace("_", "-")
        if value is None or value == (defaults or {}).get(name):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
