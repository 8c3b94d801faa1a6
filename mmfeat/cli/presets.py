"""Presets of `mmfeat heads`: published recipes as values of flags; a flag that is given wins over its preset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmfeat.errors import ConfigError

_BOTH = {
    "baselines": "none",
    "protocol": "holdout",
    "seeds": 1,
    "patience": "3",
    "monitor": "macro-f1",
    "logit_adjustment": "0",
}
PRESETS: dict[str, Mapping[str, Any]] = {
    # Fusions of BERT and ResNet-50 on an 8:2 holdout, with a grid over batch size, learning rate and dropout, and
    # cross-attention to one pooled vector. Extract with --encoders bert,resnet50 --pooling pooler --max-length 32.
    "bert-resnet50": {
        **_BOTH,
        "fusion": "late,cross-attention",
        "attend": "pooled",
        "split": "8:2",
        "learning_rate": "1e-5,1.5e-5,2e-5",
        "attention_learning_rate": "1e-5",
        "dropout": "0.3,0.4,0.5",
        "batch_size": "16,32",
        "weight_decay": "0.01",
        "class_weights": "none",
        "epochs": "6",
    },
    # Heads on frozen CLIP on an 8:1:1 holdout. Extract with --encoders clip --outputs pooled,tokens.
    "frozen-clip": {
        **_BOTH,
        "fusion": "all",
        "split": "8:1:1",
        "learning_rate": "3e-4",
        "attention_learning_rate": "1e-4",
        "dropout": "0.5",
        "batch_size": "16",
        "weight_decay": "0.05",
        "class_weights": "sqrt",
        "epochs": "12",
    },
}

FORMER = {"system-a": "bert-resnet50", "system-b": "frozen-clip"}  # names that are still taken


def preset_values(name: str) -> Mapping[str, Any]:
    """Return the values of a preset by parameter name; raises `ConfigError` for an unknown preset."""
    name = FORMER.get(name, name)
    if name not in PRESETS:
        raise ConfigError(f"--preset {name}: use one of {', '.join(PRESETS)}")
    return PRESETS[name]
