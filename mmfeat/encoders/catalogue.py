"""The catalogue: the encoders that can be named, with what is known of each before anything is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmfeat.encoders.names import HUB, family_of, request_of
from mmfeat.encoders.torchvision_ops import import_torchvision
from mmfeat.encoders.weights import checkpoint_json
from mmfeat.errors import EncoderError, HubError
from mmfeat.system.plugins import ENCODERS, package, plugins

FEW = 20  # models whose parameters are counted, by building each without memory for its weights


@dataclass(frozen=True)
class Listed:
    """A model that can be named: its modality, and what is known of it, else None or "".

    `width` is that of its vectors, `parameters` are millions, `pixels` the side of its pictures, `tokens` the most of
    a text. `source` is where a published figure stands, with its date.
    """

    name: str
    modality: str
    width: int | None = None
    parameters: float | None = None
    pixels: int | None = None
    tokens: int | None = None
    licence: str = ""
    figure: str = ""
    source: str = ""
    cached: bool = False

    @property
    def family(self) -> str:
        return self.name.partition(":")[0]

    @property
    def facts(self) -> list[str]:
        known = {"wide": self.width, "px": self.pixels, "tokens": self.tokens}
        facts = [f"{value:,} {unit}" for unit, value in known.items() if value]
        millions = [f"{self.parameters:,.0f} M parameters"] if self.parameters else []
        here = ["in the hub cache"] if self.cached else []
        return [self.modality, *facts, *millions, *filter(None, [self.licence]), *here]


_BGE = "FlagEmbedding's README, September 2023"
_DINO = "DINOv2's README, October 2023"
_SIGLIP = "big_vision's README of SigLIP 2, February 2025"
_ZERO_SHOT = "ImageNet zero-shot"
# Size -> models for text, for photos, and for both. The figures are published ones; mmfeat did not measure them.
RECOMMENDED: dict[str, tuple[Listed, ...]] = {
    "small": (
        Listed("st:BAAI/bge-small-en-v1.5", "text", 384, 33, None, 512, "mit", "MTEB classification 74.1", _BGE),
        Listed("hf:facebook/dinov2-small", "image", 384, 22, 224, None, "apache-2.0", "ImageNet linear 81.1", _DINO),
        Listed(
            *("clip:ViT-B-32-256/datacomp_s34b_b86k", "image, text", 512, 151, 256, 77, "mit"),
            *(f"{_ZERO_SHOT} 72.8", "open_clip's docs/openclip_results.csv, 2023"),
        ),
    ),
    "medium": (
        Listed(
            *("st:google/embeddinggemma-300m", "text", 768, 308, None, 2048, "gemma"),
            *("MTEB English v2 69.7", "its model card, September 2025"),
        ),
        Listed("hf:facebook/dinov2-base", "image", 768, 87, 224, None, "apache-2.0", "ImageNet linear 84.5", _DINO),
        Listed(
            *("hf:google/siglip2-base-patch16-224", "image, text", 768, 375, 224, 64, "apache-2.0"),
            *(f"{_ZERO_SHOT} 78.2", _SIGLIP),
        ),
    ),
    "large": (
        Listed(
            *("st:Qwen/Qwen3-Embedding-0.6B", "text", 1024, 596, None, 32768, "apache-2.0"),
            *("MTEB English v2 70.7", "its model card, June 2025"),
        ),
        Listed("hf:facebook/dinov2-large", "image", 1024, 304, 224, None, "apache-2.0", "ImageNet linear 86.3", _DINO),
        Listed(
            *("hf:google/siglip2-so400m-patch14-384", "image, text", 1152, 1136, 384, 64, "apache-2.0"),
            *(f"{_ZERO_SHOT} 84.1", _SIGLIP),
        ),
    ),
}
BUILT_IN = (Listed("hashing", "text"), Listed("hog", "image"), Listed("lexicon", "text", 16))
OPEN = {  # families that take any checkpoint of a kind, which no library lists
    "st": "text checkpoints of sentence-transformers",
    "bert": "text models of transformers",
    "hf": "image models of transformers, and its CLIP and SigLIP",
    "vectors": "vectors of your own by sample id, of texts; vectors.image of photos",
}


def recommended() -> dict[str, list[Listed]]:
    """Size -> the recommended models, with whether they are in the local hub cache."""
    here = cached_repositories()
    return {
        size: [replace(each, cached=each.name.partition(":")[2].removeprefix(HUB) in here) for each in models]
        for size, models in RECOMMENDED.items()
    }


def cached_repositories() -> dict[str, Path]:
    """Name -> newest snapshot of each model in the local hub cache."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return {}
    newest = {
        repository.repo_id: max(repository.revisions, key=lambda revision: revision.last_modified).snapshot_path
        for repository in repositories
        if repository.repo_type == "model" and repository.revisions
    }
    return dict(sorted(newest.items()))


def cached_models() -> list[Listed]:
    """The models in the local hub cache that an encoder could be made of, with the family that their files say."""
    found = []
    for name, folder in cached_repositories().items():
        try:
            family = family_of(str(folder))
        except (EncoderError, HubError):  # a damaged file in the cache is no reason to list nothing
            continue
        if family:
            modality = {"clip": "image, text", "timm": "image", "hf": _towers(folder)}.get(family, "text")
            found.append(Listed(request_of(family, name), modality, licence=licence_in(folder), cached=True))
    return found


def _towers(folder: Path) -> str:
    """The modalities of a model of transformers, by the type in its configuration."""
    from mmfeat.encoders.transformers_files import DOUBLE_MODELS

    return "image, text" if checkpoint_json(str(folder), "config.json")["model_type"] in DOUBLE_MODELS else "image"


def licence_in(folder: Path) -> str:
    """The licence in the front matter of a model card, "" where there is none."""
    try:
        lines = (folder / "README.md").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return ""
    stated = [line.partition(":")[2].strip() for line in lines[:200] if line.startswith(("license:", "license_name:"))]
    return stated[-1] if stated and lines[0] == "---" else ""


def listed(family: str, text: str = "") -> list[Listed]:
    """The models of a family whose name holds `text`; of a few of them the parameters are counted."""
    if family in OPEN:
        known = [model for models in RECOMMENDED.values() for model in models] + cached_models()
        models = list({model.name: model for model in known if model.family == family}.values())
    elif family in [model.name for model in BUILT_IN]:
        models = [model for model in BUILT_IN if model.name == family]
    elif family in plugins(ENCODERS):
        models = []
    else:
        models = list({"timm": _timm, "clip": _clip, "torchvision": _torchvision}[family]())
    found = [model for model in models if text.lower() in model.name.lower()]
    sizes = {"timm": timm_size, "torchvision": torchvision_size}
    if family not in sizes or len(found) > FEW:
        return found
    counted = [(model, *sizes[family](model.name.removeprefix("timm:"))) for model in found]
    return [replace(model, width=width, parameters=parameters) for model, width, parameters in counted]


def _timm() -> Iterator[Listed]:
    import_torchvision()
    import timm

    for name in timm.list_pretrained():
        config: Any = timm.get_pretrained_cfg(name)
        yield Listed(f"timm:{name}", "image", pixels=config.input_size[-1], licence=config.license or "")


def _clip() -> Iterator[Listed]:
    import_torchvision()
    import open_clip

    for model, tag in open_clip.list_pretrained():
        config = open_clip.get_model_config(model)
        size = config["vision_cfg"].get("image_size", 224)
        pixels = size if isinstance(size, int) else size[0]
        tokens = config["text_cfg"].get("context_length", 77)
        yield Listed(f"clip:{model}/{tag}", "image, text", config["embed_dim"], pixels=pixels, tokens=tokens)


def _torchvision() -> Iterator[Listed]:
    from mmfeat.encoders.torchvision_models import names

    models = names()
    import torchvision

    for name in models:
        weights = torchvision.models.get_model_weights(name)["DEFAULT"]
        pixels = weights.transforms().crop_size[0]
        yield Listed(name, "image", parameters=weights.meta["num_params"] / 1e6, pixels=pixels)


def timm_size(architecture: str) -> tuple[int, float]:
    """(Width of the vector, millions of parameters) of a timm model, which is built without memory for its weights."""
    import_torchvision()
    import timm
    import torch

    with torch.device("meta"):
        model: Any = timm.create_model(architecture, pretrained=False, num_classes=0)
    return model.num_features, sum(parameter.numel() for parameter in model.parameters()) / 1e6


def torchvision_size(name: str) -> tuple[int, float]:
    """`timm_size` of a model of torchvision, whose vector is the input of its last linear layer."""
    import_torchvision()
    import torch
    import torchvision

    with torch.device("meta"):
        model: Any = torchvision.models.get_model(name, weights=None)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    return linear[-1].in_features, sum(parameter.numel() for parameter in model.parameters()) / 1e6


def families() -> dict[str, tuple[int, str]]:
    """Family -> (number of its models, 0 where no library lists them; what they are)."""
    import_torchvision()
    import open_clip
    import timm

    from mmfeat.encoders.torchvision_models import names

    return {
        **{family: (0, words) for family, words in OPEN.items()},
        "clip": (len(open_clip.list_pretrained()), "both towers of CLIP, by open_clip"),
        "timm": (len(timm.list_pretrained()), "image models of timm"),
        "torchvision": (len(names()), "image models of torchvision, each by its own name"),
        "hashing": (1, "n-grams of texts, no download"),
        "hog": (1, "gradients and colours of photos, no download"),
        "lexicon": (1, "sentiment of English texts, and their marks; no other language; the extra lexicon"),
        **{name: (1, f"a plug-in of {package(point)}") for name, point in plugins(ENCODERS).items()},
    }
