"""Prediction: what a run says of new samples, in memory (`model`), for files and tables (`predict`), and as the
submission (`submit`). Start with `submit`. Imports `mmfeat.finetune` and what is left of it.
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
