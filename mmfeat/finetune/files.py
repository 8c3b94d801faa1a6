"""Files of a fine-tuning: tensors and what is to be known of them, committed in one step and checked when read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmfeat.errors import RunError
from mmfeat.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor


def save(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """One safetensors file; `record` goes into its header as JSON, beside a checksum of both."""
    from safetensors.torch import save as to_bytes

    whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    text = json.dumps(record)
    write_atomic(path, to_bytes(whole, metadata={"record": text, "xxh3": _checksum(whole, text)}))


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `save` wrote, None where there is no file; raises `RunError` for one that was changed."""
    from safetensors import safe_open

    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata["xxh3"] != _checksum(tensors, metadata["record"]):
            raise ValueError("it is not what was saved")
        return tensors, json.loads(metadata["record"])
    except Exception as error:  # safetensors raises what its format makes it raise
        raise RunError(f"{path}: not whole ({error}); delete it and run mmfeat finetune again") from error


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    import xxhash

    digest = xxhash.xxh3_128(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
