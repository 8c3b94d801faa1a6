"""What the files of a checkpoint of transformers say: its towers, how pictures are prepared, and the length of texts.

Common checkpoints are read without importing transformers, since each command describes its encoders.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmfeat.encoders.bert import quiet_transformers
from mmfeat.encoders.source import Source, own_code
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.tokenizer import FILES, check_files, tokenizer_errors
from mmfeat.encoders.weights import checkpoint_json
from mmfeat.errors import EncoderError
from mmfeat.system.files import canonical_json

LONGEST, FIXED = "longest", "max_length"  # transformers' names for padding
# Model types with two towers: number of positions where the configuration leaves it out, and padding in training.
DOUBLE_MODELS = {"clip": (77, LONGEST), "siglip": (64, FIXED), "siglip2": (64, FIXED)}
PLAIN_TRANSFORMERS = (
    "vit", "deit", "beit", "data2vec-vision", "dinov2", "dinov2_with_registers", "dinov3_vit", "ijepa", "vit_msn",
    "clip_vision_model", "siglip_vision_model", "siglip2_vision_model",
)  # fmt: skip
IMAGE_MODELS = (*PLAIN_TRANSFORMERS, "swin", "swinv2", "convnext", "convnextv2", "dinov3_convnext", "resnet", "regnet")
SIZES = ("size", "crop_size")
_SCALING = ("do_resize", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
_CROPPING = ("size", "do_center_crop", "crop_size")
# Image processors, and the settings that complete a file of each; any other file is completed by the library.
_SETTINGS = {
    "CLIPImageProcessor": (*_SCALING, *_CROPPING),
    "BitImageProcessor": (*_SCALING, *_CROPPING),
    "ViTImageProcessor": (*_SCALING, "size"),
    "SiglipImageProcessor": (*_SCALING, "size"),
    "DINOv3ViTImageProcessor": (*_SCALING, "size"),
    "ConvNextImageProcessor": (*_SCALING, "size", "crop_pct"),
}
# Entries of a processor's file that change no pixel of an RGB picture.
_ASIDE = (
    "image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "transformers_version",
    "do_convert_rgb", "return_tensors", "data_format", "input_data_format", "device", "disable_grouping",
    "image_seq_length", "use_fast", "backend",
)  # fmt: skip


def read_checkpoint(variant: str) -> Checkpoint:
    """The checkpoint that `variant` names. Raises `EncoderError` for one that has no image tower of transformers."""
    source = Source("hf", variant)
    source.check_form()
    config = source.read_config()
    return Checkpoint("hf", variant, source.kind_of(config), config)


@dataclass(frozen=True)
class Checkpoint(Source):
    """A checkpoint with an image tower, by its files: `model_type` and `config` are those of its `config.json`."""

    model_type: str
    config: Mapping[str, Any]

    @property
    def is_plain_transformer(self) -> bool:
        """Whether pictures go through a plain vision transformer, and no convolutions or windows."""
        return self.model_type in PLAIN_TRANSFORMERS or self.model_type in DOUBLE_MODELS

    @property
    def architecture(self) -> str:
        """The class that saved the checkpoint, "" if unknown."""
        return str((self.config.get("architectures") or [""])[0])

    @cached_property
    def has_text(self) -> bool:
        """Whether there is a text tower beside the image tower. Raises `EncoderError` where there is no image tower."""
        if self.model_type in DOUBLE_MODELS:
            return True
        return self.model_type not in IMAGE_MODELS and self._is_two_towers_by_library()

    @cached_property
    def padding(self) -> str:
        """How texts are padded: to the longest of a batch, or to the length that the model was trained with."""
        return DOUBLE_MODELS[self.model_type][1] if self.model_type in DOUBLE_MODELS else self._padded[0]

    @cached_property
    def text_length(self) -> int:
        """Most tokens of a text: the positions of the model, or fewer where its tokenizer says so."""
        if self.model_type not in DOUBLE_MODELS:
            return self._padded[1]
        text = self.config.get("text_config") or {}
        positions = text.get("max_position_embeddings", DOUBLE_MODELS[self.model_type][0])
        tokenizer = checkpoint_json(self.variant, "tokenizer_config.json") or {}
        return int(min(positions, tokenizer.get("model_max_length") or positions))

    @cached_property
    def image_settings(self) -> dict[str, Any]:
        """All that changes a pixel: size, crop, mean, ..., and the class of the image processor."""
        given = self._processor_file()
        kind = given.get("image_processor_type") or str(given.get("feature_extractor_type", ""))
        kind = kind.removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
        settings = {**_pixel_settings(given), "processor": kind}
        needed = _SETTINGS.get(kind)
        sizes = [settings.get(name, {}) for name in ("size", "crop_size")]
        is_complete = needed and not set(needed) - set(settings) and all(isinstance(size, dict) for size in sizes)
        return settings if is_complete else image_settings(self.processor())

    def settings(self, size: tuple[int, int] | None) -> dict[str, Any]:
        """The settings for pictures of another (height, width) than the checkpoint's own, or for its own."""
        return resized(self.name, self.image_settings, size) if size else self.image_settings

    def asked_sizes(self, processor: Any, spec: EncoderSpec) -> dict[str, Any]:
        """The sizes in the spec that are not those of a loaded processor, as arguments of it.

        Raises `EncoderError` where the processor differs from the spec in anything else.
        """
        described, loaded = json.loads(spec.transform), image_settings(processor)
        apart = {name: value for name, value in described.items() if loaded.get(name, value) != value}
        if wrong := {name: loaded[name] for name in apart if name not in SIZES}:
            raise EncoderError(
                f"{spec.name}: transformers prepares pictures with {canonical_json(wrong)}, the spec says "
                f"{spec.transform}"
            )
        return apart

    @cached_property
    def remote_code(self) -> int:
        """1 where code of the checkpoint will run. Raises `EncoderError` where it is needed without consent."""
        return own_code(self.name, self.variant)

    def arguments(self, spec: EncoderSpec | None = None) -> dict[str, Any]:
        """Arguments of every `from_pretrained`; without a spec, of the newest revision."""
        return self.pinned(spec) if spec else {"trust_remote_code": bool(self.remote_code)}

    def processor(self, spec: EncoderSpec | None = None) -> Any:
        """The processor of pictures; of pictures and texts where there are two towers."""
        self._processor_file()
        transformers = quiet_transformers()
        if not self.has_text:
            with self.load_errors():
                return transformers.AutoImageProcessor.from_pretrained(self.place, **self.arguments(spec))
        check_files(self.name, self.variant, FILES)
        with self.load_errors(), tokenizer_errors(self.name, self.variant):
            return transformers.AutoProcessor.from_pretrained(self.place, **self.arguments(spec))

    def _processor_file(self) -> dict[str, Any]:
        """The settings in the file of the image processor. Raises `EncoderError` where there is no file."""
        nested = checkpoint_json(self.variant, "processor_config.json") or {}
        given = nested.get("image_processor") or checkpoint_json(self.variant, "preprocessor_config.json")
        if not isinstance(given, dict):
            raise EncoderError(
                f"{self.name}: preprocessor_config.json is missing, which says how pictures are prepared; copy it from "
                "where the weights come from"
            )
        return given

    @cached_property
    def _padded(self) -> tuple[str, int]:
        """Padding and length by the library: a short text shows whether the processor pads to a fixed length."""
        transformers, processor = quiet_transformers(), self.processor()
        columns, tokens = len(processor(text=["a"])["input_ids"][0]), len(processor.tokenizer("a")["input_ids"])
        if columns > tokens:
            return FIXED, columns
        with self.load_errors():
            config = transformers.AutoConfig.from_pretrained(self.place, **self.arguments())
        positions = getattr(config.text_config, "max_position_embeddings", 512)
        return LONGEST, int(min(positions, processor.tokenizer.model_max_length))

    def _is_two_towers_by_library(self) -> bool:
        """Whether transformers' model has a text tower, for a type that is not listed here."""
        transformers = quiet_transformers()
        from transformers.models.auto import modeling_auto

        if self.model_type not in transformers.CONFIG_MAPPING:
            if self.remote_code:
                return {"text_config", "vision_config"} <= set(self.config)
            raise EncoderError(f"{self.name}: transformers has no model type {self.model_type!r}; install a newer one")
        config = transformers.CONFIG_MAPPING[self.model_type]
        model = transformers.MODEL_MAPPING.get(config, object)
        if hasattr(model, "get_image_features") and hasattr(model, "get_text_features"):
            return True
        is_video = self.model_type in modeling_auto.MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES
        is_image = self.model_type in modeling_auto.MODEL_FOR_IMAGE_MAPPING_NAMES and not is_video
        if is_image or (not is_video and getattr(model, "input_modalities", ()) in ("image", ("image",))):
            return False
        if getattr(model, "main_input_name", "") == "input_ids" and not hasattr(model, "get_image_features"):
            raise EncoderError(
                f"{self.name}: {self.model_type} is a text model; name st:{self.variant} or bert:{self.variant}"
            )
        raise EncoderError(f"{self.name}: {self.model_type} is no encoder of pictures; use another checkpoint")


def image_settings(processor: Any) -> dict[str, Any]:
    """All that changes a pixel, of a loaded processor; one of both modalities may overrule its image processor."""
    part = getattr(processor, "image_processor", processor)
    overruled = getattr(processor, "images_kwargs", None) or {}
    return {**_pixel_settings({**part.to_dict(), **overruled}), "processor": type(part).__name__}


def _pixel_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values by name, without those that change no pixel."""
    return {name: _plain(value) for name, value in given.items() if name not in _ASIDE and _plain(value) is not None}


def _plain(value: Any) -> Any:
    """A JSON value; None for a size without numbers."""
    if isinstance(value, Mapping):
        return {name: number for name, number in value.items() if number is not None} or None
    return list(value) if isinstance(value, tuple) else value


def resized(name: str, settings: dict[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """The settings of a processor that gives pictures of another (height, width), cropped by the same share."""
    asked = {"height": size[0], "width": size[1]}
    before = settings.get("size")
    if not isinstance(before, dict):
        raise EncoderError(f"--image-size: {name} takes photos in any shape; leave it out")
    if "crop_pct" in settings:
        if size[0] != size[1]:
            raise EncoderError(
                f"--image-size {size[0]}x{size[1]}: the processor of {name} gives squares; use one number"
            )
        return {**settings, "size": {"shortest_edge": size[0]}}
    crop = settings.get("crop_size")
    if not settings.get("do_center_crop") or not isinstance(crop, dict):
        return {**settings, "size": asked}
    share = max(asked[side] / crop[side] for side in asked)
    return {**settings, "size": {side: round(number * share) for side, number in before.items()}, "crop_size": asked}
