"""CLIP through open_clip: one model, two towers, `clip.image` and `clip.text`.

`clip_checkpoints` reads what a request names; here its towers are described and loaded.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders import timm_models
from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.clip_checkpoints import Checkpoint, plain_json, read_checkpoint
from mmfeat.encoders.layers import Network, Point, find_layers, timm_network
from mmfeat.encoders.pixels import check_size, image_tower, size_errors
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.tokenizer import cuts_of, watch_cuts
from mmfeat.encoders.tokenizer import is_cased as tokenizer_is_cased
from mmfeat.encoders.torch_tower import TorchTower, plain_call, stack
from mmfeat.encoders.weights import hub_errors, load_errors
from mmfeat.errors import EncoderError
from mmfeat.samples.contents import CLEANING

if TYPE_CHECKING:
    from torch import Tensor

CONTEXT_LENGTH = 77
LOWERING = ("lower", "canonicalize")  # open_clip's ways to clean a text that drop capitals


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    checkpoint = read_checkpoint(variant)
    return specs_of(checkpoint, checkpoint.identity(), options)


def specs_of(checkpoint: Checkpoint, weights: str, options: EncoderOptions) -> list[EncoderSpec]:
    """Specs of the image and the text tower of a checkpoint with this identity of its weights."""
    model = checkpoint.model
    # Both towers are one module with one dtype. `layers` of a ResNet is a list, of a ViT a number.
    resnet = not isinstance(model["vision_cfg"].get("layers", 12), int)
    options = options.for_model("resnet" if resnet else model["vision_cfg"].get("timm_model_name", "vit"))
    _check_asked(f"clip:{checkpoint.name}", model["vision_cfg"], options, resnet)
    own, size = checkpoint.preprocessing, options.size
    image = EncoderSpec(
        family="clip",
        modality="image",
        variant=checkpoint.name,
        weights=weights,
        preprocessing=plain_json({**json.loads(own), "size": size}) if size else own,
        pooling=options.tower_pooling,
        **options.of_model,
    )
    length = model["text_cfg"].get("context_length", CONTEXT_LENGTH)
    text = replace(image, modality="text", preprocessing="", pooling="tower", layers=1)
    text = replace(text, cleaning=options.cleaning, max_length=length)
    return [image, text]


def _check_asked(name: str, vision: dict[str, Any], options: EncoderOptions, resnet: bool) -> None:
    """Raise `EncoderError` for a size or a pooling that the image tower cannot have."""
    if resnet and options.size and options.size != (vision.get("image_size", 224),) * 2:
        raise EncoderError(f"--image-size {options.image_size}: {name} pools by attention over one size; leave it out")
    if vision.get("attentional_pool") and options.tower_pooling != "tower":
        raise EncoderError(f"--image-pooling {options.image_pooling}: {name} pools by attention alone; leave it out")


def is_cased(variant: str) -> bool:
    """Whether capitals of a text reach the model: its own tokenizer drops them, one of transformers may not."""
    checkpoint = read_checkpoint(variant)
    settings = checkpoint.model["text_cfg"].get("tokenizer_kwargs") or {}
    if not checkpoint.tokenizer_name or settings.get("clean") in LOWERING:
        return False
    is_folder = checkpoint.path is not None and checkpoint.path.is_dir()
    return tokenizer_is_cased(str(checkpoint.path) if is_folder else checkpoint.tokenizer_name)


def open_towers(variant: str, specs: list[EncoderSpec]) -> list[TorchTower]:
    """Load the model once and return the towers of the modalities in `specs`."""
    images = [spec for spec in specs if spec.modality == "image"]
    model, transform, tokenizer = _create(variant, images[0] if images else specs[0])
    towers = []
    if images:
        if (loaded := plain_json(model.visual.preprocess_cfg)) != images[0].transform:
            raise EncoderError(f"{images[0].name}: open_clip preprocesses with {loaded}, not {images[0].transform}")
        towers.append(image_tower(images, model, _image_network(model), transform))
    if texts := [spec for spec in specs if spec.modality == "text"]:
        clean, tower, cuts = CLEANING[texts[0].cleaning], TextTower(model), watch_cuts(tokenizer)
        network = replace(tower.network(), forward=tower.short_forward())

        def prepare(text: str) -> Tensor:
            ids = tokenizer([clean(text)])[0]
            ids.cut = cuts.pop() if cuts else 0  # as in `Tokens`
            return ids

        towers.append(
            TorchTower(
                tuple(texts),
                model,
                network,
                prepare,
                collate=tower.collate,
                keep=tower.kept,
                length=tower.length,
                stand_in=tower.stand_in,
            )
        )
    return towers


def read_cuts(variant: str, spec: EncoderSpec) -> Callable[[str], int]:
    """`Tokens.cut` of a text, by the tokenizer alone."""
    tokenizer = read_checkpoint(variant, spec.weights).tokenizer()
    return cuts_of(tokenizer, lambda text: tokenizer([text]), spec)


def reference(variant: str, spec: EncoderSpec) -> Callable[[Any], np.ndarray]:
    """open_clip's own `encode_image` or `encode_text` for one picture or text, in float32."""
    model, transform, tokenizer = _create(variant, spec)
    if spec.modality == "image":
        network = _image_network(model)
        if spec.output != "tokens":
            network = replace(network, forward=partial(_vectors, model, spec))
        return lambda image: plain_call(network, spec, transform(image).unsqueeze(0))
    tower = TextTower(model)
    network, clean = tower.network(), CLEANING[spec.cleaning]
    return lambda text: plain_call(network, spec, tokenizer(clean(text)), tower.kept)


def _vectors(model: Any, spec: EncoderSpec, images: Tensor) -> Tensor:
    """(B, D) by open_clip's `encode_image`; for another pooling or several layers by its `forward_intermediates`."""
    import torch

    visual, own = model.visual, spec.pooling in ("tower", "none")
    if own and spec.layers == 1:
        return model.encode_image(images)
    if hasattr(visual, "trunk"):
        return timm_models.vectors(visual.trunk, spec, images, visual.head)
    if hasattr(visual, "layer4"):
        return visual.forward_intermediates(images, 1)["image_intermediates"][-1].mean((2, 3))
    late = visual.final_ln_after_pool
    options = {"normalize_intermediates": not late, "output_fmt": "NLC", "output_extra_tokens": True}
    seen = visual.forward_intermediates(images, spec.layers, **options)
    patches, prefix = (
        torch.stack(seen[name]).mean(0) for name in ("image_intermediates", "image_intermediates_prefix")
    )
    parts = {"cls": prefix[:, 0], "mean": patches.mean(1)}
    names = [{"tok": "cls", "avg": "mean"}[visual.pool_type]] if own else spec.pooling.split("+")
    pooled = [visual.ln_post(parts[name]) if late else parts[name] for name in names]
    return torch.cat([each if visual.proj is None else each @ visual.proj for each in pooled], 1)


class TextTower:
    """The text tower of an open_clip model: open_clip's own transformer, or one of transformers' inside."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.module = getattr(model, "text", model)  # open_clip's plain CLIP is its own text tower
        # Only a model of transformers has a `config`; such a model may count on all columns of its input.
        self._config = getattr(self.module, "config", None)
        # CoCa appends a class token.
        self._has_class_token = getattr(self.module, "cls_emb", None) is not None

    def network(self) -> Network:
        """Forward pass over (B, T) token ids, layers, and the point where tokens can be seen."""
        transformer = self.module.transformer
        if self._config is not None:
            return Network(self.model.encode_text, find_layers(transformer), Point(transformer))
        # The norm behind an appended class token comes after pooling and never sees the tokens.
        tokens = transformer if self._has_class_token else self.module.ln_final
        return Network(self.model.encode_text, find_layers(self.module), Point(tokens))

    def kept(self, ids: Tensor) -> Tensor | None:
        """(B, T) whether each token can reach the vector; None where all can.

        In a causal tower that pools at its end token, no token after the end token can.
        """
        import torch

        if self._config is not None:
            return ids != self._config.pad_token_id
        pool_type = self._attribute("pool_type")
        if self.module.attn_mask is None or self._has_class_token or pool_type not in ("argmax", "eos"):
            return None
        is_end = ids if pool_type == "argmax" else ids.eq(self._attribute("eos_id")).int()
        return torch.arange(ids.shape[1], device=ids.device) <= is_end.argmax(-1, keepdim=True)

    def length(self, ids: Tensor) -> int:
        """Number of the (T) tokens of one text that can reach its vector."""
        kept = self.kept(ids[None])
        return len(ids) if kept is None else int(kept.sum())

    def collate(self, batch: list[Tensor]) -> Tensor:
        """(B, T) token ids, cut behind the longest text where padding cannot reach a vector."""
        ids = stack(batch)
        return ids if self._config is not None else ids[:, : max(map(self.length, batch))]

    def stand_in(self, mask: Tensor) -> Tensor:
        """(B, T) token ids with the ends or the padding that a (B, T) mask of kept tokens says; no other id matters."""
        import torch

        if self._config is not None:
            pad = self._config.pad_token_id
            return torch.where(mask, pad + 1, pad)
        end = self._attribute("eos_id", None) or 1
        return torch.zeros_like(mask, dtype=torch.long).scatter_(1, mask.sum(1, keepdim=True) - 1, end)

    def short_forward(self) -> Callable[[Tensor], Tensor]:
        """open_clip's `encode_text`, which takes 77 columns, for ids that `collate` cut.

        Positions and causal mask are cut alike; no token behind the cut could have reached the vector.
        """
        import torch

        model, tower = self.model, self.module
        if getattr(tower, "attn_mask", None) is None or self._has_class_token:
            return model.encode_text
        whole, path = torch.nn.Module(), "model." if tower is model else "model.text."
        whole.model, whole.forward = model, model.encode_text

        def forward(ids: Tensor) -> Tensor:
            length = ids.shape[1]
            if length == len(tower.attn_mask):
                return model.encode_text(ids)
            cut = {
                f"{path}positional_embedding": tower.positional_embedding[:length],
                f"{path}attn_mask": tower.attn_mask[:length, :length],
            }
            return torch.func.functional_call(whole, cut, (ids,))

        return forward

    def _attribute(self, name: str, *default: Any) -> Any:
        """An attribute of open_clip's text tower, whose name begins with `text_` where the model is the tower."""
        prefix = "text_" if hasattr(self.module, "text_pool_type") else ""
        return getattr(self.module, prefix + name, *default)


def _create(variant: str, spec: EncoderSpec) -> tuple[Any, Any, Any]:
    """open_clip's model in float32, image transform and tokenizer, of the weights and for the pictures of a spec."""
    quiet_transformers()
    import open_clip

    checkpoint = read_checkpoint(variant, spec.weights)
    asked, arguments = f"clip:{variant}", dict(checkpoint.arguments)
    if checkpoint.repository:
        with hub_errors(asked):
            open_clip.pretrained.download_pretrained_from_hf(checkpoint.repository, revision=checkpoint.revision)
    if other := spec.modality == "image" and spec.transform != checkpoint.preprocessing:
        arguments["force_image_size"] = spec.image_size
    loading = load_errors(asked, is_local=bool(checkpoint.path or checkpoint.repository))
    with loading, warnings.catch_warnings(), size_errors(spec) if other else contextlib.nullcontext():
        warnings.simplefilter("ignore")
        model, _, transform = open_clip.create_model_and_transforms(
            checkpoint.source, require_pretrained=True, **arguments
        )
    if other:
        patches = getattr(getattr(model.visual, "trunk", None), "patch_embed", model.visual)
        size = getattr(patches, "patch_size", 1)
        check_size(spec, model.eval().encode_image, size if isinstance(size, int) else max(size))
    return model.eval().requires_grad_(False), transform, checkpoint.tokenizer()


def _image_network(model: Any) -> Network:
    """Network of a ViT, a ResNet with attention pooling, or a timm trunk under open_clip's own head."""
    visual = model.visual
    if hasattr(visual, "trunk"):
        trunk = timm_network(visual.trunk)
        return replace(trunk, forward=lambda images: visual.head(trunk.forward(images)))
    if hasattr(visual, "layer4"):
        return Network(model.encode_image, find_layers(visual), Point(visual.layer4), attends=True)
    # A norm after pooling never sees the tokens.
    late = visual.attn_pool is None and visual.final_ln_after_pool
    network = Network(model.encode_image, find_layers(visual), Point(visual.ln_post), prefix=1, classed=True)
    return replace(network, tokens=Point(visual.transformer)) if late else replace(network, norm=visual.ln_post.forward)
