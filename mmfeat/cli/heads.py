"""`mmfeat heads`: the flags of a sweep of heads, and the plan and protocol that they describe."""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING, Any

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
    Trainings,
    find_request,
    interruptible,
    names,
    option,
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


# Training settings -> help text. Each flag takes one value, several to search ("1e-4,1e-3"), or for the searches random
# and optuna a range ("1e-5..1e-2").
SETTINGS = {
    "learning_rate": "Of AdamW; several: 1e-4,1e-3 or 1e-5..1e-2.",
    "attention_learning_rate": "Of cross-attention.",
    "weight_decay": "Of AdamW.",
    "dropout": "In the hidden layers.",
    "modality_dropout": "Share of samples that lose text or image.",
    "label_smoothing": "Share of the label given to all.",
    "class_weights": "Against imbalance: none, inverse, sqrt or effective.",
    "loss": "cross-entropy or focal.",
    "focal_gamma": "Of the focal loss.",
    "batch_size": "Samples a step.",
    "epochs": "Most epochs; --monitor stops earlier.",
    "patience": "Epochs without a better score that are borne.",
    "monitor": "What stops training: validation loss or macro-f1.",
}
PASSED_ON = ("ensembles", "task", "attend", "engine", "ray_address", "device", "workers")


def _setting(name: str, text: str) -> Any:
    """Return the option of a training setting; None means the default in `HeadSettings`."""
    default = getattr(DEFAULTS, name)
    shown = f"{default:g}" if isinstance(default, float) else default
    return option(f"{text}  [default: {shown}]", str | None), None


_SEARCH = "Over settings with several values: grid, random or optuna."
_BASELINES = "Beside them: all, none, or some of prior, knn, ridge, logistic, svm, forest, boosting."
_SPLIT_DIR = "Reuse the splits of this folder, or write them there for later runs."
PARAMETERS: Parameters = {
    "fusion": (option("all, none, or some of late, concat, gated, film, film-concat, cross-attention."), "all"),
    "baselines": (option(_BASELINES), "prior,knn,ridge,logistic,svm"),
    "modalities": (option("Each head on some of both,text,image."), "both,text,image"),
    "preset": (option("A published recipe: system-a or system-b.", str | None), None),
    "data": (AnyData, None),
    "encoders": (AnyEncoders, None),
    "cache": (CacheFolder, "cache"),
    "out": (option("Folder of the runs."), "heads"),
    "columns": (AnyColumns, None),
    "task": (option("multiclass, or multilabel: labels such as a|b."), "multiclass"),
    "protocol": (option("kfold or holdout."), "kfold"),
    "folds": (option("Folds of kfold.", int, least=2), 5),
    "seeds": (option("Trainings a fold, each with another seed.", int, least=1), 3),
    "split": (option("Shares of holdout: train:validation:test or train:test."), "8:1:1"),
    "group": (option("Keep near duplicates in one fold.", bool, "--group/--no-group"), True),
    "split_dir": (option(_SPLIT_DIR, str | None), None),
    "refit": (option("Train the final heads on all labelled data.", bool, "--refit/--no-refit"), True),
    "ensembles": (option("Combine the heads.", bool, "--ensembles/--no-ensembles"), True),
    "search": (option(_SEARCH), "grid"),
    "trials": (option("Most settings a head tries.  [default: all]", int | None, least=1), None),
    "time_limit": (option("Seconds after which no trial is begun.", float | None, least=0), None),
    **{name: _setting(name, text) for name, text in SETTINGS.items()},
    "logit_adjustment": (
        option("Strength against the class prior: auto (from other folds), or a number."),
        "auto",
    ),
    "attend": (option("Cross-attention looks at tokens or pooled vectors."), "tokens"),
    "seed": (Seed, 42),
    "mlflow": (Mlflow, None),
    "engine": (Engine, "local"),
    "ray_address": (RayAddress, None),
    "workers": (Trainings, 0),
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
    request = find_request(values)
    plan, protocol = _plan(values), _protocol(values)
    from mmfeat.sweep.train import train_heads

    sweep = train_heads(
        request.data,
        request.encoders,
        cache=values["cache"],
        out=values["out"],
        options=request.options,
        columns=request.columns,
        fusion=names(values["fusion"]),
        baselines=names(values["baselines"]),
        modalities=names(values["modalities"]),
        protocol=protocol,
        plan=plan,
        **{name: values[name] for name in PASSED_ON},
        progress=ConsoleProgress(),
        command=context.obj or "",
    )
    show_sweep(sweep)
    tell_mlflow(sweep.run, values["mlflow"])
    out.print(f"next: mmfeat submit --run {shlex.quote(str(sweep.run.folder))}")


def _with_preset(context: typer.Context) -> dict[str, Any]:
    """Return the command's parameters; a preset's value takes the place of a default, but not of a given value."""
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
    sizes = values["folds"], values["seeds"], shares
    return Protocol(values["protocol"], *sizes, values["group"], values["split_dir"], values["seed"])


def _plan(values: dict[str, Any]) -> Plan:
    """Return the plan: settings with one value, and the search space of those with several or a range."""
    from mmfeat.sweep.search_space import parse_values

    texts = {name: values[name] for name in SETTINGS if values[name] is not None}
    given = {name: parse_values(text, SETTING_TYPES[name], flag(name)) for name, text in texts.items()}
    single = {name: value[0] for name, value in given.items() if isinstance(value, tuple) and len(value) == 1}
    space = {name: choices for name, choices in given.items() if name not in single}
    for name, choices in space.items():
        for value in choices if isinstance(choices, tuple) else (choices.low, choices.high):
            settings_of({**single, name: value})  # raises `ConfigError` before anything is trained
    flags = [flag(name) for name in ("trials", "time_limit") if values[name] is not None]
    flags += [f"--search {values['search']}"] * (values["search"] in ("random", "optuna"))
    if flags and not space:
        raise ConfigError(
            f"{flags[0]}: nothing to search; give a setting several values, as in --learning-rate 1e-4,1e-3"
        )
    from mmfeat.sweep.search import Plan

    limits = values["trials"], values["time_limit"]
    adjustment = _adjustment(values["logit_adjustment"])
    return Plan(settings_of(single), space, values["search"], *limits, adjustment, values["refit"])


def _adjustment(text: str) -> float | None:
    """Read the strength of logit adjustment; None means that it is chosen on other folds."""
    try:
        strength = None if text == "auto" else float(text)
    except ValueError:
        strength = math.nan
    if strength is not None and not math.isfinite(strength):
        raise ConfigError(f"--logit-adjustment {text}: use auto or a number, such as 0 or 1")
    return strength
