"""The preparation of stage 2: check the head of the parent run, read its data, plan the towers that move, and extract
what the cache lacks, all before anything is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from mmfeat.cache.features import Features
from mmfeat.encoders.registry import Tower, describe_encoders, kept_for
from mmfeat.errors import ConfigError, RunError
from mmfeat.evaluation.protocol import Protocol, has_splits
from mmfeat.extraction.extract import ExtractSettings, extract_samples
from mmfeat.extraction.requests import Request, begin_request
from mmfeat.finetune.model import TunableModel, early_model, widened
from mmfeat.finetune.processes import Execution, Team
from mmfeat.finetune.settings import EARLY, FinetuneArguments, FinetuneSettings
from mmfeat.finetune.stage_one import best_fusion, chosen_head
from mmfeat.finetune.towers import TowerPlan, check_prefixes, head_slots, open_moving_tower, plan_towers, prefix_towers
from mmfeat.heads.data import HeadData
from mmfeat.heads.registry import NEEDS_TOKENS, ZERO_SHOT, load_fusion
from mmfeat.runs.entry import ChosenHead, RunConfig
from mmfeat.runs.run import Run, checked_towers
from mmfeat.samples.contents import view_name, view_number
from mmfeat.samples.labels import ORDINAL, REGRESSION
from mmfeat.sweep.arguments import requests_of
from mmfeat.sweep.class_names import with_class_vectors
from mmfeat.sweep.problem import LabelledData, Problem, read_labelled
from mmfeat.system.wording import Progress, Silent


@dataclass(frozen=True)
class Experiment:
    """A prepared stage 2: the parent run, the head of stage 1, labelled data, and the towers that move.

    `views` is the number of augmented views of a photo in stage 2; `team` trains.
    """

    parent: Run
    arguments: FinetuneArguments
    chosen: ChosenHead
    labelled: LabelledData
    problem: Problem
    plans: list[TowerPlan]
    views: int
    team: Team

    @property
    def settings(self) -> FinetuneSettings:
        return self.arguments.settings

    @property
    def fusion(self) -> str:
        return self.arguments.fusion or self.chosen.head

    @property
    def attend(self) -> str:
        """The input of cross-attention, tokens or pooled vectors; "" for other heads."""
        return str(self.parent.config.attend) if self.fusion == NEEDS_TOKENS else ""

    @property
    def adjustment(self) -> float | None:
        plan = self.parent.config.plan
        return plan.adjustment if plan else None

    @property
    def title(self) -> str:
        return f"fine-tuning {', '.join(plan.title for plan in self.plans) or self.fusion}"

    @property
    def folder(self) -> Path:
        return Path(self.arguments.out) / self.config.name(f"{self.fusion}-{self.settings.label}")

    @cached_property
    def encoders(self) -> list[Tower]:
        """The parent's encoders that the head sees, with every augmented view of photos that either stage shows."""
        towers = [tower for tower in self.parent.towers if self.chosen.modality in ("both", tower.spec.modality)]
        extra = [
            Tower(tower.request, replace(tower.spec, view=view_name(number)))
            for number in range(1, self.views + 1)
            for tower in towers
            if (tower.spec.modality, tower.spec.output, tower.spec.view) == ("image", "pooled", "none")
        ]
        return list({tower.spec: tower for tower in [*towers, *extra]}.values())

    @property
    def request(self) -> Request:
        """The extraction of the encoders of the parent run."""
        data, parent = self.labelled.recorded["data"], self.parent
        return Request(data, parent.config.columns, requests_of(parent), parent.options)

    @cached_property
    def prefixes(self) -> list[Tower]:
        """The prefixes of towers on the cached path; `--augment` shows photos in other views, which no cache holds."""
        return prefix_towers(self.plans, 0 if self.settings.augment else self.views)

    @cached_property
    def features(self) -> Features:
        """The cached vectors of the encoders, and the prefixes; with those of class names where the head needs them."""
        features, _ = self.labelled.load([tower.spec for tower in (*self.encoders, *self.prefixes)])
        if all(settings.init != ZERO_SHOT for settings in self.chosen.wanted):
            return features
        config = replace(self.parent.config, cache=str(self.labelled.store.folder.parent))
        requests = requests_of(self.parent)
        described = describe_encoders(requests, kept_for(requests, self.parent.options))
        return with_class_vectors(features, config, described, self.team.device, Silent())

    @property
    def stage_2_features(self) -> Features:
        """The vectors that stage 2 is trained on, in the views of stage 2."""
        return self.features.named(
            [tower.spec.folder_name for tower in self.encoders if view_number(tower.spec.view) <= self.views]
        )

    @cached_property
    def data(self) -> HeadData:
        """The vectors of stage 2 on the device, shared by the models of all workers."""
        return HeadData(self.stage_2_features, self.chosen.modality, self.team.device, self.attend)

    @cached_property
    def config(self) -> RunConfig:
        parent = self.parent.config
        return RunConfig(
            **self.labelled.recorded,
            encoders=tuple(self.encoders),
            prefixes=tuple(self.prefixes),
            options=replace(parent.options, views=max(self.views, parent.options.views)),
            attend=parent.attend,
            parent=self.parent.folder.name,
            fusion=self.fusion,
            stage_1=self.chosen,
            views=self.views,
            protocol=replace(parent.protocol, seeds=self.problem.repeats),
            finetune={**asdict(self.settings), "amp": self.settings.arithmetic(self.team.device)},
        )

    def model(self) -> TunableModel:
        """A new model with the weights before stage 2: every worker trains in a model of its own."""
        samples, classes = self.labelled.samples.labelled, len(self.problem.targets.classes)
        reads_tokens, amp = self.attend == "tokens", self.settings.arithmetic(self.team.device)
        towers = [
            open_moving_tower(plan, self.features, samples, self.settings, self.team, reads_tokens)
            for plan in self.plans
        ]
        if self.fusion == EARLY:
            decoding = self.parent.options.decoding
            return early_model(self.stage_2_features, samples, towers, decoding, classes, self.team, amp)
        head = load_fusion(self.fusion)(1, widened(self.data.shape, towers), classes)
        return TunableModel(head, self.data, towers, amp)


def prepare(parent: Run, arguments: FinetuneArguments, execution: Execution) -> Experiment:
    """Read the data of the parent run, plan the towers, and extract into the cache what it lacks."""
    settings, team = arguments.settings, execution.team
    if parent.is_finetuned:
        raise RunError(f"{parent.folder}: a second stage itself; name the run of its heads, {parent.config.parent}")
    if (task := parent.config.task) in (ORDINAL, REGRESSION):
        raise ConfigError(f"{parent.folder}: a run of --task {task}, whose encoders cannot be fine-tuned yet")
    chosen = chosen_head(parent, best_fusion(parent, arguments.head, arguments.modalities))
    is_early = arguments.fusion == EARLY
    if is_early and chosen.modality != "both":
        raise ConfigError(
            f"--fusion early sees text and photo, this head {chosen.modality} alone; name --modalities both"
        )
    checked_towers(parent, [tower for tower in parent.towers if chosen.modality in ("both", tower.spec.modality)])
    labelled, problem = _problem(parent, arguments, execution.progress)
    slots = head_slots(parent.towers, "text" if is_early else chosen.modality)
    plans = plan_towers(slots, settings, labelled.samples.labelled, team)
    if not plans and not is_early:
        raise ConfigError("--unfreeze none: nothing moves; name layers, as in text:1, or train --fusion early")
    views = parent.options.views if arguments.views is None else arguments.views
    experiment = Experiment(parent, arguments, chosen, labelled, problem, plans, views, team)
    _check_tokens(experiment)
    if team.leads:
        _extract(experiment, execution.progress)
    team.wait()
    check_prefixes(plans, experiment.features, experiment.request, experiment.labelled.store.folder.parent)
    return experiment


def _check_tokens(experiment: Experiment) -> None:
    """Refuse two things for a head that attends to tokens. Several processes do not share the tokens of a batch; and
    tokens are cached of plain photos alone, so a head trained on tokens of views would have to predict without any."""
    if experiment.attend != "tokens":
        return
    head, views = experiment.fusion, experiment.views
    if experiment.team.size > 1:
        raise ConfigError(
            f"--head {head}: its tokens are those of one process; name another head, or leave out torchrun"
        )
    if views and any(plan.slot.modality == "image" for plan in experiment.plans):
        raise ConfigError(
            f"--views {views}: {head} has no tokens of augmented views; name --views 0, or leave photos frozen"
        )


def _problem(parent: Run, arguments: FinetuneArguments, progress: Progress) -> tuple[LabelledData, Problem]:
    """The labelled data and the folds of the parent run. Raises `RunError` where they changed since that run."""
    config, recorded = parent.config, parent.config.protocol
    repeats = arguments.seeds or recorded.seeds
    if not has_splits(parent.folder):
        raise RunError(f"{parent.folder}: its splits are gone; run mmfeat heads again")
    protocol = Protocol(recorded.kind, seeds=repeats, split_dir=str(parent.folder), seed=recorded.seed)
    data, cache = arguments.data or config.data, arguments.cache or config.cache
    labelled = read_labelled(data, config.reading, cache, config.task, protocol, progress, rare=config.rare or "")
    if (labelled.recorded["data_hash"], labelled.recorded["table_hash"]) != (config.data_hash, config.table_hash):
        raise RunError(f"{parent.folder}: labels, texts or photos changed since; run mmfeat heads again, then finetune")
    if labelled.recorded["splits_hash"] != config.splits_hash:
        raise RunError(f"{parent.folder}: its splits changed since; run mmfeat heads again, then finetune")
    ids = tuple(sample.id for sample in labelled.samples.labelled)
    return labelled, Problem(
        ids, labelled.targets, labelled.splits, repeats, protocol.seed, config.products or "float32"
    )


def _extract(experiment: Experiment, progress: Progress) -> None:
    """Extract the vectors and prefixes that the cache lacks. A request in the cache names them, so that `cache gc`
    keeps them while no finished run does."""
    labelled = experiment.labelled
    towers = [*experiment.encoders, *experiment.prefixes]
    cache, fingerprints = labelled.store.folder.parent, tuple(tower.spec.fingerprint for tower in towers)
    begin_request(cache, replace(experiment.request, fingerprints=fingerprints))
    samples = replace(labelled.samples, samples=labelled.samples.labelled)
    settings = ExtractSettings(experiment.team.device)
    extract_samples(samples, towers, cache=cache, settings=settings, progress=progress)
