"""Where work runs: in this process, or on a Ray cluster that is joined or started."""

from __future__ import annotations

import logging
from typing import Any

from mmfeat.errors import ConfigError

ENGINES = ("local", "ray")


def check_engine(name: str) -> None:
    """Raises `ConfigError` for an engine that there is not."""
    if name not in ENGINES:
        raise ConfigError(f"--engine {name}: use one of {', '.join(ENGINES)}")


def join_cluster(address: str | None) -> tuple[Any, bool]:
    """Ray, and whether this call joined or started a cluster; then the caller leaves it again."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--engine ray needs Ray; install it with pip install 'mmfeat[ray]'") from error
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address=address, log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    except (ValueError, ConnectionError) as error:
        raise ConfigError(
            f"--ray-address {address}: no cluster there ({error}); give HOST:PORT, or leave it out"
        ) from error
    return ray, True
