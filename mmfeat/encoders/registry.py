"""Encoders: frozen towers that turn one modality into vectors.

An encoder is asked for as `family[:variant]`. Describing one (its specs) is cheap and happens on
every run; loading one happens only when vectors are missing.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from mmfeat.encoders import bert, clip, hashing, hog, timm_models, torchvision_models
from mmfeat.encoders.delta import Delta, apply_delta, read_delta, tuned_identity
from mmfeat.encoders.spec import OUTPUT, POOLINGS, Encoder, EncoderOptions, EncoderSpec, Values
from mmfeat.encoders.torch_tower import TorchTower
from mmfeat.encoders.weights import local_path
from mmfeat.errors import ConfigError, EncoderError
from mmfeat.samples.images import view_name

__all__ = [
    "FAMILIES",
    "Encoder",
    "EncoderOptions",
    "EncoderSpec",
    "Tower",
    "Values",
    "absolute_request",
    "describe_encoders",
    "is_torch",
    "load_encoders",
    "load_reference",
    "open_towers",
]


@dataclass(frozen=True)
class Tower:
    """A spec and the request it came from, which says where its weights lie."""

    request: str
    spec: EncoderSpec


OpenTowers: TypeAlias = Callable[[str, list[EncoderSpec]], list[TorchTower]]


class Family(NamedTuple):
    """What each family offers.

    `describe(family, variant, options)` gives the pooled spec of each tower; `load(variant, specs, device,
    compiled)` an encoder a tower for all outputs in `specs`; `reference(variant, spec)` the library's own plain float32
    call for one text or picture, (D) or (T, D). `open_towers(variant, specs)` gives the torch model behind a
    tower, where there is one: only then it has layers, tokens and prefixes.
    """

    describe: Callable[[str, str, EncoderOptions], list[EncoderSpec]]
    load: Callable[[str, list[EncoderSpec], str, bool], list[Encoder]]
    reference: Callable[[str, EncoderSpec], Callable[[Any], np.ndarray]]
    open_towers: OpenTowers | None = None


def _torch_family(module: Any) -> Family:
    return Family(module.describe, partial(_load_torch, module.open_towers), module.reference, module.open_towers)


def _load_torch(
    open_towers: OpenTowers, variant: str, specs: list[EncoderSpec], device: str, compiled: bool
) -> list[Encoder]:
    return [tower.encoder(device, compiled) for tower in open_towers(variant, specs)]


def _describe_tuned(family: str, variant: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The parent's spec with other weights; texts are prepared as they were when it was trained.

    Always in float32: steps of fine-tuning are smaller than what bfloat16 tells apart.
    """
    file, delta = _tuned(variant)
    before = delta.spec
    options = replace(
        options,
        cleaning=before.cleaning,
        pooling=before.pooling if before.pooling in POOLINGS else options.pooling,
        max_length=before.max_length or options.max_length,
    )
    described = _family(delta.request).describe(*_split(delta.request), options)
    parent = next(spec for spec in described if spec.modality == before.modality)
    if (parent.weights, parent.transform) != (before.weights, before.transform):
        raise EncoderError(
            f"finetuned:{variant}: {delta.request} is not the encoder that was fine-tuned; restore its weights, or "
            "run mmfeat finetune again"
        )
    weights = tuned_identity(file, parent.weights)
    tuned = f"{parent.variant}+{delta.name}"
    return [replace(parent, variant=tuned, weights=weights, arithmetic="float32", storage="float32")]


def _open_tuned(variant: str, specs: list[EncoderSpec]) -> list[TorchTower]:
    file, delta = _tuned(variant)
    before = [replace(spec, variant=delta.spec.variant, weights=delta.spec.weights) for spec in specs]
    (tower,) = open_towers(Tower(delta.request, before[0]), before)
    apply_delta(file, tower.module)
    return [tower.asked_for(specs)]


def _tuned_reference(variant: str, spec: EncoderSpec) -> Callable[[Any], np.ndarray]:
    (tower,) = _open_tuned(variant, [spec])
    return tower.reference()


def _tuned(variant: str) -> tuple[Path, Delta]:
    if not (file := local_path(variant)):
        raise EncoderError(f"finetuned:{variant}: no such file; name one that mmfeat finetune wrote, finetuned:FILE")
    return file, read_delta(file)


_TORCHVISION = _torch_family(torchvision_models)

FAMILIES: dict[str, Family] = {
    "clip": _torch_family(clip),
    "bert": _torch_family(bert),
    "resnet50": _TORCHVISION,  # any other torchvision model is found by its name
    "timm": _torch_family(timm_models),
    "hashing": Family(hashing.describe, hashing.load, hashing.reference),
    "hog": Family(hog.describe, hog.load, hog.reference),
    "finetuned": Family(_describe_tuned, partial(_load_torch, _open_tuned), _tuned_reference, _open_tuned),
}


def describe_encoders(requests: list[str], options: EncoderOptions) -> list[Tower]:
    """All towers of `family[:variant]` requests, in order; a tower asked for twice is given once.

    Each output and each view of a tower has a spec of its own.
    """
    if options.dtype == "auto":
        raise ConfigError(
            "dtype auto is no arithmetic yet; pass the options through mmfeat.extraction.requests.resolve_options"
        )
    if not requests:
        raise EncoderError(f"no encoders; name some of {', '.join(FAMILIES)} with --encoders A,B")
    towers: dict[str, Tower] = {}
    bases: list[EncoderSpec] = []
    idle: list[str] = []
    for request in requests:
        family, variant = _split(request)
        described = [spec.drafted(options.draft) for spec in _family(request).describe(family, variant, options)]
        has_layers = _family(request).open_towers is not None
        specs = [spec for base in described for spec in _outputs(base, options, has_layers)]
        for spec in specs:
            towers.setdefault(spec.fingerprint, Tower(absolute_request(request), spec))
        bases += described
        idle += [] if specs else [request]
    _check_output_names(options, bases)
    if idle:
        asked = ",".join(options.outputs)
        raise ConfigError(f"--outputs {asked}: asks nothing of {', '.join(idle)}; add an output of it, or leave it out")
    return list(towers.values())


def _outputs(base: EncoderSpec, options: EncoderOptions, has_layers: bool) -> list[EncoderSpec]:
    """The specs of all outputs of one tower, of the plain view first."""
    specs = []
    for asked in options.outputs:
        name, plain, layer = _parts(asked)
        if name and name not in _names(base):
            continue
        output = plain or "prefix"
        if output != "pooled" and not has_layers:
            wanted = asked.rpartition("=")[2]
            remedy = "leave this out" if name else f"name the encoder, as in clip={wanted}"
            only = ", only pooled vectors" if name else ""
            raise EncoderError(f"--outputs {asked}: {base.name} has no {output}{only}; {remedy}")
        pooling = base.pooling if output == "pooled" else "none"
        specs.append(replace(base, output=output, layer=int(layer or 0), pooling=pooling))
    views = [view_name(number) for number in range(1, options.views + 1)] if base.modality == "image" else []
    return specs + [replace(spec, view=view) for view in views for spec in specs]


def _check_output_names(options: EncoderOptions, bases: list[EncoderSpec]) -> None:
    """`NAME=OUTPUT` names something that was asked for."""
    known = sorted({name for base in bases for name in _names(base)})
    for asked in options.outputs:
        if _parts(asked)[0] not in ("", *known):
            raise ConfigError(
                f"--outputs {asked}: no such modality, family or tower here; there are {', '.join(known)}"
            )


def _names(spec: EncoderSpec) -> set[str]:
    return {spec.modality, spec.family, spec.tower}


def _parts(output: str) -> tuple[str, str, str]:
    """(name, "pooled" or "tokens", N of a prefix), each may be empty."""
    found = OUTPUT.fullmatch(output)
    assert found is not None  # the options were checked
    name, plain, layer = found.groups(default="")
    return name, plain, layer


def is_torch(request: str) -> bool:
    """Whether there is a torch model behind an encoder, which a GPU, half precision and a compiler could speed up."""
    return _family(request).open_towers is not None


def absolute_request(request: str) -> str:
    """The request with a local path made absolute, so that it means the same from any folder."""
    family, variant = _split(request)
    model, slash, file = variant.partition("/") if family == "clip" else ("", "", "")  # MODEL/FILE is CLIP's alone
    for prefix, path in (("", variant), (model + slash, file)):
        if path and Path(path).expanduser().exists():
            return f"{family}:{prefix}{os.path.abspath(Path(path).expanduser())}"
    return request


def load_encoders(towers: list[Tower], device: str, compiled: bool = False) -> list[Encoder]:
    """Load each model once, however many towers, outputs and views are asked for; one encoder a tower and view.

    `compiled` has `torch.compile` make kernels for this machine, which takes a minute and a C++ compiler.
    """
    encoders: list[Encoder] = []
    for request in dict.fromkeys(tower.request for tower in towers):
        specs = [tower.spec for tower in towers if tower.request == request]
        plain = list(dict.fromkeys(replace(spec, view="none") for spec in specs))
        for loaded in _family(request).load(_split(request)[1], plain, device, compiled):
            _check_outputs(loaded)
            for view in dict.fromkeys(spec.view for spec in specs):
                if seen := [spec for spec in specs if spec.view == view and replace(spec, view="none") in loaded.specs]:
                    encoders.append(_seen(loaded, seen))
    return encoders


def open_towers(tower: Tower, specs: list[EncoderSpec] | None = None) -> list[TorchTower]:
    """The torch model behind a tower, in float32 on the CPU. Raises `EncoderError` where there is none."""
    opened = _family(tower.request).open_towers
    if opened is None:
        raise EncoderError(f"{tower.request}: no layers that could be trained; name clip, bert, resnet50 or timm")
    return opened(_split(tower.request)[1], specs or [tower.spec])


def load_reference(tower: Tower) -> Callable[[Any], np.ndarray]:
    """The reference library's own plain float32 call for one text or RGB picture: (D) or (T, D)."""
    return _family(tower.request).reference(_split(tower.request)[1], tower.spec)


def _check_outputs(loaded: Encoder) -> None:
    """A model whose layers are not what they look like shows it on one blank sample, before any work."""
    if all(spec.output == "pooled" for spec in loaded.specs):
        return
    from PIL import Image

    blank = "" if loaded.modality == "text" else Image.new("RGB", (64, 64))
    try:
        outputs = loaded.embed([loaded.prepare(blank)])
    except EncoderError as error:
        raise EncoderError(f"{loaded.specs[0].name}: {error}") from error
    for spec, values in zip(loaded.specs, outputs, strict=True):
        if spec.output != "pooled" and [rows.ndim for rows in values] != [2]:
            raise EncoderError(f"{spec.name}: samples are not apart there; use another layer or pooled")


def _seen(loaded: Encoder, specs: list[EncoderSpec]) -> Encoder:
    """The encoder with only the outputs in `specs`, which are of one view."""
    chosen = [loaded.specs.index(replace(spec, view="none")) for spec in specs]

    def launch(batch: list[Any]) -> Callable[[], list[Values]]:
        wait = loaded.launch(batch)

        def chosen_values() -> list[Values]:
            values = wait()
            return [values[number] for number in chosen]

        return chosen_values

    return replace(loaded, specs=tuple(specs), launch=launch)


def _split(request: str) -> tuple[str, str]:
    family, _, variant = request.partition(":")
    return family, variant


def _family(request: str) -> Family:
    family, _ = _split(request)
    if family in FAMILIES:
        return FAMILIES[family]
    if family in (models := torchvision_models.names()):
        return _TORCHVISION
    close = difflib.get_close_matches(family.lower(), [*FAMILIES, *models], n=1)
    meant = f"did you mean {close[0]}? There are" if close else "use"
    raise EncoderError(
        f"{request}: no encoder family {family!r}; {meant} {', '.join(FAMILIES)}, each with an optional :variant, "
        "and the models of torchvision by name"
    )
