"""Image models of transformers, and both towers of its models like CLIP. Variants: a hub name or a local folder.

The vector is that of the library's own call: `get_image_features` and `get_text_features` of a model with two towers;
of an image model its `pooler_output`, else the class token, else the mean of all tokens. An image tower may have
another pooling or size than its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.bert import model_layers, quiet_transformers
from mmfeat.encoders.layers import (
    TOLERANCE,
    Network,
    Point,
    capture,
    check_layers,
    find_layers,
    hidden_states,
    no_class_token,
    no_hidden_states,
    rows_of,
)
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.tokenizer import cuts_of, preparing
from mmfeat.encoders.torch_tower import TorchTower, plain_call, stack, without_padding
from mmfeat.encoders.transformers_files import FIXED, Checkpoint, read_checkpoint
from mmfeat.encoders.weights import one_line
from mmfeat.errors import EncoderError
from mmfeat.samples.contents import CLEANING
from mmfeat.system.files import canonical_json

if TYPE_CHECKING:
    from torch import Tensor

PROBES = ((40, 48), (64, 37))  # height, width of the pictures that show what a model gives
NORMS = ("layernorm", "norm", "post_layernorm", "layer_norm")  # how models call the norm behind their layers
OWN = ("tower", "none")  # poolings that are the model's


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
        towers.append(text_tower(loaded, texts))
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


def text_tower(loaded: Loaded, specs: list[EncoderSpec]) -> TorchTower:
    """The text tower of a model with two towers, behind its tokenizer.

    Where texts are padded to the longest, padding is behind a text and changes no vector.
    """
    import torch

    spec, checkpoint, tokenizer = specs[0], loaded.checkpoint, loaded.processor.tokenizer
    is_padded = checkpoint.padding == FIXED
    mask_too = {} if is_padded else {"return_attention_mask": True}
    prepare = preparing(checkpoint.name, tokenizer, loaded.part("text_model"), spec, **mask_too)

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        length = {"max_length": spec.max_length} if is_padded else mask_too
        return dict(tokenizer.pad(batch, padding=checkpoint.padding, return_tensors="pt", **length))

    def stand_in(mask: Tensor) -> dict[str, Tensor]:  # a model like CLIP pools at the last token, an end
        end = getattr(loaded.model.config.text_config, "eos_token_id", None) or 1
        ids = torch.zeros_like(mask, dtype=torch.long).scatter_(1, mask.sum(1, keepdim=True) - 1, end)
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        return {name: inputs[name] for name in inputs if name in prepare("a")}

    network = loaded.text_network()
    tower = TorchTower(tuple(specs), loaded.model, network, prepare, collate, keep=kept_tokens, stand_in=stand_in)
    if is_padded:
        return tower
    tokenizer.padding_side = "right"
    return without_padding(checkpoint.name, replace(tower, length=lambda inputs: len(inputs["input_ids"])))


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


class ImageTower:
    """The image tower of a loaded model, tried on two pictures, for the outputs in `specs`.

    Raises `EncoderError` for a model that gives no vector of a picture, or another one at each call, and for a size, a
    pooling or a number of layers that it cannot have.
    """

    def __init__(self, loaded: Loaded, specs: list[EncoderSpec]) -> None:
        self.loaded, self.model, self.specs = loaded, loaded.model, specs
        self.spec = next((spec for spec in specs if spec.output == "pooled"), specs[0])
        has_text = loaded.checkpoint.has_text
        self.tower = loaded.part("vision_model") if has_text else self.model
        self.method = self.model.get_image_features if has_text else self.model
        self.layers = model_layers(self.tower) or find_layers(getattr(self.tower, "encoder", self.tower))
        self.asked = loaded.checkpoint.asked_sizes(loaded.processor, self.spec)
        takes_any = (
            "interpolate_pos_encoding" in inspect.signature(getattr(self.method, "forward", self.method)).parameters
        )
        self.arguments = {"interpolate_pos_encoding": True} if self.asked and takes_any else {}
        self._try_out()

    def network(self) -> Network:
        hooked = self.spec.layers > 1
        return Network(self.vectors, self.layers, Point(self.tower), hooked=hooked)

    def torch_tower(self) -> TorchTower:
        return TorchTower(tuple(self.specs), self.model, self.network(), self.prepare, collate, keep=kept_patches)

    def pictures(self, image: Any) -> Any:
        """The inputs of one RGB picture, with an axis of samples: pixels, or several tensors by name."""
        inputs = dict(self.loaded.processor(images=image, return_tensors="pt", **self.asked))
        return inputs["pixel_values"] if len(inputs) == 1 else inputs

    def prepare(self, image: Any) -> Any:
        """The inputs of one RGB picture without an axis of samples."""
        inputs = self.pictures(image)
        return {name: value[0] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[0]

    def call(self, inputs: Any) -> Any:
        """The model output for a batch of pictures."""
        given = inputs if isinstance(inputs, dict) else {"pixel_values": inputs}
        return self.method(**given, **self.arguments)

    def vectors(self, inputs: Any) -> Tensor:
        """(B, D): the model's own vectors, or those of the pooling and the layers that the spec asks for."""
        import torch

        if self.spec.pooling in OWN and self.spec.layers == 1:
            return self.own(self.call(inputs))
        points = hidden_states(self.layers, self.spec)
        with capture(points) as hidden:
            output = self.call(inputs)
        states = torch.stack([self.norm(state) for state in hidden]).mean(0) if points else rows(output)
        kept = kept_patches(inputs)
        return torch.cat([self._part(states, name, kept) for name in self.poolings], 1)

    def _part(self, states: Tensor, pooling: str, kept: Tensor | None) -> Tensor:
        """(B, D) of states (B, T, D): the class token, or the mean of the patches, of which a mask may hide some."""
        if pooling == "cls":
            return states[:, 0]
        patches = states[:, self.prefix :]
        if kept is None:
            return patches.mean(1)
        weights = kept.unsqueeze(-1).to(patches.dtype)
        return (patches * weights).sum(1) / weights.sum(1)

    def _try_out(self) -> None:
        """Choose how a vector is made, by what the model gives for two pictures."""
        import torch

        kind = type(self.model).__name__
        inputs, first, hidden = self._tried(hidden_states(self.layers, self.spec))
        _, second, _ = self._tried([])
        names = [name for name, _ in self.tower.named_parameters()]
        self.classed = any(name.endswith(("cls_token", "class_embedding")) for name in names)
        self.own: Callable[[Any], Tensor] = pooled
        if self.loaded.lacks_pooler or pooled(first) is None:
            self.own = (lambda output: output.last_hidden_state[:, 0]) if self.classed else lambda o: rows(o).mean(1)
            is_decoder = getattr(self.model.config, "is_encoder_decoder", False)  # detectors of objects are such models
            if is_decoder or not isinstance(getattr(first, "last_hidden_state", None), torch.Tensor):
                raise EncoderError(f"{self._name}: {kind} gives no vector of a picture; use another checkpoint")
        if not torch.allclose(self.own(first), self.own(second), rtol=1e-3, atol=1e-3):
            raise EncoderError(
                f"{self._name}: {kind} gives another vector of a picture at each call, as it hides random parts; use a "
                "checkpoint that does not"
            )
        self.prefix = self._aside(inputs, rows(first)) if self.classed else 0
        if self.spec.pooling not in OWN or self.spec.layers > 1:
            self._choose_pooling(first)
            self._choose_norm(hidden, first)

    def _tried(self, points: list[Point]) -> tuple[Any, Any, list[Tensor]]:
        """Inputs of two pictures of noise, the model output, and the values at points of the pass."""
        import torch
        from PIL import Image

        noise = np.random.default_rng(0)
        images = [Image.fromarray(noise.integers(0, 256, (*size, 3), np.uint8)) for size in PROBES]
        try:
            inputs = collate([self.prepare(image) for image in images])
            if self.asked and (patch := self._patch) and any(side % patch for side in inputs.shape[-2:]):
                raise EncoderError(f"its patches are {patch} pixels wide; use multiples of {patch}")
            with torch.no_grad(), capture(points) as hidden:
                return inputs, self.call(inputs), hidden
        except Exception as error:  # each model has errors of its own
            reason = one_line(error)
            if self.asked:
                raise EncoderError(f"--image-size: {self.spec.model} cannot take this size ({reason})") from error
            raise EncoderError(
                f"{self._name}: {type(self.model).__name__} cannot take what its processor makes of pictures "
                f"({reason}); name the size of the model, as in --image-size hf=224"
            ) from error

    def _choose_pooling(self, output: Any) -> None:
        """Set the poolings: those asked for, or for several layers the one that the model's own vector is."""
        self.poolings = self.spec.pooling.split("+")
        if self.spec.pooling in OWN:
            vector, states = self.own(output), rows(output)
            parts = {name: self._part(states, name, None) for name in ("cls", "mean")}
            alike = [name for name, part in parts.items() if part.shape == vector.shape and _close(part, vector)]
            if not alike:
                raise EncoderError(
                    f"--layers {self.spec.layers}: {self.spec.model} has layers of its own behind the pooling; add "
                    "--image-pooling mean, or leave it out"
                )
            self.poolings = alike[:1]
        if "cls" in self.poolings and not self.classed:
            raise no_class_token(self.spec)

    def _choose_norm(self, hidden: list[Tensor], output: Any) -> None:
        """Set the norm between the last layer and the tokens, the one of `NORMS` or none with which both agree."""
        check_layers(self.spec, len(self.layers))
        final = rows(output)
        norms = [lambda states: states, *(getattr(self.tower, name) for name in NORMS if hasattr(self.tower, name))]
        if hidden and all(state.shape == final.shape for state in hidden):
            norms = [norm for norm in norms if _close(norm(hidden[-1]), final)]
        elif hidden:
            norms = []
        if not norms:
            raise no_hidden_states(self.spec)
        self.norm: Callable[[Tensor], Tensor] = norms[0]

    def _aside(self, inputs: Any, states: Tensor) -> int:
        """The number of tokens before the patches: a class token, registers, a token of distillation."""
        if isinstance(inputs, dict) or not self._patch:
            return 1
        height, width = inputs.shape[-2:]
        return max(1, states.shape[1] - (height // self._patch) * (width // self._patch))

    @property
    def _patch(self) -> int:
        """The width of a patch in pixels, 0 where there are none."""
        size = getattr(self.tower.config, "patch_size", 0)
        return size if isinstance(size, int) and self.loaded.checkpoint.is_plain_transformer else 0

    @property
    def _name(self) -> str:
        return self.loaded.checkpoint.name


def collate(batch: list[Any]) -> Any:
    if isinstance(batch[0], dict):
        return {name: stack([inputs[name] for inputs in batch]) for name in batch[0]}
    return stack(batch)


def kept_patches(inputs: Any) -> Tensor | None:
    """(B, T) whether each patch is of the picture; None where all are."""
    mask = inputs.get("pixel_attention_mask") if isinstance(inputs, dict) else None
    return None if mask is None else mask.bool()


def pooled(output: Any) -> Any:
    """(B, D) of a model output: projected, else pooled; the output itself is a tensor in older versions."""
    vector = getattr(output, "image_embeds", None)
    vector = getattr(output, "pooler_output", output) if vector is None else vector
    return vector.flatten(1) if hasattr(vector, "flatten") else None


def rows(output: Any) -> Tensor:
    """(B, T, D): the last hidden states, those of a feature map position by position."""
    return rows_of(output, "NCHW")


def _close(one: Tensor, other: Tensor) -> bool:
    import torch

    return torch.allclose(one, other, atol=TOLERANCE, rtol=TOLERANCE)
