"""Small second stages: few epochs at a rate that shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmfeat.finetune import inputs, model, towers
from mmfeat.finetune.finetune import Finetuned, finetune_heads
from mmfeat.finetune.settings import FinetuneSettings

QUICK = FinetuneSettings(epochs=2, lr_encoder=1e-3)
ONCE = FinetuneSettings(epochs=1, lr_encoder=1e-3)


def tune(place: Path, out: str = "tuned", settings: FinetuneSettings = QUICK, **changes: Any) -> Finetuned:
    """Stage 2 of the run under `place`/heads."""
    return finetune_heads(heads=place / "heads", out=place / out, settings=settings, **{"seeds": 1, **changes})


def show_few_pixels(patch: pytest.MonkeyPatch) -> None:
    """Have early fusion see 32 x 32 pixels; all that it does is the same on more."""
    for module in (inputs, model, towers):
        patch.setattr(module, "SIDE", 32)


def weights(run: Any) -> dict[str, bytes]:
    """What a run predicts with, file by file."""
    return {str(path.relative_to(run.folder)): path.read_bytes() for path in run.folder.rglob("*.safetensors")}
