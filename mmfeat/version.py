"""The version of mmfeat and the versions of the packages that its results depend on."""

from __future__ import annotations

import platform
from collections.abc import Sequence

__version__ = "0.1.0"

ENCODING = ("torch", "torchvision", "open_clip_torch", "transformers", "timm", "scikit-learn", "scikit-image", "pillow")
TRAINING = ("numpy", "scipy", "h5py", "safetensors", "optuna", "peft", "ray")


def versions(packages: Sequence[str] = ENCODING) -> dict[str, str]:
    """Return the versions of mmfeat, of Python and of those `packages` that are installed, by name."""
    from importlib.metadata import PackageNotFoundError, version

    installed = {"mmfeat": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
