"""`mmfeat heads`: the flags of a sweep of heads, the plan that they describe, and the result on the screen."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import typer

from mmfeat.cli import flags
from mmfeat.cli.console import ConsoleProgress, fits, out, show_notes, show_partitions, show_table, show_verdict
from mmfeat.cli.flags import LATEST_PARAMETERS, LATEST_READING, AnyData, AnyEncoders, CacheFolder, Seed, names, option
from mmfeat.errors import ConfigError
from mmfeat.heads.registry import DEFAULTS, SETTING_TYPES, flag, settings_of
from mmfeat.runs.leaderboard import AUTO, MODALITY_SETS, ablation
from mmfeat.system.wording import counted, duration, gain, interval, p_value, rounded, shown, size_of

if TYPE_CHECKING:
    from mmfeat.evaluation.protocol import Protocol
    from mmfeat.extraction.requests import Request
    from mmfeat.heads.registry import Plan
    from mmfeat.runs.run import Run
    from mmfeat.sweep.train import Sweep
    from mmfeat.system.wording import Progress


SHOWN_ROWS = 10
SHOWN_CLASSES = 5
SHOWN_OPTIMISM = 0.0005  # of the score; a smaller optimism is not printed


def show_sweep(sweep: Sweep, verbose: bool = False) -> None:
    """Print the leaderboard, the path of the run, and the verdict; all rows and all details where `verbose`."""
    run = sweep.run
    if sweep.reused:
        out.print("nothing to do: these heads were trained on this data before")
    if sweep.new_splits is not None:
        out.print(f"splits written to {sweep.new_splits}; later runs with --split-dir {sweep.new_splits} reuse them")
    show_notes(sweep.notes)
    shown_rows = len(run.leaderboard) if verbose else SHOWN_ROWS
    _show_leaderboard(run, shown_rows)
    out.print(_explanation(run, shown_rows))
    if sweep.partitions:
        show_partitions(sweep.partitions, shown_rows)
    if verbose:
        _show_details(run)
    out.print(f"run {run.folder} ({sweep.seconds:.1f} s)")
    show_judgement(run)


def show_judgement(run: Run) -> None:
    """Print the verdict on a run, and how the run stands to the one before on the same folds."""
    from mmfeat.runs.verdict import against, previous_run, standing, verdict

    before = previous_run(run)
    test = against(run, before) if before else None
    show_verdict(verdict(run) + ([standing(test, "This run", "your last run on these folds")] if test else []))


def _show_details(run: Run) -> None:
    _show_ablation(run)
    _show_confusion(run)
    _show_search(run)
    _show_cost(run)
    out.print(f"leaderboard {run.leaderboard_file}")


def _show_leaderboard(run: Run, shown: int) -> None:
    main, titles = run.leaderboard[0].main_names[:2], run.leaderboard[0].titles
    header = "", "head", "on", titles[main[0]], "seeds", titles[main[1]], "p"
    rows = []
    for number, entry in enumerate(run.leaderboard[:shown]):
        seeds = entry.by_seed
        spread = f"±{seeds.std:.3f}" if len(seeds.values) > 1 else ""
        spread = f"1 of {run.config.protocol.seeds}" if entry.dropped else spread
        second = rounded(entry.score(main[1]).value or 0.0)
        p = p_value(entry.behind_best.p_holm) if number and entry.behind_best else ""
        row = ("=" if entry.tie else "", entry.head, entry.modalities, interval(entry.headline), spread, second, p)
        rows.append(row)
    show_table(header, rows, ("seeds", header[5], "p"), {"": "green"}, first="bold")


def _explanation(run: Run, rows: int) -> str:
    """Say how many rows are left out, on which samples the scores are, and what the signs in the table mean."""
    from mmfeat.evaluation.splits import HOLDOUT

    samples = f"{run.leaderboard[0].samples:,} samples"
    folds = f"{samples} of the holdout's test part" if run.config.folds == (HOLDOUT,) else f"{samples} out of fold"
    more = len(run.leaderboard) - rows
    left_out = f"and {more} more with --verbose and in {run.leaderboard_file.name}\n" if more > 0 else ""
    unit = "; MAE in the unit of the labels" if run.config.is_regression else ""
    spared = (
        f"\n1 of {run.config.protocol.seeds}: clearly worse after one seed, so not trained again (--all-seeds does)"
    )
    spared = spared if any(entry.dropped for entry in run.leaderboard[:rows]) else ""
    return f"{left_out}{folds}, 95 % bootstrap intervals; = ties with the first{unit}{spared}"


def _show_ablation(run: Run) -> None:
    if not (heads := ablation(run.leaderboard)):
        return
    sets = [name for name in MODALITY_SETS if any(name in entries for entries in heads.values())]
    rows = []
    for head, entries in heads.items():
        cells = [f"{entries[name].headline.value:.3f}" if name in entries else "" for name in sets]
        test = entries["both"].gain if "both" in entries else None
        rows.append((head, *cells, *((gain(test), p_value(test.p_holm)) if test else ("", ""))))
    show_table(("ablation", *sets, "both over the better one", "p"), rows, ("p", *sets[:0:-1]))


def _show_confusion(run: Run) -> None:
    best = run.leaderboard[0]
    if len(run.classes) > SHOWN_CLASSES or run.config.is_multilabel or run.config.is_regression:
        return
    rows = []
    for name, row in zip(run.classes, best.confusion, strict=True):
        total = max(sum(row), 1)
        rows.append((name, *(f"{count:,.0f} ({count / total:.0%})" for count in row)))
    header = best.label, *(f"-> {name}" for name in run.classes)
    if fits(header, rows):
        show_table(header, rows)


def _show_search(run: Run) -> None:
    """Print the chosen settings, and the optimism: what choosing them on the test rows would have added."""
    entries = [entry for entry in run.leaderboard if entry.optimism is not None and entry.head != "prior"]
    searched = [entry for entry in entries if (entry.trials or 1) > 1]
    if cut := [entry for entry in entries if entry.search_over is False]:
        out.print(f"--time-limit ended the search of {len(cut)} entries early; the same command goes on")
    for entry in searched[:SHOWN_ROWS]:
        varied = {name: getattr(entry.settings, name) for name in (run.config.plan.space if run.config.plan else ())}
        chosen = ", ".join(
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in varied.items()
        )
        out.print(f"{entry.label}: best of {entry.trials} settings: {chosen}")
    worst = max(entries, key=lambda entry: entry.optimism or 0.0, default=None)
    if worst and (worst.optimism or 0.0) >= SHOWN_OPTIMISM:
        out.print(
            f"Had we tuned on the test rows, scores would look up to {worst.optimism:.3f} too good ({worst.label}). "
            "We did not."
        )


def _show_cost(run: Run) -> None:
    seconds: dict[str, float] = {}
    for entry in run.leaderboard:
        seconds[entry.head] = seconds.get(entry.head, 0.0) + entry.seconds
    total = max(sum(seconds.values()), 1e-9)
    shares = ", ".join(
        f"{head} {value / total:.0%}"
        for head, value in sorted(seconds.items(), key=lambda item: -item[1])
        if value / total >= 0.01
    )
    sizes: dict[str, int] = {}
    for entry in run.leaderboard:
        if entry.parameters:
            sizes[entry.head] = max(sizes.get(entry.head, 0), entry.parameters)
    if sizes:
        out.print("parameters: " + ", ".join(f"{head} {count:,}" for head, count in sizes.items()))
    out.print(f"time: {shares}")


# Training settings -> help text. Each flag takes one value, several to search ("1e-4,1e-3"), or for the searches random
# and optuna a range ("1e-5..1e-2").
SETTINGS = {
    "learning_rate": "Learning rate of AdamW, or several: 1e-4,1e-3 or 1e-5..1e-2.",
    "attention_learning_rate": "Learning rate of cross-attention.",
    "weight_decay": "Weight decay of AdamW.",
    "dropout": "Dropout rate in the hidden layers.",
    "modality_dropout": "Share of training samples whose text or image is hidden.",
    "label_smoothing": "Share of each label that is spread over all classes.",
    "class_weights": "Class weights against imbalance: none, inverse, sqrt or effective.",
    "loss": "Loss: cross-entropy or focal.",
    "focal_gamma": "Exponent gamma of the focal loss.",
    "batch_size": "Samples in a training step.",
    "epochs": "Maximum number of epochs; --monitor stops earlier.",
    "patience": "Epochs without improvement before training stops.",
    "monitor": "Validation score that stops training: loss or macro-f1.",
    "init": "First weights of the linear head: random or zero-shot.",
}
PASSED_ON = (
    *("cache", "out", "fold_seeds", "ensembles", "task", "attend", "templates", "products", "engine", "device"),
    "workers",
)


def _setting(name: str, text: str) -> Any:
    default = getattr(DEFAULTS, name)
    shown = f"{default:g}" if isinstance(default, float) else default
    return option(f"{text}  [default: {shown}]", str | None), None


_SEARCH = "How settings with several values are searched: grid, random or optuna."
_FUSIONS = "all, none, or some of late, concat, gated, film, film-concat, cross-attention; linear on request."
_BASELINES = "all, none, or some of prior, knn, ridge, logistic, svm, kernel, forest, boosting; zero-shot on request."
_CLASS_NAMES = "Texts of the classes for zero-shot: positive='a happy photo',...  [default: the labels]"
_TEMPLATES = "open_clip's sentences around class names: openai (80), simple (7) or none."
_SPLIT_DIR = "Reuse the splits of this folder, or write them there for later runs."
PARAMETERS: flags.Parameters = {
    "fusion": (option(_FUSIONS), "all"),
    "baselines": (option(_BASELINES), "prior,knn,ridge,logistic,svm,kernel"),
    "modalities": (
        option("What the heads see: some of both, text, image, table; auto: both, and alone what matters."),
        AUTO,
    ),
    "preset": (option("A published recipe: bert-resnet50 or frozen-clip.", str | None), None),
    "data": (AnyData, None),
    "encoders": (AnyEncoders, None),
    "cache": (CacheFolder, "cache"),
    "out": (option("Folder of the runs."), "heads"),
    **LATEST_READING,
    "labels": (flags.Labels, None),
    "task": (option("multiclass, multilabel (labels such as a|b), ordinal or regression."), "multiclass"),
    "order": (
        option("Classes of an ordinal task, the lowest first: low,high.  [default: as numbers]", str | None),
        None,
    ),
    "rare": (option("Classes too few for the folds: drop or join them.  [default: an error]", str | None), None),
    "protocol": (option("kfold, holdout, given (the data's own split), or auto: given, else kfold."), "auto"),
    "folds": (option("Folds of kfold.", int, least=2), 5),
    "seeds": (option("Trainings of each fold, each with another seed.", int, least=1), 3),
    "all_seeds": (option("Train clearly worse heads with all seeds too.", bool, "--all-seeds"), False),
    "fold_seeds": (option("Partitions into folds, with seeds that follow --seed; their spread.", int, least=1), 1),
    "split": (option("Shares of a holdout: train:validation:test or train:test."), "8:1:1"),
    "group": (option("Keep near duplicates in one fold.", bool), True),
    "split_dir": (option(_SPLIT_DIR, str | None), None),
    "refit": (option("Train the final heads on all labelled data.", bool), True),
    "ensembles": (option("Make ensembles of the heads.", bool), True),
    "search": (option(_SEARCH), "grid"),
    "trials": (option("Largest number of settings to try for each head.  [default: all]", int | None, least=1), None),
    "time_limit": (option("After so many seconds no trial is begun.", float | None, least=0), None),
    **{name: _setting(name, text) for name, text in SETTINGS.items()},
    "products": (option("Matrix products in training: auto, float32 or bfloat16."), "auto"),
    "logit_adjustment": (
        option("How far rare classes are favoured: auto (chosen on other folds), or a number."),
        "auto",
    ),
    "attend": (option("What cross-attention looks at: tokens or pooled vectors."), "tokens"),
    "class_names": (option(_CLASS_NAMES, str | None), None),
    "templates": (option(_TEMPLATES), "openai"),
    "seed": (Seed, 42),
    "verbose": (option("Show all rows, the ablation, confusion, search and cost.", bool, "--verbose"), False),
    "mlflow": (flags.Mlflow, None),
    "engine": (flags.EngineFlag, "local"),
    "ray_address": (flags.RayAddress, None),
    "workers": (flags.Trainings, 0),
    "device": (flags.Device, "auto"),
    "dry_run": (option("Say what is trained, how long it takes and how much memory.", bool, "--dry-run"), False),
    **LATEST_PARAMETERS,
}


@flags.takes(PARAMETERS, "what was finished is kept, the same command goes on from there")
def heads(context: typer.Context, **given: Any) -> None:
    """Cross-validate heads on the cached vectors and rank them.

    \b
    mmfeat heads --fusion concat,film --learning-rate 3e-4,1e-3 --folds 5
    """
    values = _with_preset(context)
    if values["dry_run"]:
        _show_forecast(_asked(context, values, flags.find_request(values), ConsoleProgress()))
        return
    sweep = train(context, values, flags.find_request(values), ConsoleProgress())
    show_sweep(sweep, values["verbose"])
    flags.tell_mlflow(sweep.run, values["mlflow"])
    out.print(f"next: mmfeat report --run {shlex.quote(str(sweep.run.folder))}")


def train(context: typer.Context, values: Mapping[str, Any], request: Request, progress: Progress) -> Sweep:
    from mmfeat.sweep.train import train_heads

    return train_heads(**_asked(context, values, request, progress), command=context.obj or "")


def _asked(context: typer.Context, values: Mapping[str, Any], request: Request, progress: Progress) -> dict[str, Any]:
    plan, protocol = _plan(values), _protocol(values, context)
    from mmfeat.sweep.class_names import parse_class_names

    return {
        **{name: getattr(request, name) for name in ("data", "encoders", "options", "columns")},
        **{name: names(values[name] or "") for name in ("fusion", "baselines", "modalities", "order")},
        "protocol": protocol,
        "plan": plan,
        "rare": values["rare"] or "",
        "ray_address": values["ray_address"],
        "class_names": None if values["class_names"] is None else parse_class_names(values["class_names"]),
        **{name: values[name] for name in PASSED_ON},
        "progress": progress,
    }


def _show_forecast(asked: Mapping[str, Any]) -> None:
    """Print the trainings of each head on all modalities with their time, then the time and the memory of all."""
    from mmfeat.sweep.forecast import forecast_heads

    forecast = forecast_heads(**asked)
    if not forecast.heads:
        out.print(f"nothing to do: {shown(str(forecast.folder))} was trained on this data before")
        return
    rows = [(head, f"{count:,}", duration(seconds)) for head, count, seconds in forecast.by_head]
    show_table(("head", "trainings", "CPU time"), rows)
    out.print(f"scoring, ensembles and writing add {duration(forecast.around)}")
    size = f"{duration(forecast.seconds)} and {size_of(forecast.bytes)} of memory"
    out.print(f"{size} in all for {forecast.samples:,} samples, {counted(forecast.workers, 'training')} at a time")
    out.print("nothing was written; next: the same command without --dry-run")


def _with_preset(context: typer.Context) -> dict[str, Any]:
    """Return the command's parameters; a preset's value takes the place of a default, but not of a given value."""
    values = dict(context.params)
    if values["preset"]:
        from mmfeat.cli.presets import preset_values

        for name, value in preset_values(values["preset"]).items():
            if flags.source_of(context, name) == "DEFAULT":
                values[name] = value
    return values


def _protocol(values: Mapping[str, Any], context: typer.Context) -> Protocol:
    """Return the protocol; sizes that only one kind of splits has ask for that kind."""
    from mmfeat.evaluation.protocol import AUTO, Protocol

    kind = values["protocol"]
    for name, asked in (("folds", "kfold"), ("split", "holdout")):
        kind = asked if kind == AUTO and flags.source_of(context, name) != "DEFAULT" else kind
    try:
        shares = tuple(float(share) for share in values["split"].split(":"))
    except ValueError:
        raise ConfigError(f"--split {values['split']}: write shares such as 8:1:1 or 8:2") from None
    sizes = values["folds"], values["seeds"], shares
    return Protocol(kind, *sizes, values["group"], values["split_dir"], values["seed"])


def _plan(values: Mapping[str, Any]) -> Plan:
    """Return the plan: settings with one value, and the search space of those with several or a range."""
    from mmfeat.sweep.search_space import parse_values

    texts = {name: values[name] for name in SETTINGS if values[name] is not None}
    given = {name: parse_values(text, SETTING_TYPES[name], flag(name)) for name, text in texts.items()}
    single = {name: value[0] for name, value in given.items() if isinstance(value, tuple) and len(value) == 1}
    space = {name: choices for name, choices in given.items() if name not in single}
    for name, choices in space.items():
        for value in choices if isinstance(choices, tuple) else (choices.low, choices.high):
            settings_of({**single, name: value})  # raises `ConfigError` before anything is trained
    asked = [flag(name) for name in ("trials", "time_limit") if values[name] is not None]
    asked += [f"--search {values['search']}"] * (values["search"] in ("random", "optuna"))
    if asked and not space:
        raise ConfigError(
            f"{asked[0]}: nothing to search; give a setting several values, as in --learning-rate 1e-4,1e-3"
        )
    from mmfeat.heads.registry import Plan

    limits = values["trials"], values["time_limit"]
    adjustment = _adjustment(values["logit_adjustment"])
    return Plan(
        settings_of(single), space, values["search"], *limits, adjustment, values["refit"], not values["all_seeds"]
    )


def _adjustment(text: str) -> float | None:
    """Read the strength of logit adjustment; None means that it is chosen on other folds."""
    try:
        strength = None if text == "auto" else float(text)
    except ValueError:
        strength = math.nan
    if strength is not None and not math.isfinite(strength):
        raise ConfigError(f"--logit-adjustment {text}: use auto or a number, such as 0 or 1")
    return strength
