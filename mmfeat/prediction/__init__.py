"""Prediction: labels and probabilities of new samples by a run, in memory (`model`), for files and tables (`predict`),
and as the submission (`submit`). Start with `submit`. The package imports `mmfeat.finetune` and packages to the left of
`mmfeat.finetune`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "model": ["load"],
        "predict": ["predict_data"],
        "submit": ["write_submission"],
    },
)
