"""Names of encoders as people write and paste them, read as `family:variant`.

`clip:hf_hub:ORG/NAME`, `bert:file:///models/a,b`, `https://huggingface.co/ORG/NAME` and a folder without a family all
have one canonical form, which names the family and an absolute path or a hub name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

from mmfeat.encoders.weights import checkpoint_json, local_path
from mmfeat.errors import EncoderError, HubError

HUB = "hf-hub:"  # how open_clip and timm mark the name of a repository
_NAME = r"[\w.-]+/[\w.-]+"
_MARK = r"(?:hf[-_]hub:|https?://(?:www\.)?(?:huggingface\.co|hf\.co)/)"
_MARKED = re.compile(rf"{_MARK}({_NAME}|[\w.-]+)(?:/|/tree/main/?)?")
# What may stand before a local path: a family, and for CLIP the model and a tag of it.
_FAMILY, _MODEL, _FILE = r"(?!file:)[\w.-]+:", r"clip:[^/:]+/", r"(file://|file:)?"
_STARTS = [re.compile(start + _FILE) for start in (_FAMILY, _MODEL, _MODEL + "[^/=]+=", "")]


def split_requests(text: str) -> list[str]:
    """The requests in a comma-separated list; a path of a file or folder that has commas is kept whole."""
    pieces, requests = text.split(","), []
    while pieces:
        joined = (",".join(pieces[:count]) for count in range(len(pieces), 1, -1))
        request = next((request for request in joined if _path_in(request.strip())), pieces[0])
        requests.append(request.strip())
        pieces = pieces[request.count(",") + 1 :]
    return [request for request in requests if request]


def listed(names: str | Iterable[str] | None) -> list[str]:
    """The names of a list, or of one text with commas between them, as on the command line."""
    return split_requests(names) if isinstance(names, str) else list(names or ())


def canonical(request: str, is_family: Callable[[str], bool]) -> str:
    """The request, which is more than a family, as `family:variant`, with a local path made absolute.

    Where no family is named, the files of the checkpoint say it. Raises `EncoderError` where they do not.
    """
    if marked := _MARKED.fullmatch(request):
        return _with_family(request, marked[1])
    family, _, variant = request.partition(":")
    named = is_family(family)
    if found := _path_in(request):
        before, path = found
        return f"{before}{path}" if before else _with_family(request, path)
    if variant.startswith("file:") or family == "file":
        raise EncoderError(f"{request}: no such weights file or folder; check the path after file:")
    if re.match(_MARK, variant if named else request) and not _MARKED.fullmatch(variant):
        raise EncoderError(f"{request}: no name of a repository; write hf-hub:ORG/NAME, of its newest revision")
    if named:
        marked = _MARKED.fullmatch(variant)
        is_hub = marked or (family == "timm" and re.fullmatch(_NAME, variant))
        repository = marked[1] if marked else variant
        return f"{family}:{HUB if is_hub and family in ('clip', 'timm') else ''}{repository}"
    if request.startswith((".", "/", "~")):
        local_path(request)  # raises, as there is no such path
    return _with_family(request, request) if re.fullmatch(_NAME, request) else request


def _path_in(request: str) -> tuple[str, str] | None:
    """What stands before the path in a request that names an existing file or folder, and the absolute path."""
    for start in _STARTS:
        if not (match := start.match(request)):
            continue
        path, mark = os.path.expanduser(request[match.end() :]), match[1] or ""
        is_tag = "/" in match[0] and "/" not in path and os.path.isdir(path)  # a folder openai beside the tag openai
        for name in (path, unquote(path)) if mark else (path,):
            if name and os.path.exists(name) and not is_tag:
                return match[0].removesuffix(mark), os.path.abspath(name)
    return None


def _with_family(request: str, variant: str) -> str:
    """`family:variant` of a local folder or hub name, by its files."""
    if os.path.isfile(variant):
        raise EncoderError(
            f"{request}: a file of weights does not say its family; write clip:MODEL/FILE, resnet50:FILE or the like"
        )
    family = family_of(variant)
    if not family:
        elsewhere = "in a folder of that name here, in the hub cache or on the hub"
        where = "in this folder" if os.path.isdir(variant) else elsewhere
        raise EncoderError(
            f"{request}: no family is named, and no configuration that would say it is {where}; write the family "
            "before it, as in st:NAME, hf:NAME, clip:hf-hub:NAME or timm:NAME"
        )
    return request_of(family, variant)


def request_of(family: str, variant: str) -> str:
    """`family:variant` of a local folder or hub name, with the mark that open_clip and timm want."""
    return f"{family}:{HUB if family in ('clip', 'timm') and not os.path.isdir(variant) else ''}{variant}"


def family_of(variant: str) -> str:
    """The family that the files of a local folder or hub name are made for, "" for none that is known."""
    if _settings(variant, "modules.json"):
        return "st"
    if _settings(variant, "open_clip_config.json"):
        return "clip"
    config = _settings(variant, "config.json")
    if not isinstance(config, dict):
        return ""
    if "architecture" in config:
        return "timm"
    kind = config.get("model_type")
    return "" if not kind else "hf" if takes_pictures(str(kind)) else "bert"


def remedy_for(variant: str, family: str) -> str:
    """The end of an error about a checkpoint that is of another family, which names the family; else ""."""
    other = family_of(variant)
    return f"; its files are for {other}, so name {request_of(other, variant)}" if other not in ("", family) else ""


def _settings(variant: str, name: str) -> Any:
    with suppress(HubError):  # neither cached nor to be had
        return checkpoint_json(variant, name)
    return None


def takes_pictures(kind: str) -> bool:
    """Whether a model of transformers takes pictures, by its own tables."""
    from mmfeat.encoders.transformers_files import DOUBLE_MODELS, IMAGE_MODELS

    if kind in IMAGE_MODELS or kind in DOUBLE_MODELS or kind.endswith("_vision_model"):
        return True
    from mmfeat.encoders.bert import quiet_transformers

    quiet_transformers()
    from transformers.models.auto import modeling_auto as tables

    return (
        kind in tables.MODEL_FOR_IMAGE_MAPPING_NAMES
        or kind in tables.MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES
    )
