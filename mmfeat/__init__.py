"""mmfeat: frozen encoders run once, fusion heads train in seconds on the cached embeddings.

The Python API is what the commands call: `read_samples`, `extract_features`, `train_heads`, `write_submission`;
`FusionClassifier` is a fusion head for arrays, as scikit-learn has them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mmfeat.version import __version__

# Resolved on first use, so that importing mmfeat imports nothing heavy.
_EXPORTS = {
    "Audit": "mmfeat.audit.result",
    "Cache": "mmfeat.cache",
    "EncoderOptions": "mmfeat.encoders",
    "audit_data": "mmfeat.audit.run",
    "check_parity": "mmfeat.parity",
    "compare_runs": "mmfeat.comparison",
    "delete_garbage": "mmfeat.garbage",
    "delete_runs": "mmfeat.run_folders",
    "describe_encoders": "mmfeat.encoders",
    "export_run": "mmfeat.export.run",
    "explain_sample": "mmfeat.cache.explain",
    "FusionClassifier": "mmfeat.classifier",
    "FinetuneSettings": "mmfeat.finetune.settings",
    "ExtractSettings": "mmfeat.extractor",
    "HeadSettings": "mmfeat.heads",
    "MmfeatError": "mmfeat.errors",
    "Plan": "mmfeat.entries",
    "Protocol": "mmfeat.protocol",
    "extract_features": "mmfeat.extract",
    "forecast_extraction": "mmfeat.forecast",
    "find_garbage": "mmfeat.garbage",
    "finetune_heads": "mmfeat.finetune.run",
    "list_runs": "mmfeat.run_folders",
    "load": "mmfeat.model",
    "predict_data": "mmfeat.predict",
    "read_audit": "mmfeat.audit.result",
    "log_run": "mmfeat.mlflow_log",
    "read_pack": "mmfeat.cache.pack",
    "read_run": "mmfeat.runs",
    "read_samples": "mmfeat.samples",
    "write_comparison": "mmfeat.report.write",
    "write_report": "mmfeat.report.write",
    "reproduce_run": "mmfeat.reproduce",
    "write_submission": "mmfeat.submit",
    "survey": "mmfeat.cache.survey",
    "train_heads": "mmfeat.sweep",
    "verify_cache": "mmfeat.cache.verify",
    "write_demo": "mmfeat.demo",
    "write_pack": "mmfeat.cache.pack",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'mmfeat' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
