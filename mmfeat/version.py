"""The version of mmfeat and the versions of the packages that its results depend on."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from pathlib import Path

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


def install_command(extra: str) -> str:
    """Return the command that adds the optional group `extra` to this installation, with the installer that made it.

    A checkout is installed again with the group. Elsewhere the command names the packages of the group: the wheel may
    be gone, and on an index another package may have the name.
    """
    from importlib.metadata import distributions

    installed, checkout = next(iter(distributions(name="mmfeat")), None), Path(__file__).parents[1]
    by_uv = installed is not None and (installed.read_text("INSTALLER") or "").strip() == "uv"
    command = ["uv"] * by_uv + ["pip", "install"]
    if installed is None or (checkout / "pyproject.toml").exists():
        return shlex.join([*command, "-e", f"{'.' if checkout == Path.cwd() else checkout}[{extra}]"])
    lines = (line.replace("'", '"').partition(";") for line in installed.requires or ())
    return shlex.join([*command, *(name.strip() for name, _, marker in lines if f'extra == "{extra}"' in marker)])
