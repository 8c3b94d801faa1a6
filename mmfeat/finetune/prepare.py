"""The work of a fine-tuning: the run it starts from, its folds, its features and which towers move, read and
extracted before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from mmfeat.cache.features import Features
from mmfeat.encoders.registry import Tower
from mmfeat.errors import ConfigError, RunError
from mmfeat.evaluation.protocol import Protocol
from mmfeat.evaluation.splits import has_splits
from mmfeat.extraction.extract import ExtractSettings, extract_samples
from mmfeat.extraction.requests import Request, begin_request
from mmfeat.finetune.model import EARLY, TunableModel, early_model, widened
from mmfeat.finetune.processes import Team
from mmfeat.finetune.settings import FinetuneSettings
from mmfeat.finetune.stage_one import ChosenHead, best_fusion, chosen_head
from mmfeat.finetune.tower_plan import TowerPlan, head_slots, plan_towers
from mmfeat.finetune.towers import open_moving_tower
from mmfeat.heads.data import HeadData
from mmfeat.heads.registry import NEEDS_TOKENS, load_fusion
from mmfeat.runs.entry import RunConfig
from mmfeat.runs.run import Run, checked_towers
from mmfeat.samples.images import view_name, view_number
from mmfeat.sweep.problem import LabelledData, Problem, read_labelled
from mmfeat.sweep.train import IN_MEMORY
from mmfeat.system.hardware import resolve_dtype
from mmfeat.system.wording import Progress
from mmfeat.version import __version__


@dataclass(frozen=True)
class Asked:
    """What a call names: settings, which head, folds and views to take, and where data and cache are now."""

    settings: FinetuneSettings
    fusion: str | None = None
    head: str | None = None
    modalities: str | None = None
    seeds: int | None = None
    views: int | None = None
    data: str | Path | None = None
    cache: str | Path | None = None


@dataclass(frozen=True)
class Work:
    """Everything that the trainings of one run share."""

    parent: Run
    labelled: LabelledData
    problem: Problem
    seen: list[Tower]  # the encoders of both stages, their photos in views
    features: Features  # of `seen`, and the prefixes
    plans: list[TowerPlan]
    chosen: ChosenHead
    fusion: str  # the head, or early
    views: int
    settings: FinetuneSettings
    device: str
    amp: str

    @property
    def attend(self) -> str:
        """What cross-attention looks at."""
        return str(self.parent.config.attend) if self.fusion == NEEDS_TOKENS else ""

    @property
    def adjustment(self) -> float | None:
        return (self.parent.config.plan or {})["adjustment"]

    @property
    def label(self) -> str:
        """What the run is called after."""
        return f"{self.fusion}-{self.settings.label}"

    @property
    def title(self) -> str:
        """For whoever waits: what moves, and on which path."""
        return f"fine-tuning {', '.join(plan.title for plan in self.plans) or self.fusion}"

    @property
    def first_features(self) -> Features:
        """What the run's own heads saw."""
        return self.features.named([tower.spec.folder_name for tower in self.parent.towers])

    @cached_property
    def data(self) -> HeadData:
        """The vectors that stage 2 sees, shared by the models of all workers."""
        return HeadData(self._own_features, self.chosen.modality, self.device, self.attend)

    @property
    def _own_features(self) -> Features:
        return self.features.named(
            [tower.spec.folder_name for tower in self.seen if view_number(tower.spec.view) <= self.views],
        )

    def model(self, team: Team) -> TunableModel:
        """A model of its own for each worker."""
        samples, classes = self.labelled.labelled, len(self.problem.targets.classes)
        towers = [
            open_moving_tower(
                plan, self.features, samples, self.settings, team, self.device, self.attend == "tokens"
            )
            for plan in self.plans
        ]  # fmt: skip
        if self.fusion == EARLY:
            return early_model(self._own_features, samples, towers, classes, team, self.device, self.amp)
        return TunableModel(
            load_fusion(self.fusion)(1, widened(self.data.shape, towers), classes), self.data, towers, self.amp
        )


def prepare(
    parent: Run, asked: Asked, device: str, team: Team, out: str | Path, progress: Progress
) -> tuple[Work, RunConfig, Path]:
    """Read, plan and extract: the work, what the run records of it, and its folder."""
    settings = asked.settings
    if parent.is_finetuned:
        raise RunError(f"{parent.folder}: a second stage itself; name the run of its heads, {parent.config.parent}")
    chosen = chosen_head(parent, *best_fusion(parent, asked.head, asked.modalities))
    _check_head(chosen, asked, parent, team)
    checked_towers(parent, [each for each in parent.towers if chosen.modality in ("both", each.spec.modality)])
    labelled, problem = _problem(parent, asked, progress)
    slots = head_slots(parent.towers, "text" if asked.fusion == EARLY else chosen.modality)
    plans = plan_towers(slots, settings, labelled.labelled, device, team)
    if not plans and asked.fusion is None:
        raise ConfigError("--unfreeze none: nothing moves; name layers, as in text:1, or train --fusion early")
    views = parent.options.views if asked.views is None else asked.views
    _check_views(chosen, parent, plans, views)
    seen, prefixes = _seen_towers(parent, chosen.modality, views), _prefixes(plans, 0 if settings.augment else views)
    towers = [*seen, *prefixes]
    if team.leads:
        _extract(parent, labelled, towers, device, progress)
    team.wait()
    features = labelled.store.load(labelled.labelled, [tower.spec for tower in towers], labelled.keys, IN_MEMORY)
    _check_prefixes(plans, features)
    fusion, amp = asked.fusion or chosen.head, _amp(settings.amp, device)
    work = Work(parent, labelled, problem, seen, features, plans, chosen, fusion, views, settings, device, amp)
    config = _config(work, prefixes)
    return work, config, Path(out) / config.name(work.label)


def _check_head(chosen: ChosenHead, asked: Asked, parent: Run, team: Team) -> None:
    is_early = asked.fusion == EARLY
    if is_early and chosen.modality != "both":
        raise ConfigError(
            f"--fusion early sees text and photo, this head {chosen.modality} alone; name --modalities both"
        )
    if not is_early and chosen.head == NEEDS_TOKENS and parent.config.attend == "tokens" and team.size > 1:
        raise ConfigError(
            f"--head {chosen.head}: its tokens are those of one process; name another head, or leave out torchrun"
        )


def _check_views(chosen: ChosenHead, parent: Run, plans: Sequence[TowerPlan], views: int) -> None:
    """Tokens are cached of plain photos alone: a head that was trained on those of views would predict without them."""
    sees_tokens = chosen.head == NEEDS_TOKENS and parent.config.attend == "tokens"
    if sees_tokens and views and any(plan.slot.modality == "image" for plan in plans):
        raise ConfigError(
            f"--views {views}: {chosen.head} has no tokens of augmented views; name --views 0, or leave photos frozen"
        )


def _problem(parent: Run, asked: Asked, progress: Progress) -> tuple[LabelledData, Problem]:
    """The run's own problem and folds; data or folds that changed since are refused."""
    config, recorded = parent.config, parent.config.protocol
    repeats = asked.seeds or recorded.seeds
    if not has_splits(parent.folder):
        raise RunError(f"{parent.folder}: its splits are gone; run mmfeat heads again")
    protocol = Protocol(recorded.kind, seeds=repeats, split_dir=str(parent.folder), seed=recorded.seed)
    data, cache = asked.data or config.data, asked.cache or config.cache
    labelled = read_labelled(data, config.columns, cache, config.task, protocol, progress)
    if labelled.recorded["data_hash"] != config.data_hash:
        raise RunError(f"{parent.folder}: labels, texts or photos changed since; run mmfeat heads again, then finetune")
    if labelled.recorded["splits_hash"] != config.splits_hash:
        raise RunError(f"{parent.folder}: its splits changed since; run mmfeat heads again, then finetune")
    ids = tuple(sample.id for sample in labelled.labelled)
    return labelled, Problem(ids, labelled.targets, labelled.splits, repeats, protocol.seed)


def _extract(parent: Run, labelled: LabelledData, towers: Sequence[Tower], device: str, progress: Progress) -> None:
    """What the cache lacks; noted there, so that `cache gc` keeps it while no run names it yet."""
    cache = labelled.store.folder.parent
    fingerprints = tuple(tower.spec.fingerprint for tower in towers)
    requests = list(dict.fromkeys(tower.request for tower in parent.towers))
    place = labelled.recorded["data"]
    begin_request(cache, Request(place, parent.config.columns, requests, parent.options, fingerprints))
    samples = replace(labelled.samples, samples=labelled.labelled)
    extract_samples(samples, list(towers), cache=cache, settings=ExtractSettings(device), progress=progress)


def _check_prefixes(plans: Sequence[TowerPlan], features: Features) -> None:
    """A sample that has a vector has a prefix, unless one of them could not be made."""
    masks = features.masks
    for plan in plans:
        if plan.path == "cached":
            lacking = np.flatnonzero(masks[plan.slot.name] & ~masks[plan.prefix().folder_name])
            if len(lacking):
                output = f"{plan.tower.spec.tower}=prefix:{plan.count}"
                raise RunError(
                    f"sample {features.ids[lacking[0]]}: it has a vector of {plan.tower.spec.name} but no prefix; "
                    f"try it again with mmfeat extract --retry-failed --outputs {output}, or use --path full"
                )


def _seen_towers(parent: Run, modality: str, views: int) -> list[Tower]:
    """The run's encoders that the head sees, and their photos in as many augmented views as either stage shows."""
    towers = [tower for tower in parent.towers if modality in ("both", tower.spec.modality)]
    extra = [
        Tower(tower.request, replace(tower.spec, view=view_name(number)))
        for number in range(1, views + 1)
        for tower in towers
        if (tower.spec.modality, tower.spec.output, tower.spec.view) == ("image", "pooled", "none")
    ]
    return list({tower.spec: tower for tower in [*towers, *extra]}.values())


def _prefixes(plans: Sequence[TowerPlan], views: int) -> list[Tower]:
    names = ["none", *(view_name(number) for number in range(1, views + 1))]
    return [
        Tower(plan.tower.request, plan.prefix(view))
        for plan in plans
        if plan.path == "cached"
        for view in (names if plan.slot.modality == "image" else names[:1])
    ]


def _config(work: Work, prefixes: Sequence[Tower]) -> RunConfig:
    parent = work.parent.config
    return RunConfig(
        version=__version__,
        columns=parent.columns,
        **work.labelled.recorded,
        encoders=tuple(work.seen),
        prefixes=tuple(prefixes),
        options=replace(parent.options, views=max(work.views, parent.options.views)),
        task=parent.task,
        attend=parent.attend,
        parent=work.parent.folder.name,
        fusion=work.fusion,
        stage_1=asdict(work.chosen),
        views=work.views,
        protocol=replace(parent.protocol, seeds=work.problem.repeats),
        finetune={**asdict(work.settings), "amp": work.amp},
    )


def _amp(amp: str, device: str) -> str:
    """`auto` is bfloat16 on a GPU that has it and none elsewhere: on a CPU autocast gains little."""
    if amp != "auto":
        return amp
    found = resolve_dtype("auto", device) if device.startswith("cuda") else "float32"
    return "none" if found == "float32" else found
