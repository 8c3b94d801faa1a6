"""Final heads: those that predict, trained on all labelled samples or the ones of the folds, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.engine import Engine
from mmfeat.files import file_sha256, write_atomic
from mmfeat.heads import BASELINES
from mmfeat.heads.jobs import Fitted, Job
from mmfeat.heads.stack import Member, epoch_steps
from mmfeat.trials import Outcome, Task, run_trials


def refit(task: Task, engine: Engine, head: str, modality: str, best: Outcome) -> list[Fitted]:
    """Train on all labelled samples, as long and as slowly as the heads of the folds did on average."""
    everything, nothing = np.arange(len(task.targets)), np.empty(0, np.int64)
    settings = replace(best.settings, batch_size=min(best.settings.batch_size, len(everything)))
    steps = epoch_steps(len(everything), settings.batch_size)
    replay = replayed(best.best_epochs, best.histories) if head not in BASELINES else None
    members = tuple(
        Member(settings, everything, nothing, (task.seed, len(task.splits), repeat), steps, replay)
        for repeat in range(task.repeats_of(head))
    )
    setting = _middle(best.chosen) if head in BASELINES else None
    job = Job(head, modality, members, ((nothing,),) * len(members), setting, keep=True)
    return engine.run([job], lambda heads: None)[0]


def fold_heads(task: Task, engine: Engine, head: str, modality: str, best: Outcome) -> list[Fitted]:
    """The heads of the folds; a trial that was read from disk has none, and is trained again."""
    if best.fitted:
        return best.fitted
    (again,) = run_trials(task, engine, head, modality, [best.settings], lambda heads: None, keep=True)
    return again.fitted


def replayed(best_epochs: Sequence[int], histories: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[float, ...]:
    """The scale of the learning rate for each epoch: the folds' geometric mean, for their mean number of epochs."""
    epochs = max(1, round(float(np.mean([epoch + 1 for epoch in best_epochs]))))
    scales = [[entry["scale"] for entry in history] for history in histories]
    longest = [[line[min(epoch, len(line) - 1)] for line in scales] for epoch in range(epochs)]
    return tuple(float(np.exp(np.mean(np.log(line)))) for line in longest)


def save_finals(folder: Path, finals: list[Fitted]) -> list[dict[str, Any]]:
    """`final-N.safetensors` for each head that predicts; returns what rebuilds them."""
    from safetensors.numpy import save

    records = []
    for number, each in enumerate(finals):
        path = folder / f"final-{number}.safetensors"
        write_atomic(path, save({name: np.ascontiguousarray(value) for name, value in each.tensors.items()}))
        records.append({"file": path.name, "config": each.config, "sha256": file_sha256(path)})
    return records


def _middle(chosen: list[dict[str, float]]) -> dict[str, float]:
    """The setting of a baseline that is in the middle of those the folds chose; some may have sampled their rows."""
    names = [name for name in chosen[0] if all(name in each for each in chosen)]
    return {name: sorted(each[name] for each in chosen)[(len(chosen) - 1) // 2] for name in names}
