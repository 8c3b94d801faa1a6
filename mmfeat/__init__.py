"""mmfeat: frozen encoders run once, fusion heads train in seconds on the cached embeddings.

The Python API is what the commands call: `read_samples`, `extract_features`, `train_heads`, `write_submission`;
`FusionClassifier` is a fusion head for arrays, as scikit-learn has them. Only what stands in `__all__` is public;
names are resolved on first use, so that importing mmfeat imports nothing heavy.
"""

import lazy_loader

# `__init__.pyi` lists the names and where they are; type checkers read it too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
