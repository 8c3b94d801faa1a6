"""Plug-ins: encoders and fusions of other packages, by entry points (importlib.metadata). Metadata are read only where
a name is not known."""

from __future__ import annotations

import functools
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from mmfeat.errors import ConfigError

ENCODERS, FUSIONS = "mmfeat.encoders", "mmfeat.fusions"


def plugins(group: str) -> dict[str, EntryPoint]:
    """Name -> entry point of a group. Raises `ConfigError` where two packages declare one name."""
    return _plugins(group, tuple(sys.path))


@functools.cache
def _plugins(group: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=group):
        other = points.setdefault(point.name, point)
        if other.value != point.value:
            raise ConfigError(f"{point.name}: plug-in of {package(other)} and of {package(point)}; uninstall one")
    return points


def package(point: EntryPoint) -> str:
    """The name of the package that declares an entry point."""
    return point.dist.name if point.dist else point.module


def load_plugin(group: str, name: str) -> Any:
    """What a plug-in gives. Raises `ConfigError` in one line where it cannot be imported."""
    point = plugins(group)[name]
    try:
        return point.load()
    except Exception as error:  # an import runs code of others
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise ConfigError(
            f"{name}: the plug-in {point.value} of {package(point)} cannot be imported ({reason}); mend or uninstall it"
        ) from error


def wrong_kind(group: str, name: str, wanted: str) -> ConfigError:
    """The error for a plug-in that gives something else than `wanted`."""
    point = plugins(group)[name]
    return ConfigError(f"{name}: the plug-in {point.value} of {package(point)} is no {wanted}; mend or uninstall it")
