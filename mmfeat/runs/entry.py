"""The typed records of a run: what it was asked for, and the entries of its leaderboard.

An entry is one head on one set of modalities, or one ensemble, with its scores and what predicts.

An entry is one object of `leaderboard.json` and of the `leaderboard` in `run.json`; `metrics.json` holds one that is
not ranked yet. Fields that a kind of entry lacks are None here and absent there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from mmfeat.cache.store import folder_name
from mmfeat.encoders.registry import Tower
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.evaluation.decisions import Decision
from mmfeat.evaluation.metrics import Score
from mmfeat.evaluation.protocol import Protocol
from mmfeat.heads.registry import HeadSettings
from mmfeat.system.files import canonical_json
from mmfeat.system.wording import head_label

T = TypeVar("T")
TOGETHER = "ensemble"  # stands where an entry of several heads names its modalities


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SeedScores:
    """A score of each seed alone, with mean and standard deviation over the seeds."""

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
    """A difference of macro-F1 between two entries on the same samples, with its 95 % interval and p-values.

    `p` is that of the paired bootstrap, `mcnemar` that of McNemar's test; `..._holm` are adjusted for the number of
    comparisons. `tie` says that `p_holm` is not below 0.05, `over` names the modalities of the entry compared with.
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
    """A fine-tuned encoder beside a final head: its file of changed weights, and the block whose place it takes."""

    file: str
    sha256: str
    slot: str
    spec: EncoderSpec


@dataclass(frozen=True)
class FinalHead:
    """A head that predicts: its file, what rebuilds it beside the tensors, and the towers that were tuned with it."""

    file: str
    sha256: str
    config: dict[str, Any] = field(default_factory=dict)
    towers: tuple[TunedTower, ...] = ()


@dataclass(frozen=True)
class Rule:
    """How an ensemble combines its members: `weights` (H,), or the matrix, intercept and penalty of `stacking`."""

    weights: tuple[float, ...] | None = None
    stacking: tuple[tuple[float, ...], ...] | None = None
    intercept: tuple[float, ...] | None = None
    penalty: float | None = None


@dataclass(frozen=True)
class Scores:
    """Every score of some choices and probabilities (`mmfeat.evaluation.metrics.evaluate`).

    `confusion` holds (C, C) counts, labels in rows, or (C, 2, 2) where multi-label.
    """

    macro_f1: Interval
    accuracy: Interval
    weighted_f1: Interval
    auroc: Score
    log_loss: Interval
    calibration_error: Interval
    seeds: dict[str, SeedScores]
    classes: dict[str, ClassScores]
    confusion: list[Any]
    samples: int

    def score(self, name: str) -> Interval | Score:
        """One of the scores with an interval, by its name in the files."""
        scores: dict[str, Interval | Score] = vars(self)
        return scores[name]


@dataclass(frozen=True)
class Entry(Scores):
    """One line of a leaderboard."""

    head: str
    modalities: str
    decision: Decision
    seconds: float = 0.0
    # a trained head
    trials: int | None = None
    settings: HeadSettings | None = None
    optimism: float | None = None
    search_over: bool | None = None
    parameters: int | None = None
    final: tuple[FinalHead, ...] = ()
    # an ensemble
    members: tuple[str, ...] = ()
    rule: Rule | None = None
    # a second stage
    fusion: str | None = None
    views: int | None = None
    alpha: float | None = None
    alphas: tuple[float, ...] | None = None
    scores: dict[str, float] | None = None
    over_stage_1: PairedTest | None = None
    # its place among the others
    behind_best: PairedTest | None = None
    tie: bool | None = None
    gain: PairedTest | None = None

    @property
    def name(self) -> str:
        """The name of the entry's folder in the run, as in `concat-both`."""
        return entry_name(self.head, self.modalities)

    @property
    def label(self) -> str:
        """The name for people, as in `concat on both`."""
        return head_label(self.head, self.modalities)

    @property
    def fused_by(self) -> str:
        """The fusion or baseline whose weights the final heads hold; a second stage is named otherwise."""
        return self.fusion or self.head

    @property
    def is_ensemble(self) -> bool:
        return self.modalities == TOGETHER

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads, without the fields that this kind of entry lacks."""
        return dropped({"head": self.head, "modalities": self.modalities, **asdict(self)})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Entry:
        """The entry in `values`; raises `ValueError` that names the field which is missing or wrong."""
        return convert(values, cls)


def entry_name(head: str, modalities: str) -> str:
    """The folder of a head's entry in its run."""
    return f"{head}-{modalities}"


def convert(values: Any, kind: type[T]) -> T:
    """Plain values as the dataclass `kind`, with every field checked (msgspec); raises `ValueError`."""
    import msgspec

    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None


def dropped(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` without those that are None or empty tuples, also in inner mappings whose field is optional."""
    optional = ("behind_best", "gain", "over_stage_1", "rule")
    kept = {name: value for name, value in values.items() if value is not None and value != ()}
    for name in optional:
        if name in kept:
            kept[name] = {key: value for key, value in kept[name].items() if value is not None}
    if "final" in kept:
        kept["final"] = [{key: value for key, value in final.items() if value != ()} for final in kept["final"]]
    return kept


PLACES = ("data", "cache", "columns")  # where a run found its data; they may move, and the run stays the same
TOWERS = ("encoders", "prefixes")


@dataclass(frozen=True)
class RunConfig:
    """What a run was asked for, and the hashes of the data and folds that it was asked about.

    `plan`, `pairs`, `ensembles` and `trials` belong to a sweep of heads; `parent`, `fusion`, `stage_1`, `views`,
    `finetune` and `prefixes` to a second stage. A field of the other kind is None here and absent in `run.json`.
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
    plan: dict[str, Any] | None = None
    trials: int | None = None
    prefixes: tuple[Tower, ...] | None = None
    parent: str | None = None
    fusion: str | None = None
    stage_1: dict[str, Any] | None = None
    views: int | None = None
    finetune: dict[str, Any] | None = None

    @property
    def is_multilabel(self) -> bool:
        return self.task == "multilabel"

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The encoders and the prefixes."""
        return (*self.encoders, *(self.prefixes or ()))

    def name(self, label: str) -> str:
        """A readable name that differs for every configuration; where data and weights lie does not count."""
        values = self.to_json()
        counted = {name: value for name, value in values.items() if name not in (*PLACES, *TOWERS, "trials")}
        counted |= {name: [tower["spec"] for tower in values[name]] for name in TOWERS if name in values}
        digest = hashlib.sha256(canonical_json(counted).encode()).hexdigest()[:8]
        return f"{folder_name(self.dataset)}-{label}-{digest}"

    def to_json(self) -> dict[str, Any]:
        """Plain values that `from_json` reads, without the fields that this kind of run lacks."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration in `values`, where others may stand too; raises `ValueError` or `ConfigError`."""
        for name in TOWERS:
            for tower in values.get(name) or ():
                EncoderSpec.from_json(tower["spec"])  # refuses what another version may have added
        return convert(values, cls)
