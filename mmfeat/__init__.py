"""mmfeat: frozen encoders run once, fusion heads train in seconds on the cached embeddings.

The commands call the functions of this Python API: `read_samples`, `extract_features`, `train_heads`,
`write_submission`; `FusionClassifier` is a fusion head with scikit-learn's interface. Only names in `__all__` are
public. They are resolved on first use, so that importing mmfeat imports nothing heavy.
"""

import lazy_loader

# `__init__.pyi` lists the names and where they are; type checkers read it too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
