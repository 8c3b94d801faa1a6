"""The delta of a fine-tuned tower: the parameters that moved, and the identity of the tower that they moved from.

One safetensors file; its header says which encoder it belongs to. Written by `mmfeat finetune`, used as an encoder
with `--encoders finetuned:FILE`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mmfeat.encoders.spec import IMAGE_POOLINGS, OF_MODEL, POOLINGS, EncoderOptions, EncoderSpec
from mmfeat.encoders.weights import local_path
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.system.files import canonical_json, file_sha256, write_atomic

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module


FORMAT = "mmfeat-delta-1"


@dataclass(frozen=True)
class Delta:
    """Header of the file: request and spec of the tower before fine-tuning, and the name of the result."""

    request: str
    spec: EncoderSpec
    name: str

    def options(self, options: EncoderOptions) -> EncoderOptions:
        """The options with contents prepared and pooled as they were when the tower was trained.

        The prompt and the width of an st tower are not named again: `tuned` takes them from its spec.
        """
        size, pooling = self.spec.image_size, self.spec.pooling
        return replace(
            options,
            image_size="x".join(map(str, size)) if size else OF_MODEL,
            image_pooling=pooling if self.spec.modality == "image" and pooling in IMAGE_POOLINGS else OF_MODEL,
            layers=self.spec.layers,
            prompt="none",
            truncate_dim=0,
            cleaning=self.spec.cleaning,
            pooling=pooling if pooling in POOLINGS else options.pooling,
            max_length=self.spec.max_length or options.max_length,
        )

    def tuned(self, parent: EncoderSpec, file: Path) -> EncoderSpec:
        """The spec of the fine-tuned tower: that of its parent with other weights.

        Always in float32: steps of fine-tuning are smaller than the resolution of bfloat16.
        """
        weights = f"sha256:{hashlib.sha256(f'{parent.weights} {file_sha256(file)}'.encode()).hexdigest()}"
        variant = f"{parent.variant}+{self.name}"
        return replace(parent, variant=variant, weights=weights, arithmetic="float32", storage="float32")


def write_delta(path: Path, delta: Delta, moved: Mapping[str, Tensor]) -> None:
    """Write a delta; `moved` maps the name of each parameter that moved to its whole value."""
    from safetensors.torch import save

    tensors = {name: value.detach().cpu().contiguous() for name, value in moved.items()}
    header = {"format": FORMAT, **asdict(delta), "spec": delta.spec.stated}
    # One entry, since safetensors keeps no order of several.
    write_atomic(path, save(tensors, metadata={"delta": canonical_json(header)}))


def read_delta(variant: str) -> tuple[Path, Delta]:
    """The file that `variant` names, and its header. Raises `EncoderError` for a file that is no delta."""
    from safetensors import SafetensorError, safe_open

    if not (path := local_path(variant)):
        raise EncoderError(f"finetuned:{variant}: no such file; name one that mmfeat finetune wrote, finetuned:FILE")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        header = json.loads(metadata["delta"])
        if header["format"] != FORMAT:
            raise ValueError("it has another format")
        return path, Delta(str(header["request"]), EncoderSpec.from_json(header["spec"]), str(header["name"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, ConfigError) as error:
        raise EncoderError(
            f"finetuned:{path}: not a fine-tuned tower ({error}); name a file that mmfeat finetune wrote, "
            "as in finetuned:heads/RUN/stage-2-both/bert-0-0.safetensors"
        ) from error


def apply_delta(path: Path, module: Module) -> None:
    """Copy the moved parameters into a model. Raises `EncoderError` for a parameter that does not fit."""
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
