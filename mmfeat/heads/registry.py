"""The registry of heads: every name that `--fusion` and `--baselines` take, the settings that heads train
with, and the plan by which a sweep varies settings.

torch is imported only where a fusion is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from importlib import import_module
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, TypeAlias

from mmfeat.errors import ConfigError, HeadError
from mmfeat.system import plugins

if TYPE_CHECKING:
    from mmfeat.heads.stack import FusionType


NEEDS_TOKENS = "cross-attention"
LINEAR, ZERO_SHOT = "linear", "zero-shot"
ON_REQUEST = (
    LINEAR,
    ZERO_SHOT,
)  # heads that `all` leaves out: the names of older runs, and no encoder is loaded unasked
TWINS = {"film-concat": "film"}  # on a single modality, the first fusion equals the second
QUICK = ("ridge", "logistic")  # scored first, and on every modality alone, so that a person sees an answer in seconds
CLASS_WEIGHTS = ("none", "inverse", "sqrt", "effective")
LOSSES = ("cross-entropy", "focal")
MONITORS = ("loss", "macro-f1")
INITS = ("random", ZERO_SHOT)
METHODS = ("grid", "random", "optuna")  # of a search
# What a setting of a type takes, and in words.
KINDS: dict[str, tuple[type, str]] = {
    "float": (Real, "a number"),
    "int": (Integral, "a whole number"),
    "str": (str, "a text"),
}
# Settings that all heads of a stack share, because they shape its tensors; the others may differ from head to head.
SHARED = ("batch_size", "loss")


@dataclass(frozen=True)
class HeadSettings:
    """The settings in which heads may differ, and which a search may vary."""

    learning_rate: float = 1e-3
    attention_learning_rate: float = 1e-4  # learning rate of the attention layers of cross-attention
    weight_decay: float = 0.05
    dropout: float = 0.5
    modality_dropout: float = 0.0  # probability that a training sample loses one of its modalities
    label_smoothing: float = 0.0
    class_weights: str = "sqrt"
    loss: str = "cross-entropy"
    focal_gamma: float = 2.0
    batch_size: int = 128
    epochs: int = 12
    patience: int = 1  # validation loss falls and rises once; more patience gained only 0.0004 nats
    monitor: str = "loss"  # the score on validation rows that decides on early stopping and the learning rate
    min_delta: float = 0.001
    init: str = "random"  # first weights of a linear head: drawn, or the vectors of the class names

    def __post_init__(self) -> None:
        choices_of = {"class_weights": CLASS_WEIGHTS, "loss": LOSSES, "monitor": MONITORS, "init": INITS}
        for name, choices in choices_of.items():
            if str(getattr(self, name)) not in choices:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: use one of {', '.join(choices)}")
        for setting in fields(self):
            kind, words = KINDS[str(setting.type)]
            value = getattr(self, setting.name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ConfigError(f"{flag(setting.name)} {value!r}: {words}")
        for name in ("learning_rate", "attention_learning_rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: a number above 0")
        for name in ("weight_decay", "focal_gamma", "min_delta"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: a number not below 0")
        for name in ("dropout", "modality_dropout", "label_smoothing"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: a share from 0 to below 1")
        for name, least in (("batch_size", 2), ("epochs", 1), ("patience", 1)):  # batch normalisation needs two
            if getattr(self, name) < least:
                raise ConfigError(f"{flag(name)} {getattr(self, name)}: at least {least}")


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; whole numbers if both ends are of type int."""

    low: int | float
    high: int | float
    log: bool = False

    def __post_init__(self) -> None:
        if not -math.inf < self.low < self.high < math.inf or (self.log and self.low <= 0):
            raise ConfigError(f"range {self}: the ends must rise, and be above 0 where the scale is logarithmic")

    def __str__(self) -> str:
        return f"{self.low}..{self.high}"

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def middle(self) -> float:
        return math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2

    def nearest(self, value: float) -> float:
        """The number of the range that is nearest to `value`, of the range's type."""
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.whole else float(inside)


Value: TypeAlias = "bool | int | float | str"
Space: TypeAlias = "Mapping[str, Sequence[Value] | Range]"


@dataclass(frozen=True)
class PlanRecord:
    """The plan of a sweep as a run records it: the settings of the heads, and the `space` of those that vary.

    `method` is that of the search. The limits of a search are always None: a search can be prolonged and stays the same
    run. `refit`: the final heads are trained on all labelled samples; else the heads of the folds predict together.
    `race`: heads get one seed, and further seeds only where they may be the best.
    """

    settings: HeadSettings
    space: Space = field(default_factory=dict)
    method: str = "grid"
    trials: None = None
    time_limit: None = None
    adjustment: float | None = None
    refit: bool = True
    race: bool = False


@dataclass(frozen=True)
class Plan(PlanRecord):
    """The plan of a sweep with the limits of its search: a number of trials, and seconds."""

    trials: int | None = None  # type: ignore[assignment]
    time_limit: float | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"--search {self.method}: use one of {', '.join(METHODS)}")
        if self.trials is not None and self.trials < 1:
            raise ConfigError(f"--trials {self.trials}: nothing to search; use at least 1")
        for name, values in self.space.items():
            if isinstance(values, Range) and self.method == "grid":
                raise ConfigError(f"{flag(name)}: a grid has no ranges; list values, or use --search random or optuna")
            if isinstance(values, Range) and not values.whole and self.trials is None and self.time_limit is None:
                raise ConfigError(
                    f"{flag(name)}: a range has no end of settings to try; say how many with --trials, or for how "
                    "long with --time-limit"
                )

    @property
    def recorded(self) -> dict[str, Any]:
        """The fields of a `RunConfig` about the plan."""
        return {"plan": PlanRecord(**{**vars(self), "trials": None, "time_limit": None}), "trials": self.trials}


DEFAULTS = HeadSettings()
SETTING_TYPES: dict[str, type] = {field.name: type(getattr(DEFAULTS, field.name)) for field in fields(HeadSettings)}


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return f"--{name.replace('_', '-')}"


def settings_of(values: dict[str, Any]) -> HeadSettings:
    """Settings with `values` in place of the defaults; JSON and searches may hold whole numbers as floats."""
    return HeadSettings(**{name: SETTING_TYPES[name](value) for name, value in values.items()})


FUSIONS = {  # the classes of `mmfeat.heads.fusions`
    "late": "Late",
    "concat": "Concat",
    "gated": "Gated",
    "film": "Film",
    "film-concat": "FilmConcat",
    NEEDS_TOKENS: "CrossAttention",
    LINEAR: "LinearFusion",
}
# `mmfeat.baselines.fit` has the functions and needs NumPy; these names are also for `mmfeat --help`, which does not.
BASELINES = ("prior", "knn", "ridge", "logistic", "svm", "kernel", "forest", "boosting", ZERO_SHOT)


def is_fusion(name: str) -> bool:
    """Whether a head is a fusion, of mmfeat or of a plug-in."""
    return name in FUSIONS or (name not in BASELINES and name in plugins.plugins(plugins.FUSIONS))


def load_fusion(name: str) -> FusionType:
    """The class of a fusion, for which torch is imported. Raises `HeadError` for one that is not here."""
    fusion: FusionType
    if name in FUSIONS:
        fusion = getattr(import_module("mmfeat.heads.fusions"), FUSIONS[name])
        return fusion
    if not is_fusion(name):
        raise HeadError(f"no fusion {name!r} here; install the plug-in that has it")
    fusion = plugins.load_plugin(plugins.FUSIONS, name)
    from mmfeat.heads.layers import Fusion

    if not (isinstance(fusion, type) and issubclass(fusion, Fusion)):
        raise plugins.wrong_kind(plugins.FUSIONS, name, "subclass of mmfeat.heads.Fusion")
    return fusion
