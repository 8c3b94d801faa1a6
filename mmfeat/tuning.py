"""Tuning: how the settings of heads are found."""

from __future__ import annotations

from dataclasses import dataclass, field

from mmfeat.errors import ConfigError
from mmfeat.heads.settings import HeadSettings, flag
from mmfeat.search_space import Range, Space


@dataclass(frozen=True)
class Plan:
    """How settings are found: `space` of those that vary, by which method, for how long. `refit`: the final heads are
    trained on all labelled samples; otherwise those of the folds predict together."""

    settings: HeadSettings
    space: Space = field(default_factory=dict)
    method: str = "grid"
    trials: int | None = None
    time_limit: float | None = None
    adjustment: float | None = None
    refit: bool = True

    def __post_init__(self) -> None:
        for name, values in self.space.items():
            if isinstance(values, Range) and self.method == "grid":
                raise ConfigError(f"{flag(name)}: a grid has no ranges; list values, or use --search random or optuna")
            if isinstance(values, Range) and not values.whole and self.trials is None and self.time_limit is None:
                raise ConfigError(
                    f"{flag(name)}: a range has no end of settings to try; say how many with --trials, or for how "
                    "long with --time-limit"
                )
