"""Help texts: flags in panels, types in plain words, and seldom used flags only under `--help-all`."""

from __future__ import annotations

import re
from typing import Any

from typer.core import TyperCommand

ALL = "--help-all"
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
        if ALL in args:
            ctx.meta[ALL] = True
            args = ["--help"]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        parameters = self.get_params(ctx)
        is_long = len(parameters) > MANY
        panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], **{name: [] for name in PANELS}, OTHERS: []}
        left = 0
        for parameter in parameters:
            if is_long and ALL not in ctx.meta and _is_seldom(parameter):
                left += 1
            elif record := parameter.get_help_record(ctx):
                panel = PANEL_OF.get(parameter.name or "", OTHERS) if is_long else OTHERS
                is_argument = parameter.param_type_name == "argument"
                panels["Arguments" if is_argument else panel].append(in_words(record, parameter.name or ""))
        if left:
            panels[OTHERS].append((ALL, f"Show {left} more flags, which are seldom needed."))
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
