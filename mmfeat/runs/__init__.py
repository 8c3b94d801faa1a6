"""Runs: a folder with everything that one training knew and made. Start with `run`; `leaderboard` and `compare` rank,
`folders` lists and deletes, `garbage` finds what no run needs. Imports `mmfeat.heads` and what is left of it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "run": ["Run", "read_run"],
        "folders": ["list_runs", "delete_runs"],
        "compare": ["compare_runs"],
        "garbage": ["find_garbage", "delete_garbage"],
        "mlflow_log": ["log_run"],
    },
)
