"""`mmfeat finetune`: the flags of a second stage, and its scores beside those of the first."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

import typer

from mmfeat.cli.console import ConsoleProgress, out, show_table, show_verdict
from mmfeat.cli.flags import Device, Heads, Mlflow, Parameters, RayAddress, option, takes, tell_mlflow
from mmfeat.finetune.settings import path_in_words
from mmfeat.system.wording import gain, head_label, interval, shown

if TYPE_CHECKING:
    from mmfeat.finetune.finetune import Finetuned
    from mmfeat.runs.entry import Entry
    from mmfeat.runs.run import Moved, Run


def show_finetuned(result: Finetuned) -> None:
    """Print the scores of both stages with their paired test, the scores on training rows, and the path of the run."""
    run = result.run
    if result.reused:
        out.print("nothing to do: this was trained before")
    for tower in run.results.moving:
        out.print(_moved(tower))
    entries = sorted(run.leaderboard, key=lambda entry: entry.over_stage_1 is not None)
    out.print(f"stage 1 is {head_label(entries[0].fusion, entries[0].modalities)} of {run.config.parent}")
    header = ("entry", "macro-F1", "over stage 1", "p", "train", "val.", "test")
    rows = [(entry.head, interval(entry.macro_f1), *_test(entry)) for entry in entries]
    show_table(header, rows, ("train", "val.", "test", "p"))
    out.print(
        f"{entries[0].samples:,} samples out of fold, 95 % bootstrap intervals, paired bootstrap (Holm)\n"
        "train, val. and test: macro-F1 without adjustment"
    )
    for entry in [entry for entry in entries if entry.head == "wise-ft"]:
        shares = ", ".join(f"{share:.0%}" for share in entry.alphas or ())
        final = f"{entry.alpha:.0%} in the heads that predict"
        out.print(f"share of stage 2 in wise-ft, chosen on validation rows: {shares} by fold, {final}")
    if run.results.warning:
        out.print(f"warning: {run.results.warning}")
    out.print(f"run {run.folder} ({result.seconds:.1f} s)")


def _moved(tower: Moved) -> str:
    layers = {-1: "all layers", 0: "nothing", 1: "the last layer"}.get(tower.layers, f"the last {tower.layers} layers")
    how = path_in_words(tower.path, tower.reason)
    return f"{tower.tower}: {layers} ({tower.parameters:,} parameters) moved, {how}"


def _test(entry: Entry) -> list[str]:
    over = entry.over_stage_1
    tested = [gain(over), f"{over.p_holm:.3f}"] if over else ["", ""]
    return tested + [_score((entry.scores or {}).get(name)) for name in ("train", "validation", "test")]


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


# Training settings: parameter -> its option and default, as in `FinetuneSettings`.
SETTINGS: Parameters = {
    "projection": (option("Train the projections behind those layers too.", bool), False),
    "path": (option("Run only the moving layers, or all: auto, cached or full."), "auto"),
    "lr_encoder": (option("Learning rate of the moving layers.", float), 5e-6),
    "lr_attention": (option("Learning rate of cross-attention.", float), 1e-5),
    "lr_head": (option("Learning rate of the head.", float), 3e-4),
    "layer_decay": (option("Factor by which the learning rate falls from one layer to the one before.", float), 1.0),
    "weight_decay": (option("Weight decay of AdamW.", float), 0.05),
    "warmup": (option("Share of all steps in which the learning rates rise.", float), 0.1),
    "schedule": (option("Schedule of the learning rates: plateau, cosine or constant."), "plateau"),
    "clip_norm": (option("Largest norm of the gradients; 0: no limit.", float), 1.0),
    "batch_size": (option("Samples in a training step.", int), 16),
    "accumulate": (option("Number of steps whose gradients are added up before an update.", int), 1),
    "epochs": (option("Maximum number of epochs; --monitor stops earlier.", int), 5),
    "patience": (option("Epochs without improvement before training stops.", int), 2),
    "monitor": (option("Validation score that stops training: macro-f1 or loss."), "macro-f1"),
    "amp": (option("Mixed precision: auto (on a GPU), none, bfloat16 or float16."), "auto"),
    "gradient_checkpointing": (option("Use less memory and more time.", bool), False),
    "gradual": (option("Unfreeze one more layer in each epoch.", bool), False),
    "augment": (option("Augment photos in another way each time.", bool), False),
    "lora": (option("Rank of LoRA adapters (needs peft); 0 trains the weights themselves.", int), 0),
}
PARAMETERS: Parameters = {
    "run": (option("A run of mmfeat heads.  [default: the one with the best fusion]", str | None), None),
    "unfreeze": (option("NAME:LAYERS,...: the last layers of text, image, bert, ...; all or none."), "text:1"),
    "data": (option("Folder or table, where it is now.  [default: the run's]", str | None), None),
    "cache": (option("Feature cache.  [default: the run's]", str | None), None),
    "heads": (Heads, "heads"),
    "out": (option("Folder to write the new run into."), "heads"),
    "fusion": (option("early: train early fusion on pixels beside stage 1.", str | None), None),
    "head": (option("The run's fusion to start from.  [default: its best]", str | None), None),
    "modalities": (option("both, text or image.  [default: both]", str | None), None),
    "seeds": (option("Trainings of each fold.  [default: as the run]", int | None, least=1), None),
    "views": (option("Augmented views of each photo to train on.  [default: as the run]", int | None, least=0), None),
    **SETTINGS,
    "checkpoint_seconds": (option("Between checkpoints.", float), 30.0),
    "engine": (option("local, or ray: processes of Ray Train."), "local"),
    "ray_address": (RayAddress, None),
    "workers": (option("Trainings at the same time, or processes of Ray; 0: by the machine.", int, least=0), 0),
    "device": (Device, "auto"),
    "mlflow": (Mlflow, None),
}
PASSED_ON = PARAMETERS.keys() - SETTINGS.keys() - {"run", "unfreeze", "mlflow"}


@takes(PARAMETERS, "what was finished is kept, the same command goes on from there")
def finetune(context: typer.Context, **values: Any) -> None:
    """Train the last layers of encoders with a run's best head. The scores stand beside those of the head alone.

    \b
    mmfeat finetune --run heads/RUN --unfreeze text:1 --lr-encoder 5e-6 --lr-head 3e-4
    """
    from mmfeat.finetune.finetune import finetune_heads
    from mmfeat.finetune.settings import FinetuneSettings, parse_unfreeze

    settings = FinetuneSettings(
        unfreeze=parse_unfreeze(values["unfreeze"]), **{name: values[name] for name in SETTINGS}
    )
    result = finetune_heads(
        values["run"],
        settings=settings,
        progress=ConsoleProgress(),
        command=context.obj or "",
        **{name: values[name] for name in PASSED_ON},
    )
    if not result.leads:  # only the leading process of a team prints
        return
    show_finetuned(result)
    tell_mlflow(result.run, values["mlflow"])
    judge(result.run)


def judge(run: Run) -> None:
    """Print how stage 2 stands to the best entry of the run it came from, and the step that the better one allows."""
    from mmfeat.runs.verdict import best, over_parent, parent_run, prediction_step, standing

    parent = parent_run(run)
    label, test = over_parent(run, parent) if parent else ("", None)
    first = best(run.leaderboard[0], sum(bool(entry.tie) for entry in run.leaderboard[1:]))
    if not parent or not test:
        show_verdict([first, f"{run.config.parent} is gone or changed, so nothing says whether it has a better head."])
        out.print(f"next: {prediction_step(run)}")
        return
    show_verdict([first, standing(test, label, f"the {parent.leaderboard[0].label} of {parent.name}")])
    better = run if test.difference.value > 0 else parent
    other = parent if better is run else run
    as_good = f"; a tie: --run {shlex.quote(shown(str(other.folder)))} is as good" if test.tie else ""
    out.print(f"next: {prediction_step(better)}{as_good}")
