"""The audit: duplicates, conflicting labels, leaks between splits, odd files and likely label errors of a data set.
Start with `audit`. Imports `mmfeat.prediction` and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "audit": ["audit_data"],
        "result": ["Audit", "read_audit"],
    },
)
