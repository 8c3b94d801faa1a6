"""CLIP through open_clip: one model, two towers, `clip.image` and `clip.text`.

Variants: `MODEL/TAG` (default `ViT-B-32/openai`), `MODEL/FILE` with local weights, or a local folder
in open_clip's own layout (`open_clip_config.json` beside the weights).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.layers import Network, Point, find_layers, timm_network
from mmfeat.encoders.pixels import image_tower
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.torch_tower import TorchTower, load_errors, plain_call, stack
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.encoders.weights import downloaded_identity, hub_errors, local_path, path_identity
from mmfeat.errors import EncoderError
from mmfeat.samples.texts import CLEANING
from mmfeat.system.files import canonical_json, read_json

if TYPE_CHECKING:
    from torch import Tensor


def text_network(model: Any) -> Network:
    """A transformer of open_clip's or, inside it, one of transformers'."""
    tower = text_tower(model)
    if hasattr(tower, "config"):
        return Network(model.encode_text, find_layers(tower.transformer), Point(tower.transformer))
    # With an appended class token (CoCa) the norm comes after pooling and never sees the tokens.
    tokens = tower.ln_final if getattr(tower, "cls_emb", None) is None else tower.transformer
    return Network(model.encode_text, find_layers(tower), Point(tokens))


def text_tower(model: Any) -> Any:
    return getattr(model, "text", model)  # open_clip's plain CLIP is its own text tower


def kept_tokens(tower: Any, ids: Tensor) -> Tensor | None:
    """(B, T) of the tokens that can reach the vector, None for all.

    In a causal tower that pools at its end token, what follows that token cannot.
    """
    import torch

    if hasattr(tower, "config"):
        return ids != tower.config.pad_token_id
    own = "text_" if hasattr(tower, "text_pool_type") else ""
    pool_type = getattr(tower, f"{own}pool_type")
    if tower.attn_mask is None or getattr(tower, "cls_emb", None) is not None or pool_type not in ("argmax", "eos"):
        return None
    found = ids if pool_type == "argmax" else ids.eq(getattr(tower, f"{own}eos_id")).int()
    ends = found.argmax(-1, keepdim=True)
    return torch.arange(ids.shape[1], device=ids.device) <= ends


def text_length(tower: Any, ids: Tensor) -> int:
    """How many of the (T) tokens of one text can reach its vector."""
    kept = kept_tokens(tower, ids[None])
    return len(ids) if kept is None else int(kept.sum())


def trimmed(tower: Any, batch: list[Tensor]) -> Tensor:
    """(B, T) token ids as far as the longest text goes, where what follows cannot reach a vector."""
    ids = stack(batch)
    if hasattr(tower, "config"):  # a tower of transformers', which may count on its full width
        return ids
    return ids[:, : max(text_length(tower, one) for one in batch)]


def stand_in(tower: Any, mask: Tensor) -> Tensor:
    """(B, T) token ids that nobody looks at but for where the text ends, or where it is padded."""
    import torch

    if hasattr(tower, "config"):
        pad = tower.config.pad_token_id
        return torch.where(mask, pad + 1, pad)
    own = "text_" if hasattr(tower, "text_pool_type") else ""
    end = getattr(tower, f"{own}eos_id", None) or 1
    return torch.zeros_like(mask, dtype=torch.long).scatter_(1, mask.sum(1, keepdim=True) - 1, end)


def short_texts(model: Any) -> Callable[[Tensor], Tensor]:
    """open_clip's own `encode_text`, which takes 77 columns, for texts whose padding was cut off.

    Positions and causal mask are cut alike; what is gone could not have reached the vector.
    """
    import torch

    tower = text_tower(model)
    if getattr(tower, "attn_mask", None) is None or getattr(tower, "cls_emb", None) is not None:
        return model.encode_text
    whole, place = torch.nn.Module(), "model." if tower is model else "model.text."
    whole.model, whole.forward = model, model.encode_text

    def forward(ids: Tensor) -> Tensor:
        length = ids.shape[1]
        if length == len(tower.attn_mask):
            return model.encode_text(ids)
        cut = {
            f"{place}positional_embedding": tower.positional_embedding[:length],
            f"{place}attn_mask": tower.attn_mask[:length, :length],
        }
        return torch.func.functional_call(whole, cut, (ids,))

    return forward


DEFAULT_VARIANT = "ViT-B-32/openai"
CONTEXT_LENGTH = 77
# open_clip's defaults, for a folder whose configuration leaves them out; checked again after loading.
_PREPROCESSING: dict[str, Any] = {
    "size": 224,
    "mode": "RGB",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
_SETTABLE = ("mean", "std", "interpolation", "resize_mode")  # by an argument image_... of open_clip's


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """Specs of the image and the text tower."""
    variant = variant or DEFAULT_VARIANT
    if folder := local_path(variant):
        config = _folder_config(folder)
        name, identity, overlay = folder.resolve().name, path_identity(folder), config.get("preprocess_cfg", {})
        model = config["model_cfg"]
    else:
        name, identity, overlay, model = _named(variant)
    # Both towers are one module with one dtype. A ResNet tower has a list of layers, a ViT a number.
    resnet = not isinstance(model["vision_cfg"].get("layers", 12), int)
    options = options.for_model("resnet" if resnet else model["vision_cfg"].get("timm_model_name", "vit"))
    image = EncoderSpec(
        family="clip",
        modality="image",
        variant=name,
        weights=identity,
        arithmetic=options.dtype,
        storage=options.storage,
        preprocessing=_preprocessing(model, overlay),
    )
    length = model["text_cfg"].get("context_length", CONTEXT_LENGTH)
    text = replace(image, modality="text", preprocessing="", cleaning=options.cleaning, max_length=length)
    return [image, text]


def open_towers(variant: str, specs: list[EncoderSpec]) -> list[TorchTower]:
    """Load the model once and give the towers that `specs` ask for."""
    model, transform, tokenizer = _create(variant)
    towers = []
    if images := [spec for spec in specs if spec.modality == "image"]:
        _check_preprocessing(model, images[0])
        towers.append(image_tower(images, model, _image_network(model), transform))
    if texts := [spec for spec in specs if spec.modality == "text"]:
        clean, tower = CLEANING[texts[0].cleaning], text_tower(model)
        network = replace(text_network(model), forward=short_texts(model))
        towers.append(
            TorchTower(
                tuple(texts),
                model,
                network,
                lambda text: tokenizer([clean(text)])[0],
                collate=partial(trimmed, tower),
                keep=partial(kept_tokens, tower),
                length=partial(text_length, tower),
                stand_in=partial(stand_in, tower),
            )
        )
    return towers


def reference(variant: str, spec: EncoderSpec) -> Callable[[Any], np.ndarray]:
    """open_clip's own `encode_image` or `encode_text` for one picture or text, in float32."""
    model, transform, tokenizer = _create(variant)
    if spec.modality == "image":
        network = _image_network(model)
        if spec.output != "tokens":
            network = replace(network, forward=model.encode_image)
        return lambda image: plain_call(network, spec, transform(image).unsqueeze(0))
    network, tower = text_network(model), text_tower(model)

    def encode(text: str) -> np.ndarray:
        ids = tokenizer(CLEANING[spec.cleaning](text))
        values = plain_call(network, spec, ids)
        kept = kept_tokens(tower, ids) if spec.output != "pooled" else None
        return values if kept is None else values[kept[0].numpy()]

    return encode


def _create(variant: str) -> tuple[Any, Any, Any]:
    """open_clip's model in float32, image transform and tokenizer."""
    import_torchvision()
    import open_clip

    variant = variant or DEFAULT_VARIANT
    name, arguments = _creation_arguments(variant)
    local = local_path(variant) or local_path(_split(variant)[1])
    with load_errors(f"clip:{variant}") if local else hub_errors(f"clip:{variant}"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, transform = open_clip.create_model_and_transforms(name, require_pretrained=True, **arguments)
        tokenizer = open_clip.get_tokenizer(name)
    return model.eval().requires_grad_(False), transform, tokenizer


def _check_preprocessing(model: Any, spec: EncoderSpec) -> None:
    if (loaded := canonical_json(_plain(model.visual.preprocess_cfg))) != spec.transform:
        raise EncoderError(f"{spec.name}: open_clip preprocesses with {loaded}, the spec says {spec.transform}")


def _image_network(model: Any) -> Network:
    """A ViT, a ResNet with attention pooling, or a timm trunk under open_clip's own head."""
    visual = model.visual
    if hasattr(visual, "trunk"):
        trunk = timm_network(visual.trunk)
        return replace(trunk, forward=lambda images: visual.head(trunk.forward(images)))
    if hasattr(visual, "layer4"):
        tokens = visual.layer4
    else:  # a norm after pooling never sees the tokens
        tokens = visual.transformer if visual.attn_pool is None and visual.final_ln_after_pool else visual.ln_post
    return Network(model.encode_image, find_layers(visual), Point(tokens))


def _named(variant: str) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Name, identity, preprocessing overlay and model configuration of `MODEL/TAG` or `MODEL/FILE`."""
    import_torchvision()
    import open_clip

    model, tag = _split(variant)
    if (config := open_clip.get_model_config(model)) is None:
        raise EncoderError(f"clip:{variant}: open_clip has no model {model!r}; see open_clip.list_models()")
    if file := local_path(tag):
        overlay = _published(model, file)
        quick = "-quickgelu" if _quick_gelu(overlay, config) else ""
        return f"{model}{quick}/{file.name}", path_identity(file), overlay, config
    if not open_clip.is_pretrained_cfg(model, tag):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise EncoderError(f"clip:{variant}: no weights {tag!r} for {model}; open_clip has {tags}, or name a file")
    overlay = open_clip.get_pretrained_cfg(model, tag)
    with hub_errors(f"clip:{variant}"):
        identity = downloaded_identity(open_clip.download_pretrained(overlay))
    quick = "-quickgelu" if _quick_gelu(overlay, config) else ""
    return f"{model}{quick}/{tag}", identity, overlay, config


def _creation_arguments(variant: str) -> tuple[str, dict[str, Any]]:
    """What `open_clip.create_model_and_transforms` is called with."""
    if folder := local_path(variant):
        return f"local-dir:{folder}", {}
    import open_clip

    model, tag = _split(variant)
    if file := local_path(tag):
        overlay, pretrained = _published(model, file), str(file)
    else:
        overlay, pretrained = open_clip.get_pretrained_cfg(model, tag), tag
    # open_clip only warns when weights trained with QuickGELU meet a model without it.
    quick = _quick_gelu(overlay, open_clip.get_model_config(model))
    settings = {f"image_{key}": overlay[key] for key in _SETTABLE if overlay.get(key) is not None}
    return model, {"pretrained": pretrained, "force_quick_gelu": quick, **settings}


def _published(model: str, file: Path) -> dict[str, Any]:
    """What open_clip knows of the weights it publishes under this file name; nothing of a file of one's own."""
    import open_clip

    known = (open_clip.get_pretrained_cfg(model, tag) for tag in open_clip.list_pretrained_tags_by_model(model))
    return next((entry for entry in known if Path(entry.get("url", "")).name == file.name), {})


def _split(variant: str) -> tuple[str, str]:
    model, _, tag = variant.partition("/")
    return model, tag or "openai"


def _quick_gelu(pretrained: dict[str, Any], model: dict[str, Any]) -> bool:
    return bool(pretrained.get("quick_gelu")) and not model.get("quick_gelu")


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "open_clip_config.json")
        config["model_cfg"]["text_cfg"], config["model_cfg"]["vision_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EncoderError(
            f"{folder}: open_clip_config.json with model_cfg is needed here ({error}); name a folder in "
            "open_clip's layout, or MODEL/FILE"
        ) from error
    return config


def _preprocessing(model: dict[str, Any], overlay: dict[str, Any]) -> str:
    """What open_clip makes of the configuration: its defaults, the weights' own values, the model's size."""
    size = model["vision_cfg"].get("image_size", 224)
    return canonical_json(_plain({**_PREPROCESSING, **_known(overlay), "size": size}))


def _known(overlay: dict[str, Any]) -> dict[str, Any]:
    """The part of a pretrained configuration that is about preprocessing."""
    return {key: overlay[key] for key in _PREPROCESSING if overlay.get(key) is not None}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    """JSON values only, with a square size as one number."""
    plain = {key: list(value) if isinstance(value, tuple | list) else value for key, value in config.items()}
    size = plain["size"]
    return {**plain, "size": size[0] if isinstance(size, list) and len(set(size)) == 1 else size}
