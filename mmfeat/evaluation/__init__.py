"""Evaluation: splits without leaks, scores with intervals, paired tests, calibrated decisions, and blends of several
heads. Start with `metrics`. The package sees only labels and logits; imports `mmfeat.samples`.
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
