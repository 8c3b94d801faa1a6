"""The typed records of a run: its configuration, and the entries of its leaderboard.

An entry is one head on one set of modalities, or one ensemble, with its scores and the files that predict. It is one
object of `leaderboard.json` and of `leaderboard` in `run.json`; `metrics.json` holds an entry that is not ranked yet.
A field that a kind of entry or run lacks is None in Python and absent in the files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from mmfeat.cache.store import folder_name
from mmfeat.encoders.registry import Tower
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.evaluation.decisions import Decision
from mmfeat.evaluation.metrics import Score
from mmfeat.evaluation.protocol import Protocol
from mmfeat.extraction.requests import stated_options
from mmfeat.heads.registry import DEFAULTS, HeadSettings, PlanRecord
from mmfeat.samples.corrections import LABELS, Corrections, Rare
from mmfeat.samples.dataset import SampleSet
from mmfeat.samples.labels import MULTILABEL, REGRESSION
from mmfeat.samples.table_columns import TableColumn
from mmfeat.system.files import canonical_json
from mmfeat.system.wording import SCORE_NAMES, head_label

T = TypeVar("T")
TOGETHER = "ensemble"  # the `modalities` of an entry that combines several heads
PLACES = ("data", "cache", "columns")  # the fields that may change while the run stays the same
TOWERS = ("encoders", "prefixes")
UNNAMED = ("trials", "products", "corrections")  # more trials, another arithmetic; labels count in the data hash
LATER = {"init": DEFAULTS.init, "race": False}  # settings that the first version lacked: runs are named as before
NUMBER_SCORES = ("r2", "mae", "rmse", "spearman")
SCORES = ("macro_f1", "accuracy", "weighted_f1", "auroc", "log_loss", "calibration_error",
          "calibration_excess", "classwise_excess")  # fmt: skip


@dataclass(frozen=True)
class Interval:
    value: float
    low: float
    high: float


UNDEFINED = Score(None, None, None)
NO_SCORE = Interval(math.nan, math.nan, math.nan)  # of classes, in a regression


@dataclass(frozen=True)
class SeedScores:
    """The score of each seed alone, with mean and standard deviation over the seeds."""

    mean: float
    std: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class ClassScores:
    """Scores of one class against the rest; `support` counts the samples that have it."""

    precision: float
    recall: float
    f1: Interval
    auroc: float | None
    support: int


@dataclass(frozen=True)
class PairedTest:
    """The difference of headlines of two entries on the same samples, with its 95 % interval and p-values.

    `p` comes from the paired bootstrap and `mcnemar` from McNemar's test; `p_holm` and `mcnemar_holm` are the same
    p-values adjusted for the number of comparisons: by Holm, and in `behind_best` by the largest difference of any two
    entries. `tie` is `p_holm >= 0.05`. `over` names the modalities of the other entry.
    """

    value: float
    low: float
    high: float
    p: float
    p_holm: float
    mcnemar: float | None = None
    mcnemar_holm: float | None = None
    tie: bool | None = None
    over: str | None = None


@dataclass(frozen=True)
class TunedTower:
    """A fine-tuned encoder beside a final head: the file with its changed weights, and `slot`, the block of features
    that it replaces."""

    file: str
    sha256: str
    slot: str
    spec: EncoderSpec


@dataclass(frozen=True)
class FinalHead:
    """A head that predicts: its file of tensors, the `config` that rebuilds it, and the towers tuned with it."""

    file: str
    sha256: str
    config: dict[str, Any] = field(default_factory=dict)
    towers: tuple[TunedTower, ...] = ()


@dataclass(frozen=True)
class Rule:
    """How an ensemble combines its H members: by `weights` (H,), or by stacking, a linear model with the matrix
    `stacking`, an `intercept` and the `penalty` it was fitted with."""

    weights: tuple[float, ...] | None = None
    stacking: tuple[tuple[float, ...], ...] | None = None
    intercept: tuple[float, ...] | None = None
    penalty: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Every score that `mmfeat.evaluation.metrics.evaluate` computes from choices and probabilities: `kappa`, quadratic
    weighted, of an ordinal task; `r2`, `mae`, `rmse` and `spearman` alone of a regression.

    `confusion` (C, C) counts samples, true labels in rows; multi-label, (C, 2, 2) has a table for each class.
    """

    macro_f1: Interval = NO_SCORE
    accuracy: Interval = NO_SCORE
    weighted_f1: Interval = NO_SCORE
    auroc: Score = UNDEFINED
    log_loss: Interval = NO_SCORE
    calibration_error: Interval = NO_SCORE
    calibration_excess: Interval | None = None
    classwise_excess: Interval | None = None
    micro_f1: Interval | None = None  # of a multi-label task
    seeds: dict[str, SeedScores]
    classes: dict[str, ClassScores]
    confusion: list[Any]
    samples: int
    kappa: Interval | None = None
    r2: Interval | None = None
    mae: Interval | None = None
    rmse: Interval | None = None
    spearman: Score | None = None

    @property
    def headline_name(self) -> str:
        """The name of the score by which entries are ranked and compared."""
        return self.main_names[0]

    @property
    def main_names(self) -> tuple[str, str, str]:
        """The names of the scores that narrow tables show, the headline first."""
        if self.r2:
            return "r2", "mae", "spearman"
        second = "micro_f1" if self.micro_f1 else "accuracy"
        return ("kappa", "macro_f1", second) if self.kappa else ("macro_f1", second, "log_loss")

    @property
    def titles(self) -> dict[str, str]:
        """What people call the scores; of several labels a sample, `accuracy` counts samples with all of them right."""
        several = bool(self.confusion) and isinstance(self.confusion[0][0], list | tuple)
        return SCORE_NAMES | ({"accuracy": "exact match"} if several else {})

    @property
    def headline_title(self) -> str:
        return SCORE_NAMES[self.headline_name]

    @property
    def headline(self) -> Interval:
        return self.r2 or self.kappa or self.macro_f1

    @property
    def by_seed(self) -> SeedScores:
        return self.seeds[self.headline_name]

    @property
    def score_names(self) -> tuple[str, ...]:
        """The names of the scores, the headline first."""
        return NUMBER_SCORES if self.r2 else tuple(n for n in ("kappa", *SCORES, "micro_f1") if getattr(self, n))

    def score(self, name: str) -> Interval | Score:
        """Return a score by its name in the files; undefined where an earlier version left it out."""
        return getattr(self, name) or UNDEFINED


@dataclass(frozen=True, kw_only=True)
class Entry(Scores):
    """One row of a leaderboard: the scores of a head or an ensemble, and the files that predict."""

    head: str
    modalities: str
    decision: Decision
    seconds: float = 0.0
    # Fields of a trained head:
    trials: int | None = None
    settings: HeadSettings | None = None
    optimism: float | None = None
    search_over: bool | None = None
    dropped: bool | None = None  # by the race, after one seed
    parameters: int | None = None
    final: tuple[FinalHead, ...] = ()
    predictions: str | None = None  # SHA-256 of `out_of_fold.csv`
    # Fields of an ensemble:
    members: tuple[str, ...] = ()
    rule: Rule | None = None
    # Fields of a second stage:
    fusion: str | None = None
    views: int | None = None
    alpha: float | None = None
    alphas: tuple[float, ...] | None = None
    scores: dict[str, float] | None = None
    over_stage_1: PairedTest | None = None
    # Tests of the entry against the best one, and against the better one of its two single modalities:
    behind_best: PairedTest | None = None
    tie: bool | None = None
    gain: PairedTest | None = None
    picked: Interval | None = None  # macro-F1 of the first entry without the luck of having come first

    @property
    def name(self) -> str:
        """The name of the entry's folder in the run, as in `concat-both`."""
        return entry_name(self.head, self.modalities)

    @property
    def label(self) -> str:
        """The name that people read, as in `concat on both`."""
        return head_label(self.head, self.modalities)

    @property
    def fused_by(self) -> str:
        """The fusion or baseline of the final heads; the `head` of a second stage is the name of the stage instead."""
        return self.fusion or self.head

    @property
    def is_ensemble(self) -> bool:
        return self.modalities == TOGETHER

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` reads, without absent fields and `seconds`: the same training, the same bytes."""
        values = {"head": self.head, "modalities": self.modalities, **asdict(self)}
        absent = ("seconds", *(SCORES if self.r2 else ()))
        return dropped({name: value for name, value in values.items() if name not in absent})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Entry:
        """Read an entry; raises `ValueError` that names the field which is missing or wrong."""
        return convert(values, cls)


def entry_name(head: str, modalities: str) -> str:
    return f"{head}-{modalities}"


def _stated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a record without later ones that hold their default, as before they came."""
    return {name: value for name, value in pairs if name not in LATER or value != LATER[name]}


def placeless(values: Mapping[str, Any]) -> dict[str, Any]:
    """The plain values of a configuration or a run without the paths of data, cache and weights, which may move."""
    specs = {name: [tower["spec"] for tower in values[name]] for name in TOWERS if name in values}
    return {name: value for name, value in values.items() if name not in PLACES} | specs


def convert(values: Any, kind: type[T]) -> T:
    """Make the dataclass `kind` of plain values and check every field (msgspec); raises `ValueError`."""
    import msgspec

    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def dropped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out values that are None or an empty tuple, also in the records that an entry may lack."""
    kept = {name: value for name, value in values.items() if value is not None and value != ()}
    for name in {"behind_best", "decision", "gain", "over_stage_1", "rule"} & kept.keys():
        kept[name] = {key: value for key, value in kept[name].items() if value is not None}
    if "final" in kept:
        kept["final"] = [{key: value for key, value in final.items() if value != ()} for final in kept["final"]]
    return kept


@dataclass(frozen=True)
class ChosenHead:
    """A head of a run with the settings that validated best there: in each fold, and over all of them (`best`)."""

    head: str
    modality: str
    folds: list[HeadSettings]
    best: HeadSettings
    trials: int

    @property
    def wanted(self) -> list[HeadSettings]:
        """The different settings among those of the folds and the best one."""
        return list(dict.fromkeys([*self.folds, self.best]))


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run, with the hashes of its data and folds.

    `table` is what the columns of numbers and categories hold. `plan`, `pairs`, `ensembles` and `trials` belong to a
    sweep of heads, `class_names` (the text of each class) and `templates` to one whose heads read these; `parent`,
    `fusion`, `stage_1`, `views`, `finetune` and `prefixes` to a second stage.
    """

    version: str
    columns: dict[str, str]
    data: str
    cache: str
    dataset: str
    data_hash: str
    folds: tuple[str, ...]
    splits_hash: str
    encoders: tuple[Tower, ...]
    options: EncoderOptions
    task: str
    attend: str
    protocol: Protocol
    pairs: tuple[tuple[str, str], ...] | None = None
    ensembles: bool | None = None
    plan: PlanRecord | None = None
    trials: int | None = None
    products: str | None = None  # arithmetic of linear layers in training; None: float32
    class_names: dict[str, str] | None = None
    templates: str | None = None
    prefixes: tuple[Tower, ...] | None = None
    parent: str | None = None
    fusion: str | None = None
    stage_1: ChosenHead | None = None
    views: int | None = None
    finetune: dict[str, Any] | None = None
    table: tuple[TableColumn, ...] | None = None
    table_hash: str | None = None
    order: tuple[str, ...] | None = None  # of the labels of an ordinal task, where the user named one
    corrections: Corrections | None = None
    rare: Rare | None = None
    modalities: str | None = None  # AUTO: of the `pairs` on one modality only those that matter are trained

    def known(self, samples: SampleSet, given: Mapping[str, str] | None = None) -> SampleSet:
        """The samples with their labels as the run knows them, see `Rare.over`."""
        return self.rare.over(samples, given) if self.rare else samples

    @property
    def reading(self) -> dict[str, str]:
        """The columns, and the corrections of labels, with which the run's data are read to train on them."""
        return self.columns | ({LABELS: self.corrections.file} if self.corrections else {})

    @property
    def given_hash(self) -> str:
        """The data hash with the data's own labels."""
        return self.corrections.data_hash if self.corrections else self.data_hash

    @property
    def is_regression(self) -> bool:
        return self.task == REGRESSION

    @property
    def is_multilabel(self) -> bool:
        return self.task == MULTILABEL

    @property
    def towers(self) -> tuple[Tower, ...]:
        return (*self.encoders, *(self.prefixes or ()))

    def name(self, label: str) -> str:
        """A readable name with a hash of the configuration without the paths of data, cache and weights."""
        counted = {name: value for name, value in placeless(self.to_json()).items() if name not in UNNAMED}
        counted["options"] = self.options.identity
        digest = hashlib.sha256(canonical_json(counted).encode()).hexdigest()[:8]
        return f"{folder_name(self.dataset)}-{label}-{digest}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` reads, without the fields that this kind of run lacks."""
        values = {name: value for name, value in asdict(self, dict_factory=_stated).items() if value is not None}
        for name in TOWERS:
            for tower, written in zip(getattr(self, name) or (), values.get(name, ()), strict=True):
                written["spec"] = tower.spec.stated
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunConfig:
        """Read a configuration, passing over other values; raises `ValueError` or `ConfigError`."""
        for name in TOWERS:
            for tower in values.get(name) or ():
                EncoderSpec.from_json(tower["spec"])  # refuses fields that another version added
        return convert({**values, "options": stated_options(values.get("options"))}, cls)
