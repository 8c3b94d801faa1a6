"""Configuration files: TOML that holds any flags of any command."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmfeat.errors import ConfigError


def read_config(path: Path, flags: Mapping[str, Mapping[str, str]]) -> dict[str, dict[str, Any]]:
    """Values of `path` by command and parameter name.

    `flags` maps each command's flags, without dashes, to parameter names. A top-level key counts for every
    command that has the flag, a table for the command of its name. Raises `ConfigError` for anything else.
    """
    values = _dashed(_read_toml(path))
    broken = [name for name in flags if not isinstance(values.get(name, {}), dict)]
    broken += ["out"] * ("out" in values)
    if broken:
        raise ConfigError(f"{path}: {', '.join(broken)} means something else for each command; write a table, [heads]")
    common = {key: value for key, value in values.items() if key not in flags}
    if tables := [key for key, value in common.items() if isinstance(value, dict)]:
        known_tables = ", ".join(f"[{name}]" for name in flags)
        raise ConfigError(f"{path}: no command {', '.join(tables)}; tables are {known_tables}")
    known = {flag for names in flags.values() for flag in names}
    unknown = [key for key in common if key not in known]
    unknown += [f"{name}.{key}" for name in flags for key in values.get(name, {}) if key not in flags[name]]
    if unknown:
        raise ConfigError(f'{path}: no flag {", ".join(unknown)}; keys are flag names, as in encoders = "clip,bert"')
    return {name: _of_command({**common, **values.get(name, {})}, names) for name, names in flags.items()}


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; --config names a TOML file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable TOML file ({error})") from error


def _dashed(values: Mapping[str, Any]) -> dict[str, Any]:
    """`batch_size` is taken for the flag `batch-size`, in tables too."""
    plain = {key.replace("_", "-"): value for key, value in values.items()}
    return {key: _dashed(value) if isinstance(value, dict) else value for key, value in plain.items()}


def _of_command(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Parameter name -> value; a list becomes what the flag takes, a comma-separated text."""
    return {
        names[flag]: ",".join(map(str, value)) if isinstance(value, list) else value
        for flag, value in values.items()
        if flag in names
    }
