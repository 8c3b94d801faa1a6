"""The service of a run over HTTP: what it answers (`service`), and how requests reach it (`app`). Start with `service`.
Imports `mmfeat.prediction` and packages to its left.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"app": ["listen", "make_server"], "service": ["Limits", "Pair", "Service"]}
)
