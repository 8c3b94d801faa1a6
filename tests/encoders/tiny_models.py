"""Tiny real models with random weights, written the way their libraries read them, and contents to encode."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmfeat.encoders.spec import Encoder
from mmfeat.encoders.torchvision_ops import import_torchvision
from tests.encoders.tiny_hf import change_json, write_hf

TEXTS = ["What a wonderful day of this", "so tired", "@bob the bus http://t.co/x #day", "", "a " * 200]


def contents(modality: str) -> list[Any]:
    """Texts of all lengths, or pictures of all sizes."""
    rng = np.random.default_rng(5)
    noise = [rng.integers(0, 256, (size, size + 20, 3), dtype=np.uint8) for size in (40, 65, 300)]
    return TEXTS if modality == "text" else [Image.fromarray(pixels) for pixels in noise]


def embed(encoder: Encoder) -> dict[str, Any]:
    """Output -> values of one batch of all contents."""
    values = encoder.embed([encoder.prepare(one) for one in contents(encoder.modality)])
    names = [f"{spec.output}:{spec.layer}" if spec.layer else spec.output for spec in encoder.specs]
    return dict(zip(names, values, strict=True))


def write_clip(folder: Path, vision: dict[str, Any] | None = None, text: dict[str, Any] | None = None) -> Path:
    """A CLIP with two-layer towers in open_clip's folder layout, changed by `vision` and `text`."""
    import_torchvision()
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16, **(vision or {})}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2, **(text or {})}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    own_text = "hf_model_name" in text or "embed_cls" in text
    torch.manual_seed(2)
    model = (open_clip.CustomTextCLIP if own_text else open_clip.CLIP)(**config)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    described = {"model_cfg": {**config, "custom_text": own_text}, "preprocess_cfg": {"mean": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    return folder


def write_timm(folder: Path, architecture: str, size: int = 64, **arguments: Any) -> Path:
    """A timm model in a local folder."""
    import_torchvision()
    import timm
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    torch.manual_seed(3)
    model = timm.create_model(architecture, pretrained=False, num_classes=5, **arguments)
    save_file(model.state_dict(), folder / "model.safetensors")
    pretrained = {"input_size": [3, size, size], "interpolation": "bilinear", "crop_pct": 0.9, "num_classes": 5}
    pretrained["classifier"] = model.default_cfg["classifier"]
    config = {"architecture": architecture, "num_classes": 5, "pretrained_cfg": pretrained, "model_args": arguments}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_torchvision(file: Path, architecture: str) -> Path:
    """The state dict of a torchvision model with seven classes, as a `.pth` file."""
    import_torchvision()
    import torch
    import torchvision

    torch.manual_seed(4)
    torch.save(torchvision.models.get_model(architecture, weights=None, num_classes=7).state_dict(), file)
    return file


def write_kind(kind: str, folder: Path, tiny_bert: Path) -> str:
    """The request for one small model of a kind that the families tell apart."""
    if kind == "bert-left":
        shutil.copytree(tiny_bert, folder)
        change_json(folder / "tokenizer_config.json", padding_side="left")
        return f"bert:{folder}"
    if kind == "clip-resnet":
        vision = {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}
        return f"clip:{write_clip(folder, vision, {'no_causal_mask': True, 'pool_type': 'first'})}"
    if kind == "clip-late-norm":
        return f"clip:{write_clip(folder, {'final_ln_after_pool': True, 'pool_type': 'avg'}, {'embed_cls': True})}"
    if kind == "clip-timm-bert":
        vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
        names = {"hf_model_name": str(tiny_bert), "hf_tokenizer_name": str(tiny_bert), "context_length": 24}
        write_clip(folder, vision, {**names, "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"})
        for file in tiny_bert.glob("token*"):
            shutil.copy(file, folder)
        return f"clip:{folder}"
    if kind.startswith("hf-"):
        return f"hf:{write_hf(folder, kind.removeprefix('hf-'))}"
    if kind.startswith("test_"):
        return f"timm:{write_timm(folder, kind, 160 if 'vit' in kind else 64)}"
    if kind == "swin":
        shape = {"img_size": 56, "window_size": 7, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
        return f"timm:{write_timm(folder, 'swin_tiny_patch4_window7_224', 56, **shape)}"
    return f"{kind}:{write_torchvision(folder.with_suffix('.pth'), kind)}"


def write_hub(cache: Path, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model folder as a repository in a cache of Hugging Face's hub, which clients then use; returns its revision."""
    import huggingface_hub.constants

    revision = hashlib.sha1(name.encode()).hexdigest()
    repository = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return revision
