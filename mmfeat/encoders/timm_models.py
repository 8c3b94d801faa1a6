"""Image encoders of timm. Variants: a timm name (`resnet50.a1_in1k`) or a local folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmfeat.encoders.layers import timm_network
from mmfeat.encoders.pixels import image_tower
from mmfeat.encoders.spec import EncoderOptions, EncoderSpec
from mmfeat.encoders.torch_tower import TorchTower, load_errors, plain_call
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.encoders.weights import hub_errors, hub_revision, local_path, path_identity
from mmfeat.errors import EncoderError
from mmfeat.system.files import canonical_json, read_json

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
    config = _folder_config(folder) if folder else _hub_config(variant)
    options = options.for_model(config.get("architecture", variant))
    identity = path_identity(folder) if folder else f"revision:{hub_revision(config['hf_hub_id'])}"
    return [
        EncoderSpec(
            family="timm",
            modality="image",
            variant=folder.resolve().name if folder else variant,
            weights=identity,
            preprocessing=canonical_json(_preprocessing(config)),
            arithmetic=options.dtype,
            storage=options.storage,
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
        network = replace(network, forward=model)
    return lambda image: plain_call(network, spec, transform(image).unsqueeze(0))


def _create(variant: str, spec: EncoderSpec) -> tuple[Any, Any, str]:
    """timm's model, its evaluation transform, and the preprocessing as canonical JSON."""
    import_torchvision()
    import timm

    folder = local_path(variant)
    overlay = None if folder else {"hf_hub_id": f"{_hub_config(variant)['hf_hub_id']}@{spec.weights.partition(':')[2]}"}
    with load_errors(f"timm:{variant}") if folder else hub_errors(f"timm:{variant}"):
        model = timm.create_model(
            f"local-dir:{folder}" if folder else variant,
            pretrained=True,
            num_classes=0,
            pretrained_cfg_overlay=overlay,
        )
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    return model.eval().requires_grad_(False), transform, canonical_json(_preprocessing(config))


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
        return {**config.get("pretrained_cfg", config), "architecture": config["architecture"]}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise EncoderError(f"{folder}: timm's config.json is needed beside the weights ({error})") from error


def _hub_config(variant: str) -> dict[str, Any]:
    import_torchvision()
    import timm

    config = timm.get_pretrained_cfg(variant, allow_unregistered=True)
    if config is None or not config.hf_hub_id:
        raise EncoderError(f"timm:{variant}: timm knows no such pretrained model; see timm.list_pretrained()")
    return {**config.to_dict(), "hf_hub_id": config.hf_hub_id.split("@")[0]}


def _preprocessing(config: dict[str, Any]) -> dict[str, Any]:
    given = {key: config[key] for key in _PREPROCESSING if config.get(key) is not None}
    return {key: list(v) if isinstance(v, tuple) else v for key, v in {**_PREPROCESSING, **given}.items()}
