"""The export: a run's heads, and where possible its encoders, as ONNX graphs with a model card. Start with `export`.
Imports `mmfeat.report` and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "export": ["export_run"],
    },
)
