"""Runs: folders with the configuration and the results of one training each.

Start with `run`; `entry` has the records in its files, `compare` tests runs against each other, `folders` lists and
deletes runs, and `garbage` finds cached vectors that no run needs. Imports `mmfeat.heads` and packages to its left.
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
