"""Baselines: simple models on cached vectors (linear, neighbours, trees), each of which chooses its own setting on
validation rows. Start with `fit`. Imports `mmfeat.evaluation` and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "fit": ["Baseline"],
    },
)
