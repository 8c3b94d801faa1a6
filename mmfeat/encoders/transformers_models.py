"""Image models of transformers, and both towers of its models like CLIP. Variants: a hub name or a local folder.

The vector is that of the library's own call: `get_image_features` and `get_text_features` of a model with two towers;
of an image model its `pooler_output`, else the class token, else the mean of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.bert import model_layers, quiet_transformers
from mmfeat.encoders.layers import Network, Point
from mmfeat.encoders.padding import without_padding
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.tokenizer import Tokens, check_fit, cuts_of, watch_cuts
from mmfeat.encoders.torch_tower import TorchTower, plain_call
from mmfeat.encoders.transformers_files import FIXED, Checkpoint, read_checkpoint
from mmfeat.encoders.transformers_images import ImageTower, kept_patches, pooled
from mmfeat.errors import EncoderError
from mmfeat.samples.contents import CLEANING
from mmfeat.system.files import canonical_json

if TYPE_CHECKING:
    from torch import Tensor


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of the image tower, and of the text tower where there is one; common checkpoints are only read."""
    if not variant:
        raise EncoderError("hf: name a checkpoint, as in hf:facebook/dinov2-base, or a local folder, hf:FOLDER")
    checkpoint = read_checkpoint(variant)
    has_text = checkpoint.has_text  # raises for a model without an image tower
    options = options.for_model("vit" if checkpoint.is_plain_transformer else checkpoint.model_type)
    image = EncoderSpec(
        family="hf",
        modality="image",
        **checkpoint.identity(deep=bool(checkpoint.remote_code)),  # code may lie in folders inside the folder
        preprocessing=canonical_json(checkpoint.settings(options.size)),
        pooling=options.tower_pooling,
        **options.of_model,
        remote_code=checkpoint.remote_code,
    )
    if not has_text:
        return [image]
    padding = canonical_json({"padding": checkpoint.padding})
    text = replace(image, modality="text", preprocessing=padding, pooling="tower", layers=1)
    return [image, replace(text, cleaning=options.cleaning, max_length=checkpoint.text_length)]


def open_towers(variant: str, specs: list[EncoderSpec]) -> list[TorchTower]:
    """Load the model once and return the towers of the modalities in `specs`."""
    loaded = _load(variant, specs[0])
    towers = []
    if images := [spec for spec in specs if spec.modality == "image"]:
        towers.append(ImageTower(loaded, images).torch_tower())
    if texts := [spec for spec in specs if spec.modality == "text"]:
        towers.append(TextTower(loaded, texts[0]).torch_tower(texts))
    return towers


def read_cuts(variant: str, spec: EncoderSpec) -> Callable[[str], int]:
    """`Tokens.cut` of a text, by the tokenizer alone."""
    tokenizer = read_checkpoint(variant).processor(spec).tokenizer
    return cuts_of(tokenizer, lambda text: tokenizer(text, truncation=True, max_length=spec.max_length), spec)


def reference(variant: str, spec: EncoderSpec) -> Callable[[Any], np.ndarray]:
    """transformers' own processor and model over one picture or text, in float32."""
    loaded = _load(variant, spec)
    if spec.modality == "image":
        tower = ImageTower(loaded, [spec])
        network, inputs_of, kept = tower.network(), tower.pictures, kept_patches
    else:
        network, inputs_of, kept = loaded.text_network(), partial(loaded.texts, spec), kept_tokens
    return lambda content: plain_call(network, spec, inputs_of(content), kept)


@dataclass(frozen=True)
class Loaded:
    """A model in float32 with its processor: that of pictures, or of both modalities where the model has two towers."""

    checkpoint: Checkpoint
    model: Any
    processor: Any
    lacks_pooler: bool  # its files have no weights of a pooler, so what the pooler gives is random

    def texts(self, spec: EncoderSpec, text: str) -> dict[str, Tensor]:
        """The inputs of one text, with an axis of samples."""
        given = {"padding": self.checkpoint.padding, "truncation": True, "max_length": spec.max_length}
        return dict(self.processor(text=[CLEANING[spec.cleaning](text)], return_tensors="pt", **given))

    def text_network(self) -> Network:
        """Forward pass over token ids, layers and tokens of the text tower."""
        tower, taken = self.part("text_model"), self.processor.tokenizer.model_input_names

        def forward(inputs: dict[str, Tensor]) -> Tensor:
            return pooled(self.model.get_text_features(**{name: inputs[name] for name in taken if name in inputs}))

        return Network(forward, model_layers(tower), Point(tower))

    def part(self, name: str) -> Any:
        """One tower of a model with two. Raises `EncoderError` for a model that is built in another way."""
        if (part := getattr(self.model, name, None)) is None:
            kind = type(self.model).__name__
            raise EncoderError(f"{self.checkpoint.name}: {kind} has no {name} as CLIP has it; use another checkpoint")
        return part


class TextTower:
    """The text tower of a model with two towers, behind its tokenizer."""

    def __init__(self, loaded: Loaded, spec: EncoderSpec) -> None:
        self.loaded, self.spec, self.tokenizer = loaded, spec, loaded.processor.tokenizer
        self.check = check_fit(loaded.checkpoint.name, self.tokenizer, loaded.part("text_model"))
        self.cuts = watch_cuts(self.tokenizer)
        self.is_padded = loaded.checkpoint.padding == FIXED

    def torch_tower(self, specs: list[EncoderSpec]) -> TorchTower:
        """The tower; where texts are padded to the longest, padding is behind a text and changes no vector."""
        tower = TorchTower(
            tuple(specs),
            self.loaded.model,
            self.loaded.text_network(),
            self.prepare,
            self.collate,
            keep=kept_tokens,
            stand_in=self.stand_in,
        )
        if self.is_padded:
            return tower
        self.tokenizer.padding_side = "right"
        return without_padding(
            self.loaded.checkpoint.name, replace(tower, length=lambda inputs: len(inputs["input_ids"]))
        )

    def prepare(self, text: str) -> Tokens:
        text = CLEANING[self.spec.cleaning](text)
        self.check(text)
        mask = {} if self.is_padded else {"return_attention_mask": True}
        given = self.tokenizer(text, truncation=True, max_length=self.spec.max_length, **mask)
        return Tokens.of(given, self.cuts)

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """(B, T) tensors, padded to the longest text or to the length that the model was trained with."""
        length = {"max_length": self.spec.max_length} if self.is_padded else {"return_attention_mask": True}
        padding = self.loaded.checkpoint.padding
        return dict(self.tokenizer.pad(batch, padding=padding, return_tensors="pt", **length))

    def stand_in(self, mask: Tensor) -> dict[str, Tensor]:
        """Inputs with the lengths that a (B, T) mask says; a model like CLIP pools at the last, an end token."""
        import torch

        end = getattr(self.loaded.model.config.text_config, "eos_token_id", None) or 1
        ids = torch.zeros_like(mask, dtype=torch.long).scatter_(1, mask.sum(1, keepdim=True) - 1, end)
        return {
            name: value for name, value in (("input_ids", ids), ("attention_mask", mask.long())) if name in self._given
        }

    @cached_property
    def _given(self) -> set[str]:
        """The names of the model's inputs."""
        return set(self.prepare("a"))


def kept_tokens(inputs: dict[str, Tensor]) -> Tensor | None:
    """(B, T) whether each token is no padding; None where the model is not told."""
    return inputs["attention_mask"].bool() if "attention_mask" in inputs else None


def _load(variant: str, spec: EncoderSpec) -> Loaded:
    """The checkpoint with all its weights in float32."""
    transformers = quiet_transformers()
    import torch

    checkpoint = read_checkpoint(variant)
    loader = transformers.AutoModel
    if checkpoint.architecture.endswith("VisionModelWithProjection"):  # AutoModel would leave the projection out
        loader = getattr(transformers, checkpoint.architecture)
    processor = checkpoint.processor(spec)
    with checkpoint.load_errors():
        model, info = loader.from_pretrained(
            checkpoint.place,
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # the library would print a table of them; they are refused below
            **checkpoint.pinned(spec),
        )
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    checkpoint.check_complete(missing, info["mismatched_keys"])
    return Loaded(checkpoint, model.eval().requires_grad_(False), processor, bool(info["missing_keys"]))
