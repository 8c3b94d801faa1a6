"""Import of torchvision beside a torch that its wheel was not built for, as a CPU-only torch is.

The compiled operators of the wheel do not load there, so `import torchvision` stops at `operator torchvision::nms does
not exist`, and with it transformers, timm and open_clip. mmfeat calls none of these operators, so it is enough to
declare their schemas. A matching pair is imported unchanged.
"""

from __future__ import annotations

import sys
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[Any] = []  # a torch Library undoes its declarations when it is garbage-collected


def import_torchvision() -> None:
    """Import torchvision; to be called before any library that imports torchvision itself."""
    if "torchvision" in sys.modules:
        return
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        _declare_operators()
        import torchvision  # noqa: F401


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(name + _SCHEMA)
    _declared.append(library)
