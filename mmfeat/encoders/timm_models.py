"""Image encoders of timm. Variants: a timm name (`resnet50.a1_in1k`), `hf-hub:ORG/NAME`, or a folder."""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfeat.encoders.layers import timm_network
from mmfeat.encoders.names import HUB, remedy_for
from mmfeat.encoders.pixels import check_size, image_tower, size_errors
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.torch_tower import TorchTower, plain_call
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.encoders.weights import (
    checkpoint_json,
    hub_revision,
    load_errors,
    load_reason,
    local_path,
    logged,
    path_identity,
)
from mmfeat.errors import EncoderError, HubError
from mmfeat.system.files import canonical_json
from mmfeat.system.wording import counted

if TYPE_CHECKING:
    from torch import Tensor

# timm's defaults for what a configuration leaves out; checked again after loading.
_PREPROCESSING: dict[str, Any] = {
    "input_size": [3, 224, 224],
    "interpolation": "bicubic",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "crop_pct": 0.875,
    "crop_mode": "center",
}


def describe(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The spec of the one image tower; a local folder is described without importing timm."""
    if not variant:
        raise EncoderError("timm: name a model, as in timm:resnet50.a1_in1k, or a local folder, timm:PATH")
    folder = local_path(variant)
    config = _config(variant)
    options = options.for_model(config.get("architecture", variant))
    preprocessing = _preprocessing(config)
    if options.size:
        preprocessing["input_size"] = [preprocessing["input_size"][0], *options.size]
    identity = path_identity(folder) if folder else f"revision:{hub_revision(config['hf_hub_id'])}"
    return [
        EncoderSpec(
            family="timm",
            modality="image",
            variant=folder.resolve().name if folder else variant,
            weights=identity,
            preprocessing=canonical_json(preprocessing),
            pooling=options.tower_pooling,
            **options.of_model,
        )
    ]


def open_towers(variant: str, specs: list[EncoderSpec]) -> list[TorchTower]:
    """The tower of `timm.create_model` without its classifier, behind timm's own evaluation transform."""
    model, transform, preprocessing = _create(variant, specs[0])
    if preprocessing != specs[0].transform:
        raise EncoderError(f"{specs[0].name}: timm preprocesses with {preprocessing}, not {specs[0].transform}")
    return [image_tower(specs, model, timm_network(model), transform)]


def reference(variant: str, spec: EncoderSpec) -> Callable[[Any], np.ndarray]:
    """timm's own model over one picture, in float32; tokens are the output of `forward_features`."""
    model, transform, _ = _create(variant, spec)
    network = timm_network(model)
    if spec.output != "tokens":
        network = replace(network, forward=partial(vectors, model, spec))
    return lambda image: plain_call(network, spec, transform(image).unsqueeze(0))


def vectors(
    model: Any, spec: EncoderSpec, images: Tensor, behind: Callable[[Tensor], Tensor] = lambda vector: vector
) -> Tensor:
    """(B, D) by timm's calls: `reset_classifier` for another pooling, `forward_intermediates` for several layers.

    `behind` is what follows the pooling of each part, as the head of open_clip does.
    """
    import torch

    parts = []
    for pooling in [""] if spec.pooling in ("tower", "none") else spec.pooling.split("+"):
        if pooling:
            model.reset_classifier(0, {"cls": "token", "mean": "avg"}[pooling])
        if spec.layers == 1:
            parts.append(behind(model(images)))
            continue
        options = {"output_fmt": "NLC", "norm": True, "intermediates_only": True}
        if getattr(model, "num_prefix_tokens", 0):
            states = model.forward_intermediates(images, spec.layers, return_prefix_tokens=True, **options)
            states = [torch.cat([prefix, patches], 1) for patches, prefix in states]
        else:
            states = model.forward_intermediates(images, spec.layers, **options)
        parts.append(behind(model.forward_head(torch.stack(states).mean(0))))
    return torch.cat(parts, 1)


def _create(variant: str, spec: EncoderSpec) -> tuple[Any, Any, str]:
    """timm's model for the size in the spec, its evaluation transform, and the preprocessing as canonical JSON."""
    import_torchvision()
    import timm

    folder = local_path(variant)
    config = _config(variant)
    revision = spec.weights.partition(":")[2]
    name = f"local-dir:{folder}" if folder else f"{variant}@{revision}" if variant.startswith(HUB) else variant
    overlay = {"hf_hub_id": f"{config['hf_hub_id']}@{revision}"} if name == variant else None
    size = json.loads(spec.preprocessing)["input_size"]
    other = size if size != _preprocessing(config)["input_size"] else []
    fixed = bool(other) and _is_fixed(config, variant)
    loading = load_errors(f"timm:{variant}", is_local=folder is not None)
    with loading, size_errors(spec) if other else contextlib.nullcontext(), _complete(f"timm:{variant}"):
        model: Any = timm.create_model(
            name,
            pretrained=True,
            num_classes=0,
            pretrained_cfg_overlay=overlay,
            img_size=tuple(other[1:]) if fixed else None,
        ).eval()
    if other:
        check_size(
            spec, model.forward_features, max(stage["reduction"] for stage in model.feature_info) if fixed else 1
        )
    config = timm.data.resolve_data_config({"input_size": tuple(other)} if other else {}, model=model)
    try:
        transform = timm.data.create_transform(**config, is_training=False)
    except (KeyError, ValueError, TypeError, AssertionError) as error:  # interpolation "random" is for training alone
        reason = load_reason(error)
        raise EncoderError(f"timm:{variant}: its config.json prepares pictures as timm cannot ({reason})") from error
    transform = _coloured(transform, config["input_size"][0], variant)
    return model.eval().requires_grad_(False), transform, canonical_json(_preprocessing(config))


def _is_fixed(config: dict[str, Any], variant: str) -> bool:
    """Whether a model is built for one size of pictures, by its own configuration or by that of its architecture."""
    import timm

    known = timm.get_pretrained_cfg(config.get("architecture", variant), allow_unregistered=True)
    return bool(config.get("fixed_input_size") or (known is not None and known.fixed_input_size))


@contextlib.contextmanager
def _complete(asked: str) -> Iterator[None]:
    """Raise `EncoderError` where weights lack parameters: timm, asked for no classifier, logs them and goes on."""
    with logged("timm.models._builder") as messages:
        yield
    for message in messages:
        if lost := re.match(r"Missing keys \((.*)\) discovered", message):
            names = lost[1].split(", ")
            raise EncoderError(
                f"{asked}: the weights lack {counted(len(names), 'tensor')}, the first is {names[0]}; use a complete "
                "checkpoint"
            )
        if "random init" in message:
            raise EncoderError(f"{asked}: timm would leave parameters random ({message}); use a complete checkpoint")


def _coloured(transform: Any, channels: int, variant: str) -> Any:
    """The transform of an RGB picture for a model of that many channels: a grey one sees it as Pillow's mode L."""
    if channels == 3:
        return transform
    if channels != 1:
        raise EncoderError(f"timm:{variant}: its pictures have {channels} channels; use a model for RGB or grey ones")
    return lambda image: transform(image.convert("L"))


def _config(variant: str) -> dict[str, Any]:
    """The pretrained configuration of a folder, of a repository of the hub, or of a name of timm."""
    if local_path(variant) or variant.startswith(HUB):
        source = variant.removeprefix(HUB)
        try:
            return {**_own_config(checkpoint_json(source, "config.json")), "hf_hub_id": source}
        except (HubError, KeyError, AttributeError, TypeError) as error:
            remedy = remedy_for(source, "timm")
            if isinstance(error, HubError) and not remedy:
                raise
            remedy = remedy or "; name a folder as timm saves it, or timm:NAME"
            raise EncoderError(f"timm:{variant}: timm's config.json is needed beside the weights{remedy}") from error
    import_torchvision()
    import timm

    config = timm.get_pretrained_cfg(variant, allow_unregistered=True)
    if config is None or not config.hf_hub_id:
        alike = difflib.get_close_matches(variant, timm.list_pretrained(), 1)
        guess = f"did you mean {alike[0]}?" if alike else "mmfeat encoders --family timm --match TEXT lists them"
        raise EncoderError(f"timm:{variant}: timm knows no such pretrained model; {guess}")
    return {**config.to_dict(), "hf_hub_id": config.hf_hub_id.split("@")[0]}


def _own_config(config: dict[str, Any]) -> dict[str, Any]:
    """The pretrained configuration in a `config.json`, for the channels and the size of the model that timm builds."""
    own = {**config.get("pretrained_cfg", config), "architecture": str(config["architecture"])}
    arguments, size = config.get("model_args") or {}, list(own.get("input_size") or _PREPROCESSING["input_size"])
    size[0] = arguments.get("in_chans") or size[0]
    side = arguments.get("img_size")
    if side and own.get("fixed_input_size") and not arguments.get("dynamic_img_size"):
        size[1:] = [side, side] if isinstance(side, int) else side
    return {**own, "input_size": size}


def _preprocessing(config: dict[str, Any]) -> dict[str, Any]:
    given = {key: config[key] for key in _PREPROCESSING if config.get(key) is not None}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in {**_PREPROCESSING, **given}.items()}
