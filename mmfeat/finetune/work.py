"""The work of a fine-tuning: the run it starts from, its folds, its features and which towers move, read and
extracted before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mmfeat.encoders import Tower
from mmfeat.errors import ConfigError, RunError
from mmfeat.extract import extract_samples
from mmfeat.features import Features
from mmfeat.finetune.early import EARLY
from mmfeat.finetune.model import Model, early_model, widened
from mmfeat.finetune.movers import Part, make_mover
from mmfeat.finetune.plan import plan_parts
from mmfeat.finetune.settings import FinetuneSettings
from mmfeat.finetune.stage_one import best_fusion
from mmfeat.finetune.team import Team
from mmfeat.hardware import resolve_dtype
from mmfeat.heads import NEEDS_TOKENS, load_fusion
from mmfeat.heads.data import HeadData
from mmfeat.problem import Problem, read_problem
from mmfeat.progress import Progress
from mmfeat.protocol import Protocol
from mmfeat.runs import Run, run_name
from mmfeat.sweep import IN_MEMORY
from mmfeat.trials import Task
from mmfeat.version import __version__


@dataclass(frozen=True)
class Asked:
    """What a call names: settings, and which head, folds and views to take."""

    settings: FinetuneSettings
    fusion: str | None = None
    head: str | None = None
    modalities: str | None = None
    seeds: int | None = None
    views: int | None = None


@dataclass(frozen=True)
class Work:
    """Everything that the trainings of one run share."""

    parent: Run
    problem: Problem
    task: Task
    features: Features
    parts: list[Part]
    head: str
    modality: str
    fusion: str  # `head`, or early
    settings: FinetuneSettings
    device: str
    amp: str

    @property
    def attend(self) -> str:
        return str(self.parent.config["attend"]) if self.fusion == NEEDS_TOKENS else ""

    @property
    def label(self) -> str:
        """What the run is called after."""
        return f"{self.fusion}-{self.settings.label}"

    @property
    def title(self) -> str:
        """For whoever waits: what moves, and on which path."""
        moving = [f"{part.tower.spec.model} {part.way}" for part in self.parts]
        return f"fine-tuning {', '.join(moving) or self.fusion}"

    def model(self, team: Team) -> Model:
        """A model of its own for each worker."""
        data = HeadData(self.features, self.modality, self.device, self.attend)
        samples = self.problem.labelled
        attends = self.attend == "tokens"
        movers = [
            make_mover(part, self.features, samples, self.settings, team, self.device, attends) for part in self.parts
        ]
        if self.fusion == EARLY:
            return early_model(self.features, samples, movers, len(self.task.targets.classes), team, self.device)
        head = load_fusion(self.fusion)(1, widened(data.shape, movers), len(self.task.targets.classes))
        return Model(head, data, movers, self.amp)


def prepare(
    parent: Run, asked: Asked, device: str, team: Team, out: str | Path, progress: Progress
) -> tuple[Work, dict[str, Any], Path]:
    """Read, plan and extract: the work, what the run records of it, and its folder."""
    settings = asked.settings
    if parent.is_finetuned:
        raise RunError(f"{parent.folder}: a second stage itself; name the run of its heads, {parent.config['parent']}")
    name, modality = best_fusion(parent, asked.head, asked.modalities)
    if name == NEEDS_TOKENS and team.size > 1:
        raise ConfigError(f"--head {name}: only one process can train it; name another head, or leave out torchrun")
    problem, task = _task(parent, asked.seeds, progress)
    parts = plan_parts(parent.towers, modality, settings, problem.labelled, device)
    if asked.fusion == EARLY and modality != "both":
        raise ConfigError(f"--fusion early sees text and photo, this head {modality} alone; name --modalities both")
    if not parts and asked.fusion is None:
        raise ConfigError("--unfreeze none: nothing moves; name layers, as in text:1, or train --fusion early")
    views = parent.options.views if asked.views is None else asked.views
    seen, prefixes = _view_towers(parent, modality, views), _prefixes(parts, 0 if settings.augment else views)
    if team.leads:
        labelled = replace(problem.samples, samples=problem.labelled)
        extract_samples(labelled, [*seen, *prefixes], cache=parent.config["cache"], device=device, progress=progress)
    team.wait()
    specs = [tower.spec for tower in [*seen, *prefixes]]
    features = problem.store.load(problem.labelled, specs, problem.keys, IN_MEMORY)
    fusion, amp = asked.fusion or name, _amp(settings.amp, device)
    work = Work(parent, problem, task, features, parts, name, modality, fusion, settings, device, amp)
    return work, _config(work, prefixes, views), Path(out) / run_name(_config(work, prefixes, views), work.label)


def _task(parent: Run, seeds: int | None, progress: Progress) -> tuple[Problem, Task]:
    """The run's own problem and folds; data that changed since are refused."""
    recorded = parent.config["protocol"]
    repeats = seeds or int(recorded["seeds"])
    kind = "holdout" if len(parent.config["folds"]) == 1 else "kfold"
    protocol = Protocol(kind, seeds=repeats, split_dir=str(parent.folder), seed=int(recorded["seed"]))
    config = parent.config
    problem = read_problem(config["data"], config["columns"], config["cache"], config["task"], protocol, progress)
    if problem.config["data_hash"] != config["data_hash"]:
        raise RunError(f"{parent.folder}: labels, texts or photos changed since; run mmfeat heads again, then finetune")
    ids = tuple(sample.id for sample in problem.labelled)
    return problem, Task(ids, problem.targets, problem.splits, repeats, protocol.seed)


def _view_towers(parent: Run, modality: str, views: int) -> list[Tower]:
    """The run's encoders that the head sees, their photos in this many augmented views."""
    towers = [tower for tower in parent.towers if modality in ("both", tower.spec.modality)]
    plain = [tower for tower in towers if tower.spec.view == "none"]
    extra = [
        Tower(tower.request, replace(tower.spec, view=f"train:{number}"))
        for number in range(1, views + 1)
        for tower in plain
        if (tower.spec.modality, tower.spec.output) == ("image", "pooled")
    ]
    return [*plain, *extra]


def _prefixes(parts: Sequence[Part], views: int) -> list[Tower]:
    names = ["none", *(f"train:{number}" for number in range(1, views + 1))]
    return [
        Tower(part.tower.request, part.prefix(view))
        for part in parts
        if part.path == "cached"
        for view in (names if part.slot.modality == "image" else names[:1])
    ]


def _config(work: Work, prefixes: Sequence[Tower], views: int) -> dict[str, Any]:
    parent = work.parent.config
    return {
        "version": __version__,
        "columns": parent["columns"],
        **work.problem.config,
        "encoders": parent["encoders"],
        "prefixes": [{"request": tower.request, "spec": asdict(tower.spec)} for tower in prefixes],
        "options": {**parent["options"], "views": views},
        "task": parent["task"],
        "attend": parent["attend"],
        "parent": work.parent.folder.name,
        "fusion": work.fusion,
        "stage_1": [work.head, work.modality],
        "protocol": {**parent["protocol"], "seeds": work.task.repeats},
        "finetune": {**asdict(work.settings), "amp": work.amp},
    }


def _amp(amp: str, device: str) -> str:
    """`auto` is bfloat16 on a GPU that has it and none elsewhere: on a CPU autocast gains little."""
    if amp != "auto":
        return amp
    found = resolve_dtype("auto", device) if device.startswith("cuda") else "float32"
    return "none" if found == "float32" else found
