"""What a person sees of a fine-tuning: stage 1 and stage 2 side by side, what moved, and a warning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from mmfeat.console import out
from mmfeat.finetune.settings import path_in_words
from mmfeat.wording import gain, interval

if TYPE_CHECKING:
    from mmfeat.finetune.run import Finetuned


def show_finetuned(result: Finetuned) -> None:
    """The stages with their paired test, the gap to training rows, and where the run lies."""
    run = result.run
    if result.reused:
        out.print("nothing to do: this was trained before")
    for tower in run.config["moving"]:
        out.print(_moved(tower))
    entries = sorted(run.leaderboard, key=lambda entry: "over_stage_1" in entry)
    out.print(f"stage 1 is {entries[0]['fusion']} on {entries[0]['modalities']} of {run.config['parent']}")
    header = ("", "macro-F1", "over stage 1", "p", "train", "val.", "test")
    table = Table(*header, box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for entry in entries:
        table.add_row(entry["head"], interval(entry["macro_f1"]), *_test(entry))
    out.print(table)
    out.print(
        f"{entries[0]['samples']:,} samples out of fold, 95 % bootstrap intervals, paired bootstrap (Holm); train, "
        "val. and test are macro-F1 without adjustment"
    )
    for entry in [entry for entry in entries if entry["head"] == "wise-ft"]:
        shares = ", ".join(f"{share:.0%}" for share in entry["alphas"])
        final = f"{entry['alpha']:.0%} in the heads that predict"
        out.print(f"share of stage 2 in wise-ft, chosen on validation rows: {shares} by fold, {final}")
    if run.config["warning"]:
        out.print(f"warning: {run.config['warning']}")
    out.print(f"run {run.folder} ({result.seconds:.1f} s)")
    out.print(f"leaderboard {run.leaderboard_file}")


def _moved(tower: dict[str, Any]) -> str:
    layers = {-1: "all layers", 0: "nothing"}.get(tower["layers"], f"the last {tower['layers']} layers")
    if tower["layers"] == 1:
        layers = "the last layer"
    how = path_in_words(tower["path"], tower["reason"])
    return f"{tower['tower']}: {layers} ({tower['parameters']:,} parameters) moved, {how}"


def _test(entry: dict[str, Any]) -> list[str]:
    over = entry.get("over_stage_1")
    tested = ["", ""]
    if over:
        tested = [gain(over), f"{over['p_holm']:.3f}"]
    return tested + [_score(entry["scores"].get(name)) for name in ("train", "validation", "test")]


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
