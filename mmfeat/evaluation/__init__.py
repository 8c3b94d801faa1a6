"""Evaluation: splits without leaks, scores with intervals, paired tests, calibrated decisions, and blends of several
heads. Start with `metrics`. Metrics, tests and decisions see only labels and logits; `protocol` also reads samples, to
keep duplicates on one side of a split. Imports `mmfeat.samples` and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "metrics": ["evaluate"],
        "protocol": ["Protocol"],
        "decisions": ["Decision"],
        "splits": ["Splits", "make_folds", "make_holdout"],
    },
)
