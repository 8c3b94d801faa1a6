"""The recipe of an encoder: how it makes a vector, told from its small files before any weights are loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mmfeat.encoders import clip, torchvision_models
from mmfeat.encoders.catalogue import licence_in, timm_size, torchvision_size
from mmfeat.encoders.clip_checkpoints import read_checkpoint
from mmfeat.encoders.names import HUB
from mmfeat.encoders.registry import absolute_request, cleaning_of_tweets, describe_encoders, load_encoders
from mmfeat.encoders.spec import DRAFT, RAW, EncoderOptions, EncoderSpec
from mmfeat.encoders.weights import MODULES, ROOTS, cached_files, checkpoint_json, checkpoint_modules, local_path

NOT_HERE = "not here; the first extraction downloads them"


def recipe(request: str, options: EncoderOptions) -> list[tuple[str, list[tuple[str, str]]]]:
    """(Name of a tower, lines of its recipe) of each tower; `options` are resolved but for the cleaning.

    A line is (what, how). Small files of a checkpoint may be fetched, weights are not. Raises `EncoderError` for an
    encoder that is not known, and `HubError` where the hub cannot be reached and nothing is cached.
    """
    request = absolute_request(request)
    specs = _specs(request, options)
    variant = request.partition(":")[2]
    return [(spec.model, _lines(request, variant, spec, options)) for spec in specs]


def _specs(request: str, options: EncoderOptions) -> list[EncoderSpec]:
    """The specs of the towers; CLIP's weights that are not here have the identity "", since open_clip would fetch
    them."""
    plain = options.cleaned("none")
    family, _, variant = request.partition(":")
    if family == "clip" and (tag := read_checkpoint(variant).tag) and not (local_path(variant) or _is_cached(tag)):
        return clip.specs_of(read_checkpoint(variant), "", plain)
    return [tower.spec for tower in describe_encoders([request], plain)]


def _is_cached(tag: dict[str, Any]) -> bool:
    """Whether the published weights of open_clip are on this machine."""
    repository = str(tag.get("hf_hub") or "").rstrip("/")
    files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    if repository and any(cached_files(repository, files)):
        return True
    return bool(tag.get("url")) and (Path("~/.cache/clip").expanduser() / Path(tag["url"]).name).is_file()


def _lines(request: str, variant: str, spec: EncoderSpec, options: EncoderOptions) -> list[tuple[str, str]]:
    width, parameters = _size(request, variant, spec)
    lines = [
        ("family", f"{spec.family}, {spec.modality}"),
        ("width", f"{width:,}" if width else ""),
        ("parameters", f"{parameters:,.0f} M" if parameters else ""),
        ("pooling", _pooling(variant, spec)),
        *(_of_texts(request, variant, spec, options) if spec.part == "text" else _of_pictures(spec)),
        ("arithmetic", f"{spec.arithmetic}, stored as {spec.storage} (--dtype)"),
        ("licence", _licence(variant, spec)),
        ("weights", spec.weights or NOT_HERE),
        ("fingerprint", spec.fingerprint[:8] if spec.weights else ""),
    ]
    return [(what, how) for what, how in lines if how]


def _pooling(variant: str, spec: EncoderSpec) -> str:
    if spec.family == "st":
        kinds = [module["type"].rpartition(".")[2] for module in checkpoint_modules(variant)]
        return f"{', '.join(kinds)} (modules.json)" if kinds else "mean"
    return "the model's own" if spec.pooling == "tower" else spec.pooling


def _of_texts(request: str, variant: str, spec: EncoderSpec, options: EncoderOptions) -> list[tuple[str, str]]:
    """Lines on prompts, length and cleaning."""
    if spec.family in RAW:
        return [("texts", "in English, as they were written; --cleaning is about others")]
    asked = options.cleaning
    asked += f": {cleaning_of_tweets(request, spec)} for tweets, else none" if asked == "auto" else ""
    return [
        ("prompts", _prompts(variant) if spec.family == "st" else ""),
        ("max length", _length(variant, spec)),
        ("cleaning", f"{asked} (--cleaning)"),
    ]


def _prompts(variant: str) -> str:
    settings = checkpoint_json(variant, "config_sentence_transformers.json")
    settings = settings if isinstance(settings, dict) else {}
    prompts, default = settings.get("prompts"), settings.get("default_prompt_name")
    named = prompts.items() if isinstance(prompts, dict) else ()
    return "; ".join(f"{name}{' (default)' if name == default else ''}: {text!r}" for name, text in named) or "none"


def _length(variant: str, spec: EncoderSpec) -> str:
    if spec.max_length:
        return f"{spec.max_length:,} tokens"
    stated = checkpoint_json(variant, "sentence_bert_config.json") if spec.family == "st" else None
    length = stated.get("max_seq_length") if isinstance(stated, dict) else None
    return f"{length:,} tokens, the checkpoint's" if length else ("the checkpoint's" if spec.family == "st" else "")


def _of_pictures(spec: EncoderSpec) -> list[tuple[str, str]]:
    """The preprocessing, one line for each of its values."""
    steps = json.loads(spec.preprocessing or "{}")
    return [(name.replace("_", " "), _value(value)) for name, value in steps.items() if name != DRAFT]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _licence(variant: str, spec: EncoderSpec) -> str:
    if spec.family == "timm" and not local_path(variant):
        import timm

        config: Any = timm.get_pretrained_cfg(variant, allow_unregistered=True)
        return (config and config.license) or ""
    return licence_in(folder) if (folder := _folder(variant)) else ""


def _folder(variant: str) -> Path | None:
    """The folder of a checkpoint on this machine: a local one, or that in the hub cache."""
    if local := local_path(variant):
        return local if local.is_dir() else local.parent
    name = variant.removeprefix(HUB)
    files = (*ROOTS, MODULES) if name.count("/") == 1 else ()
    return next((file.parent for file in cached_files(name, files)), None)


def _size(request: str, variant: str, spec: EncoderSpec) -> tuple[int | None, float | None]:
    """(Width of the vector, millions of parameters of the whole model), None where the small files do not say it."""
    if spec.family in ("hashing", "hog", "lexicon"):
        return _built_in_width(request), None
    if spec.family == "timm" and not local_path(variant):
        return timm_size(variant.removeprefix(HUB)) if "/" not in variant else (None, None)
    folder = _folder(variant)
    parameters = _parameters(folder) if folder else None
    if spec.family == "clip":
        return int(read_checkpoint(variant).model["embed_dim"]), parameters
    if spec.family in ("bert", "st"):
        return _text_width(variant, spec), parameters
    if spec.family == "timm" and folder:
        return (checkpoint_json(str(folder), "config.json") or {}).get("num_features"), parameters
    return torchvision_size(spec.family) if spec.family in torchvision_models.names() else (None, parameters)


def _built_in_width(request: str) -> int:
    from PIL import Image

    (encoder,) = load_encoders(describe_encoders([request], EncoderOptions(dtype="float32", cleaning="none")), "cpu")
    blank = "" if encoder.modality == "text" else Image.new("RGB", (64, 64))
    (vectors,) = encoder.embed([encoder.prepare(blank)])
    return len(vectors[0])


def _text_width(variant: str, spec: EncoderSpec) -> int | None:
    """The width that the last Dense module, the pooling or the model states."""
    asked = json.loads(spec.preprocessing or "{}").get("truncate_dim")
    pooled = ("out_features", "word_embedding_dimension", "embedding_dimension")
    keys = (*pooled, "hidden_size", "d_model", "dim", "n_embd")
    paths = [module["path"] for module in checkpoint_modules(variant)] if spec.family == "st" else []
    for path in [*reversed(paths), ""]:
        config = checkpoint_json(variant, f"{path}/config.json" if path else "config.json")
        stated = [config[key] for key in keys if isinstance(config, dict) and isinstance(config.get(key), int)]
        if stated:
            return min(stated[0], asked or stated[0])
    return None


def _parameters(folder: Path) -> float | None:
    """Millions of parameters in the safetensors files of a folder, by their headers."""
    from safetensors import SafetensorError, safe_open

    total = 0
    try:
        for file in folder.glob("*.safetensors"):
            with safe_open(file, framework="np") as tensors:
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    except (OSError, SafetensorError):  # a broken file is reported when it is loaded
        return None
    return total / 1e6 or None
