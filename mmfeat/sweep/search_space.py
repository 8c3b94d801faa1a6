"""The settings that a search may try: lists of values and ranges, as users write them and as Optuna knows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmfeat.errors import ConfigError
from mmfeat.heads.registry import Range, Space, Value

LOG_RATIO = 10  # a range at least this wide between positive ends is searched by orders of magnitude
WANTED = {int: "whole numbers, such as 8,16", float: "numbers, such as 1e-4,3e-4", bool: "true, false or both"}


class SearchSpace:
    """A checked space, in the order in which it was written. Raises `ConfigError` for one that cannot be searched."""

    def __init__(self, space: Space) -> None:
        self.parameters = {name: _checked(name, values) for name, values in space.items()}
        self._choices = {name: _choices(values) for name, values in self.parameters.items()}

    @property
    def size(self) -> int | None:
        """The number of combinations; None where a range makes them uncountable."""
        sizes = [None if choices is None else len(choices) for choices in self._choices.values()]
        return None if None in sizes else math.prod(size or 1 for size in sizes)

    def combination(self, index: int) -> dict[str, Value]:
        """The combination at `index`, modulo `size`, of the product of all lists; the last parameter varies fastest."""
        values = {}
        for name in reversed(self._choices):
            choices = self._choices[name] or ()
            index, position = divmod(index, len(choices))
            values[name] = choices[position]
        return {name: values[name] for name in self._choices}

    def nearest(self, wanted: Mapping[str, Value]) -> dict[str, Value]:
        """`wanted` within the space: a value outside becomes the end of a range or the first of a list.

        A parameter that is not in `wanted` takes the middle of its range or the first of its list.
        """
        return {name: _nearest(values, wanted.get(name)) for name, values in self.parameters.items()}

    def distributions(self) -> dict[str, Any]:
        """Name -> Optuna's distribution."""
        return {name: _distribution(values) for name, values in self.parameters.items()}

    def to_json(self) -> list[list[Any]]:
        """The space as a list of pairs, because the order counts."""
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
    raise ConfigError(f"{flag} {text!r}: write {WANTED.get(kind, 'names, such as one,two')}")


def _checked(name: str, values: Sequence[Value] | Range) -> tuple[Value, ...] | Range:
    """The values without repetition, if Optuna's file can hold them."""
    if isinstance(values, Range):
        return values
    finite = [isinstance(value, bool | int | str) or math.isfinite(value) for value in values]
    if isinstance(values, str) or not values or not all(finite):
        raise ConfigError(f"{name} {values!r}: nothing to search; list one or more finite numbers or names")
    return tuple(dict.fromkeys(values))


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
    kind: Any = IntDistribution if values.whole else FloatDistribution
    return kind(values.low, values.high, log=values.log)
