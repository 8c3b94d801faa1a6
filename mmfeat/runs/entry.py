"""The typed records of a run: its configuration, the entries of its leaderboard, and predictions out of fold.

An entry is one head on one set of modalities, or one ensemble, with its scores and the files that predict. It is one
object of `leaderboard.json` and of `leaderboard` in `run.json`; `metrics.json` holds an entry that is not ranked yet.
A field that a kind of entry or run lacks is None in Python and absent in the files.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mmfeat.cache.store import folder_name
from mmfeat.encoders.registry import Tower
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec, stated_options
from mmfeat.errors import RunError
from mmfeat.evaluation.decisions import Decision
from mmfeat.evaluation.metrics import Score
from mmfeat.evaluation.protocol import Protocol
from mmfeat.heads.registry import DEFAULTS, HeadSettings, PlanRecord
from mmfeat.samples.labels import SEPARATOR, Targets
from mmfeat.samples.table_columns import TableColumn
from mmfeat.system.files import canonical_json
from mmfeat.system.wording import head_label

T = TypeVar("T")
TOGETHER = "ensemble"  # the `modalities` of an entry that combines several heads
OUT_OF_FOLD = "out_of_fold.csv"
PLACES = ("data", "cache", "columns")  # the fields that may change while the run stays the same
TOWERS = ("encoders", "prefixes")
UNNAMED = ("trials", "products")  # a run may get more trials, and go on in another arithmetic
LATER = {"init": DEFAULTS.init, "race": False}  # settings that the first version lacked: runs are named as before
CERTAIN = 0.01  # largest distance from 1 of the sum of a sample's probabilities, which are written rounded


@dataclass(frozen=True)
class Interval:
    """A score with its 95 % interval."""

    value: float
    low: float
    high: float


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
    """The difference of macro-F1 between two entries on the same samples, with its 95 % interval and p-values.

    `p` comes from the paired bootstrap and `mcnemar` from McNemar's test; `p_holm` and `mcnemar_holm` are the same
    p-values adjusted for the number of comparisons: by Holm, and in `behind_best` by the largest difference of any two
    entries. `tie` is `p_holm >= 0.05`. `over` names the modalities of
    the other entry.
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


@dataclass(frozen=True)
class Scores:
    """Every score that `mmfeat.evaluation.metrics.evaluate` computes from choices and probabilities.

    `confusion` is a (C, C) table of counts with true labels in rows; a multi-label task has a (2, 2) table for each
    class, (C, 2, 2) in all.
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
        """Return a score that has an interval, by its name in the files."""
        scores: dict[str, Interval | Score] = vars(self)
        return scores[name]


@dataclass(frozen=True)
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
        """Return plain values that `from_json` reads, without the fields that this kind of entry lacks."""
        return dropped({"head": self.head, "modalities": self.modalities, **asdict(self)})

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Entry:
        """Read an entry; raises `ValueError` that names the field which is missing or wrong."""
        return convert(values, cls)


def entry_name(head: str, modalities: str) -> str:
    """The name of the folder of an entry in its run."""
    return f"{head}-{modalities}"


def _stated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The fields of a record without later ones that hold their default, as before they came."""
    return {name: value for name, value in pairs if name not in LATER or value != LATER[name]}


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
    for name in {"behind_best", "gain", "over_stage_1", "rule"} & kept.keys():
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

    @property
    def is_multilabel(self) -> bool:
        return self.task == "multilabel"

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The encoders and the prefixes."""
        return (*self.encoders, *(self.prefixes or ()))

    def name(self, label: str) -> str:
        """A readable name with a hash of the configuration, from which the paths of data, cache and weights are left
        out."""
        values = self.to_json()
        counted = {name: value for name, value in values.items() if name not in (*PLACES, *TOWERS, *UNNAMED)}
        counted |= {name: [tower["spec"] for tower in values[name]] for name in TOWERS if name in values}
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


@dataclass(frozen=True)
class OutOfFold:
    """Predictions out of fold of one entry, for N samples, C classes and S seeds.

    `chosen` is (S, N, C) bool, the classes that each seed chose; `probabilities` is (N, C), the mean over the seeds;
    near duplicates have the same number in `groups` (N,), which is None where there are none.
    """

    ids: tuple[str, ...]
    targets: Targets
    chosen: np.ndarray
    probabilities: np.ndarray
    groups: np.ndarray | None = None

    @property
    def voted(self) -> np.ndarray:
        """(N, C) bool: the class that most seeds chose, and of a tie the more probable one; where samples may have
        several classes, every class that at least half of the seeds chose."""
        votes = self.chosen.mean(0)
        if self.targets.multilabel:
            return votes >= 0.5
        best = (votes + 1e-6 * self.probabilities).argmax(1)
        return best[:, None] == np.arange(votes.shape[1])

    @property
    def right(self) -> np.ndarray:
        """(N,) bool: whether `voted` equals the label of a sample in every class."""
        return (self.voted == self.targets.matrix).all(1)


def read_out_of_fold(path: Path, samples: int, classes: tuple[str, ...], multilabel: bool) -> OutOfFold:
    """Read the predictions of an entry with so many samples; raises `RunError` where the file is missing or differs."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        if len(rows) != samples:
            raise ValueError(f"{len(rows)} of {samples} samples")
        return _parsed(header, rows, classes, multilabel)
    except (OSError, ValueError, KeyError, IndexError, csv.Error) as error:
        raise RunError(f"{path}: not the predictions of a whole run ({error}); train it again") from error


def _parsed(
    header: Sequence[str], rows: Sequence[Sequence[str]], classes: tuple[str, ...], multilabel: bool
) -> OutOfFold:
    seeds = sum(name.startswith("predicted_") for name in header[: len(header) - len(classes)])
    if list(header) != ["id", "label", *(f"predicted_{n + 1}" for n in range(seeds)), *(f"p_{c}" for c in classes)]:
        raise ValueError("its columns are others")
    labels, *chosen = (_label_matrix([row[column] for row in rows], classes) for column in range(1, 2 + seeds))
    probabilities = np.array([row[2 + seeds :] for row in rows], dtype=np.float64).reshape(len(rows), len(classes))
    if not np.isfinite(probabilities).all() or (not multilabel and (np.abs(probabilities.sum(1) - 1) > CERTAIN).any()):
        raise ValueError("its probabilities are none")
    targets = Targets(classes, labels, multilabel)
    return OutOfFold(tuple(row[0] for row in rows), targets, np.stack(chosen), probabilities)


def _label_matrix(cells: Sequence[str], classes: tuple[str, ...]) -> np.ndarray:
    """(N, C) bool: the classes in N cells; a class may hold the separator in its name where a sample has one class."""
    column = {name: index for index, name in enumerate(classes)}
    matrix = np.zeros((len(cells), len(classes)), dtype=bool)
    for row, cell in enumerate(cells):
        names = [cell] if cell in column else [name for name in cell.split(SEPARATOR) if name]
        matrix[row, [column[name] for name in names]] = True
    return matrix
