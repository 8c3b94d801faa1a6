"""The settings that a search may try: lists of values and ranges, as they are written and as Optuna knows them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from mmfeat.errors import ConfigError

LOG_RATIO = 10  # a range at least this wide between positive ends is searched by orders of magnitude

Value: TypeAlias = "bool | int | float | str"


@dataclass(frozen=True)
class Range:
    """All numbers from `low` to `high`, both included; whole numbers if both ends are of type int."""

    low: float
    high: float
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
        """The value of the range that is nearest to `value`, of the range's type."""
        inside = min(max(value, self.low), self.high)
        return round(inside) if self.whole else float(inside)


Space: TypeAlias = "Mapping[str, Sequence[Value] | Range]"


class SearchSpace:
    """A checked space, in the order in which it was written. Raises `ConfigError` for one that cannot be searched."""

    def __init__(self, space: Space) -> None:
        self.parameters = {name: _checked(name, values) for name, values in space.items()}
        self.choices = {name: _choices(values) for name, values in self.parameters.items()}

    @property
    def size(self) -> int | None:
        """How many combinations there are; None where a range makes them uncountable."""
        sizes = [None if choices is None else len(choices) for choices in self.choices.values()]
        return None if None in sizes else math.prod(size or 1 for size in sizes)

    @property
    def ranges(self) -> list[str]:
        """Names of the parameters that have a range and no list."""
        return [name for name, values in self.parameters.items() if isinstance(values, Range)]

    def products(self) -> Iterator[dict[str, Value]]:
        """All combinations of lists in the listed order, the last parameter fastest."""
        lists = (choices or () for choices in self.choices.values())
        return (dict(zip(self.choices, values, strict=True)) for values in itertools.product(*lists))

    def combination(self, index: int) -> dict[str, Value]:
        """The combination at `index` of `products`, found without counting up to it."""
        found = {}
        for name in reversed(self.choices):
            choices = self.choices[name] or ()
            index, place = divmod(index, len(choices))
            found[name] = choices[place]
        return {name: found[name] for name in self.choices}

    def nearest(self, wanted: Mapping[str, Value]) -> dict[str, Value]:
        """`wanted` within the space: what lies outside becomes the end of a range or the first of a list.

        A parameter that is not in `wanted` takes the middle of its range or the first of its list.
        """
        return {name: _nearest(values, wanted.get(name)) for name, values in self.parameters.items()}

    def distributions(self) -> dict[str, Any]:
        """The space in Optuna's words."""
        return {name: _distribution(values) for name, values in self.parameters.items()}

    def described(self) -> list[list[Any]]:
        """The space for JSON; a list of pairs, because the order counts."""
        parameters = self.parameters.items()
        return [[name, vars(values) if isinstance(values, Range) else list(values)] for name, values in parameters]


def parse_values(text: str, kind: type, flag: str) -> tuple[Value, ...] | Range:
    """`1e-4,3e-4` and `0.3` as values of `kind` (int, float, str or bool), `1e-5..1e-3` as a range.

    A range is logarithmic where its ends are above 0 and a factor of 10 or more apart. Raises `ConfigError`.
    """
    if ".." not in text:
        return tuple(dict.fromkeys(_parse(piece.strip(), kind, flag) for piece in text.split(",")))
    if kind not in (int, float):
        raise ConfigError(f"{flag} {text}: only numbers have ranges; list the values: one,two")
    if "," in text:
        raise ConfigError(f"{flag} {text}: write either values (1,2,3) or one range (1..3)")
    low, high = (_parse(piece.strip(), kind, flag) for piece in text.split("..", 1))
    if low > high:
        raise ConfigError(f"{flag} {text}: the range falls; write {high}..{low}")
    return Range(low, high, low > 0 and high / low >= LOG_RATIO) if low < high else (low,)


def _parse(text: str, kind: type, flag: str) -> Any:
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if text and (not isinstance(value, float) or math.isfinite(value)):
            return value
    except (KeyError, ValueError):
        pass
    wanted = {int: "whole numbers, such as 8,16", float: "numbers, such as 1e-4,3e-4", bool: "true, false or both"}
    raise ConfigError(f"{flag} {text!r}: write {wanted.get(kind, 'names, such as one,two')}")


def _checked(name: str, values: Sequence[Value] | Range) -> tuple[Value, ...] | Range:
    """The values without repetition, if Optuna's file can hold them."""
    if isinstance(values, Range):
        return values
    if isinstance(values, str) or not values or not all(_can_be_kept(value) for value in values):
        raise ConfigError(f"{name} {values!r}: nothing to search; list one or more finite numbers or names")
    return tuple(dict.fromkeys(values))


def _can_be_kept(value: Any) -> bool:
    return isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))


def _choices(values: tuple[Value, ...] | Range) -> Sequence[Value] | None:
    if not isinstance(values, Range):
        return values
    return range(int(values.low), int(values.high) + 1) if values.whole else None


def _nearest(values: tuple[Value, ...] | Range, wanted: Value | None) -> Value:
    if isinstance(values, Range):
        return values.nearest(values.middle if wanted is None or isinstance(wanted, str) else wanted)
    return values[values.index(wanted)] if wanted is not None and wanted in values else values[0]


def _distribution(values: tuple[Value, ...] | Range) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(values, Range):
        return CategoricalDistribution(values)
    if values.whole:
        return IntDistribution(int(values.low), int(values.high), log=values.log)
    return FloatDistribution(values.low, values.high, log=values.log)
