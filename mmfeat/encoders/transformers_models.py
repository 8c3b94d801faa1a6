"""Image models of transformers, and both towers of its models like CLIP. Variants: a hub name or a local folder.

The vector is that of the library's own call: `get_image_features` and `get_text_features` of a model with two towers;
of an image model its `pooler_output`, else the class token, else the mean of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.bert import model_layers, quiet_transformers
from mmfeat.encoders.layers import Network, Point, find_layers
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.tokenizer import check_fit
from mmfeat.encoders.torch_tower import TorchTower, plain_call, stack
from mmfeat.encoders.transformers_files import LONGEST, Checkpoint, read_checkpoint
from mmfeat.encoders.weights import hub_revision, local_path, path_identity
from mmfeat.errors import EncoderError
from mmfeat.samples.contents import CLEANING
from mmfeat.system.files import canonical_json

if TYPE_CHECKING:
    from torch import Tensor

PROBES = ((40, 48), (64, 37))  # height, width of the pictures that show what a model gives


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of the image tower, and of the text tower where there is one; common checkpoints are only read."""
    if not variant:
        raise EncoderError("hf: name a checkpoint, as in hf:facebook/dinov2-base, or a local folder, hf:FOLDER")
    folder = local_path(variant)
    checkpoint = read_checkpoint(variant)
    has_text = checkpoint.has_text  # raises for a model without an image tower
    options = options.for_model("vit" if checkpoint.is_plain_transformer else checkpoint.model_type)
    image = EncoderSpec(
        family="hf",
        modality="image",
        variant=folder.resolve().name if folder else variant,
        weights=path_identity(folder) if folder else f"revision:{hub_revision(variant)}",
        preprocessing=canonical_json(checkpoint.image_settings),
        arithmetic=options.dtype,
        storage=options.storage,
    )
    if not has_text:
        return [image]
    padding = canonical_json({"padding": checkpoint.padding})
    length = checkpoint.text_length
    return [image, replace(image, modality="text", preprocessing=padding, cleaning=options.cleaning, max_length=length)]


def open_towers(variant: str, specs: list[EncoderSpec]) -> list[TorchTower]:
    """Load the model once and return the towers of the modalities in `specs`."""
    loaded = _load(variant, specs[0])
    towers = []
    if images := [spec for spec in specs if spec.modality == "image"]:
        loaded.checkpoint.check_settings(loaded.processor, images[0])
        network = loaded.image_network()
        towers.append(
            TorchTower(
                tuple(images), loaded.model, network, loaded.picture, _collate, keep=_mask("pixel_attention_mask")
            )
        )
    if texts := [spec for spec in specs if spec.modality == "text"]:
        towers.append(TextTower(loaded, texts[0]).tower(texts))
    return towers


def reference(variant: str, spec: EncoderSpec) -> Callable[[Any], np.ndarray]:
    """transformers' own processor and model over one picture or text, in float32."""
    loaded = _load(variant, spec)
    if spec.modality == "image":
        network, kept = loaded.image_network(), _mask("pixel_attention_mask")
    else:
        network, kept = loaded.text_network(), _mask("attention_mask")

    def encode(content: Any) -> np.ndarray:
        inputs = loaded.pictures(content) if spec.modality == "image" else loaded.texts(content, spec)
        values = plain_call(network, spec, inputs)
        mask = kept(inputs) if spec.output != "pooled" else None
        return values if mask is None else values[mask[0].numpy()]

    return encode


@dataclass(frozen=True)
class Loaded:
    """A model in float32 with its processor: that of pictures, or of both modalities where the model has two towers."""

    checkpoint: Checkpoint
    model: Any
    processor: Any
    lacks_pooler: bool  # its files have no weights of a pooler, so what the pooler gives is random

    def pictures(self, image: Any) -> Any:
        """The inputs of one RGB picture, with an axis of samples: pixels, or several tensors by name."""
        inputs = dict(self.processor(images=image, return_tensors="pt"))
        return inputs["pixel_values"] if len(inputs) == 1 else inputs

    def picture(self, image: Any) -> Any:
        """The inputs of one RGB picture without an axis of samples."""
        inputs = self.pictures(image)
        return {name: value[0] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[0]

    def texts(self, text: str, spec: EncoderSpec) -> dict[str, Tensor]:
        """The inputs of one text, with an axis of samples."""
        given = {"padding": self.checkpoint.padding, "truncation": True, "max_length": spec.max_length}
        return dict(self.processor(text=[CLEANING[spec.cleaning](text)], return_tensors="pt", **given))

    def image_network(self) -> Network:
        """Forward pass over pixels, layers and tokens of the image tower, after a trial."""
        tower = self.model.vision_model if self.checkpoint.has_text else self.model
        call = self.model.get_image_features if self.checkpoint.has_text else self.model
        vector = self._trial(call)

        def forward(inputs: Any) -> Tensor:
            return vector(call(**inputs) if isinstance(inputs, dict) else call(pixel_values=inputs))

        return Network(forward, model_layers(tower) or find_layers(getattr(tower, "encoder", tower)), Point(tower))

    def text_network(self) -> Network:
        """Forward pass over token ids, layers and tokens of the text tower."""
        tower = self.model.text_model
        return Network(
            lambda inputs: _pooled(self.model.get_text_features(**inputs)), model_layers(tower), Point(tower)
        )

    def _trial(self, call: Callable[..., Any]) -> Callable[[Any], Tensor]:
        """The function from a model output to vectors (B, D), chosen by what the model gives for two pictures.

        Raises `EncoderError` for a model that gives no vector, or another one at each call.
        """
        import torch

        name, kind = self.checkpoint.name, type(self.model).__name__
        first, second = self._tried(call), self._tried(call)
        vector: Callable[[Any], Tensor] = _pooled
        if self.lacks_pooler or _pooled(first) is None:
            parameters = (parameter for parameter, _ in self.model.named_parameters())
            vector = _class_token if any(parameter.endswith("cls_token") for parameter in parameters) else _mean_token
            is_decoder = getattr(self.model.config, "is_encoder_decoder", False)  # as detectors of objects are
            if is_decoder or not isinstance(getattr(first, "last_hidden_state", None), torch.Tensor):
                raise EncoderError(f"{name}: {kind} gives no vector of a picture; use another checkpoint")
        if not torch.allclose(vector(first), vector(second), rtol=1e-3, atol=1e-3):
            raise EncoderError(
                f"{name}: {kind} gives another vector of a picture at each call, as it hides random parts; use a "
                "checkpoint that does not"
            )
        return vector

    def _tried(self, call: Callable[..., Any]) -> Any:
        """The model output for two pictures of noise. Raises `EncoderError` where pictures do not fit the model."""
        import torch
        from PIL import Image

        noise = np.random.default_rng(0)
        pictures = [Image.fromarray(noise.integers(0, 256, (*size, 3), np.uint8)) for size in PROBES]
        try:
            batch = _collate([self.picture(image) for image in pictures])
            with torch.no_grad():
                return call(**batch) if isinstance(batch, dict) else call(pixel_values=batch)
        except Exception as error:  # each model has errors of its own
            raise EncoderError(
                f"{self.checkpoint.name}: {type(self.model).__name__} cannot take what its processor makes of pictures "
                f"({' '.join(str(error).split())[:160]}); preprocessor_config.json has to give pictures of one size, "
                "that of the model"
            ) from error


class TextTower:
    """The text tower of a model with two towers, behind its tokenizer."""

    def __init__(self, loaded: Loaded, spec: EncoderSpec) -> None:
        self.loaded, self.spec, self.padding = loaded, spec, loaded.checkpoint.padding
        self.tokenizer = loaded.processor.tokenizer
        self.check = check_fit(loaded.checkpoint.name, self.tokenizer, loaded.model.text_model)
        if self.padding == LONGEST:  # padding behind a text leaves its vector unchanged
            self.tokenizer.padding_side = "right"

    def tower(self, specs: list[EncoderSpec]) -> TorchTower:
        network, length = self.loaded.text_network(), (lambda inputs: len(inputs["input_ids"]))
        return TorchTower(
            tuple(specs),
            self.loaded.model,
            network,
            self.prepare,
            self.collate,
            keep=_mask("attention_mask"),
            stand_in=self.stand_in,
            length=length if self.padding == LONGEST else None,
        )

    def prepare(self, text: str) -> dict[str, Any]:
        text = CLEANING[self.spec.cleaning](text)
        self.check(text)
        return dict(self.tokenizer(text, truncation=True, max_length=self.spec.max_length))

    def collate(self, batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        """(B, T) tensors, padded to the longest text or to the length that the model was trained with."""
        length = {} if self.padding == LONGEST else {"max_length": self.spec.max_length}
        return dict(self.tokenizer.pad(batch, padding=self.padding, return_tensors="pt", **length))

    def stand_in(self, mask: Tensor) -> dict[str, Tensor]:
        """Inputs with the lengths that a (B, T) mask says; a model like CLIP pools at the last, an end token."""
        import torch

        end = getattr(self.loaded.model.config.text_config, "eos_token_id", None) or 1
        ids = torch.zeros_like(mask, dtype=torch.long).scatter_(1, mask.sum(1, keepdim=True) - 1, end)
        return {"input_ids": ids, **({"attention_mask": mask.long()} if self._has_mask else {})}

    @cached_property
    def _has_mask(self) -> bool:
        return "attention_mask" in self.prepare("")


def _mask(name: str) -> Callable[[Any], Tensor | None]:
    """A function from inputs to their (B, T) mask of that name; None where they have none."""
    return lambda inputs: inputs[name].bool() if isinstance(inputs, dict) and name in inputs else None


def _collate(batch: list[Any]) -> Any:
    """B prepared pictures as one batch."""
    if isinstance(batch[0], dict):
        return {name: stack([inputs[name] for inputs in batch]) for name in batch[0]}
    return stack(batch)


def _pooled(output: Any) -> Any:
    """(B, D) of a model output: projected, else pooled; the output itself is a tensor in older versions."""
    pooled = getattr(output, "image_embeds", None)
    pooled = getattr(output, "pooler_output", output) if pooled is None else pooled
    return pooled.flatten(1) if hasattr(pooled, "flatten") else None


def _class_token(output: Any) -> Tensor:
    return output.last_hidden_state[:, 0]


def _mean_token(output: Any) -> Tensor:
    """(B, D): the mean of (B, T, D), or of feature maps (B, D, H, W)."""
    hidden = output.last_hidden_state
    return hidden.flatten(2).mean(2) if hidden.ndim == 4 else hidden.mean(1)


def _load(variant: str, spec: EncoderSpec) -> Loaded:
    """The checkpoint with all its weights in float32. Its own code is never run."""
    transformers = quiet_transformers()
    import torch

    checkpoint = read_checkpoint(variant)
    loader = transformers.AutoModel
    if checkpoint.projects:  # AutoModel would leave the projection out
        loader = getattr(transformers, checkpoint.architecture)
    processor = checkpoint.processor(spec)
    with checkpoint.load_errors():
        model, info = loader.from_pretrained(
            checkpoint.source,
            output_loading_info=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # the library would print a table of them; they are refused below
            **checkpoint.pinned(spec),
        )
    if lost := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
        raise EncoderError(f"{checkpoint.name}: the weights lack {', '.join(lost[:3])}; use a complete checkpoint")
    if other := sorted(info["mismatched_keys"]):
        name, found, wanted = other[0]
        raise EncoderError(
            f"{checkpoint.name}: {name} has the shape {tuple(found)}, its config.json wants {tuple(wanted)}; use a "
            "complete checkpoint"
        )
    return Loaded(checkpoint, model.eval().requires_grad_(False), processor, bool(info["missing_keys"]))
