"""Tiny real models of transformers with random weights beside real files of their processors, by `save_pretrained`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mmfeat.encoders.bert import quiet_transformers

TRANSFORMER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
PATCHES = {**TRANSFORMER, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
WINDOWS = {"image_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
SQUARE, WIDE = {"height": 32, "width": 32}, {"height": 24, "width": 40}
CROPPED = {"size": {"shortest_edge": 37}, "crop_size": SQUARE}
UNCROPPED = {"size": WIDE, "do_center_crop": False}
# kind: model, configuration, image processor, settings of the processor
KINDS: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "dinov2": ("Dinov2Model", PATCHES, "BitImageProcessor", CROPPED),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", PATCHES, "BitImageProcessor", UNCROPPED),
    "dinov3_vit": ("DINOv3ViTModel", {**PATCHES, "num_register_tokens": 4}, "DINOv3ViTImageProcessor", {"size": WIDE}),
    "dinov3_convnext": (
        "DINOv3ConvNextModel",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4},
        "DINOv3ViTImageProcessor",
        {"size": SQUARE},
    ),
    "vit": ("ViTModel", {**PATCHES, "image_size": [24, 40]}, "ViTImageProcessor", {"size": WIDE}),
    "vit-classifier": ("ViTForImageClassification", PATCHES, "ViTImageProcessor", {"size": SQUARE}),
    "deit": ("DeiTModel", PATCHES, "DeiTImageProcessor", CROPPED),
    "beit": ("BeitModel", PATCHES, "BeitImageProcessor", {"size": SQUARE, "do_center_crop": False}),
    "swin": ("SwinModel", WINDOWS, "ViTImageProcessor", {"size": SQUARE}),
    "convnext": ("ConvNextModel", STAGES, "ConvNextImageProcessor", {"size": {"shortest_edge": 40}, "crop_pct": 0.9}),
    "resnet": (
        "ResNetModel",
        {**STAGES, "embedding_size": 8},
        "ConvNextImageProcessor",
        {"size": {"shortest_edge": 40}},
    ),
    "ijepa": ("IJepaModel", PATCHES, "ViTImageProcessor", {"size": SQUARE}),
    "vit_msn": ("ViTMSNModel", PATCHES, "ViTImageProcessor", {"size": SQUARE}),
    "vit_mae": ("ViTMAEModel", PATCHES, "ViTImageProcessor", {"size": SQUARE}),
    "clip_vision_model": ("CLIPVisionModel", PATCHES, "CLIPImageProcessor", CROPPED),
    "clip-projection": ("CLIPVisionModelWithProjection", PATCHES, "CLIPImageProcessor", CROPPED),
    "siglip_vision_model": ("SiglipVisionModel", PATCHES, "SiglipImageProcessor", {"size": SQUARE}),
    "clip": ("CLIPModel", {"projection_dim": 16}, "CLIPImageProcessor", CROPPED),
    "siglip": ("SiglipModel", {}, "SiglipImageProcessor", {"size": SQUARE}),
    "siglip2": ("Siglip2Model", {}, "Siglip2ImageProcessor", {"patch_size": 16, "max_num_patches": 256}),
}


def change_json(file: Path, **values: Any) -> None:
    """Change entries of a JSON file, or write it."""
    before = json.loads(file.read_text()) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**before, **values}))


def write_hf(folder: Path, kind: str) -> Path:
    """The model of a kind with its processor, in transformers' own layout."""
    transformers = quiet_transformers()
    import torch

    name, shape, processor, settings = KINDS[kind]
    torch.manual_seed(6)
    model = getattr(transformers, name)
    image_processor = getattr(transformers, processor)(**settings)
    if kind in ("clip", "siglip", "siglip2"):
        tokenizer = write_tokenizer(kind, transformers)
        length = {"max_position_embeddings": 77 if kind == "clip" else 64}
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        text = {**TRANSFORMER, **length, **ends, "vocab_size": len(tokenizer), "projection_size": 32}
        vision = {**PATCHES, **({"num_patches": 16, "patch_size": 16} if kind == "siglip2" else {})}
        shape = {**shape, "text_config": text, "vision_config": vision}
        paired = {"clip": "CLIPProcessor", "siglip": "SiglipProcessor", "siglip2": "Siglip2Processor"}[kind]
        getattr(transformers, paired)(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    else:
        image_processor.save_pretrained(folder)
    network = model(model.config_class(**shape))
    with torch.no_grad():  # some libraries begin with zeros and ones, which would hide parts of a model
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    network.save_pretrained(folder)
    return folder


def write_tokenizer(kind: str, transformers: Any) -> Any:
    """A tokenizer of single letters: byte pairs as CLIP has them, or Gemma's in lower case as SigLIP 2 has it."""
    letters = "abcdefghijklmnopqrstuvwxyz@:/#.'"
    if kind == "clip":
        words = [letter + end for letter in letters for end in ("", "</w>")]
        words += ["<|startoftext|>", "<|endoftext|>"]
        vocab = {word: number for number, word in enumerate(words)}
        return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *letters, "▁", *(f"<0x{code:02X}>" for code in range(256))]
    vocab = {word: number for number, word in enumerate(words)}
    settings = {"model_max_length": 64, "padding_side": "right"}
    if kind == "siglip":  # its checkpoints show the model all columns
        settings["model_input_names"] = ["input_ids"]
    return transformers.Siglip2Tokenizer(vocab=vocab, merges=[], **settings)
