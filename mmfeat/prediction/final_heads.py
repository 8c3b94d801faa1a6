"""Prediction with the saved heads of a run: one entry, or an ensemble of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.cache.features import Features
from mmfeat.encoders.registry import Tower
from mmfeat.errors import RunError
from mmfeat.evaluation.blending import mean_logits
from mmfeat.evaluation.decisions import Decision
from mmfeat.finetune.model import EARLY, early_model
from mmfeat.finetune.processes import Team
from mmfeat.heads.data import HeadData
from mmfeat.heads.jobs import Predict, restore_heads
from mmfeat.heads.registry import NEEDS_TOKENS
from mmfeat.runs.run import Run
from mmfeat.samples.dataset import Sample
from mmfeat.samples.images import view_number
from mmfeat.sweep.ensembles import TOGETHER, combine
from mmfeat.system.files import file_sha256


class FinalHeads:
    """The final heads of a run: read, checked and built when something first predicts with them, and kept."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._tensors: dict[Path, dict[str, np.ndarray]] = {}
        self._built: dict[tuple[Path, ...], Predict] = {}

    def logits(
        self, entry: Mapping[str, Any], records: Sequence[Mapping[str, Any]], data: HeadData
    ) -> list[np.ndarray]:
        """(N, C) of each of some heads of an entry, which see the same."""
        places = tuple(_place(self.run, entry, record) for record in records)
        if places not in self._built:
            head, classes = entry.get("fusion", entry["head"]), len(self.run.classes)
            tensors = [load_final(self.run, entry, record) for record in records]
            self._built[places] = restore_heads(head, records[0]["config"], tensors, classes, data)
        return self._built[places](data)

    def tensors(self, entry: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Those of one head."""
        place = _place(self.run, entry, record)
        if place not in self._tensors:
            self._tensors[place] = load_final(self.run, entry, record)
        return self._tensors[place]


def predict_entry(
    run: Run,
    entry: Mapping[str, Any],
    features: Features,
    device: str = "cpu",
    samples: Sequence[Sample] = (),
    heads: FinalHeads | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(N, C) bool choices and (N, C) probabilities of one entry of the run's leaderboard.

    `samples` are those of `features`; only early fusion looks at them, at their photos. `heads` may be those of
    an earlier call.
    """
    heads = heads or FinalHeads(run)
    command = "finetune" if run.is_finetuned else "heads"
    try:
        decision = Decision.from_json(entry["decision"])
        if entry["head"] == EARLY:
            logits = _early_logits(run, entry, features, device, samples, heads)
        else:
            logits = _logits(run, entry, features, device, heads)
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise RunError(
            f"{run.folder}: not a whole run ({error!r}); delete the folder and run mmfeat {command} again"
        ) from error
    return decision.choose(logits), decision.probabilities(logits)


def towers_of(run: Run, entry: Mapping[str, Any]) -> list[Tower]:
    """The encoders whose vectors an entry takes: the run's, and in the place of one that was fine-tuned the results."""
    seen = {each["modalities"] for each in members(run, entry)}
    wanted = [tower for tower in run.towers if {"both", tower.spec.modality} & seen and _sees_view(entry, tower)]
    finals = [run.successors(entry, final) for final in entry.get("final", [])] or [{}]
    found = {each.get(t.spec.folder_name, t).spec: each.get(t.spec.folder_name, t) for each in finals for t in wanted}
    return list(found.values())


def _sees_view(entry: Mapping[str, Any], tower: Tower) -> bool:
    """Stage 1 and stage 2 may have seen photos in different numbers of augmented views."""
    return view_number(tower.spec.view) <= entry.get("views", math.inf)


def widths_of(run: Run, entry: Mapping[str, Any]) -> dict[str, int]:
    """D of each block that an entry may take; a fine-tuned tower is as wide as the one before."""
    widths = dict(run.config["widths"])
    for final in entry.get("final", []):
        for name, tower in run.successors(entry, final).items():
            widths[tower.spec.folder_name] = widths[name]
    return widths


def seen_by(run: Run, entry: Mapping[str, Any], final: Mapping[str, Any], features: Features) -> Features:
    """What one final head sees, in the order of the run's encoders."""
    if not final.get("towers"):
        return features
    found = run.successors(entry, final)
    names = [found.get(tower.spec.folder_name, tower).spec.folder_name for tower in run.towers]
    return features.named(names)


def members(run: Run, entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The heads behind an entry: itself, or those of an ensemble that count."""
    if entry["modalities"] != TOGETHER:
        return [entry]
    weights = entry["rule"].get("weights", [1.0] * len(entry["members"]))
    by_name = {f"{each['head']}-{each['modalities']}": each for each in run.leaderboard}
    return [by_name[name] for name, weight in zip(entry["members"], weights, strict=True) if weight > 0]


def _logits(run: Run, entry: Mapping[str, Any], features: Features, device: str, heads: FinalHeads) -> np.ndarray:
    """(N, C) log-probabilities or logits to which the entry's decision applies."""
    if entry["modalities"] != TOGETHER:
        return _head_logits(run, entry, features, device, heads)
    multilabel = bool(entry["decision"]["multilabel"])
    used = {f"{each['head']}-{each['modalities']}": each for each in members(run, entry)}
    parts: list[np.ndarray | None] = []
    for name in entry["members"]:
        member = used.get(name)
        parts.append(None if member is None else _calibrated(run, member, features, device, heads))
    shape = next(part.shape for part in parts if part is not None)
    filled = [np.zeros(shape) if part is None else part for part in parts]
    return combine(dict(entry), np.stack(filled), multilabel)


def _calibrated(run: Run, entry: Mapping[str, Any], features: Features, device: str, heads: FinalHeads) -> np.ndarray:
    return Decision.from_json(entry["decision"]).log_probabilities(_head_logits(run, entry, features, device, heads))


def _head_logits(run: Run, entry: Mapping[str, Any], features: Features, device: str, heads: FinalHeads) -> np.ndarray:
    """(N, C) logits at the entry's temperature: the mean probability of its final heads, on the scale of one."""
    finals = entry["final"]
    groups = [finals] if not any(record.get("towers") for record in finals) else [[record] for record in finals]
    logits: list[np.ndarray] = []
    try:
        attend = run.config["attend"] if entry.get("fusion", entry["head"]) == NEEDS_TOKENS else ""
        for records in groups:
            data = HeadData(seen_by(run, entry, records[0], features), entry["modalities"], device, attend)
            logits += heads.logits(entry, records, data)
    except RunError:
        raise
    except Exception as error:  # a head of another shape
        raise RunError(_not_whole(run, run.head_folder(entry), error)) from error
    return mean_logits(np.stack(logits), Decision.from_json(entry["decision"]))


def _early_logits(
    run: Run,
    entry: Mapping[str, Any],
    features: Features,
    device: str,
    samples: Sequence[Sample],
    heads: FinalHeads,
) -> np.ndarray:
    """(N, C) logits of early fusion, whose photos are read now."""
    logits = []
    for final in entry["final"]:
        seen = seen_by(run, entry, final, features)
        model = early_model(seen, samples, [], len(run.classes), Team(), device)
        model.load_head(heads.tensors(entry, final))
        logits.append(model.predict(np.arange(len(samples))))
    return mean_logits(np.stack(logits), Decision.from_json(entry["decision"]))


def load_final(run: Run, entry: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of one final head; raises `RunError` where they are not what was saved."""
    from safetensors.numpy import load_file

    path = _place(run, entry, record)
    try:
        if file_sha256(path) != record["sha256"]:
            raise ValueError(f"{path.name} is not what was saved")
        return load_file(path)
    except Exception as error:  # safetensors raises what its format makes it raise
        raise RunError(_not_whole(run, path.parent, error)) from error


def _place(run: Run, entry: Mapping[str, Any], record: Mapping[str, Any]) -> Path:
    return run.head_folder(entry) / Path(record["file"]).name


def _not_whole(run: Run, folder: Path, error: Exception) -> str:
    command = "finetune" if run.is_finetuned else "heads"
    return f"{folder}: not a whole head ({error}); the same mmfeat {command} trains it again"
