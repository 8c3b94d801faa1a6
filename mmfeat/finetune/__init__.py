"""Fine-tuning: stage 2 trains the last layers of encoders together with a head, from cached prefixes where that gives
the same result. Start with `finetune`, then `prepare`, `cells` and `training`. The package imports `mmfeat.sweep` and
packages to the left of it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "finetune": ["finetune_heads"],
        "settings": ["FinetuneSettings"],
    },
)
