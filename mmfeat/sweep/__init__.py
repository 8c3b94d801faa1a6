"""The sweep: heads x modalities x folds x seeds -> a run with its leaderboard. Start with `entries`, which trains one
head, then `train`. Imports `mmfeat.runs` and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "train": ["train_heads"],
        "forecast": ["forecast_heads"],
        "search": ["Plan"],
        "search_space": ["Range"],
    },
)
