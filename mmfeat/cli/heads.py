"""`mmfeat heads`: the flags of the sweep, and their way into its plan."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmfeat.cli.console import ConsoleProgress, out
from mmfeat.cli.flags import (
    LATEST_PARAMETERS,
    AnyColumns,
    AnyData,
    AnyEncoders,
    CacheFolder,
    Device,
    Engine,
    Mlflow,
    Parameters,
    RayAddress,
    Seed,
    encoder_options,
    find_request,
    interruptible,
    names,
    takes,
    tell_mlflow,
)
from mmfeat.cli.leaderboard import show_sweep
from mmfeat.cli.presets import preset_values
from mmfeat.errors import ConfigError
from mmfeat.heads.registry import DEFAULTS, SETTING_TYPES, flag, settings_of

if TYPE_CHECKING:
    from mmfeat.evaluation.protocol import Protocol
    from mmfeat.sweep.search import Plan


# Each is one value, or several to search, "1e-4,1e-3", or for random and optuna a range, "1e-5..1e-2".
SETTINGS = (
    "learning_rate",
    "attention_learning_rate",
    "weight_decay",
    "dropout",
    "modality_dropout",
    "label_smoothing",
    "class_weights",
    "loss",
    "focal_gamma",
    "batch_size",
    "epochs",
    "patience",
    "monitor",
)
AnySetting = str | None


def setting(name: str, text: str) -> Any:
    """The option of a training setting."""
    default = getattr(DEFAULTS, name.lstrip("-").replace("-", "_"))
    return typer.Option(
        name, help=f"{text}  [default: {default:g}]" if isinstance(default, float) else f"{text}  [default: {default}]"
    )


# What `mmfeat heads` takes: parameter -> its option and its default. A table, because a signature of so many flags
# could not be seen at once.
PARAMETERS: Parameters = {
    "fusion": (
        Annotated[
            str,
            typer.Option(help="all, none, or some of late, concat, gated, film, film-concat, cross-attention."),
        ],
        "all",
    ),
    "baselines": (
        Annotated[
            str,
            typer.Option(help="Beside them: all, none, or some of prior, knn, ridge, logistic, svm, forest, boosting."),
        ],
        "prior,knn,ridge,logistic,svm",
    ),
    "modalities": (Annotated[str, typer.Option(help="Each head on some of both,text,image.")], "both,text,image"),
    "preset": (Annotated[str | None, typer.Option(help="A published recipe: system-a or system-b.")], None),
    "data": (AnyData, None),
    "encoders": (AnyEncoders, None),
    "cache": (CacheFolder, "cache"),
    "out_folder": (Annotated[str, typer.Option("--out", help="Folder of the runs.")], "heads"),
    "columns": (AnyColumns, None),
    "task": (Annotated[str, typer.Option(help="multiclass, or multilabel: labels such as a|b.")], "multiclass"),
    "protocol": (Annotated[str, typer.Option(help="kfold or holdout.")], "kfold"),
    "folds": (Annotated[int, typer.Option(help="Folds of kfold.", min=2)], 5),
    "seeds": (Annotated[int, typer.Option(help="Trainings a fold, each with another seed.", min=1)], 3),
    "split": (Annotated[str, typer.Option(help="Shares of holdout: train:validation:test or train:test.")], "8:1:1"),
    "group": (Annotated[bool, typer.Option("--group/--no-group", help="Keep near duplicates in one fold.")], True),
    "split_dir": (
        Annotated[
            str | None, typer.Option(help="Reuse the splits of this folder, or write them there for later runs.")
        ],
        None,
    ),
    "refit": (
        Annotated[bool, typer.Option("--refit/--no-refit", help="Train the final heads on all labelled data.")],
        True,
    ),
    "ensembles": (Annotated[bool, typer.Option("--ensembles/--no-ensembles", help="Combine the heads.")], True),
    "search": (Annotated[str, typer.Option(help="Over settings with several values: grid, random or optuna.")], "grid"),
    "trials": (
        Annotated[int | None, typer.Option(help="Most settings a head tries.  [default: all]", min=1)],
        None,
    ),
    "time_limit": (Annotated[float | None, typer.Option(help="Seconds after which no trial is begun.", min=0)], None),
    "learning_rate": (
        Annotated[AnySetting, setting("--learning-rate", "Of AdamW; several: 1e-4,1e-3 or 1e-5..1e-2.")],
        None,
    ),
    "attention_learning_rate": (
        Annotated[AnySetting, setting("--attention-learning-rate", "Of cross-attention.")],
        None,
    ),
    "weight_decay": (Annotated[AnySetting, setting("--weight-decay", "Of AdamW.")], None),
    "dropout": (Annotated[AnySetting, setting("--dropout", "In the hidden layers.")], None),
    "modality_dropout": (
        Annotated[AnySetting, setting("--modality-dropout", "Share of samples that lose text or image.")],
        None,
    ),
    "label_smoothing": (Annotated[AnySetting, setting("--label-smoothing", "Share of the label given to all.")], None),
    "class_weights": (
        Annotated[AnySetting, setting("--class-weights", "Against imbalance: none, inverse, sqrt or effective.")],
        None,
    ),
    "loss": (Annotated[AnySetting, setting("--loss", "cross-entropy or focal.")], None),
    "focal_gamma": (Annotated[AnySetting, setting("--focal-gamma", "Of the focal loss.")], None),
    "batch_size": (Annotated[AnySetting, setting("--batch-size", "Samples a step.")], None),
    "epochs": (Annotated[AnySetting, setting("--epochs", "Most epochs; --monitor stops earlier.")], None),
    "patience": (Annotated[AnySetting, setting("--patience", "Epochs without a better score that are borne.")], None),
    "monitor": (
        Annotated[AnySetting, setting("--monitor", "What stops training: validation loss or macro-f1.")],
        None,
    ),
    "logit_adjustment": (
        Annotated[str, typer.Option(help="Strength against the class prior: auto (from other folds), or a number.")],
        "auto",
    ),
    "attend": (Annotated[str, typer.Option(help="Cross-attention looks at tokens or pooled vectors.")], "tokens"),
    "seed": (Seed, 42),
    "mlflow": (Mlflow, None),
    "engine": (Engine, "local"),
    "ray_address": (RayAddress, None),
    "workers": (Annotated[int, typer.Option(help="Trainings side by side; 0 is one a core.", min=0)], 0),
    "device": (Device, "auto"),
    **LATEST_PARAMETERS,
}


@takes(PARAMETERS)
@interruptible("what was finished is kept, the same command goes on from there")
def heads(context: typer.Context, **given: Any) -> None:
    """Cross-validate heads on the cached vectors and rank them.

    \b
    mmfeat heads --fusion concat,film --learning-rate 3e-4,1e-3 --folds 5
    """
    values = _with_preset(context)
    request = find_request(
        values["data"], values["encoders"], values["cache"], values["columns"], encoder_options(values)
    )
    plan, protocol = _plan(values), _protocol(values)
    from mmfeat.sweep.train import train_heads

    sweep = train_heads(
        request.data,
        request.encoders,
        cache=values["cache"],
        out=values["out_folder"],
        options=request.options,
        columns=request.columns,
        fusion=names(values["fusion"]),
        baselines=names(values["baselines"]),
        modalities=names(values["modalities"]),
        protocol=protocol,
        plan=plan,
        **{
            name: values[name] for name in ("ensembles", "task", "attend", "engine", "ray_address", "device", "workers")
        },
        progress=ConsoleProgress(),
        command=context.obj or "",
    )
    show_sweep(sweep)
    tell_mlflow(sweep.run, values["mlflow"])
    out.print(f"next: mmfeat submit --run {shlex.quote(str(sweep.run.folder))}")


def _with_preset(context: typer.Context) -> dict[str, Any]:
    """The command's parameters, a preset's values where neither the line nor --config gives one."""
    values = dict(context.params)
    if values["preset"]:
        for name, value in preset_values(values["preset"]).items():
            source = context.get_parameter_source(name)
            if source is None or source.name == "DEFAULT":
                values[name] = value
    return values


def _protocol(values: dict[str, Any]) -> Protocol:
    from mmfeat.evaluation.protocol import Protocol

    try:
        shares = tuple(float(share) for share in values["split"].split(":"))
    except ValueError:
        raise ConfigError(f"--split {values['split']}: write shares such as 8:1:1 or 8:2") from None
    return Protocol(
        values["protocol"],
        values["folds"],
        values["seeds"],
        shares,
        values["group"],
        values["split_dir"],
        values["seed"],
    )


def _plan(values: dict[str, Any]) -> Plan:
    """Settings with one value, and the space of those with several."""
    from mmfeat.sweep.search_space import parse_values

    given = {
        name: parse_values(values[name], SETTING_TYPES[name], flag(name))
        for name in SETTINGS
        if values[name] is not None
    }
    single = {name: each[0] for name, each in given.items() if isinstance(each, tuple) and len(each) == 1}
    space = {name: each for name, each in given.items() if name not in single}
    for name, each in space.items():
        for value in each if isinstance(each, tuple) else (each.low, each.high):
            settings_of({**single, name: value})  # says what is wrong before anything is trained
    asked = [flag(name) for name in ("trials", "time_limit") if values[name] is not None]
    asked += [f"--search {values['search']}"] * (values["search"] in ("random", "optuna"))
    if asked and not space:
        raise ConfigError(
            f"{asked[0]}: nothing to search; give a setting several values, as in --learning-rate 1e-4,1e-3"
        )
    from mmfeat.sweep.search import Plan

    return Plan(
        settings_of(single),
        space,
        values["search"],
        values["trials"],
        values["time_limit"],
        _adjustment(values["logit_adjustment"]),
        values["refit"],
    )


def _adjustment(text: str) -> float | None:
    try:
        strength = None if text == "auto" else float(text)
    except ValueError:
        strength = math.nan
    if strength is not None and not math.isfinite(strength):
        raise ConfigError(f"--logit-adjustment {text}: use auto or a number, such as 0 or 1")
    return strength
