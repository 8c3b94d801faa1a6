"""The one place where the version stands."""

from __future__ import annotations

import platform
from collections.abc import Sequence

__version__ = "0.1.0"

ENCODING = ("torch", "torchvision", "open_clip_torch", "transformers", "timm", "scikit-learn", "scikit-image", "pillow")
TRAINING = ("numpy", "scipy", "h5py", "safetensors", "optuna", "peft", "ray")


def versions(packages: Sequence[str] = ENCODING) -> dict[str, str]:
    """Name -> version: mmfeat, Python, and those of the packages that are installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"mmfeat": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
