"""CPU-only torch beside a registry's torchvision wheel: let `import torchvision` succeed.

The wheel's compiled operators are built for another torch and do not load, so torchvision stops at
`operator torchvision::nms does not exist`, and with it transformers, timm and open_clip. Nothing
here calls those operators: declaring their schemas is enough. A pair that does match is imported
as it is.
"""

from __future__ import annotations

import sys
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []  # a torch Library undoes its declarations when it is collected


def import_torchvision() -> None:
    """Import torchvision; call it before anything that imports torchvision itself."""
    if "torchvision" in sys.modules:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        _forget_torchvision()
        _declare_operators()
        import torchvision  # noqa: F401


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _declared.append(library)
