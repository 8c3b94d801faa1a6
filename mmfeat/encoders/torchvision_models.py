"""Image encoders of torchvision without their classifier.

Variants of `resnet50` and its siblings: a weights name (`IMAGENET1K_V2`; default `DEFAULT`) or a local
`.pth` / `.safetensors` state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.layers import Network, Point, find_layers, repooled
from mmfeat.encoders.pixels import check_size, image_tower
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.torch_tower import TorchTower, plain_call
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.encoders.weights import hub_errors, load_errors, local_path, path_identity
from mmfeat.errors import EncoderError
from mmfeat.system.files import canonical_json

if TYPE_CHECKING:
    from torch import Tensor


def names() -> list[str]:
    import_torchvision()
    import torchvision

    return list(torchvision.models.list_models(module=torchvision.models))


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    file = local_path(variant)
    weights, options = _weights(family, variant, file), options.for_model(family)
    return [
        EncoderSpec(
            family=family,
            modality="image",
            variant=file.name if file else weights.name,
            weights=path_identity(file) if file else f"torchvision:{Path(weights.url).name}",
            preprocessing=canonical_json(_preprocessing(_transform(weights, options.size))),
            pooling=options.tower_pooling,
            **options.of_model,
        )
    ]


def open_towers(variant: str, specs: list[EncoderSpec]) -> list[TorchTower]:
    """The tower of a model whose last linear layer is replaced by the identity."""
    family, file = specs[0].family, local_path(variant)
    weights = _weights(family, variant, file)
    if file:
        model = _untrained(family)
        classifier = drop_classifier(model)
        with load_errors(f"{family}:{variant}"):
            state = {name: value for name, value in _state_dict(file).items() if not name.startswith(classifier + ".")}
            model.load_state_dict(state)
    else:
        model = _published(family, weights)
        drop_classifier(model)
    model.eval().requires_grad_(False)
    if list(specs[0].image_size or ()) != _crop(weights.transforms()):
        check_size(specs[0], model)
    return [image_tower(specs, model, network_of(model), _transform(weights, specs[0].image_size))]


def reference(variant: str, spec: EncoderSpec) -> Callable[[Any], np.ndarray]:
    """torchvision's whole model over one picture, in float32; the vector is the input of its classifier."""
    file = local_path(variant)
    weights = _weights(spec.family, variant, file)
    if file:
        with load_errors(f"{spec.family}:{variant}"):
            state = _state_dict(file)
            classifier = drop_classifier(_untrained(spec.family))
            model = _untrained(spec.family, num_classes=len(state[f"{classifier}.weight"]))
            model.load_state_dict(state)
    else:
        model = _published(spec.family, weights)
    drop_classifier(model)
    network, transform = network_of(model.eval()), _transform(weights, spec.image_size)
    if spec.output == "pooled" and hasattr(model, "encoder"):
        network = replace(network, forward=partial(_vectors, model, spec))
    elif spec.output == "pooled":
        network = repooled(network, spec)
    return lambda image: plain_call(network, spec, transform(image).unsqueeze(0))


def _vectors(model: Any, spec: EncoderSpec, images: Tensor) -> Tensor:
    """(B, D) of a ViT by its modules, for any pooling and number of layers."""
    import torch

    if spec.pooling == "tower" and spec.layers == 1:
        return model(images)
    states = model._process_input(images)
    states = torch.cat([model.class_token.expand(len(images), -1, -1), states], 1) + model.encoder.pos_embedding
    hidden = []
    for layer in model.encoder.layers:
        states = layer(states)
        hidden.append(model.encoder.ln(states))
    mean = torch.stack(hidden[-spec.layers :]).mean(0)
    parts = {"tower": mean[:, 0], "cls": mean[:, 0], "mean": mean[:, 1:].mean(1)}
    return torch.cat([model.heads(parts[name]) for name in spec.pooling.split("+")], 1)


def _untrained(family: str, **arguments: Any) -> Any:
    """The architecture for a weights file, with the `transform_input` that named weights would set."""
    import torchvision

    rescale = {"transform_input": True} if family in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(family, weights=None, **rescale, **arguments)


def _published(family: str, weights: Any) -> Any:
    import torchvision

    with hub_errors(f"{family}:{weights.name}"):
        return torchvision.models.get_model(family, weights=weights, progress=False)


def network_of(model: Any) -> Network:
    """The network of a model. Tokens are the input of pooling: the final map, or the normed sequence of a ViT."""
    import torchvision

    layers = find_layers(model)
    if hasattr(model, "encoder"):
        return Network(model, layers, Point(model.encoder), norm=model.encoder.ln.forward, prefix=1, classed=True)
    # In some models a function pools, not a module.
    tokens = Point(model.avgpool, "input") if hasattr(model, "avgpool") else Point(layers[-1])
    layout = "NHWC" if isinstance(model, torchvision.models.SwinTransformer) else "NCHW"
    return Network(model, layers, tokens, layout)


def drop_classifier(model: Any) -> str:
    """Replace the last linear layer by the identity; returns the name of the layer."""
    import torch

    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    if not linear:
        raise EncoderError(f"{type(model).__name__}: ends in no linear layer; use it through timm instead")
    name = linear[-1]
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, torch.nn.Identity())
    return name


def _weights(family: str, variant: str, file: Path | None) -> Any:
    """torchvision's entry for weights; for a local file the entry of the same file name, else the first.

    The first entry of a model is its original training with the classic ImageNet evaluation.
    """
    import_torchvision()
    import torchvision

    entries = torchvision.models.get_model_weights(family)
    if file:
        return next((entry for entry in entries if Path(entry.url).stem == file.stem), next(iter(entries)))
    try:
        return entries[variant or "DEFAULT"]
    except KeyError:
        names = ", ".join(entry.name for entry in entries)
        raise EncoderError(f"{family}:{variant}: torchvision has {names}, or name a local weights file") from None


def _transform(weights: Any, size: tuple[int, int] | None) -> Any:
    """The evaluation transform of weights, for pictures of another (height, width) with the same share cut off.

    Where the sides differ, the short side of a picture is resized for the larger one, so that the crop lies inside.
    """
    transform = weights.transforms()
    if size and list(size) != (own := _crop(transform)):
        share = transform.resize_size[0] / own[0]
        transform.crop_size, transform.resize_size = list(size), [round(max(size) * share)]
    return transform


def _crop(transform: Any) -> list[int]:
    """[height, width] of the pictures that the transform gives."""
    return [transform.crop_size[0], transform.crop_size[-1]]


def _preprocessing(transform: Any) -> dict[str, Any]:
    return {
        "resize": list(transform.resize_size),
        "crop": list(transform.crop_size),
        "interpolation": transform.interpolation.value,
        "antialias": transform.antialias,
        "mean": list(transform.mean),
        "std": list(transform.std),
    }


def _state_dict(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        import safetensors.torch

        return safetensors.torch.load_file(file)
    import torch

    return torch.load(file, map_location="cpu", weights_only=True)
