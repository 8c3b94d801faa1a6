"""Fine-tuning: stage 2 trains the last layers of encoders together with a head, from cached prefixes where that gives
the same result. Start with `finetune`, then `prepare`, `cells` and `training`. Imports `mmfeat.sweep` and packages to
its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "finetune": ["finetune_heads"],
        "settings": ["FinetuneSettings"],
    },
)
