"""Prediction: labels and probabilities of new samples by a run, in memory (`model`), for files and tables (`predict`),
and as the submission (`submit`), with tests for drift (`drift`). Start with `submit`. Imports `mmfeat.finetune` and
packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "model": ["load"],
        "nearest": ["neighbours"],
        "predict": ["predict_data"],
        "submit": ["write_submission"],
    },
)
