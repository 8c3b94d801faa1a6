"""Privacy: what other libraries would tell their makers stays here."""

from __future__ import annotations

import os

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


def keep_private() -> None:
    """Turn telemetry off in the libraries that this process and those it starts import from now on.

    A variable of the environment that is set stays as the user has set it.
    """
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
