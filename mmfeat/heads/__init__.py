"""Heads: small models from vectors to class probabilities. A head sees only vectors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmfeat.errors import HeadError, RunError
from mmfeat.features import Features
from mmfeat.files import file_sha256, read_json, write_json
from mmfeat.heads.settings import HeadSettings

__all__ = ["BASELINES", "FUSIONS", "HEADS", "Head", "HeadSettings", "load_head", "make_head", "save_head"]


class Head(Protocol):
    """What every head can do. Labels are class numbers."""

    suffix: str

    def fit(self, train: Features, labels: np.ndarray, validation: Features, validation_labels: np.ndarray) -> None: ...
    def predict_proba(self, features: Features) -> np.ndarray: ...
    def save(self, path: Path) -> dict[str, Any]: ...
    def load(self, path: Path, config: dict[str, Any]) -> None: ...


def _concat(settings: HeadSettings, classes: int, device: str) -> Head:
    from mmfeat.heads.concat import Concat
    from mmfeat.heads.torch_head import TorchHead

    return TorchHead(Concat, settings, classes, device)


def _logistic(settings: HeadSettings, classes: int, device: str) -> Head:
    from mmfeat.heads.baselines import SklearnHead, logistic_candidates

    return SklearnHead(logistic_candidates, settings, classes)


Maker = Callable[[HeadSettings, int, str], Head]
FUSIONS: dict[str, Maker] = {"concat": _concat}
BASELINES: dict[str, Maker] = {"logistic": _logistic}
HEADS: dict[str, Maker] = {**FUSIONS, **BASELINES}


def make_head(name: str, settings: HeadSettings, classes: int, device: str = "cpu") -> Head:
    """An untrained head; raises `HeadError` for an unknown name."""
    if name not in HEADS:
        raise HeadError(f"no head {name!r}; use {', '.join(HEADS)}")
    return HEADS[name](settings, classes, device)


def save_head(head: Head, name: str, settings: HeadSettings, classes: int, folder: Path, stem: str) -> None:
    """`STEM.safetensors` or `STEM.skops`, then `STEM.json`, whose existence says that both are there."""
    path = folder / f"{stem}{head.suffix}"
    config = {"head": name, "classes": classes, "settings": asdict(settings), **head.save(path)}
    write_json(folder / f"{stem}.json", {**config, "sha256": file_sha256(path)})


def load_head(folder: Path, stem: str, device: str = "cpu") -> Head:
    """The head that `save_head` wrote."""
    try:
        config = read_json(folder / f"{stem}.json")
        head = make_head(config["head"], HeadSettings(**config["settings"]), config["classes"], device)
        path = folder / f"{stem}{head.suffix}"
        if file_sha256(path) != config["sha256"]:
            raise ValueError("its weights are not those that were saved")
        head.load(path, config)
    except Exception as error:  # safetensors and skops raise what their formats make them raise
        raise RunError(
            f"{folder / stem}: not a whole head ({error}); delete the folder {folder.parent} and run mmfeat heads again"
        ) from error
    return head
