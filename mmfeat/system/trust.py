"""What a process lets others do: checkpoints run their own code with the user's consent only, and libraries tell their
makers nothing.

The consent belongs to the process. It is in no request, run or cache, so nobody else's file can give it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

# Read by a library as it is imported: ONNX Runtime writes a device id and counts sessions, hubs hear of versions and
# are asked to convert weights, Ray and MLflow count their users. The last one is for any other library.
SILENT = {
    "ORT_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "1",
}

_trusted = False


def is_trusted() -> bool:
    """Whether the user lets checkpoints run their own code."""
    return _trusted


def trust(value: bool) -> None:
    """Let checkpoints run their own code in this process from now on, or not."""
    global _trusted
    _trusted = value


@contextlib.contextmanager
def trust_remote_code() -> Iterator[None]:
    """Let checkpoints run their own code inside the context, as `--trust-remote-code` does. Read that code before."""
    before = _trusted
    trust(True)
    try:
        yield
    finally:
        trust(before)


def keep_private() -> None:
    """Turn telemetry off in the libraries that this process and those it starts import from now on.

    A variable of the environment that is set stays as the user has set it.
    """
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
