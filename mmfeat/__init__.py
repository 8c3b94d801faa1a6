"""mmfeat: frozen encoders run once, fusion heads train in seconds on the cached embeddings.

The commands call the functions of this Python API: `read_samples`, `extract_features`, `train_heads`,
`write_submission`; `FusionClassifier` is a fusion head with scikit-learn's interface. Only names in `__all__` are
public. They are resolved on first use, so that importing mmfeat imports nothing heavy.
"""

import os
import sys

import lazy_loader

# `__init__.pyi` lists the names and where they are; type checkers read it too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _one_thread() -> None:
    """Let a forked process compute in one thread: it has none of its parent's, and OpenMP would wait for them."""
    if set_num_threads := getattr(sys.modules.get("torch"), "set_num_threads", None):
        set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_one_thread)
