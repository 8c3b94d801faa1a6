"""Heads: small networks from cached vectors to logits, trained in stacks of many heads. Start with `fusions`, then
`stack`. `registry` names all heads without importing torch. Imports `mmfeat.baselines` and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "registry": ["BASELINES", "FUSIONS", "HeadSettings", "load_fusion"],
        "classifier": ["FusionClassifier"],
        "layers": ["Fusion", "Linear", "Shape"],
    },
)
