"""mmfeat: frozen encoders run once, fusion heads train in seconds on the cached embeddings.

The Python API is what the commands call: `read_samples`, `extract_features`, `train_heads`, `write_submission`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmfeat.version import __version__

# Resolved on first use, so that importing mmfeat imports nothing heavy.
_EXPORTS = {
    "Cache": "mmfeat.cache",
    "EncoderOptions": "mmfeat.encoders",
    "HeadSettings": "mmfeat.heads",
    "MmfeatError": "mmfeat.errors",
    "extract_features": "mmfeat.extract",
    "read_run": "mmfeat.runs",
    "read_samples": "mmfeat.samples",
    "write_submission": "mmfeat.submit",
    "train_heads": "mmfeat.sweep",
    "write_demo": "mmfeat.demo",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mmfeat' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
