"""The delta of a fine-tuned tower: the parameters that moved, and the identity of the tower that they moved from.

One safetensors file; its header says which encoder it belongs to. Written by `mmfeat finetune`, used as an encoder
with `--encoders finetuned:FILE`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmfeat.encoders.spec import EncoderSpec
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.system.files import canonical_json, file_sha256, write_atomic

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


FORMAT = "mmfeat-delta-1"


@dataclass(frozen=True)
class Delta:
    """What the header says: the request and the spec of the tower before, and what the result is called."""

    request: str
    spec: EncoderSpec
    name: str


def write_delta(path: Path, delta: Delta, moved: Mapping[str, Tensor]) -> None:
    """`moved`: parameter name in the model -> its value, whole."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in moved.items()}
    header = canonical_json({"format": FORMAT, **asdict(delta)})  # one entry: safetensors keeps no order of several
    write_atomic(path, save(tensors, metadata={"delta": header}))


def read_delta(path: Path) -> Delta:
    """The header. Raises `EncoderError` for a file that is no delta."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        found = json.loads(metadata["delta"])
        if found["format"] != FORMAT:
            raise ValueError("it has another format")
        return Delta(str(found["request"]), EncoderSpec.from_json(found["spec"]), str(found["name"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, ConfigError) as error:
        raise EncoderError(
            f"finetuned:{path}: not a fine-tuned tower ({error}); name a file that mmfeat finetune wrote, "
            "as in finetuned:heads/RUN/stage-2-both/bert-0-0.safetensors"
        ) from error


def apply_delta(path: Path, module: Module) -> None:
    """Put the moved parameters in place. Raises `EncoderError` where one does not fit."""
    import torch
    from safetensors.torch import load_file

    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in load_file(path).items():
            if name not in parameters or parameters[name].shape != value.shape:
                raise EncoderError(
                    f"finetuned:{path}: {name} does not fit its parent; was mmfeat or a library changed?"
                )
            parameters[name].copy_(value)


def tuned_identity(path: Path, parent: str) -> str:
    """The identity of the weights: those of the parent and what moved."""
    return f"sha256:{hashlib.sha256(f'{parent} {file_sha256(path)}'.encode()).hexdigest()}"
