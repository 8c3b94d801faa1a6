"""CPU-only torch beside a torchvision built for another torch, in fresh processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def run(code: str, path: Path | None = None) -> str:
    environment = {**os.environ, **({"PYTHONPATH": str(path)} if path else {})}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.strip()


@pytest.fixture
def broken_torchvision(tmp_path: Path) -> Path:
    """The installed torchvision without its compiled operators: what a wheel for another torch amounts to."""
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    folder = tmp_path / "torchvision"
    folder.mkdir()
    for entry in Path(spec.origin).parent.iterdir():
        if entry.suffix not in (".so", ".pyd", ".dylib"):
            (folder / entry.name).symlink_to(entry)
    return tmp_path


def test_a_torchvision_that_does_not_match_is_made_to_import(broken_torchvision: Path) -> None:
    code = (
        "import sys\n"
        "try: import torchvision\n"
        "except RuntimeError as error: assert 'torchvision::nms does not exist' in str(error)\n"
        "else: raise AssertionError('torchvision is not broken')\n"
        "for name in [name for name in sys.modules if name.startswith('torchvision')]: del sys.modules[name]\n"
        "from mmfeat.encoders.torchvision_ops import import_torchvision, _declared\n"
        "import_torchvision()\n"
        "import torch, torchvision, timm, open_clip, transformers\n"
        "from transformers import AutoModel\n"
        f"assert torchvision.__file__.startswith({str(broken_torchvision)!r})\n"
        "print(len(_declared), *torchvision.models.resnet18().eval()(torch.zeros(1, 3, 64, 64)).shape)"
    )
    assert run(code, broken_torchvision) == "1 1 1000"


def test_a_pair_that_matches_stays_untouched(broken_torchvision: Path) -> None:
    """The operators are there before torchvision is imported, as its own library would have made them."""
    code = (
        "import torch\n"
        "library = torch.library.Library('torchvision', 'DEF')\n"
        "for name in ('nms', 'qnms'):\n"
        "    library.define(name + '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')\n"
        "library.impl('nms', lambda dets, scores, iou_threshold: torch.full((1,), 42), 'CPU')\n"
        "from mmfeat.encoders.torchvision_ops import import_torchvision, _declared\n"
        "import_torchvision()\n"
        "import torchvision\n"
        "print(len(_declared), int(torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)))"
    )
    assert run(code, broken_torchvision) == "0 42"
