"""Checkpoints of open_clip: what a request names, with the preprocessing and the activation of its weights.

`MODEL/TAG`; `MODEL/FILE` and `MODEL/TAG=FILE` with local weights; a folder in open_clip's own layout
(`open_clip_config.json` beside the weights); `hf-hub:ORG/NAME`, a repository of the hub in that layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfeat.encoders.names import HUB, remedy_for
from mmfeat.encoders.tokenizer import FILES, check_files
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.encoders.weights import (
    downloaded_identity,
    hub_errors,
    hub_file,
    hub_revision,
    load_reason,
    local_path,
    path_identity,
)
from mmfeat.errors import EncoderError
from mmfeat.system.files import canonical_json, read_json

DEFAULT_VARIANT = "ViT-B-32/openai"
CONFIG = "open_clip_config.json"
# open_clip's defaults for what a configuration leaves out; checked again after loading.
_PREPROCESSING: dict[str, Any] = {
    "size": 224,
    "mode": "RGB",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
_SETTABLE = ("mean", "std", "interpolation", "resize_mode")  # open_clip's arguments image_mean, image_std, ...
# What a checkpoint may tell its tokenizer; others name files elsewhere or have code of the checkpoint run.
_TOKENIZER = ("clean", "strip_sep_token", "language", "additional_special_tokens", "reduction_mask")


@dataclass(frozen=True)
class Checkpoint:
    """What a request names: the name in its spec, open_clip's configuration, and where its weights are.

    `source` is the first argument of open_clip's own calls, `arguments` are the others; `repository` is a name on the
    hub, `path` a local file or folder.
    """

    name: str
    model: dict[str, Any]
    preprocessing: str  # canonical JSON
    source: str
    arguments: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    repository: str = ""
    tag: dict[str, Any] = field(default_factory=dict)  # open_clip's entry for published weights

    @property
    def revision(self) -> str:
        """The revision in whose folder of the hub's cache a repository lies."""
        return Path(self.source).name

    @property
    def tokenizer_name(self) -> str:
        """The checkpoint of transformers that the tokenizer is of, "" for open_clip's own."""
        return str(self.model["text_cfg"].get("hf_tokenizer_name") or "")

    def tokenizer(self) -> Any:
        """open_clip's tokenizer; no code of the checkpoint is run for it."""
        import open_clip

        asked: dict[str, Any] = {"trust_remote_code": False} if self.tokenizer_name else {}
        if self.repository and self.tokenizer_name == self.repository:
            asked["revision"] = self.revision
        name = f"{HUB}{self.repository}" if self.repository else self.source
        try:
            return open_clip.get_tokenizer(name, **asked)
        except Exception as error:  # each kind of tokenizer has errors of its own
            reason = load_reason(error)
            raise EncoderError(
                f"clip:{self.name}: its tokenizer {self.tokenizer_name} cannot be loaded ({reason}); name a local "
                "folder that holds the files of the tokenizer, clip:FOLDER"
            ) from error

    def identity(self) -> str:
        """The identity of the weights, which are downloaded if open_clip alone knows where they are."""
        if self.path:
            return path_identity(self.path)
        if self.repository:
            return f"revision:{hub_revision(self.repository, CONFIG)}"
        import open_clip

        with hub_errors(f"clip:{self.name}"):
            return downloaded_identity(open_clip.download_pretrained(self.tag))


def read_checkpoint(variant: str, weights: str = "") -> Checkpoint:
    """The checkpoint that a variant names; of a hub repository at the revision in the identity `weights`, if given."""
    variant = variant or DEFAULT_VARIANT
    if variant.startswith(HUB):
        return _of_repository(variant, weights.removeprefix("revision:") or None)
    if folder := local_path(variant):
        return _of_folder(folder, folder.resolve().name, folder)
    return _of_model(variant)


def _of_folder(folder: Path, name: str, path: Path | None = None, repository: str = "") -> Checkpoint:
    config = _folder_config(folder)
    model = config["model_cfg"]
    if path and (tokenizer := model["text_cfg"].get("hf_tokenizer_name")):
        check_files(f"clip:{folder}", str(folder), FILES, source=f"{tokenizer} into this folder")
    preprocessing = _preprocessing(model, config.get("preprocess_cfg") or {})
    return Checkpoint(name, model, preprocessing, f"local-dir:{folder}", path=path, repository=repository)


def _of_repository(variant: str, revision: str | None) -> Checkpoint:
    """The checkpoint in the folder of the hub's cache that holds a revision, by default the newest."""
    repository = variant.removeprefix(HUB)
    file = hub_file(repository, CONFIG, revision)
    if file is None:
        raise EncoderError(f"clip:{variant}: no {CONFIG} in this repository{remedy_for(repository, 'clip')}")
    return _of_folder(file.parent, variant, repository=repository)


def _of_model(variant: str) -> Checkpoint:
    """The checkpoint of `MODEL/TAG`, `MODEL/FILE` or `MODEL/TAG=FILE`."""
    import_torchvision()
    import open_clip

    model, tag, file = _split(variant)
    if (config := open_clip.get_model_config(model)) is None:
        raise EncoderError(
            f"clip:{variant}: open_clip has no model {model!r}; see open_clip.list_models(), or name a repository of "
            "the hub by clip:hf-hub:ORG/NAME"
        )
    if tag and not open_clip.is_pretrained_cfg(model, tag):
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none"
        raise EncoderError(f"clip:{variant}: no weights {tag!r} for {model}; open_clip has {tags}, or name a file")
    if file and file.is_dir():
        raise EncoderError(f"clip:{variant}: {file} is a folder, so name clip:{file}")
    entry = dict(open_clip.get_pretrained_cfg(model, tag)) if tag else _entry_of_file(model, config, file)
    # open_clip only warns when weights trained with QuickGELU meet a model without it.
    quick = _quick_gelu(entry, config)
    settings = {f"image_{key}": entry[key] for key in _SETTABLE if entry.get(key) is not None}
    return Checkpoint(
        f"{model}{'-quickgelu' if quick else ''}/{file.name if file else tag}",
        config,
        _preprocessing(config, entry),
        model,
        {"pretrained": str(file or tag), "force_quick_gelu": quick, **settings},
        path=file,
        tag=entry,
    )


def _split(variant: str) -> tuple[str, str, Path | None]:
    """Model, tag and file of a variant: one of tag and file, or both."""
    import open_clip

    model, _, rest = variant.partition("/")
    size, _, tag = rest.partition("/")
    if f"{model}-{size}" in open_clip.list_models():  # OpenAI writes ViT-B/32
        model, rest = f"{model}-{size}", tag
    if (file := local_path(rest)) and ("/" in rest or file.is_file()):
        return model, "", file
    tag, equals, name = rest.partition("=")
    if equals and not (file := local_path(name)):
        raise EncoderError(f"clip:{variant}: no such weights file {name!r}; check the path after {tag}=")
    return model, tag or "openai", file


def _entry_of_file(model: str, config: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """open_clip's entry for weights in a file: by the configuration beside it, by the name of a published file, or as
    all tags of the model agree. Raises `EncoderError` where the tags do not.
    """
    import open_clip

    if file and (file.parent / CONFIG).is_file():
        beside = _folder_config(file.parent)
        quick = bool(beside["model_cfg"].get("quick_gelu"))
        if config.get("quick_gelu") and not quick:
            raise EncoderError(f"clip:{model}/{file}: {CONFIG} beside it says no QuickGELU; name a model without it")
        return {**(beside.get("preprocess_cfg") or {}), "quick_gelu": quick}
    tags = open_clip.list_pretrained_tags_by_model(model)
    entries = {tag: dict(open_clip.get_pretrained_cfg(model, tag)) for tag in tags}
    named = [
        entry
        for entry in entries.values()
        if file and file.name in (Path(entry.get("url", "")).name, entry.get("hf_hub", "").rpartition("/")[2])
    ]
    like = named or list(entries.values())
    if len({(_preprocessing(config, entry), _quick_gelu(entry, config)) for entry in like}) > 1:
        raise EncoderError(
            f"clip:{model}/{file}: preprocessing or activation differ between the tags of {model}, so name the tag of "
            f"these weights, clip:{model}/TAG=FILE; there are {', '.join(tags)}"
        )
    return like[0] if like else {}


def _quick_gelu(pretrained: dict[str, Any], model: dict[str, Any]) -> bool:
    return bool(pretrained.get("quick_gelu")) and not model.get("quick_gelu")


def _folder_config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / CONFIG)
        text = config["model_cfg"]["text_cfg"]
        trunk = str(config["model_cfg"]["vision_cfg"].get("timm_model_name"))
        (config.get("preprocess_cfg") or {}).get("size"), int(text.get("context_length", 0))
        asked = [key for key in text.get("tokenizer_kwargs") or {} if key not in _TOKENIZER]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = remedy_for(str(folder), "clip") or "; name a folder in open_clip's layout, or MODEL/FILE"
        raise EncoderError(
            f"{folder}: {CONFIG} with model_cfg is needed here ({load_reason(error)}){remedy}"
        ) from error
    if ":" in trunk:  # timm would read the configuration of another repository or folder
        raise EncoderError(f"{folder}: {CONFIG} has the timm_model_name {trunk}, which leaves it; name a model of timm")
    if asked:
        raise EncoderError(
            f"{folder}: {CONFIG} tells its tokenizer {asked[0]}, which could run code of the checkpoint or read files "
            "elsewhere; remove it from tokenizer_kwargs"
        )
    return config


def _preprocessing(model: dict[str, Any], overlay: dict[str, Any]) -> str:
    """Canonical JSON of the preprocessing: open_clip's defaults, values of the weights, and the size of the model."""
    given = {key: overlay[key] for key in _PREPROCESSING if overlay.get(key) is not None}
    return plain_json({**_PREPROCESSING, **given, "size": model["vision_cfg"].get("image_size", 224)})


def plain_json(config: dict[str, Any]) -> str:
    """Canonical JSON of a preprocessing, with a square size as one number."""
    plain = {key: list(value) if isinstance(value, tuple | list) else value for key, value in config.items()}
    size = plain["size"]
    return canonical_json({**plain, "size": size[0] if isinstance(size, list) and len(set(size)) == 1 else size})
