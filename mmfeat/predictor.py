"""Prediction with the saved heads of a run: one entry, or an ensemble of several."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.calibration import Decision
from mmfeat.committee import TOGETHER, combine
from mmfeat.ensembles import blend, mean_weights
from mmfeat.errors import RunError
from mmfeat.features import Features
from mmfeat.files import file_sha256
from mmfeat.heads import NEEDS_TOKENS
from mmfeat.heads.data import HeadData
from mmfeat.heads.jobs import predict_fitted
from mmfeat.runs import Run


def predict_entry(
    run: Run, entry: Mapping[str, Any], features: Features, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) bool choices and (N, C) probabilities of one entry of the run's leaderboard."""
    try:
        decision = Decision.from_json(entry["decision"])
        logits = _logits(run, entry, features, device)
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise RunError(
            f"{run.folder}: not a whole run ({error!r}); delete the folder and run mmfeat heads again"
        ) from error
    return decision.choose(logits), decision.probabilities(logits)


def members(run: Run, entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The heads behind an entry: itself, or those of an ensemble that count."""
    if entry["modalities"] != TOGETHER:
        return [entry]
    weights = entry["rule"].get("weights", [1.0] * len(entry["members"]))
    by_name = {f"{each['head']}-{each['modalities']}": each for each in run.leaderboard}
    return [by_name[name] for name, weight in zip(entry["members"], weights, strict=True) if weight > 0]


def _logits(run: Run, entry: Mapping[str, Any], features: Features, device: str) -> np.ndarray:
    """(N, C) log-probabilities or logits to which the entry's decision applies."""
    if entry["modalities"] != TOGETHER:
        return _head_logits(run, entry, features, device)
    multilabel = bool(entry["decision"]["multilabel"])
    used = {f"{each['head']}-{each['modalities']}": each for each in members(run, entry)}
    parts: list[np.ndarray | None] = []
    for name in entry["members"]:
        member = used.get(name)
        parts.append(None if member is None else _calibrated(run, member, features, device))
    shape = next(part.shape for part in parts if part is not None)
    filled = [np.zeros(shape) if part is None else part for part in parts]
    return combine(dict(entry), np.stack(filled), multilabel)


def _calibrated(run: Run, entry: Mapping[str, Any], features: Features, device: str) -> np.ndarray:
    return Decision.from_json(entry["decision"]).log_probabilities(_head_logits(run, entry, features, device))


def _head_logits(run: Run, entry: Mapping[str, Any], features: Features, device: str) -> np.ndarray:
    """(N, C) logits at the entry's temperature: the mean probability of its final heads, on the scale of one."""
    from safetensors.numpy import load_file

    folder = run.head_folder(entry)
    try:
        tensors, configs = [], []
        for record in entry["final"]:
            path = folder / Path(record["file"]).name
            if file_sha256(path) != record["sha256"]:
                raise ValueError(f"{path.name} is not what was saved")
            tensors.append(load_file(path))
            configs.append(record["config"])
        attend = run.config["attend"] if entry["head"] == NEEDS_TOKENS else ""
        data = HeadData(features, entry["modalities"], device, attend)
        logits = predict_fitted(entry["head"], configs[0], tensors, len(run.classes), data)
    except Exception as error:  # safetensors raises what its format makes it raise
        raise RunError(f"{folder}: not a whole head ({error}); the same mmfeat heads trains it again") from error
    return mean_logits(np.stack(logits), Decision.from_json(entry["decision"]))


def mean_logits(logits: np.ndarray, decision: Decision) -> np.ndarray:
    """(S, N, C) logits -> (N, C) whose calibrated probabilities are the mean of those of the S heads."""
    if len(logits) == 1:
        return logits[0]
    log_probabilities = decision.log_probabilities(logits)
    return blend(log_probabilities, mean_weights(len(logits)), decision.multilabel) * decision.temperature
