"""The image tower of a model of transformers: its pictures, its vector, and another pooling or size than its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.bert import model_layers
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
from mmfeat.encoders.spec import EncoderSpec
from mmfeat.encoders.torch_tower import TorchTower, stack
from mmfeat.encoders.weights import one_line
from mmfeat.errors import EncoderError

if TYPE_CHECKING:
    from torch import Tensor

    from mmfeat.encoders.transformers_models import Loaded

PROBES = ((40, 48), (64, 37))  # height, width of the pictures that show what a model gives
NORMS = ("layernorm", "norm", "post_layernorm", "layer_norm")  # how models call the norm behind their layers
OWN = ("tower", "none")  # poolings that are the model's


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
        """Forward pass over pixels, layers and tokens."""
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
    """B prepared pictures as one batch."""
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
